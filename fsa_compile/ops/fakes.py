"""Fake kernels: shapes, dtypes and strides of every operator's results; `schema.fake` puts the checks before them."""

from __future__ import annotations

import torch
from torch import Tensor

from . import schema
from .arguments import Size, compressed_length, packed_compressed_length


def _attention(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, seq_len, num_q_heads, _ = q.shape
    out = q.new_empty((batch, seq_len, num_q_heads, v.shape[3]))
    shift, log_sum = (q.new_empty((batch, seq_len, num_q_heads), dtype=torch.float32) for _ in range(2))
    return out, shift, log_sum


def _grads(*inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in inputs)
    return dq, dk, dv


def selected_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    *,
    block_size: int = 64,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: Size | None = None,
    max_seqlen_k: Size | None = None,
    loop_order: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    return _attention(q, v)


def selected_attention_backward(
    grad_out: Tensor | None,
    grad_log_sum: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    out: Tensor,
    shift: Tensor,
    log_sum: Tensor,
    *,
    block_size: int = 64,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: Size | None = None,
    max_seqlen_k: Size | None = None,
    loop_order: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    return _grads(q, k, v)


def compressed_attention_forward(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    *,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    seq_len_k: Size | None = None,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: Size | None = None,
    max_seqlen_k: Size | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _attention(q, v_cmp)


def compressed_attention_backward(
    grad_out: Tensor | None,
    grad_log_sum: Tensor | None,
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    out: Tensor,
    shift: Tensor,
    log_sum: Tensor,
    *,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    seq_len_k: Size | None = None,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: Size | None = None,
    max_seqlen_k: Size | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _grads(q, k_cmp, v_cmp)


def select_blocks(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    *,
    block_size: int = 64,
    num_selected: int = 16,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    init_blocks: int = 1,
    local_blocks: int = 2,
    seq_len_k: Size | None = None,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: Size | None = None,
    max_seqlen_k: Size | None = None,
) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1], k_cmp.shape[2], num_selected), dtype=torch.int32)


def sliding_window_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window_size: int,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: Size | None = None,
    max_seqlen_k: Size | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _attention(q, v)


def sliding_window_attention_backward(
    grad_out: Tensor | None,
    grad_log_sum: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    shift: Tensor,
    log_sum: Tensor,
    *,
    window_size: int,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: Size | None = None,
    max_seqlen_k: Size | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _grads(q, k, v)


def mean_compress(
    x: Tensor, *, kernel_size: int = 32, kernel_stride: int = 16, cu_seqlens: Tensor | None = None
) -> Tensor:
    length = (
        compressed_length(x.shape[1], kernel_size, kernel_stride)
        if cu_seqlens is None
        else packed_compressed_length(x.shape[1], kernel_stride)
    )
    return x.new_empty((x.shape[0], length, x.shape[2], x.shape[3]))


def mean_compress_backward(
    grad_out: Tensor, *, seq_len: Size, kernel_size: int = 32, kernel_stride: int = 16, cu_seqlens: Tensor | None = None
) -> Tensor:
    return grad_out.new_empty((grad_out.shape[0], seq_len, grad_out.shape[2], grad_out.shape[3]))


for _fake in (
    selected_attention_forward,
    selected_attention_backward,
    compressed_attention_forward,
    compressed_attention_backward,
    select_blocks,
    sliding_window_attention_forward,
    sliding_window_attention_backward,
    mean_compress,
    mean_compress_backward,
):
    schema.fake(_fake.__name__, _fake)
