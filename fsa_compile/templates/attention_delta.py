"""Backward, first step: ``delta = rowsum(grad_out * out) - grad_log_sum``, the softmax Jacobian's rank-one term.

The gradient of a score is ``p * (grad_out @ v - delta)``. Where one key has all of a row's probability, ``out`` is its
``v`` and the difference has to vanish. In float32 it does so only if both products are added up in the same order, so
there delta comes from a matrix product, of which the diagonal is kept.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .config import Meta, next_power_of_2
from .tiles import dot, load_tile


@triton.jit
def attention_delta_kernel(
    grad_out_ptr, grad_log_sum_ptr, out_ptr, delta_ptr, num_rows, seq_len,
    stride_gb, stride_gt, stride_gh, stride_lb, stride_lt, stride_lh,
    NUM_HEADS: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_DV: tl.constexpr,
    BY_PRODUCT: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    exists = rows < num_rows
    n = rows // NUM_HEADS
    h = rows % NUM_HEADS
    b = n // seq_len
    t = n % seq_len
    grad_out = load_tile(grad_out_ptr, b * stride_gb + t * stride_gt + h * stride_gh, exists, HEAD_DIM_V, BLOCK_DV)
    out = load_tile(out_ptr, rows * HEAD_DIM_V, exists, HEAD_DIM_V, BLOCK_DV)
    if BY_PRODUCT:
        own = tl.arange(0, BLOCK_R)[:, None] == tl.arange(0, BLOCK_R)[None, :]
        delta = tl.sum(tl.where(own, dot(grad_out, tl.trans(out)), 0.0), 1)
    else:
        delta = tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), 1)
    if grad_log_sum_ptr is not None:
        delta -= tl.load(grad_log_sum_ptr + b * stride_lb + t * stride_lt + h * stride_lh, mask=exists, other=0.0)
    tl.store(delta_ptr + rows, delta, mask=exists)


def meta(num_heads: int, head_dim_v: int, itemsize: int) -> Meta:
    """Compile-time constants and launch options."""
    block_dv = max(16, next_power_of_2(head_dim_v))
    by_product = itemsize == 4
    return {
        "NUM_HEADS": num_heads,
        "HEAD_DIM_V": head_dim_v,
        "BLOCK_R": 16 if by_product else max(1, 4096 // block_dv),
        "BLOCK_DV": block_dv,
        "BY_PRODUCT": by_product,
        "num_warps": 4,
    }


def launch(grad_out: torch.Tensor, grad_log_sum: torch.Tensor | None, out: torch.Tensor, delta: torch.Tensor) -> None:
    """Fill ``delta``, float32 like grad_log_sum, ``[B, T, HQ]``, from grad_out and out ``[B, T, HQ, DV]``."""
    constants = meta(out.shape[2], out.shape[3], out.element_size())
    num_rows = delta.numel()
    if num_rows:
        sum_strides = (0, 0, 0) if grad_log_sum is None else grad_log_sum.stride()
        attention_delta_kernel[(triton.cdiv(num_rows, constants["BLOCK_R"]),)](
            grad_out, grad_log_sum, out, delta, num_rows, out.shape[1], *grad_out.stride()[:3], *sum_strides,
            **constants,
        )  # fmt: skip
