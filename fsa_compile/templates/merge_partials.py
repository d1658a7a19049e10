"""FSA loop order, forward, second step: merge a row's partials by their softmax statistics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .config import Meta, PartialShape, Tables, next_power_of_2
from .lists import MAX_UNROLLED, partial_slots
from .tiles import exp_scaled, finite_max, is_visible, load_tile, log_or_none, store_tile


@triton.jit
def weighted_partial(
    partial_out_ptr, partial_stats_ptr, block_indices_ptr, exists, pos, slots, g, i, shift, total, scale,
    GROUP: tl.constexpr, HEAD_DIM_V: tl.constexpr, NUM_CHUNKS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """What each row's ``i``-th partial adds to its output."""  # [BLOCK_R, BLOCK_DV]
    block = tl.load(block_indices_ptr + slots + i // NUM_CHUNKS)
    seen = exists & is_visible(block, pos, BLOCK_SIZE)
    partial = (slots * NUM_CHUNKS + i) * GROUP + g
    part_max = tl.load(partial_stats_ptr + partial * 2, mask=seen, other=float("-inf"))
    part_sum = tl.load(partial_stats_ptr + partial * 2 + 1, mask=seen, other=0.0)
    out = load_tile(partial_out_ptr, partial * HEAD_DIM_V, seen, HEAD_DIM_V, BLOCK_DV)
    return (part_sum * exp_scaled(part_max, shift, scale) / total)[:, None] * out.to(tl.float32)


@triton.jit
def merge_partials_tile(
    partial_out_ptr, partial_stats_ptr, block_indices_ptr, rows, num_rows,
    seq_len, seq_len_k, cu_seqlens_q_ptr, cu_seqlens_k_ptr, seq_ids_ptr, scale,
    PACKED: tl.constexpr, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    NUM_SELECTED: tl.constexpr, NUM_CHUNKS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Merged attention of BLOCK_R output rows (int32 ``rows``).

    Returns ``(out, shift, log_sum, b, t, h)``: float32 ``[BLOCK_R, BLOCK_DV]``, ``[BLOCK_R]`` and ``[BLOCK_R]``, and
    where the rows lie. A slot whose block is not visible was never written, so its partial is not read.
    """
    exists, pos, slots, g, b, t, h = partial_slots(
        rows, num_rows, seq_len, seq_len_k, cu_seqlens_q_ptr, cu_seqlens_k_ptr, seq_ids_ptr,
        PACKED, NUM_KV_HEADS, GROUP, NUM_SELECTED,
    )  # fmt: skip
    NUM_PARTIALS: tl.constexpr = NUM_SELECTED * NUM_CHUNKS
    slot = tl.arange(0, BLOCK_S)[None, :]
    block = tl.load(block_indices_ptr + slots[:, None] + slot // NUM_CHUNKS, mask=slot < NUM_PARTIALS, other=-1)
    seen = exists[:, None] & is_visible(block, pos[:, None], BLOCK_SIZE)  # [BLOCK_R, BLOCK_S]
    stats = partial_stats_ptr + ((slots[:, None] * NUM_CHUNKS + slot) * GROUP + g[:, None]) * 2
    part_max = tl.load(stats, mask=seen, other=float("-inf"))
    part_sum = tl.load(stats + 1, mask=seen, other=0.0)
    row_max = tl.max(part_max, 1)
    shift = finite_max(row_max)
    row_sum = tl.sum(part_sum * exp_scaled(part_max, shift[:, None], scale), 1)
    total = tl.where(row_sum > 0, row_sum, 1.0)
    acc = tl.zeros([BLOCK_R, BLOCK_DV], tl.float32)
    if NUM_PARTIALS <= MAX_UNROLLED:  # so that the loads of all slots are in flight together
        for i in tl.static_range(NUM_PARTIALS):
            acc += weighted_partial(
                partial_out_ptr, partial_stats_ptr, block_indices_ptr, exists, pos, slots, g, i, shift, total, scale,
                GROUP, HEAD_DIM_V, NUM_CHUNKS, BLOCK_SIZE, BLOCK_DV,
            )  # fmt: skip
    else:
        for i in range(NUM_PARTIALS):
            acc += weighted_partial(
                partial_out_ptr, partial_stats_ptr, block_indices_ptr, exists, pos, slots, g, i, shift, total, scale,
                GROUP, HEAD_DIM_V, NUM_CHUNKS, BLOCK_SIZE, BLOCK_DV,
            )  # fmt: skip
    return acc, shift, log_or_none(row_sum), b, t, h


@triton.jit
def merge_partials_kernel(
    partial_out_ptr, partial_stats_ptr, block_indices_ptr, out_ptr, shift_ptr, log_sum_ptr, num_rows,
    seq_len, seq_len_k, cu_seqlens_q_ptr, cu_seqlens_k_ptr, seq_ids_ptr, scale,
    PACKED: tl.constexpr, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    NUM_SELECTED: tl.constexpr, NUM_CHUNKS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    out, shift, log_sum, _, _, _ = merge_partials_tile(
        partial_out_ptr, partial_stats_ptr, block_indices_ptr, rows, num_rows,
        seq_len, seq_len_k, cu_seqlens_q_ptr, cu_seqlens_k_ptr, seq_ids_ptr, scale,
        PACKED, NUM_KV_HEADS, GROUP, HEAD_DIM_V, NUM_SELECTED, NUM_CHUNKS, BLOCK_SIZE, BLOCK_R, BLOCK_S, BLOCK_DV,
    )  # fmt: skip
    tl.store(shift_ptr + rows, shift, mask=rows < num_rows)
    tl.store(log_sum_ptr + rows, log_sum, mask=rows < num_rows)
    store_tile(out_ptr, rows.to(tl.int64) * HEAD_DIM_V, rows < num_rows, out, HEAD_DIM_V, BLOCK_DV)


def meta(shape: PartialShape, packed: bool) -> Meta:
    """Compile-time constants and launch options."""
    block_dv = max(16, next_power_of_2(shape.head_dim))
    return {
        "PACKED": packed,
        "NUM_KV_HEADS": shape.num_kv_heads,
        "GROUP": shape.group,
        "HEAD_DIM_V": shape.head_dim,
        "NUM_SELECTED": shape.num_selected,
        "NUM_CHUNKS": shape.num_chunks,
        "BLOCK_SIZE": shape.block_size,
        "BLOCK_R": max(1, 256 // block_dv),
        "BLOCK_S": next_power_of_2(shape.num_selected * shape.num_chunks),
        "BLOCK_DV": block_dv,
        "num_warps": 1,
        "num_stages": 2,
    }


def launch(
    partial_out: torch.Tensor,
    partial_stats: torch.Tensor,
    block_indices: torch.Tensor,
    out: torch.Tensor,
    shift: torch.Tensor,
    log_sum: torch.Tensor,
    tables: Tables,
    seq_len_k: int,
    block_size: int,
    scale: float,
) -> None:
    """Fill ``out`` ``[B, T, HQ, DV]``, ``shift`` and ``log_sum`` ``[B, T, HQ]`` from ``selected_fwd_kv_outer``'s."""
    constants = meta(PartialShape.of(partial_out, block_size), tables[0] is not None)
    num_rows = shift.numel()
    if num_rows:
        merge_partials_kernel[(triton.cdiv(num_rows, constants["BLOCK_R"]),)](
            partial_out, partial_stats, block_indices, out, shift, log_sum, num_rows, out.shape[1], seq_len_k, *tables,
            scale, **constants,
        )  # fmt: skip
