"""Backward, first step: ``delta = rowsum(grad_out * out) - grad_lse``, the softmax Jacobian's rank-one term."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .config import Meta, next_power_of_2
from .tiles import load_tile


@triton.jit
def attention_delta_kernel(
    grad_out_ptr, grad_lse_ptr, out_ptr, delta_ptr, num_rows, seq_len,
    stride_gb, stride_gt, stride_gh, stride_lb, stride_lt, stride_lh,
    NUM_HEADS: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    exists = rows < num_rows
    n = rows // NUM_HEADS
    h = rows % NUM_HEADS
    b = n // seq_len
    t = n % seq_len
    grad_out = load_tile(grad_out_ptr, b * stride_gb + t * stride_gt + h * stride_gh, exists, HEAD_DIM_V, BLOCK_DV)
    out = load_tile(out_ptr, rows * HEAD_DIM_V, exists, HEAD_DIM_V, BLOCK_DV)
    delta = tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), 1)
    if grad_lse_ptr is not None:
        delta -= tl.load(grad_lse_ptr + b * stride_lb + t * stride_lt + h * stride_lh, mask=exists, other=0.0)
    tl.store(delta_ptr + rows, delta, mask=exists)


def meta(num_heads: int, head_dim_v: int) -> Meta:
    """Compile-time constants and launch options."""
    block_dv = max(16, next_power_of_2(head_dim_v))
    return {
        "NUM_HEADS": num_heads,
        "HEAD_DIM_V": head_dim_v,
        "BLOCK_R": max(1, 4096 // block_dv),
        "BLOCK_DV": block_dv,
        "num_warps": 4,
    }


def launch(grad_out: torch.Tensor, grad_lse: torch.Tensor | None, out: torch.Tensor, delta: torch.Tensor) -> None:
    """Fill ``delta`` ``[B, T, HQ]``, float32, from grad_out and out ``[B, T, HQ, DV]`` and grad_lse ``[B, T, HQ]``."""
    constants = meta(out.shape[2], out.shape[3])
    num_rows = delta.numel()
    if num_rows:
        lse_strides = (0, 0, 0) if grad_lse is None else grad_lse.stride()
        attention_delta_kernel[(triton.cdiv(num_rows, constants["BLOCK_R"]),)](
            grad_out, grad_lse, out, delta, num_rows, out.shape[1], *grad_out.stride()[:3], *lse_strides, **constants
        )
