"""Backward with key blocks outside: dk and dv of a block and, in FSA order, partials of dq of the rows that chose it.

A block's list may be cut into several tiles, so each tile writes float32 sums of its own, which ``reduce_tiles`` adds
in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .config import ENTRIES_PER_TILE, Lists, Meta, StaticSizes, Tables, sequence_args, stages, warps
from .lists import chunk_keys, head_base, list_rows, list_tile, load_chunk
from .tiles import accumulate, dot, load_tile, probabilities, store_tile


@triton.jit
def selected_bwd_kv_outer_step(
    grad_out_base, q_base, shift_ptr, log_sum_ptr, delta_ptr, k, v, keys, valid, n, g, hk, first_row, first_pos,
    stride_gt, stride_gh, stride_qt, stride_qh, scale,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """What BLOCK_M rows add to a chunk's gradients.

    Returns ``(dk, dv, ds_t)``: float32 ``[BLOCK_N, BLOCK_D]``, ``[BLOCK_N, BLOCK_DV]`` and the gradient of the scores
    before scaling, ``[BLOCK_N, BLOCK_M]`` (keys first, so that both products take it as it lies in registers). dk
    lacks the factor ``scale``.
    """
    t = (n - first_row).to(tl.int64)
    q = load_tile(q_base, t * stride_qt + g * stride_qh, valid, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    grad_out = load_tile(grad_out_base, t * stride_gt + g * stride_gh, valid, HEAD_DIM_V, BLOCK_DV)
    row = (n.to(tl.int64) * NUM_KV_HEADS + hk) * GROUP + g
    shift = tl.load(shift_ptr + row, mask=valid, other=0.0)[None, :]
    log_sum = tl.load(log_sum_ptr + row, mask=valid, other=float("-inf"))[None, :]
    delta = tl.load(delta_ptr + row, mask=valid, other=0.0)[None, :]
    visible = keys[:, None] <= (n - first_pos)[None, :]
    p = probabilities(dot(k, tl.trans(q)), visible, shift, log_sum, scale)  # [BLOCK_N, BLOCK_M]
    dv = dot(p.to(grad_out.dtype), grad_out)
    ds = p * (dot(v, tl.trans(grad_out)) - delta)
    ds = ds.to(q.dtype)
    return dot(ds, q), dv, ds


@triton.jit
def selected_bwd_kv_outer_kernel(
    grad_out_ptr, q_ptr, k_ptr, v_ptr, block_indices_ptr, shift_ptr, log_sum_ptr, delta_ptr,
    entries_ptr, tile_list_ptr, tile_offsets_ptr, list_offsets_ptr, dk_tiles_ptr, dv_tiles_ptr, dq_partial_ptr,
    stride_gb, stride_gt, stride_gh, stride_qb, stride_qt, stride_qh,
    stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    seq_len, seq_len_k, cu_seqlens_q_ptr, cu_seqlens_k_ptr, seq_ids_ptr, scale,
    PACKED: tl.constexpr, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    NUM_SELECTED: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ENTRIES_PER_TILE: tl.constexpr, WITH_DQ: tl.constexpr,
):  # fmt: skip
    w = tl.program_id(0)
    chunk = tl.program_id(1)
    NUM_CHUNKS: tl.constexpr = BLOCK_SIZE // BLOCK_N
    first, last, block, hk, b, first_row, first_pos, first_key, len_k = list_tile(
        w, block_indices_ptr, entries_ptr, tile_list_ptr, tile_offsets_ptr, list_offsets_ptr,
        seq_len, seq_len_k, cu_seqlens_q_ptr, cu_seqlens_k_ptr, seq_ids_ptr,
        PACKED, NUM_KV_HEADS, NUM_SELECTED, ENTRIES_PER_TILE,
    )  # fmt: skip
    keys, exists = chunk_keys(block, chunk, len_k, first < last, BLOCK_SIZE, BLOCK_N)
    k = load_chunk(k_ptr, stride_kb, stride_kt, stride_kh, b, hk, first_key, keys, exists, HEAD_DIM, BLOCK_D)
    v = load_chunk(v_ptr, stride_vb, stride_vt, stride_vh, b, hk, first_key, keys, exists, HEAD_DIM_V, BLOCK_DV)
    q_base = head_base(q_ptr, stride_qb, stride_qh, b, hk, GROUP)
    grad_out_base = head_base(grad_out_ptr, stride_gb, stride_gh, b, hk, GROUP)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    dk_lost = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_lost = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for m in range(tl.cdiv((last - first) * GROUP, BLOCK_M)):
        valid, n, g, partial = list_rows(
            entries_ptr, first, last, m, chunk, NUM_KV_HEADS, GROUP, NUM_SELECTED, NUM_CHUNKS, BLOCK_M
        )
        dk_rows, dv_rows, ds = selected_bwd_kv_outer_step(
            grad_out_base, q_base, shift_ptr, log_sum_ptr, delta_ptr, k, v, keys, valid, n, g, hk, first_row, first_pos,
            stride_gt, stride_gh, stride_qt, stride_qh, scale,
            NUM_KV_HEADS, GROUP, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
        dk, dk_lost = accumulate(dk, dk_lost, dk_rows, k_ptr.dtype.element_ty == tl.float32)
        dv, dv_lost = accumulate(dv, dv_lost, dv_rows, k_ptr.dtype.element_ty == tl.float32)
        if WITH_DQ:
            dq = dot(tl.trans(ds), k) * scale  # [BLOCK_M, BLOCK_D]
            store_tile(dq_partial_ptr, partial * HEAD_DIM, valid, dq, HEAD_DIM, BLOCK_D)
    if first < last:
        rows = (w.to(tl.int64) * NUM_CHUNKS + chunk) * BLOCK_N + tl.arange(0, BLOCK_N)
        every = rows >= 0
        store_tile(dk_tiles_ptr, rows * HEAD_DIM, every, dk * scale, HEAD_DIM, BLOCK_D)
        store_tile(dv_tiles_ptr, rows * HEAD_DIM_V, every, dv, HEAD_DIM_V, BLOCK_DV)


def meta(sizes: StaticSizes, with_dq: bool) -> Meta:
    """Compile-time constants and launch options."""
    return sizes.constants() | {
        "BLOCK_M": 16 if sizes.row_bytes > 256 or sizes.itemsize == 4 else 32,
        "BLOCK_N": sizes.block_n,
        "ENTRIES_PER_TILE": ENTRIES_PER_TILE,
        "WITH_DQ": with_dq,
        "num_warps": warps(sizes.itemsize, 4 if sizes.widest <= 128 else 8),
        "num_stages": stages(2 if with_dq else 3) if sizes.row_bytes <= 256 else 1,
    }


def launch(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_indices: torch.Tensor,
    shift: torch.Tensor,
    log_sum: torch.Tensor,
    delta: torch.Tensor,
    lists: Lists,
    dk_tiles: torch.Tensor,
    dv_tiles: torch.Tensor,
    dq_partial: torch.Tensor | None,
    tables: Tables,
    block_size: int,
    scale: float,
) -> None:
    """Fill the float32 tiles ``[W, C, BLOCK_N, D]`` of dk and dv and, unless None, dq's partials."""
    sizes = StaticSizes.of(q, k, v, block_indices, block_size, tables[0] is not None)
    num_tiles = lists.tile_list.shape[0]
    if num_tiles == 0:
        return
    selected_bwd_kv_outer_kernel[(num_tiles, sizes.num_chunks)](
        grad_out, q, k, v, block_indices, shift, log_sum, delta, *lists, dk_tiles, dv_tiles, dq_partial,
        *grad_out.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *sequence_args(q, k, tables), scale,
        **meta(sizes, dq_partial is not None),
    )  # fmt: skip
