"""FSA loop order, backward, second step: a row's dq is the sum of its partials."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .config import Meta, PartialShape, Tables, next_power_of_2
from .lists import MAX_UNROLLED, partial_slots
from .tiles import is_visible, load_tile, store_tile


@triton.jit
def one_partial(
    partial_ptr, block_indices_ptr, exists, pos, slots, g, i,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, NUM_CHUNKS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Each row's ``i``-th partial, 0 where its slot's block is not visible."""  # [BLOCK_R, BLOCK_D]
    block = tl.load(block_indices_ptr + slots + i // NUM_CHUNKS)
    seen = exists & is_visible(block, pos, BLOCK_SIZE)
    partial = (slots * NUM_CHUNKS + i) * GROUP + g
    return load_tile(partial_ptr, partial * HEAD_DIM, seen, HEAD_DIM, BLOCK_D).to(tl.float32)


@triton.jit
def sum_partials_tile(
    partial_ptr, block_indices_ptr, rows, num_rows,
    seq_len, seq_len_k, cu_seqlens_q_ptr, cu_seqlens_k_ptr, seq_ids_ptr,
    PACKED: tl.constexpr, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    NUM_SELECTED: tl.constexpr, NUM_CHUNKS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The sums of BLOCK_R rows' partials (int32 ``rows``); slots that were never written are not read.

    Returns ``(total, b, t, h)``: float32 ``[BLOCK_R, BLOCK_D]``, and where the rows lie.
    """
    exists, pos, slots, g, b, t, h = partial_slots(
        rows, num_rows, seq_len, seq_len_k, cu_seqlens_q_ptr, cu_seqlens_k_ptr, seq_ids_ptr,
        PACKED, NUM_KV_HEADS, GROUP, NUM_SELECTED,
    )  # fmt: skip
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    NUM_PARTIALS: tl.constexpr = NUM_SELECTED * NUM_CHUNKS
    if NUM_PARTIALS <= MAX_UNROLLED:  # so that the loads of all slots are in flight together
        for i in tl.static_range(NUM_PARTIALS):
            acc += one_partial(
                partial_ptr, block_indices_ptr, exists, pos, slots, g, i,
                GROUP, HEAD_DIM, NUM_CHUNKS, BLOCK_SIZE, BLOCK_D,
            )  # fmt: skip
    else:
        for i in range(NUM_PARTIALS):
            acc += one_partial(
                partial_ptr, block_indices_ptr, exists, pos, slots, g, i,
                GROUP, HEAD_DIM, NUM_CHUNKS, BLOCK_SIZE, BLOCK_D,
            )  # fmt: skip
    return acc, b, t, h


@triton.jit
def sum_partials_kernel(
    partial_ptr, block_indices_ptr, out_ptr, num_rows,
    seq_len, seq_len_k, cu_seqlens_q_ptr, cu_seqlens_k_ptr, seq_ids_ptr,
    PACKED: tl.constexpr, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    NUM_SELECTED: tl.constexpr, NUM_CHUNKS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    total, _, _, _ = sum_partials_tile(
        partial_ptr, block_indices_ptr, rows, num_rows,
        seq_len, seq_len_k, cu_seqlens_q_ptr, cu_seqlens_k_ptr, seq_ids_ptr,
        PACKED, NUM_KV_HEADS, GROUP, HEAD_DIM, NUM_SELECTED, NUM_CHUNKS, BLOCK_SIZE, BLOCK_R, BLOCK_D,
    )  # fmt: skip
    store_tile(out_ptr, rows.to(tl.int64) * HEAD_DIM, rows < num_rows, total, HEAD_DIM, BLOCK_D)


def meta(shape: PartialShape, packed: bool) -> Meta:
    """Compile-time constants and launch options."""
    block_d = max(16, next_power_of_2(shape.head_dim))
    return {
        "PACKED": packed,
        "NUM_KV_HEADS": shape.num_kv_heads,
        "GROUP": shape.group,
        "HEAD_DIM": shape.head_dim,
        "NUM_SELECTED": shape.num_selected,
        "NUM_CHUNKS": shape.num_chunks,
        "BLOCK_SIZE": shape.block_size,
        "BLOCK_R": max(1, 256 // block_d),
        "BLOCK_D": block_d,
        "num_warps": 1,
        "num_stages": 2,
    }


def launch(
    partial: torch.Tensor,
    block_indices: torch.Tensor,
    out: torch.Tensor,
    tables: Tables,
    seq_len_k: int,
    block_size: int,
) -> None:
    """Fill ``out`` ``[B, T, HQ, D]`` from partials ``[B, T, HK, S, C, G, D]``."""
    constants = meta(PartialShape.of(partial, block_size), tables[0] is not None)
    num_rows = out.shape[0] * out.shape[1] * out.shape[2]
    if num_rows:
        sum_partials_kernel[(triton.cdiv(num_rows, constants["BLOCK_R"]),)](
            partial, block_indices, out, num_rows, out.shape[1], seq_len_k, *tables, **constants
        )
