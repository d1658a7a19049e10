"""Backward: what the pass over dk and dv reads of each query row and head, beside each other, as it gathers rows.

A softmax weight is ``exp2(score * scale * log2(e) + minus)``; the row has ``minus``, -inf if it sees nothing, and
``-scale * delta``. One number rounds by 4e-4 at logits of 1e4, as much as a weight does in 16 bits. Of float32 inputs
the row has three: ``shift``, ``log_sum`` (inf if it sees nothing) and ``-delta``. They are read here, too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..tiling import Config, Device
from .kernel import Dense, Kernel, Output, Plan
from .tiles import LOG2E, store_output


class WeightSizes(NamedTuple):
    """Static sizes: numbers of a row."""

    NUMBERS: int


@triton.jit
def _load_or_zero(pointers, exists):
    if exists is None:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=exists, other=0)


@triton.jit
def load_row_weights(weights, row, exists, COMPENSATED: tl.constexpr):
    """Three numbers of each row: ``(shift, log_sum, -delta)`` if COMPENSATED, else ``(0,
    minus, -scale * delta)``, of which the pair is one load. exists: None if all do; zeros of one that does not.
    """
    if COMPENSATED:
        shift = _load_or_zero(weights + row * 3, exists)
        log_sum = _load_or_zero(weights + row * 3 + 1, exists)
        return shift, log_sum, _load_or_zero(weights + row * 3 + 2, exists)
    else:
        pair = _load_or_zero(weights.to(tl.pointer_type(tl.int64)) + row, exists)
        minus = pair.to(tl.int32).to(tl.float32, bitcast=True)
        return 0.0, minus, (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def without_rows(known, valid, COMPENSATED: tl.constexpr):
    """``known`` of ``load_row_weights`` so that rows that are not valid have weights of 0."""
    if COMPENSATED:
        return known[0], tl.where(valid, known[1], float("inf")), known[2]
    else:
        return known[0], tl.where(valid, known[1], float("-inf")), known[2]


@triton.jit
def weights_of(scores, known, scale, COMPENSATED: tl.constexpr):
    """Softmax weights of scores whose columns are rows, of which ``load_row_weights`` has ``known``."""
    if COMPENSATED:
        return tl.exp2(tl.fma(scores - known[0][None, :], scale * LOG2E, known[1][None, :] * -LOG2E))
    else:
        return tl.exp2(tl.fma(scores, scale * LOG2E, known[1][None, :]))


@triton.jit
def gradient_of_scores(p, dp, known, scale, COMPENSATED: tl.constexpr):
    """The gradient of the products before scaling. COMPENSATED: nothing where ``dp`` and delta are the same number."""
    if COMPENSATED:
        return p * (dp + known[2][None, :]) * scale
    else:
        return p * tl.fma(dp, scale, known[2][None, :])


@triton.jit
def row_weights_kernel(shift, log_sum, delta, weights, num_rows, scale, SIZES: tl.constexpr, BLOCK_R: tl.constexpr):
    zero = tl.zeros([], tl.int64)
    rows = (zero + tl.program_id(0)) * BLOCK_R + tl.arange(0, BLOCK_R)
    exists = rows < num_rows
    row_shift = tl.load(shift + rows, mask=exists, other=0.0)
    row_log_sum = tl.load(log_sum + rows, mask=exists, other=0.0)
    row_delta = tl.load(delta + rows, mask=exists, other=0.0)
    nothing = row_log_sum == float("-inf")
    NUMBERS: tl.constexpr = SIZES.NUMBERS
    WIDTH: tl.constexpr = 2 if NUMBERS == 2 else 4
    cols = tl.arange(0, WIDTH)[None, :]
    if NUMBERS == 2:
        factor = scale * LOG2E  # the very number that scores are multiplied by
        minus = tl.where(nothing, float("-inf"), tl.fma(row_shift, -factor, row_log_sum * -LOG2E))
        value = tl.where(cols == 0, minus[:, None], (row_delta * -scale)[:, None])
    else:
        first = tl.where(nothing, float("inf"), row_log_sum)
        value = tl.where(cols == 0, row_shift[:, None], tl.where(cols == 1, first[:, None], -row_delta[:, None]))
    mask = exists[:, None] & (cols < NUMBERS)
    store_output(weights, (rows[:, None], cols), (NUMBERS,), value, mask, (BLOCK_R, WIDTH))


def plan(shift: Any, log_sum: Any, delta: Any, *, scale: float, compensated: bool) -> Plan:
    """weights ``[B, T, HQ, 2]`` float32, or ``3`` if compensated, for float32 inputs; from three ``[B, T, HQ]``."""
    sizes = WeightSizes(3 if compensated else 2)
    num_rows = shift.shape[0] * shift.shape[1] * shift.shape[2]
    return Plan(
        {
            "shift": Dense(shift),
            "log_sum": Dense(log_sum),
            "delta": Dense(delta),
            "num_rows": num_rows,
            "scale": scale,
        },
        {"weights": Output((*shift.shape, sizes.NUMBERS), torch.float32)},
        sizes,
        (num_rows,),
    )


def grid(extent: tuple[Any, ...], tiles: dict[str, Any], cdiv: Any) -> tuple[Any, Any, Any]:
    """BLOCK_R rows a program."""
    return cdiv(extent[0], tiles["BLOCK_R"]), 1, 1


def heuristic(sizes: WeightSizes, device: Device) -> Config:
    """Bound by memory."""
    return Config({"BLOCK_R": 512}, 4, 1)


ROW_WEIGHTS = Kernel(
    row_weights_kernel,
    "_row_weights(Tensor shift, Tensor log_sum, Tensor delta, *, float scale, bool compensated) -> Tensor",
    plan, grid, heuristic, lambda sizes, device: [heuristic(sizes, device)], fuses_epilogue=False,
)  # fmt: skip
