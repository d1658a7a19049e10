"""NSA loop order, forward: one program per (query row, key/value head) walks the row's selected blocks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .config import Meta, StaticSizes, Tables, sequence_args, stages, warps
from .tiles import dot, exp_scaled, finite_max, is_visible, load_tile, log_or_none, sequence_of, store_tile


@triton.jit
def selected_fwd_query_outer_tile(
    q_ptr, k_ptr, v_ptr, block_indices_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    n, hk, seq_len, seq_len_k, cu_seqlens_q_ptr, cu_seqlens_k_ptr, seq_ids_ptr, scale,
    PACKED: tl.constexpr, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    NUM_SELECTED: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Attention of the heads of one group at row ``n`` over its selected blocks.

    Returns ``(out, shift, log_sum, b, t)``: float32 ``[BLOCK_G, BLOCK_DV]``, ``[BLOCK_G]`` and ``[BLOCK_G]``, and where
    the row lies.
    """
    b, first_row, first_pos, first_key, _ = sequence_of(
        n, seq_len, seq_len_k, cu_seqlens_q_ptr, cu_seqlens_k_ptr, seq_ids_ptr, PACKED
    )
    t = n - first_row
    pos = n - first_pos
    b64 = b.to(tl.int64)
    heads = tl.arange(0, BLOCK_G)
    keys = tl.arange(0, BLOCK_N)
    q_base = q_ptr + b64 * stride_qb + t.to(tl.int64) * stride_qt + hk.to(tl.int64) * (GROUP * stride_qh)
    q = load_tile(q_base, heads * stride_qh, heads < GROUP, HEAD_DIM, BLOCK_D)  # [BLOCK_G, BLOCK_D]
    k_base = k_ptr + b64 * stride_kb + hk.to(tl.int64) * stride_kh
    v_base = v_ptr + b64 * stride_vb + hk.to(tl.int64) * stride_vh
    indices = block_indices_ptr + (n.to(tl.int64) * NUM_KV_HEADS + hk) * NUM_SELECTED

    row_max = tl.full([BLOCK_G], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_DV], tl.float32)
    # One flat loop over key tiles, masked rather than branched, so that Triton can pipeline the loads.
    TILES: tl.constexpr = BLOCK_SIZE // BLOCK_N
    for i in range(NUM_SELECTED * TILES):
        block = tl.load(indices + i // TILES)
        seen = is_visible(block, pos, BLOCK_SIZE)
        start = tl.where(seen, block, 0) * BLOCK_SIZE + (i % TILES) * BLOCK_N
        visible = start + keys <= tl.where(seen, pos, -1)
        row = (first_key + start).to(tl.int64)
        k = load_tile(k_base + row * stride_kt, keys * stride_kt, visible, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        v = load_tile(v_base + row * stride_vt, keys * stride_vt, visible, HEAD_DIM_V, BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
        scores = tl.where(visible[None, :], dot(q, tl.trans(k)), float("-inf"))  # [BLOCK_G, BLOCK_N]
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        shift = finite_max(new_max)
        p = exp_scaled(scores, shift[:, None], scale)
        decay = exp_scaled(row_max, shift, scale)
        row_sum = row_sum * decay + tl.sum(p, 1)
        acc = acc * decay[:, None] + dot(p.to(v.dtype), v)
        row_max = new_max
    out = acc / tl.where(row_sum > 0, row_sum, 1.0)[:, None]
    return out, finite_max(row_max), log_or_none(row_sum), b, t


@triton.jit
def selected_fwd_query_outer_kernel(
    q_ptr, k_ptr, v_ptr, block_indices_ptr, out_ptr, shift_ptr, log_sum_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    seq_len, seq_len_k, cu_seqlens_q_ptr, cu_seqlens_k_ptr, seq_ids_ptr, scale,
    PACKED: tl.constexpr, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    NUM_SELECTED: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    hk = tl.program_id(1)
    out, shift, log_sum, _, _ = selected_fwd_query_outer_tile(
        q_ptr, k_ptr, v_ptr, block_indices_ptr,
        stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
        n, hk, seq_len, seq_len_k, cu_seqlens_q_ptr, cu_seqlens_k_ptr, seq_ids_ptr, scale,
        PACKED, NUM_KV_HEADS, GROUP, HEAD_DIM, HEAD_DIM_V, NUM_SELECTED, BLOCK_SIZE, BLOCK_D, BLOCK_DV, BLOCK_G,
        BLOCK_N,
    )  # fmt: skip
    heads = tl.arange(0, BLOCK_G)
    row = (n.to(tl.int64) * NUM_KV_HEADS + hk) * GROUP
    store_tile(out_ptr + row * HEAD_DIM_V, heads * HEAD_DIM_V, heads < GROUP, out, HEAD_DIM_V, BLOCK_DV)
    tl.store(shift_ptr + row + heads, shift, mask=heads < GROUP)
    tl.store(log_sum_ptr + row + heads, log_sum, mask=heads < GROUP)


def meta(sizes: StaticSizes) -> Meta:
    """Compile-time constants and launch options."""
    return sizes.constants() | {
        "BLOCK_G": sizes.block_g,
        "BLOCK_N": sizes.block_n,
        "num_warps": warps(sizes.itemsize, 4 if sizes.group > 16 or sizes.widest > 128 else 2),
        "num_stages": stages(2),
    }


def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_indices: torch.Tensor,
    out: torch.Tensor,
    shift: torch.Tensor,
    log_sum: torch.Tensor,
    tables: Tables,
    block_size: int,
    scale: float,
) -> None:
    """Fill ``out`` ``[B, T, HQ, DV]`` and the softmax statistics ``shift`` and ``log_sum`` ``[B, T, HQ]``."""
    sizes = StaticSizes.of(q, k, v, block_indices, block_size, tables[0] is not None)
    num_rows = q.shape[0] * q.shape[1]
    if num_rows == 0:
        return
    # Rows run fastest over the grid, so that one head's keys and values stay in L2.
    selected_fwd_query_outer_kernel[(num_rows, sizes.num_kv_heads)](
        q, k, v, block_indices, out, shift, log_sum, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        *sequence_args(q, k, tables), scale, **meta(sizes),
    )  # fmt: skip
