"""Backward, last step: dk or dv of a block is the sum of the tiles of its list, added in list order."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ...tiling import Config, Device
from ..kernel import SEQUENCES, Dense, Kernel, Output, Plan, sequences
from ..sequences import Sequences, num_tiles, run_of_block
from ..tiles import columns, dense_strides, load_tile, store_output
from .sizes import SelectedSizes, spread


@triton.jit
def reduce_tiles_tile(tiles, tile_offsets, block_list, chunk, exists, SIZES: tl.constexpr):
    """The sum of one chunk's tiles of a list: float32 ``[CHUNK_N, BLOCK_D]``."""
    CHUNK_N: tl.constexpr = SIZES.CHUNK_N
    BLOCK_D: tl.constexpr = SIZES.BLOCK_D
    total = tl.zeros([CHUNK_N, BLOCK_D], tl.float32)
    chunk_rows = (chunk * CHUNK_N + tl.arange(0, CHUNK_N)).to(tl.int64)
    for w in range(tl.load(tile_offsets + block_list), tl.load(tile_offsets + block_list + 1)):
        rows = (chunk_rows + w * (SIZES.NUM_CHUNKS * SIZES.CHUNK_N)) * SIZES.HEAD_DIM
        total += load_tile(tiles, rows, exists, SIZES.HEAD_DIM, SIZES.BLOCK_D)
    return total


@triton.jit
def reduce_tiles_kernel(tiles, tile_offsets, grad, seqs: Sequences, SIZES: tl.constexpr):
    hk = tl.program_id(1)
    chunk = tl.program_id(2)
    run, block, num_rows = run_of_block(seqs, tl.program_id(0), SIZES.BLOCK_SIZE)
    key = block * SIZES.BLOCK_SIZE + chunk * SIZES.CHUNK_N + tl.arange(0, SIZES.CHUNK_N)
    block_list = hk * tl.num_programs(0) + tl.program_id(0)
    total = reduce_tiles_tile(tiles, tile_offsets, block_list, chunk, key < run.num_keys, SIZES)
    t = (run.first_key + key) % seqs.seq_len_k
    CHUNK_N: tl.constexpr = SIZES.CHUNK_N
    BLOCK_D: tl.constexpr = SIZES.BLOCK_D
    cols, mask = columns(key < num_rows, SIZES.HEAD_DIM, BLOCK_D)
    strides = dense_strides(seqs.seq_len_k, SIZES.NUM_KV_HEADS, SIZES.HEAD_DIM)
    store_output(grad, (run.b, t[:, None], hk, cols), strides, total, mask, (CHUNK_N, BLOCK_D))


def plan(tiles: Any, tile_offsets: Any, like: Any, *seqs: Any, block_size: int) -> Plan:
    """grad ``[B, Tk, HK, D]``, as ``like`` (k or v), from float32 tiles ``[W, C, CHUNK_N, D]``."""
    batch, seq_len_k, num_kv_heads, dim = like.shape
    num_chunks, chunk_n = tiles.shape[1:3]
    sizes = SelectedSizes.of(num_kv_heads, 1, dim, dim, 1, block_size, like.dtype.itemsize)
    sizes = sizes._replace(NUM_CHUNKS=int(num_chunks), CHUNK_N=int(chunk_n))
    runs = sequences(like, seq_len_k, seqs)
    return Plan(
        {"tiles": Dense(tiles), "tile_offsets": Dense(tile_offsets), "seqs": runs},
        {"grad": Output(tuple(like.shape), like.dtype)},
        sizes,
        (batch, seq_len_k, runs.num_seqs, runs.cu_seqlens_q is not None, block_size, num_kv_heads, num_chunks),
    )


def grid(extent: tuple[Any, ...], tiles: dict[str, Any], cdiv: Any) -> tuple[Any, Any, Any]:
    """One program per block, key/value head and chunk."""
    batch, seq_len_k, num_seqs, packed, block_size, num_kv_heads, num_chunks = extent
    return num_tiles(batch, seq_len_k, num_seqs, packed, block_size, cdiv), num_kv_heads, num_chunks


def heuristic(sizes: SelectedSizes, device: Device) -> Config:
    """Bound by memory: any will do."""
    return Config({}, 4 if sizes.HEAD_DIM <= 128 else 8, 2)


def candidates(sizes: SelectedSizes, device: Device) -> list[Config]:
    """What is worth measuring."""
    return spread(heuristic(sizes, device), {}, (2, 4, 8), (1, 2, 3))


REDUCE_TILES = Kernel(
    reduce_tiles_kernel,
    # `like` is k or v: only its shape and dtype are used.
    f"_reduce_tiles(Tensor tiles, Tensor tile_offsets, Tensor like, {SEQUENCES}, *, int block_size) -> Tensor",
    plan, grid, heuristic, candidates,
)  # fmt: skip
