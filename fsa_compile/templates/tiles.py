"""Device functions shared by the kernels.

Rows of the flattened query axis are numbered ``n = b * seq_len + t`` (batched) or by token (packed). An *entry* is one
(row, key/value head, slot) of ``block_indices``, numbered in row-major order. Offsets that can pass 2**31 are int64.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


class Statistics(NamedTuple):
    """What a backward knows of the rows, float32 ``[B, T, HQ]`` each: softmax statistics and delta."""

    shift: Any
    log_sum: Any
    delta: Any


@triton.jit
def load_statistics(rows: Statistics, row, exists):
    """Statistics of the rows numbered ``row``; of those that do not exist, what gives probability 0."""
    shift = tl.load(rows.shift + row, mask=exists, other=0.0)
    log_sum = tl.load(rows.log_sum + row, mask=exists, other=float("-inf"))
    return shift, log_sum, tl.load(rows.delta + row, mask=exists, other=0.0)


@triton.jit
def rows_apart(rows, stride):
    """How far ``rows`` rows are, in 64 bits.

    In a loop either carried from tile to tile, or of a counter that the compiler does not see (``opaque.py``).
    Multiplied out from a counter that it does see, LLVM widens the counter to 64 bits where sizes are constants, as in
    Inductor's templates, and every comparison with it: a window's forward took 358 instructions a tile for 292.
    """
    return (tl.zeros([], tl.int64) + rows) * stride


@triton.jit
def is_visible(block, pos, BLOCK_SIZE: tl.constexpr):
    """Whether a block id names a block that the query at ``pos`` may read: not padding, not in the future, in range.

    A negative position sees nothing; on a GPU division rounds towards zero, and would give it block 0.
    """
    return (block >= 0) & (pos >= 0) & (block <= pos // BLOCK_SIZE)


@triton.jit
def load_tile(ptr, rows, row_mask, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr):
    """Rows of a matrix whose last axis is contiguous: ``ptr + rows[:, None] + arange(BLOCK_W)``."""  # [ROWS, BLOCK_W]
    cols = tl.arange(0, BLOCK_W)
    mask = row_mask[:, None]
    if BLOCK_W != WIDTH:
        mask = mask & (cols < WIDTH)[None, :]
    return tl.load(ptr + (rows[:, None] + cols[None, :]), mask=mask, other=0.0)


@triton.jit
def load_whole_tile(ptr, rows, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr):
    """``load_tile`` of rows that all exist."""  # [ROWS, BLOCK_W]
    cols = tl.arange(0, BLOCK_W)
    pointers = ptr + (rows[:, None] + cols[None, :])
    if BLOCK_W != WIDTH:
        return tl.load(pointers, mask=(cols < WIDTH)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def store_tile(ptr, rows, row_mask, value, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr):
    """The counterpart of ``load_tile``."""
    cols = tl.arange(0, BLOCK_W)
    mask = row_mask[:, None]
    if BLOCK_W != WIDTH:
        mask = mask & (cols < WIDTH)[None, :]
    tl.store(ptr + (rows[:, None] + cols[None, :]), value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def dot(a, b):
    """Matrix product with float32 accumulation; float32 operands are not rounded to tf32."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def accumulate(total, lost, value, COMPENSATED: tl.constexpr):
    """``total + value``, and what rounding lost of it, which the next call returns to the sum (Kahan).

    Long lists make float32 sums of thousands of terms; with 16-bit inputs their rounding does not show, and nothing
    is kept.
    """
    if COMPENSATED:
        value -= lost
        new_total = total + value
        lost = (new_total - total) - value
        total = new_total
    else:
        total += value
    return total, lost


@triton.jit
def finite_max(row_max):
    """A row maximum that can be subtracted: 0 where no key was visible, so that ``-inf - max`` stays ``-inf``."""
    return tl.where(row_max == float("-inf"), 0.0, row_max)


@triton.jit
def exp_scaled(scores, shift, scale):
    """``exp(scale * (scores - shift))``, ``-inf`` giving 0.

    Scores are raw products and the shift one of their maxima, so that their difference has no rounding error where it
    matters, whatever the compiler contracts: scaled first, scores of 1e4 would be off by 1e-3, and differently so from
    one kernel to the next.
    """
    return tl.exp2((scores - shift) * (scale * LOG2E))


@triton.jit
def probabilities(scores, visible, shift, log_sum, scale):
    """A row's softmax as its statistics have it; 0 where a key is not visible or a row sees none."""
    exponent = (scores - shift) * (scale * LOG2E) - log_sum * LOG2E
    return tl.exp2(tl.where(visible & (log_sum != float("-inf")), exponent, float("-inf")))


@triton.jit
def log_or_none(row_sum):
    """Natural logarithm of a row's sum; ``-inf`` for a row with no visible key, whose sum is 0."""
    empty = row_sum == 0  # not what is NaN
    return tl.where(empty, float("-inf"), tl.log2(tl.where(empty, 1.0, row_sum)) * LN2)


@triton.jit
def store_output(ptr, indices, strides, value, mask, SHAPE: tl.constexpr):
    """Store a kernel's main result: element ``value[i, j]`` at ``indices`` (one per axis, each broadcasting to SHAPE).

    Under Inductor this very call becomes the template's store, with the epilogue behind it, and the output's own
    strides are taken. The last axis is dense.
    """
    offset = 0
    for axis in tl.static_range(len(strides)):
        offset += indices[axis].to(tl.int64) * strides[axis]
    tl.store(ptr + (offset + indices[len(strides)]), value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def columns(exists, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr):
    """Column numbers ``[1, BLOCK_W]``, and the mask ``[ROWS, BLOCK_W]`` of what there is of rows and columns."""
    cols = tl.arange(0, BLOCK_W)[None, :]
    return cols, exists[:, None] & (cols < WIDTH)


@triton.jit
def dense_strides(seq_len, num_heads, width):
    """Strides of batch, time and head of a dense ``[B, T, H, W]`` tensor, the first two in 64 bits."""
    row = tl.zeros([], tl.int64) + num_heads * width
    return row * seq_len, row, width


@triton.jit
def all_finite(x):
    """Whether every element of a tile is finite (scalar).

    Zero times it is zero then, and NaN otherwise. Not axis by axis, which Triton 3.7 cannot compile for sm_100; and not
    by counting, which in the template of dk and dv leaves 2 KiB of registers to memory (Triton 3.6).
    """
    return tl.sum(x * 0.0) == 0.0


@triton.jit
def rows_finite(x, row):
    """Whether every element of a tile and of a number a row is finite: one reduction for both."""
    return tl.sum(x * (row * 0.0)[:, None]) == 0.0


@triton.jit
def finite_part(x):
    """``x`` with 0 for what is not finite."""
    return tl.where(tl.abs(x.to(tl.float32)) < float("inf"), x, 0.0).to(x.dtype)


@triton.jit
def add_met(met, visible, x):
    """``met`` and how many of a row's visible ``x`` are not finite, by column."""
    infinite = tl.where(tl.abs(x.to(tl.float32)) < float("inf"), 0.0, 1.0).to(x.dtype)
    return tl.dot(visible.to(x.dtype), infinite, met, input_precision="ieee")
