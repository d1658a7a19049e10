"""FSA loop order, forward: one program per tile of a block's list and chunk of the block serves the rows listed.

Every partial carries its own softmax statistics, so no statistics pass has to run first and the merge is exact for
every row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .config import ENTRIES_PER_TILE, Lists, Meta, StaticSizes, Tables, sequence_args, warps
from .lists import chunk_keys, head_base, list_rows, list_tile, load_chunk
from .tiles import dot, exp_scaled, finite_max, load_tile, store_tile


@triton.jit
def selected_fwd_kv_outer_step(
    q_base, k, v, keys, valid, n, g, first_row, first_pos, stride_qt, stride_qh, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Attention of BLOCK_M rows over the keys of one chunk, with a softmax of its own.

    Returns float32 ``(out [BLOCK_M, BLOCK_DV], row_max [BLOCK_M], row_sum [BLOCK_M])``: the normalised output, the
    largest score before scaling and the sum of ``exp(scale * (score - row_max))``; a row that sees no key of the chunk
    has 0, ``-inf`` and 0.
    """
    rows = (n - first_row).to(tl.int64) * stride_qt + g * stride_qh
    q = load_tile(q_base, rows, valid, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    visible = keys[None, :] <= (n - first_pos)[:, None]
    scores = tl.where(visible, dot(q, tl.trans(k)), float("-inf"))  # [BLOCK_M, BLOCK_N]
    row_max = tl.max(scores, 1)
    p = exp_scaled(scores, finite_max(row_max)[:, None], scale)
    row_sum = tl.sum(p, 1)
    out = dot(p.to(v.dtype), v) / tl.where(row_sum > 0, row_sum, 1.0)[:, None]
    return out, row_max, row_sum


@triton.jit
def store_stats(partial_stats_ptr, partial, valid, row_max, row_sum):
    """Keep maximum and sum apart: one log-sum-exp, rounded at 1e4, would lose the weights between partials."""
    tl.store(partial_stats_ptr + partial * 2, row_max, mask=valid)
    tl.store(partial_stats_ptr + partial * 2 + 1, row_sum, mask=valid)


@triton.jit
def selected_fwd_kv_outer_kernel(
    q_ptr, k_ptr, v_ptr, block_indices_ptr, entries_ptr, tile_list_ptr, tile_offsets_ptr, list_offsets_ptr,
    partial_out_ptr, partial_stats_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    seq_len, seq_len_k, cu_seqlens_q_ptr, cu_seqlens_k_ptr, seq_ids_ptr, scale,
    PACKED: tl.constexpr, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    NUM_SELECTED: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ENTRIES_PER_TILE: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(1)
    first, last, block, hk, b, first_row, first_pos, first_key, len_k = list_tile(
        tl.program_id(0), block_indices_ptr, entries_ptr, tile_list_ptr, tile_offsets_ptr, list_offsets_ptr,
        seq_len, seq_len_k, cu_seqlens_q_ptr, cu_seqlens_k_ptr, seq_ids_ptr,
        PACKED, NUM_KV_HEADS, NUM_SELECTED, ENTRIES_PER_TILE,
    )  # fmt: skip
    keys, exists = chunk_keys(block, chunk, len_k, first < last, BLOCK_SIZE, BLOCK_N)
    k = load_chunk(k_ptr, stride_kb, stride_kt, stride_kh, b, hk, first_key, keys, exists, HEAD_DIM, BLOCK_D)
    v = load_chunk(v_ptr, stride_vb, stride_vt, stride_vh, b, hk, first_key, keys, exists, HEAD_DIM_V, BLOCK_DV)
    q_base = head_base(q_ptr, stride_qb, stride_qh, b, hk, GROUP)
    for m in range(tl.cdiv((last - first) * GROUP, BLOCK_M)):
        valid, n, g, partial = list_rows(
            entries_ptr, first, last, m, chunk, NUM_KV_HEADS, GROUP, NUM_SELECTED, BLOCK_SIZE // BLOCK_N, BLOCK_M
        )
        out, row_max, row_sum = selected_fwd_kv_outer_step(
            q_base, k, v, keys, valid, n, g, first_row, first_pos, stride_qt, stride_qh, scale, HEAD_DIM, BLOCK_D
        )
        store_stats(partial_stats_ptr, partial, valid, row_max, row_sum)
        store_tile(partial_out_ptr, partial * HEAD_DIM_V, valid, out, HEAD_DIM_V, BLOCK_DV)


def meta(sizes: StaticSizes) -> Meta:
    """Compile-time constants and launch options."""
    return sizes.constants() | {
        "BLOCK_M": 16 if sizes.row_bytes > 512 else 32 if sizes.row_bytes > 256 or sizes.itemsize == 4 else 64,
        "BLOCK_N": sizes.block_n,
        "ENTRIES_PER_TILE": ENTRIES_PER_TILE,
        "num_warps": warps(sizes.itemsize, 4),
        "num_stages": 1,
    }


def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_indices: torch.Tensor,
    lists: Lists,
    partial_out: torch.Tensor,
    partial_stats: torch.Tensor,
    tables: Tables,
    block_size: int,
    scale: float,
) -> None:
    """Fill partials ``[B, T, HK, S, C, G, DV]`` and their statistics ``[..., 2]`` where a slot's block is visible."""
    sizes = StaticSizes.of(q, k, v, block_indices, block_size, tables[0] is not None)
    num_tiles = lists.tile_list.shape[0]
    if num_tiles == 0:
        return
    selected_fwd_kv_outer_kernel[(num_tiles, sizes.num_chunks)](
        q, k, v, block_indices, *lists, partial_out, partial_stats,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *sequence_args(q, k, tables), scale, **meta(sizes),
    )  # fmt: skip
