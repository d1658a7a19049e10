"""What a kernel is compiled for: the static part of a problem, and the constants every kernel derives from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

Meta = dict[str, int | bool]
# cu_seqlens_q, cu_seqlens_k and seq_ids (the sequence of every packed query row); all None when batched.
Tables = tuple["torch.Tensor | None", "torch.Tensor | None", "torch.Tensor | None"]

# How many entries of a block's list one program serves. The lists of blocks that every query must select are as long as
# the sequence, so they are cut; the cost of a cut is one more load of the block and one more float32 tile in the
# backward.
ENTRIES_PER_TILE = 1024


def stages(count: int) -> int:
    """Software-pipelining depth; AMD's compiler keeps the stages in registers, where they do not fit."""
    return 1 if torch.version.hip else count


def warps(itemsize: int, count: int) -> int:
    """Warps of a matrix kernel: ``count`` on tensor cores; float32 tiles lie in registers and want more of them."""
    return count if itemsize < 4 else 4 if torch.version.hip else 8


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is >= n."""
    return 1 << max(0, n - 1).bit_length()


@dataclass(frozen=True)
class StaticSizes:
    """The static sizes of a selected-attention call; lengths and batch are run-time values and not part of it."""

    num_kv_heads: int
    group: int
    head_dim: int
    head_dim_v: int
    num_selected: int
    block_size: int
    itemsize: int
    packed: bool

    @classmethod
    def of(
        cls,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        block_indices: torch.Tensor,
        block_size: int,
        packed: bool,
    ) -> StaticSizes:
        """Read the sizes off q, k, v ``[B, T, H, D]`` and block_indices ``[B, T, HK, S]``."""
        num_kv_heads = int(k.shape[2])
        return cls(
            num_kv_heads=num_kv_heads,
            group=int(q.shape[2]) // num_kv_heads,
            head_dim=int(q.shape[3]),
            head_dim_v=int(v.shape[3]),
            num_selected=int(block_indices.shape[3]),
            block_size=block_size,
            itemsize=q.element_size(),
            packed=packed,
        )

    @property
    def widest(self) -> int:
        """The larger of the two head dims, padded to a power of two."""
        return next_power_of_2(max(self.head_dim, self.head_dim_v))

    @property
    def row_bytes(self) -> int:
        """Bytes of the widest row of a tile; what fits on chip goes by it."""
        return self.widest * self.itemsize

    @property
    def block_n(self) -> int:
        """Keys of a block on chip at once; the KV-outer kernels cut wider blocks into ``num_chunks``.

        float32 is multiplied without tensor cores, from registers, so it takes narrower tiles.
        """
        return min(self.block_size, 64 if self.itemsize < 4 else max(16, 4096 // self.widest))

    @property
    def block_g(self) -> int:
        """Heads of a group as the query-outer kernels tile them."""
        return max(16, next_power_of_2(self.group))

    @property
    def num_chunks(self) -> int:
        """Pieces that the KV-outer kernels cut a block into; each makes a partial of its own."""
        return self.block_size // self.block_n

    def constants(self) -> Meta:
        """The constants that every kernel takes. Tiles are at least 16 wide, as ``tl.dot`` asks."""
        return {
            "PACKED": self.packed,
            "NUM_KV_HEADS": self.num_kv_heads,
            "GROUP": self.group,
            "HEAD_DIM": self.head_dim,
            "HEAD_DIM_V": self.head_dim_v,
            "NUM_SELECTED": self.num_selected,
            "BLOCK_SIZE": self.block_size,
            "BLOCK_D": max(16, next_power_of_2(self.head_dim)),
            "BLOCK_DV": max(16, next_power_of_2(self.head_dim_v)),
        }


def sequence_args(
    q: torch.Tensor, k: torch.Tensor, tables: Tables
) -> tuple[int, int, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The run-time arguments of ``tiles.sequence_of``: seq_len, seq_len_k, cu_seqlens_q, cu_seqlens_k, seq_ids."""
    return (q.shape[1], k.shape[1], *tables)


class Lists(NamedTuple):
    """Per-block lists of the entries that chose a block, and their cutting into tiles.

    entries: (num_entries,), int32 or int64, grouped by list, in row order within a list.
    tile_list: (num_tiles,), int32, the list a tile belongs to, -1 for the unused tiles at the end.
    tile_offsets: (num_lists + 1,), int32, the first tile of each list.
    list_offsets: (num_lists + 1,), of the dtype of entries, the first entry of each list.
    """

    entries: torch.Tensor
    tile_list: torch.Tensor
    tile_offsets: torch.Tensor
    list_offsets: torch.Tensor


@dataclass(frozen=True)
class PartialShape:
    """The static sizes of a tensor of partials ``[B, T, HK, S, C, G, D]``."""

    num_kv_heads: int
    num_selected: int
    num_chunks: int
    group: int
    head_dim: int
    block_size: int

    @classmethod
    def of(cls, partial: torch.Tensor, block_size: int) -> PartialShape:
        """Read the sizes off a tensor of partials."""
        num_kv_heads, num_selected, num_chunks, group, head_dim = map(int, partial.shape[2:])
        return cls(num_kv_heads, num_selected, num_chunks, group, head_dim, block_size)
