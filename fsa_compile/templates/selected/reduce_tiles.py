"""Backward, last step: dk or dv of a block is the sum of the tiles of its list, added in list order.

Of a group of which some heads came after the others, each list has a second set of tiles.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ...tiling import Config, Device
from ..kernel import SEQUENCES, Dense, Kernel, Output, Plan, sequences
from ..sequences import Sequences, num_tiles, run_of_block
from ..tiles import columns, dense_strides, load_tile, store_output
from .sizes import SelectedSizes, spread

# Tiles whose loads are in flight together: a list that every query is in has 64 of them per 64K tokens.
AT_ONCE = tl.constexpr(4)


@triton.jit
def reduce_tiles_tile(
    tiles, more, tile_offsets, block_list, first, exists, SIZES: tl.constexpr, BLOCK_R: tl.constexpr
):  # fmt: skip
    """The sums of BLOCK_R rows, from ``first`` on, of a list's tiles: float32 ``[BLOCK_R, BLOCK_D]``."""
    BLOCK_D: tl.constexpr = SIZES.BLOCK_D
    ROWS: tl.constexpr = SIZES.NUM_CHUNKS * SIZES.CHUNK_N
    total = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    rows = (first + tl.arange(0, BLOCK_R)).to(tl.int64)
    end = tl.load(tile_offsets + block_list + 1)
    ends = tl.where(exists, end, 0)
    for w in range(tl.load(tile_offsets + block_list), end, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            there = ends > w + i
            place = (rows + (w + i) * ROWS) * SIZES.HEAD_DIM
            value = load_tile(tiles, place, there, SIZES.HEAD_DIM, BLOCK_D)
            if more is not None:
                value += load_tile(more, place, there, SIZES.HEAD_DIM, BLOCK_D)
            total += value
    return total


@triton.jit
def reduce_tiles_kernel(
    tiles, more, tile_offsets, row_heads, grad, seqs: Sequences, SIZES: tl.constexpr, BLOCK_R: tl.constexpr
):  # fmt: skip
    hk = tl.program_id(1)
    first = tl.program_id(2) * BLOCK_R
    run, block, num_rows = run_of_block(seqs, tl.program_id(0), SIZES.BLOCK_SIZE)
    key = block * SIZES.BLOCK_SIZE + first + tl.arange(0, BLOCK_R)
    block_list = hk * tl.num_programs(0) + tl.program_id(0)
    total = reduce_tiles_tile(tiles, more, tile_offsets, block_list, first, key < run.num_keys, SIZES, BLOCK_R)
    t = (run.first_key + key) % seqs.seq_len_k
    BLOCK_D: tl.constexpr = SIZES.BLOCK_D
    cols, mask = columns(key < num_rows, SIZES.HEAD_DIM, BLOCK_D)
    strides = dense_strides(seqs.seq_len_k, row_heads, SIZES.HEAD_DIM)
    store_output(grad, (run.b, t[:, None], hk, cols), strides, total, mask, (BLOCK_R, BLOCK_D))


def plan(
    tiles: Any, more: Any, tile_offsets: Any, like: Any, *seqs: Any, block_size: int, row_heads: int = 0
) -> Plan:  # fmt: skip
    """grad ``[B, Tk, HK, D]``, as ``like`` (k or v), from float32 tiles ``[W, C, CHUNK_N, D]``, once or twice.

    row_heads: of the tensor that it is a view of some heads of, or 0.
    """
    batch, seq_len_k, num_kv_heads, dim = like.shape
    num_chunks, chunk_n = tiles.shape[1:3]
    sizes = SelectedSizes.of(num_kv_heads, 1, dim, dim, 1, block_size, like.dtype.itemsize)
    sizes = sizes._replace(NUM_CHUNKS=int(num_chunks), CHUNK_N=int(chunk_n))
    runs = sequences(like, seq_len_k, seqs)
    return Plan(
        {
            "tiles": Dense(tiles),
            "more": None if more is None else Dense(more),
            "tile_offsets": Dense(tile_offsets),
            "row_heads": row_heads or num_kv_heads,
            "seqs": runs,
        },
        {"grad": Output(tuple(like.shape), like.dtype)},
        sizes,
        (batch, seq_len_k, runs.num_seqs, runs.cu_seqlens_q is not None, block_size, num_kv_heads),
    )


def grid(extent: tuple[Any, ...], tiles: dict[str, Any], cdiv: Any) -> tuple[Any, Any, Any]:
    """One program per BLOCK_R keys of a block and key/value head."""
    batch, seq_len_k, num_seqs, packed, block_size, num_kv_heads = extent
    blocks = num_tiles(batch, seq_len_k, num_seqs, packed, block_size, cdiv)
    return blocks, num_kv_heads, block_size // tiles["BLOCK_R"]


def heuristic(sizes: SelectedSizes, device: Device) -> Config:
    """Bound by memory; few rows a program, as the longest list is long."""
    return Config({"BLOCK_R": min(8, sizes.BLOCK_SIZE)}, 4, 2)


def candidates(sizes: SelectedSizes, device: Device) -> list[Config]:
    """What is worth measuring."""
    rows = [r for r in (8, 16, 32) if r <= sizes.BLOCK_SIZE]
    return spread(heuristic(sizes, device), {"BLOCK_R": rows}, (1, 2, 4, 8), (2,))


REDUCE_TILES = Kernel(
    reduce_tiles_kernel,
    # `like` is k or v: only its shape and dtype are used.
    f"_reduce_tiles(Tensor tiles, Tensor? more, Tensor tile_offsets, Tensor like, {SEQUENCES}, *, int block_size) "
    "-> Tensor",
    plan, grid, heuristic, candidates,
)  # fmt: skip
