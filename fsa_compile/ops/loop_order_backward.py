"""Internal operators of the selected branch's backward; see `loop_order` for names and shapes.

dk and dv always come from a pass with key blocks outside. dq comes from a query-outer pass (NSA order) or as partials
out of that same pass (FSA order). dk and dv leave it as float32 tiles `[num_tiles, C, BLOCK_N, D]`, which are then
added in list order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..templates import attention_delta, reduce_tiles, selected_bwd_kv_outer, selected_bwd_query_outer, sum_partials
from ..templates.config import Lists, StaticSizes
from .loop_order import _LISTS, _TABLES, KERNEL_KEYS, _rows
from .schema import define, fake, impl

_BWD = "Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor block_indices, Tensor shift, Tensor log_sum, Tensor delta"


def _attention_delta_fake(grad_out: Tensor, grad_log_sum: Tensor | None, out: Tensor) -> Tensor:
    return out.new_empty(out.shape[:3], dtype=torch.float32)


def _attention_delta(grad_out: Tensor, grad_log_sum: Tensor | None, out: Tensor) -> Tensor:
    delta = _attention_delta_fake(grad_out, grad_log_sum, out)
    attention_delta.launch(_rows(grad_out), grad_log_sum, out.contiguous(), delta)
    return delta


define("_attention_delta(Tensor grad_out, Tensor? grad_log_sum, Tensor out) -> Tensor")
fake("_attention_delta", _attention_delta_fake)
impl("_attention_delta", _attention_delta, *KERNEL_KEYS)


def _selected_bwd_query_outer_fake(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    shift: Tensor,
    log_sum: Tensor,
    delta: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seq_ids: Tensor | None,
    *,
    block_size: int,
    scale: float,
) -> Tensor:
    return q.new_empty(q.shape)


def _selected_bwd_query_outer(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    shift: Tensor,
    log_sum: Tensor,
    delta: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seq_ids: Tensor | None,
    *,
    block_size: int,
    scale: float,
) -> Tensor:
    dq = q.new_empty(q.shape)
    selected_bwd_query_outer.launch(
        _rows(grad_out), _rows(q), _rows(k), _rows(v), block_indices.contiguous(), shift.contiguous(),
        log_sum.contiguous(), delta, dq, (cu_seqlens_q, cu_seqlens_k, seq_ids), block_size, scale,
    )  # fmt: skip
    return dq


define(f"_selected_bwd_query_outer({_BWD}, {_TABLES}, *, int block_size, float scale) -> Tensor")
fake("_selected_bwd_query_outer", _selected_bwd_query_outer_fake)
impl("_selected_bwd_query_outer", _selected_bwd_query_outer, *KERNEL_KEYS)


def _selected_bwd_kv_outer_fake(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    shift: Tensor,
    log_sum: Tensor,
    delta: Tensor,
    entries: Tensor,
    tile_list: Tensor,
    tile_offsets: Tensor,
    list_offsets: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seq_ids: Tensor | None,
    *,
    block_size: int,
    scale: float,
    with_dq: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    sizes = StaticSizes.of(q, k, v, block_indices, block_size, seq_ids is not None)
    tile = (tile_list.shape[0], sizes.num_chunks, sizes.block_n)
    partial = (*block_indices.shape, sizes.num_chunks, sizes.group, sizes.head_dim) if with_dq else (0,)
    return (
        q.new_empty(*tile, sizes.head_dim, dtype=torch.float32),
        q.new_empty(*tile, sizes.head_dim_v, dtype=torch.float32),
        q.new_empty(partial),
    )


def _selected_bwd_kv_outer(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    shift: Tensor,
    log_sum: Tensor,
    delta: Tensor,
    entries: Tensor,
    tile_list: Tensor,
    tile_offsets: Tensor,
    list_offsets: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seq_ids: Tensor | None,
    *,
    block_size: int,
    scale: float,
    with_dq: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    lists = Lists(entries, tile_list, tile_offsets, list_offsets)
    tables = (cu_seqlens_q, cu_seqlens_k, seq_ids)
    dk_tiles, dv_tiles, dq_partial = _selected_bwd_kv_outer_fake(
        grad_out, q, k, v, block_indices, shift, log_sum, delta, *lists, *tables,
        block_size=block_size, scale=scale, with_dq=with_dq,
    )  # fmt: skip
    selected_bwd_kv_outer.launch(
        _rows(grad_out), _rows(q), _rows(k), _rows(v), block_indices.contiguous(), shift.contiguous(),
        log_sum.contiguous(), delta, lists, dk_tiles, dv_tiles, dq_partial if with_dq else None, tables, block_size,
        scale,
    )  # fmt: skip
    return dk_tiles, dv_tiles, dq_partial


define(
    f"_selected_bwd_kv_outer({_BWD}, {_LISTS}, {_TABLES}, *, int block_size, float scale, bool with_dq) "
    "-> (Tensor dk_tiles, Tensor dv_tiles, Tensor dq_partial)"
)
fake("_selected_bwd_kv_outer", _selected_bwd_kv_outer_fake)
impl("_selected_bwd_kv_outer", _selected_bwd_kv_outer, *KERNEL_KEYS)


def _sum_partials_fake(
    partial: Tensor,
    block_indices: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seq_ids: Tensor | None,
    *,
    seq_len_k: int,
    block_size: int,
) -> Tensor:
    batch, seq_len, num_kv_heads, _, _, group, head_dim = partial.shape
    return partial.new_empty(batch, seq_len, num_kv_heads * group, head_dim)


def _sum_partials(
    partial: Tensor,
    block_indices: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seq_ids: Tensor | None,
    *,
    seq_len_k: int,
    block_size: int,
) -> Tensor:
    tables = (cu_seqlens_q, cu_seqlens_k, seq_ids)
    out = _sum_partials_fake(partial, block_indices, *tables, seq_len_k=seq_len_k, block_size=block_size)
    sum_partials.launch(partial, block_indices.contiguous(), out, tables, seq_len_k, block_size)
    return out


define(f"_sum_partials(Tensor partial, Tensor block_indices, {_TABLES}, *, SymInt seq_len_k, int block_size) -> Tensor")
fake("_sum_partials", _sum_partials_fake)
impl("_sum_partials", _sum_partials, *KERNEL_KEYS)


def _reduce_tiles_fake(
    tiles: Tensor,
    tile_offsets: Tensor,
    like: Tensor,
    cu_seqlens_k: Tensor | None,
    block_base: Tensor | None,
    block_seq_ids: Tensor | None,
    *,
    block_size: int,
) -> Tensor:
    return like.new_empty(like.shape)


def _reduce_tiles(
    tiles: Tensor,
    tile_offsets: Tensor,
    like: Tensor,
    cu_seqlens_k: Tensor | None,
    block_base: Tensor | None,
    block_seq_ids: Tensor | None,
    *,
    block_size: int,
) -> Tensor:
    grad = like.new_empty(like.shape)
    reduce_tiles.launch(
        tiles, tile_offsets, reduce_tiles.BlockTables(cu_seqlens_k, block_base, block_seq_ids), grad, block_size
    )
    return grad


# `like` is k or v: only its shape and dtype are used.
define(
    "_reduce_tiles(Tensor tiles, Tensor tile_offsets, Tensor like, Tensor? cu_seqlens_k, Tensor? block_base, "
    "Tensor? block_seq_ids, *, int block_size) -> Tensor"
)
fake("_reduce_tiles", _reduce_tiles_fake)
impl("_reduce_tiles", _reduce_tiles, *KERNEL_KEYS)
