"""What the kernels of the selected branch are compiled for, and the tiles that follow from it."""

from __future__ import annotations

from typing import Any, NamedTuple

from ...tiling import ENTRIES_PER_TILE, Config, Device, padded, selected_block_n, selected_chunk_n
from ..kernel import Dense, Strided
from ..tiles import Statistics

LISTS = "Tensor entries, Tensor tile_list, Tensor tile_offsets, Tensor list_offsets"


class Lists(NamedTuple):
    """Per-block lists of the entries that chose a block, and their cutting into tiles.

    entries: (num_entries,), int32, grouped by list, in row order within a list.
    tile_list: (num_tiles,), int32, the list a tile belongs to, -1 for the unused tiles at the end.
    tile_offsets: (num_lists + 1,), int32, the first tile of each list.
    list_offsets: (num_lists + 1,), int32, the first entry of each list.
    """

    entries: Any
    tile_list: Any
    tile_offsets: Any
    list_offsets: Any


class Part(NamedTuple):
    """Which key/value heads of those listed a launch is of: the first, its first list, and the list after the last."""

    first_head: Any
    first_list: Any
    end_list: Any


class SelectedSizes(NamedTuple):
    """Static sizes; lengths and batch are run-time values and not part of it. Tiles are 16 wide at least.

    NUM_KV_HEADS: of q, k, v and partials, which may be a part of LISTED_HEADS, those of block_indices and lists.
    """

    NUM_KV_HEADS: int
    LISTED_HEADS: int
    GROUP: int
    HEAD_DIM: int
    HEAD_DIM_V: int
    NUM_SELECTED: int
    BLOCK_SIZE: int
    ITEMSIZE: int
    BLOCK_D: int
    BLOCK_DV: int
    BLOCK_N: int
    CHUNK_N: int
    NUM_CHUNKS: int
    ENTRIES_PER_TILE: int

    @classmethod
    def of(
        cls, num_kv_heads: Any, group: Any, head_dim: Any, head_dim_v: Any, num_selected: Any, block_size: int,
        itemsize: int,
    ) -> SelectedSizes:  # fmt: skip
        """Derive the tiles' sizes; all heads are listed."""
        block_n, chunk_n = (
            rule(block_size, int(head_dim), int(head_dim_v), itemsize) for rule in (selected_block_n, selected_chunk_n)
        )
        return cls(
            int(num_kv_heads), int(num_kv_heads), int(group), int(head_dim), int(head_dim_v), int(num_selected),
            block_size, itemsize, padded(int(head_dim)), padded(int(head_dim_v)), block_n, chunk_n,
            block_size // chunk_n, ENTRIES_PER_TILE,
        )  # fmt: skip

    @classmethod
    def of_call(cls, q: Any, k: Any, v: Any, block_indices: Any, block_size: int) -> SelectedSizes:
        """Read the sizes off q, k, v ``[B, T, H, D]`` and block_indices ``[B, T, HK, S]``."""
        num_kv_heads = k.shape[2]
        sizes = cls.of(
            num_kv_heads, q.shape[2] // num_kv_heads, q.shape[3], v.shape[3], block_indices.shape[3], block_size,
            q.dtype.itemsize,
        )  # fmt: skip
        return sizes._replace(LISTED_HEADS=int(block_indices.shape[2]))

    @classmethod
    def of_partials(cls, partial: Any, block_size: int) -> SelectedSizes:
        """Read them off partials ``[B, T, HK, S, C, G, D]``; both head dims are D."""
        _, _, num_kv_heads, num_selected, num_chunks, group, dim = partial.shape
        sizes = cls.of(num_kv_heads, group, dim, dim, num_selected, block_size, partial.dtype.itemsize)
        return sizes._replace(NUM_CHUNKS=int(num_chunks), CHUNK_N=block_size // int(num_chunks))

    def partials(self, batch: Any, seq_len: Any) -> tuple[Any, ...]:
        """Shape of the partials of a call, but for their last axis: ``(B, T, HK, S, C, G)``."""
        return batch, seq_len, self.NUM_KV_HEADS, self.NUM_SELECTED, self.NUM_CHUNKS, self.GROUP

    @property
    def widest(self) -> int:
        """The larger of the two padded head dims."""
        return max(self.BLOCK_D, self.BLOCK_DV)

    @property
    def row_bytes(self) -> int:
        """Bytes of the widest row of a tile; what fits on chip goes by it."""
        return self.widest * self.ITEMSIZE


def stages(count: int, device: Device) -> int:
    """Software-pipelining depth; AMD's compiler keeps the stages in registers, where they do not fit."""
    return 1 if device.arch == "hip" else count


def warps(sizes: SelectedSizes, count: int, device: Device) -> int:
    """Warps of a matrix kernel: ``count`` on tensor cores; float32 tiles lie in registers and want more of them."""
    return count if sizes.ITEMSIZE < 4 else 4 if device.arch == "hip" else 8


def spread(
    config: Config, tiles: dict[str, list[int]], num_warps: tuple[int, ...], num_stages: tuple[int, ...]
) -> list[Config]:
    """``config`` and its neighbours: every combination of the given tiles and launch options."""
    found = [config]
    combinations: list[dict[str, Any]] = [dict(config.tiles)]
    for name, values in tiles.items():
        combinations = [c | {name: value} for c in combinations for value in values]
    for combination in combinations:
        for w in num_warps:
            for s in num_stages:
                one = Config(combination, w, s)
                if one not in found:
                    found.append(one)
    return found


def attention_inputs(q: Any, k: Any, v: Any, block_indices: Any) -> dict[str, Any]:
    """What every kernel that multiplies reads."""
    return {"q": Strided(q), "k": Strided(k), "v": Strided(v), "block_indices": Dense(block_indices)}


def list_inputs(
    lists: tuple[Any, ...], block_indices: Any, num_kv_heads: int, first_head: int
) -> tuple[dict[str, Any], Any]:
    """The per-block lists, and which of them a launch is of, as arguments; and how many tiles these have at most."""
    listed_heads, num_lists = int(block_indices.shape[2]), lists[3].shape[0] - 1
    part, num_tiles = None, lists[1].shape[0]
    if num_kv_heads != listed_heads:
        per_head = num_lists // listed_heads
        part = Part(first_head, first_head * per_head, (first_head + num_kv_heads) * per_head)
        entries = block_indices.numel() // listed_heads * num_kv_heads
        num_tiles = entries // ENTRIES_PER_TILE + per_head * num_kv_heads
    return {"lists": Lists(*map(Dense, lists)), "part": part}, num_tiles


BACKWARD = (
    "Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor block_indices, Tensor shift, Tensor log_sum, Tensor delta"
)


def backward_inputs(grad_out: Any, shift: Any, log_sum: Any, delta: Any) -> dict[str, Any]:
    """What a backward reads besides."""
    return {"grad_out": Strided(grad_out), "rows": Statistics(Dense(shift), Dense(log_sum), Dense(delta))}
