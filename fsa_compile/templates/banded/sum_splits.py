"""Banded attention, backward: dk or dv as the sum, in order, of the splits' float32 parts."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...tiling import Config, Device, padded
from ..kernel import Dense, Kernel, Output, Plan
from ..tiles import dense_strides, store_output


class SumSizes(NamedTuple):
    """Static sizes."""

    SPLITS: int
    NUM_KV_HEADS: int
    WIDTH: int
    BLOCK_W: int


@triton.jit
def banded_sum_kernel(parts, total, num_rows, num_key_rows, SIZES: tl.constexpr, BLOCK_R: tl.constexpr):
    BLOCK_W: tl.constexpr = SIZES.BLOCK_W
    SPLITS: tl.constexpr = SIZES.SPLITS
    zero = tl.full([], 0, tl.int64)
    row = (zero + tl.program_id(0)) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    cols = tl.arange(0, BLOCK_W)[None, :]
    mask = (row < num_rows) & (cols < SIZES.WIDTH)
    value = tl.load(parts + (row * SIZES.WIDTH + cols), mask=mask, other=0.0)
    for split in tl.static_range(1, SPLITS):
        value += tl.load(parts + ((row + (zero + split) * num_rows) * SIZES.WIDTH + cols), mask=mask, other=0.0)
    h = row % SIZES.NUM_KV_HEADS
    n = row // SIZES.NUM_KV_HEADS
    b = n // num_key_rows
    t = n % num_key_rows
    strides = dense_strides(num_key_rows, SIZES.NUM_KV_HEADS, SIZES.WIDTH)
    store_output(total, (b, t, h, cols), strides, value, mask, (BLOCK_R, BLOCK_W))


def plan(parts: Any, like: Any, *, splits: int) -> Plan:
    """parts: (splits * batch, key rows, num_kv_heads, width), float32. like: (batch, ...), of the result's dtype."""
    batch, key_rows, num_kv_heads, width = like.shape
    num_rows = batch * key_rows * num_kv_heads
    return Plan(
        inputs={"parts": Dense(parts), "num_rows": num_rows, "num_key_rows": key_rows},
        outputs={"total": Output((batch, key_rows, num_kv_heads, width), like.dtype)},
        sizes=SumSizes(splits, int(num_kv_heads), int(width), padded(int(width))),
        extent=(num_rows,),
    )


def heuristic(sizes: SumSizes, device: Device) -> Config:
    """Bound by memory."""
    return Config({"BLOCK_R": max(1, 2048 // sizes.BLOCK_W)}, 4, 1)


BANDED_SUM = Kernel(
    fn=banded_sum_kernel,
    schema="_banded_sum(Tensor parts, Tensor like, *, int splits) -> Tensor total",
    plan=plan,
    grid=lambda extent, tiles, cdiv: (cdiv(extent[0], tiles["BLOCK_R"]), 1, 1),
    heuristic=heuristic,
    candidates=lambda sizes, device: [heuristic(sizes, device)],
)
