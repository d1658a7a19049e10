"""NSA loop order, backward: dq, one program per (query row, key/value head).

dk and dv are ``selected_bwd_kv_outer``'s.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .config import Meta, StaticSizes, Tables, sequence_args, stages, warps
from .tiles import dot, is_visible, load_tile, probabilities, sequence_of, store_tile


@triton.jit
def selected_bwd_query_outer_tile(
    grad_out_ptr, q_ptr, k_ptr, v_ptr, block_indices_ptr, shift_ptr, log_sum_ptr, delta_ptr,
    stride_gb, stride_gt, stride_gh, stride_qb, stride_qt, stride_qh,
    stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    n, hk, seq_len, seq_len_k, cu_seqlens_q_ptr, cu_seqlens_k_ptr, seq_ids_ptr, scale,
    PACKED: tl.constexpr, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    NUM_SELECTED: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq of the heads of one group at row ``n``.

    Returns ``(dq, b, t)``: float32 ``[BLOCK_G, BLOCK_D]`` and where the row lies.
    """
    b, first_row, first_pos, first_key, _ = sequence_of(
        n, seq_len, seq_len_k, cu_seqlens_q_ptr, cu_seqlens_k_ptr, seq_ids_ptr, PACKED
    )
    t = n - first_row
    pos = n - first_pos
    b64, t64, hk64 = b.to(tl.int64), t.to(tl.int64), hk.to(tl.int64)
    heads = tl.arange(0, BLOCK_G)
    keys = tl.arange(0, BLOCK_N)
    q_base = q_ptr + b64 * stride_qb + t64 * stride_qt + hk64 * (GROUP * stride_qh)
    q = load_tile(q_base, heads * stride_qh, heads < GROUP, HEAD_DIM, BLOCK_D)  # [BLOCK_G, BLOCK_D]
    grad_out_base = grad_out_ptr + b64 * stride_gb + t64 * stride_gt + hk64 * (GROUP * stride_gh)
    grad_out = load_tile(grad_out_base, heads * stride_gh, heads < GROUP, HEAD_DIM_V, BLOCK_DV)  # [BLOCK_G, BLOCK_DV]
    row = (n.to(tl.int64) * NUM_KV_HEADS + hk) * GROUP + heads
    shift = tl.load(shift_ptr + row, mask=heads < GROUP, other=0.0)[:, None]
    log_sum = tl.load(log_sum_ptr + row, mask=heads < GROUP, other=float("-inf"))[:, None]
    delta = tl.load(delta_ptr + row, mask=heads < GROUP, other=0.0)[:, None]
    delta = tl.where(log_sum > float("-inf"), delta, 0.0)  # without a key log_sum is a constant, whatever came back
    k_base = k_ptr + b64 * stride_kb + hk64 * stride_kh
    v_base = v_ptr + b64 * stride_vb + hk64 * stride_vh
    indices = block_indices_ptr + (n.to(tl.int64) * NUM_KV_HEADS + hk) * NUM_SELECTED

    dq = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    TILES: tl.constexpr = BLOCK_SIZE // BLOCK_N
    for i in range(NUM_SELECTED * TILES):
        block = tl.load(indices + i // TILES)
        seen = is_visible(block, pos, BLOCK_SIZE)
        start = tl.where(seen, block, 0) * BLOCK_SIZE + (i % TILES) * BLOCK_N
        visible = start + keys <= tl.where(seen, pos, -1)
        key_row = (first_key + start).to(tl.int64)
        k = load_tile(k_base + key_row * stride_kt, keys * stride_kt, visible, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        v = load_tile(v_base + key_row * stride_vt, keys * stride_vt, visible, HEAD_DIM_V, BLOCK_DV)
        p = probabilities(dot(q, tl.trans(k)), visible[None, :], shift, log_sum, scale)  # [BLOCK_G, BLOCK_N]
        ds = p * (dot(grad_out, tl.trans(v)) - delta)
        dq += dot(ds.to(k.dtype), k)
    return dq * scale, b, t


@triton.jit
def selected_bwd_query_outer_kernel(
    grad_out_ptr, q_ptr, k_ptr, v_ptr, block_indices_ptr, shift_ptr, log_sum_ptr, delta_ptr, dq_ptr,
    stride_gb, stride_gt, stride_gh, stride_qb, stride_qt, stride_qh,
    stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    seq_len, seq_len_k, cu_seqlens_q_ptr, cu_seqlens_k_ptr, seq_ids_ptr, scale,
    PACKED: tl.constexpr, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    NUM_SELECTED: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    hk = tl.program_id(1)
    dq, _, _ = selected_bwd_query_outer_tile(
        grad_out_ptr, q_ptr, k_ptr, v_ptr, block_indices_ptr, shift_ptr, log_sum_ptr, delta_ptr,
        stride_gb, stride_gt, stride_gh, stride_qb, stride_qt, stride_qh,
        stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
        n, hk, seq_len, seq_len_k, cu_seqlens_q_ptr, cu_seqlens_k_ptr, seq_ids_ptr, scale,
        PACKED, NUM_KV_HEADS, GROUP, HEAD_DIM, HEAD_DIM_V, NUM_SELECTED, BLOCK_SIZE, BLOCK_D, BLOCK_DV, BLOCK_G,
        BLOCK_N,
    )  # fmt: skip
    heads = tl.arange(0, BLOCK_G)
    row = (n.to(tl.int64) * NUM_KV_HEADS + hk) * GROUP
    store_tile(dq_ptr + row * HEAD_DIM, heads * HEAD_DIM, heads < GROUP, dq, HEAD_DIM, BLOCK_D)


def meta(sizes: StaticSizes) -> Meta:
    """Compile-time constants and launch options."""
    return sizes.constants() | {
        "BLOCK_G": sizes.block_g,
        "BLOCK_N": sizes.block_n,
        "num_warps": warps(sizes.itemsize, 4 if sizes.group > 16 or sizes.widest > 128 else 2),
        "num_stages": stages(2),
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
    dq: torch.Tensor,
    tables: Tables,
    block_size: int,
    scale: float,
) -> None:
    """Fill ``dq`` ``[B, T, HQ, D]``."""
    sizes = StaticSizes.of(q, k, v, block_indices, block_size, tables[0] is not None)
    num_rows = q.shape[0] * q.shape[1]
    if num_rows == 0:
        return
    selected_bwd_query_outer_kernel[(num_rows, sizes.num_kv_heads)](
        grad_out, q, k, v, block_indices, shift, log_sum, delta, dq,
        *grad_out.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *sequence_args(q, k, tables), scale,
        **meta(sizes),
    )  # fmt: skip
