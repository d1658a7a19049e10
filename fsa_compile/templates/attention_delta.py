"""Backward, first step: ``delta = rowsum(grad_out * out) - grad_log_sum``, the softmax Jacobian's rank-one term.

The gradient of a score is ``p * (grad_out @ v - delta)``. Where one key has all of a row's probability, ``out`` is its
``v`` and the difference has to vanish. In float32 it does so only if both products are added up in the same order, so
there delta comes from a matrix product, of which the diagonal is kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..tiling import Config, Device, padded
from .kernel import Dense, Kernel, Output, Plan, Strided
from .sequences import Rows
from .tiles import dot, load_tile


class DeltaSizes(NamedTuple):
    """Static sizes."""

    NUM_HEADS: int
    HEAD_DIM_V: int
    BLOCK_DV: int
    ITEMSIZE: int


@triton.jit
def attention_delta_kernel(
    grad_out: Rows, grad_log_sum, out, delta, num_rows, seq_len, SIZES: tl.constexpr, BLOCK_R: tl.constexpr
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    exists = rows < num_rows
    n = rows // SIZES.NUM_HEADS
    h = rows % SIZES.NUM_HEADS
    b = n // seq_len
    t = n % seq_len
    places = b * grad_out.strides[0] + t * grad_out.strides[1] + h * grad_out.strides[2]
    grad_rows = load_tile(grad_out.ptr, places, exists, SIZES.HEAD_DIM_V, SIZES.BLOCK_DV)
    out_rows = load_tile(out, rows * SIZES.HEAD_DIM_V, exists, SIZES.HEAD_DIM_V, SIZES.BLOCK_DV)
    if SIZES.ITEMSIZE == 4:
        own = tl.arange(0, BLOCK_R)[:, None] == tl.arange(0, BLOCK_R)[None, :]
        value = tl.sum(tl.where(own, dot(grad_rows, tl.trans(out_rows)), 0.0), 1)
    else:
        value = tl.sum(grad_rows.to(tl.float32) * out_rows.to(tl.float32), 1)
    if grad_log_sum is not None:
        value -= tl.load(grad_log_sum + rows, mask=exists, other=0.0)
    tl.store(delta + rows, value, mask=exists)


def plan(grad_out: Any, grad_log_sum: Any, out: Any) -> Plan:
    """delta ``[B, T, HQ]`` float32."""
    batch, seq_len, num_heads, head_dim_v = out.shape
    num_rows = batch * seq_len * num_heads
    return Plan(
        {
            "grad_out": Strided(grad_out),
            "grad_log_sum": None if grad_log_sum is None else Dense(grad_log_sum),
            "out": Dense(out),
            "num_rows": num_rows,
            "seq_len": seq_len,
        },
        {"delta": Output((batch, seq_len, num_heads), torch.float32)},
        DeltaSizes(int(num_heads), int(head_dim_v), padded(int(head_dim_v)), out.dtype.itemsize),
        (num_rows,),
    )


def grid(extent: tuple[Any, ...], tiles: dict[str, Any], cdiv: Any) -> tuple[Any, Any, Any]:
    """BLOCK_R rows a program."""
    return cdiv(extent[0], tiles["BLOCK_R"]), 1, 1


def heuristic(sizes: DeltaSizes, device: Device) -> Config:
    """Bound by memory."""
    return Config({"BLOCK_R": 16 if sizes.ITEMSIZE == 4 else max(1, 4096 // sizes.BLOCK_DV)}, 4, 2)


ATTENTION_DELTA = Kernel(
    attention_delta_kernel,
    "_attention_delta(Tensor grad_out, Tensor? grad_log_sum, Tensor out) -> Tensor",
    plan, grid, heuristic, lambda sizes, device: [heuristic(sizes, device)],
)  # fmt: skip
