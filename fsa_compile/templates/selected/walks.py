"""Walking the union of a query tile's blocks: device functions and sizes of the kernels that do."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...tiling import Config, Device, next_power_of_2, padded, selected_block_n
from ..kernel import Dense, Strided, sequences
from ..query_tiles import Place, load_keys
from ..sequences import Run
from ..tiles import add_met, rows_apart
from .unions import Unions


class WalkSizes(NamedTuple):
    """Static sizes. TOKENS: of a query tile; MOST: places of its union."""

    NUM_KV_HEADS: int
    GROUP: int
    HEAD_DIM: int
    HEAD_DIM_V: int
    BLOCK_SIZE: int
    ITEMSIZE: int
    BLOCK_D: int
    BLOCK_DV: int
    BLOCK_N: int
    TOKENS: int
    MOST: int

    @classmethod
    def of_call(cls, q: Any, k: Any, v: Any, blocks: Any, block_size: int, tokens: int) -> WalkSizes:
        """Read the sizes off q, k, v ``[B, T, H, D]`` and blocks ``[tiles, HK, MOST]``."""
        num_kv_heads, head_dim, head_dim_v = int(k.shape[2]), int(q.shape[3]), int(v.shape[3])
        block_n = selected_block_n(block_size, head_dim, head_dim_v, q.dtype.itemsize)
        return cls(
            num_kv_heads, int(q.shape[2]) // num_kv_heads, head_dim, head_dim_v, block_size, q.dtype.itemsize,
            padded(head_dim), padded(head_dim_v), block_n, tokens, int(blocks.shape[2]),
        )  # fmt: skip


class Walk(NamedTuple):
    """What a tile attends to. blocks, members: the pointers of its own union; tiles: key tiles in it.

    token: ``[BLOCK_M]``, a row's bit in ``members``. pos: its position, -1 if it does not exist. first: the position
    of the tile's first token. num_keys: of the run.
    """

    blocks: Any
    members: Any
    tiles: Any
    token: Any
    pos: Any
    first: Any
    num_keys: Any


@triton.jit
def walk_of_tile(
    unions: Unions, w, hk, run: Run, first, place: Place, SIZES: tl.constexpr, BLOCK_M: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    """The walk of query tile ``w``."""
    union = w.to(tl.int64) * SIZES.NUM_KV_HEADS + hk
    tiles = tl.load(unions.counts + union) * (SIZES.BLOCK_SIZE // SIZES.BLOCK_N)
    token = (tl.arange(0, BLOCK_M) // HEADS).to(tl.int64)
    pos = tl.where(place.exists, place.pos, -1)
    return Walk(
        unions.blocks + union * SIZES.MOST, unions.members + union * SIZES.MOST, tiles, token, pos, run.offset + first,
        run.num_keys,
    )  # fmt: skip


@triton.jit
def key_tile(walk: Walk, i, SIZES: tl.constexpr):
    """The ``i``-th key tile.

    Returns ``(start, left, chosen, members)``: its first position, how many keys there are from it on, and who selected
    its block, by row of the query tile ``[BLOCK_M]`` and as the union has it.
    """
    PER_BLOCK: tl.constexpr = SIZES.BLOCK_SIZE // SIZES.BLOCK_N
    start = tl.load(walk.blocks + i // PER_BLOCK) * SIZES.BLOCK_SIZE + (i % PER_BLOCK) * SIZES.BLOCK_N
    members = tl.load(walk.members + i // PER_BLOCK)
    chosen = ((members >> walk.token) & 1) > 0
    return start, walk.num_keys - start, chosen, members


@triton.jit
def hides_keys(walk: Walk, start, SIZES: tl.constexpr):
    """Whether a key of the tile at ``start`` comes after a row that selected its block."""
    return start + SIZES.BLOCK_N - 1 > walk.first


@triton.jit
def is_past(walk: Walk, start, SIZES: tl.constexpr):
    """Which keys of the tile at ``start`` are at or before a row's position."""  # [BLOCK_M, BLOCK_N]
    return tl.arange(0, SIZES.BLOCK_N)[None, :] <= (walk.pos - start)[:, None]


@triton.jit
def nan_of_walk(
    base, stride, walk: Walk, SIZES: tl.constexpr, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_M: tl.constexpr
):
    """NaN where a row sees a key whose ``k`` or ``v`` is not finite in that column, else 0: a careful sum's start."""
    met = tl.zeros([BLOCK_M, BLOCK_W], tl.float32)
    for i in tl.range(0, walk.tiles, num_stages=1):
        start, left, chosen, _ = key_tile(walk, i, SIZES)
        visible = chosen[:, None] & is_past(walk, start, SIZES)
        x = load_keys(base + rows_apart(start, stride), stride, left, WIDTH, BLOCK_W, SIZES.BLOCK_N, True)
        met = add_met(met, visible, x)
    return tl.where(met > 0, float("nan"), 0.0)


def inputs(q: Any, k: Any, v: Any, unions: tuple[Any, ...], seqs: tuple[Any, ...], scale: float) -> dict[str, Any]:
    """What every kernel that walks reads."""
    return {
        "q": Strided(q),
        "k": Strided(k),
        "v": Strided(v),
        "unions": Unions(*map(Dense, unions)),
        "seqs": sequences(q, k.shape[1], seqs),
        "scale": scale,
    }


def grid(extent: tuple[Any, ...], tiles: dict[str, Any], cdiv: Any) -> tuple[Any, Any, Any]:
    """One program per query tile, key/value head and part of a group that is wider than a tile."""
    num_tiles, num_kv_heads, group = extent
    return num_tiles, num_kv_heads * cdiv(group, tiles["HEADS"]), 1


def _config(sizes: WalkSizes, num_warps: int, num_stages: int) -> Config:
    heads = min(sizes.GROUP, max(1, (64 if sizes.ITEMSIZE < 4 else 16) // sizes.TOKENS))
    return Config({"BLOCK_M": max(16, next_power_of_2(sizes.TOKENS * heads)), "HEADS": heads}, num_warps, num_stages)


def heuristic(sizes: WalkSizes, device: Device) -> Config:
    """What is known to fit."""
    pipelined = 1 if device.arch == "hip" or sizes.ITEMSIZE == 4 or max(sizes.BLOCK_D, sizes.BLOCK_DV) > 128 else 2
    return _config(sizes, 8 if sizes.ITEMSIZE == 4 else 4, pipelined)


def candidates(sizes: WalkSizes, device: Device) -> list[Config]:
    """Those worth measuring."""
    found = [heuristic(sizes, device)]
    for num_warps in (4, 8):
        for num_stages in (1, 2, 3):
            one = _config(sizes, num_warps, num_stages)
            if one not in found:
                found.append(one)
    return found
