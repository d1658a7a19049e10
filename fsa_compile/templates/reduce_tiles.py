"""Backward, last step: dk or dv of a block is the sum of the tiles of its list, added in list order."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .config import Meta, next_power_of_2
from .tiles import load_tile, store_tile


class BlockTables(NamedTuple):
    """Where packed blocks lie: all None when batched.

    cu_seqlens_k: (num_seqs + 1,), int32.
    block_base: (num_seqs + 1,), int32, the first block of each sequence.
    block_seq_ids: (num_blocks,), int32, the sequence of each block.
    """

    cu_seqlens_k: torch.Tensor | None
    block_base: torch.Tensor | None
    block_seq_ids: torch.Tensor | None


@triton.jit
def reduce_tiles_tile(
    tiles_ptr, tile_offsets_ptr, cu_seqlens_k_ptr, block_base_ptr, block_seq_ids_ptr, block, num_blocks, hk, chunk,
    seq_len_k,
    PACKED: tl.constexpr, NUM_CHUNKS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradient of the keys of one chunk of ``block`` (numbered over all sequences).

    Returns ``(total, b, t, exists)``: float32 ``[BLOCK_N, BLOCK_D]``, the batch index, the keys' rows and which of
    them exist.
    """
    if PACKED:
        seq = tl.load(block_seq_ids_ptr + block)
        first_key = tl.load(cu_seqlens_k_ptr + seq)
        last_key = tl.load(cu_seqlens_k_ptr + seq + 1)
        b = seq * 0
        t = first_key + (block - tl.load(block_base_ptr + seq)) * BLOCK_SIZE + chunk * BLOCK_N + tl.arange(0, BLOCK_N)
        exists = t < last_key
    else:
        blocks_per_sequence = tl.cdiv(seq_len_k, BLOCK_SIZE)
        b = block // blocks_per_sequence
        t = (block % blocks_per_sequence) * BLOCK_SIZE + chunk * BLOCK_N + tl.arange(0, BLOCK_N)
        exists = t < seq_len_k
    block_list = hk * num_blocks + block
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    chunk_rows = (chunk * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    for w in range(tl.load(tile_offsets_ptr + block_list), tl.load(tile_offsets_ptr + block_list + 1)):
        rows = (chunk_rows + w * (NUM_CHUNKS * BLOCK_N)) * HEAD_DIM
        total += load_tile(tiles_ptr, rows, exists, HEAD_DIM, BLOCK_D)
    return total, b, t, exists


@triton.jit
def reduce_tiles_kernel(
    tiles_ptr, tile_offsets_ptr, cu_seqlens_k_ptr, block_base_ptr, block_seq_ids_ptr, grad_ptr, seq_len_k,
    PACKED: tl.constexpr, NUM_KV_HEADS: tl.constexpr, NUM_CHUNKS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    hk = tl.program_id(1)
    total, b, t, exists = reduce_tiles_tile(
        tiles_ptr, tile_offsets_ptr, cu_seqlens_k_ptr, block_base_ptr, block_seq_ids_ptr,
        tl.program_id(0), tl.num_programs(0), hk, tl.program_id(2), seq_len_k,
        PACKED, NUM_CHUNKS, HEAD_DIM, BLOCK_SIZE, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    rows = ((b.to(tl.int64) * seq_len_k + t) * NUM_KV_HEADS + hk) * HEAD_DIM
    store_tile(grad_ptr, rows, exists, total, HEAD_DIM, BLOCK_D)


def meta(tiles: torch.Tensor, num_kv_heads: int, block_size: int, packed: bool) -> Meta:
    """Compile-time constants and launch options for tiles ``[W, C, BLOCK_N, D]``."""
    _, num_chunks, block_n, head_dim = tiles.shape
    return {
        "PACKED": packed,
        "NUM_KV_HEADS": num_kv_heads,
        "NUM_CHUNKS": num_chunks,
        "HEAD_DIM": head_dim,
        "BLOCK_SIZE": block_size,
        "BLOCK_N": block_n,
        "BLOCK_D": max(16, next_power_of_2(head_dim)),
        "num_warps": 4 if head_dim <= 128 else 8,
        "num_stages": 2,
    }


def launch(
    tiles: torch.Tensor, tile_offsets: torch.Tensor, tables: BlockTables, grad: torch.Tensor, block_size: int
) -> None:
    """Fill ``grad`` ``[B, Tk, HK, D]`` from float32 tiles ``[W, C, BLOCK_N, D]``."""
    num_kv_heads = grad.shape[2]
    num_blocks = (tile_offsets.shape[0] - 1) // num_kv_heads
    if num_blocks == 0:
        return
    reduce_tiles_kernel[(num_blocks, num_kv_heads, tiles.shape[1])](
        tiles, tile_offsets, *tables, grad, grad.shape[1],
        **meta(tiles, num_kv_heads, block_size, tables.block_base is not None),
    )  # fmt: skip
