"""Tiles of query rows, for kernels with a program per tile.

A query tile holds TOKENS consecutive tokens of a run by HEADS heads of a group: row ``r`` is token ``r // HEADS`` and
head ``r % HEADS``, so that a tile is full whatever the group, and a token's heads share the keys on chip.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .sequences import Rows, Run, num_tiles
from .tiles import LN2, LOG2E, Statistics, columns, dense_strides, rows_apart

LOWEST = tl.constexpr(-3.4028234663852886e38)


class Place(NamedTuple):
    """Where a query tile's rows lie, all ``[BLOCK_M]`` but ``b``.

    n: row of the flattened ``[B * T * HQ]`` statistics. pos: position within its sequence.
    """

    b: Any
    t: Any
    h: Any
    n: Any
    exists: Any
    pos: Any


def query_tiles(sizes: Any, block_m: int) -> dict[str, int]:
    """The constexprs of a query tile of ``block_m`` rows; a group wider than that is cut."""
    heads = min(sizes.GROUP, block_m)
    return {"BLOCK_M": block_m, "TOKENS": block_m // heads, "HEADS": heads}


def query_grid(extent: tuple[Any, ...], tiles: dict[str, Any], cdiv: Any) -> tuple[Any, Any, Any]:
    """One program per query tile and key/value head; tiles run fastest, so that a head's keys stay in L2."""
    batch, seq_len, _, num_seqs, packed, num_kv_heads, group = extent
    return (
        num_tiles(batch, seq_len, num_seqs, packed, tiles["TOKENS"], cdiv),
        num_kv_heads * cdiv(group, tiles["HEADS"]),
        1,
    )


@triton.jit
def tile_of_program(SIZES: tl.constexpr, HEADS: tl.constexpr):
    """A program's query tile, key/value head and, in a group wider than a tile, which of its parts.

    Later queries see more keys (if no window cuts them) and have more blocks to select from: they go first, and the
    short ones fill the end.
    """
    parts = tl.cdiv(SIZES.GROUP, HEADS)
    return tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1) // parts, tl.program_id(1) % parts


@triton.jit
def place_of_tile(
    run: Run, first, hk, head_tile, seq_len, SIZES: tl.constexpr, BLOCK_M: tl.constexpr, TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    """The rows of the tile that starts at token ``first`` of a run."""
    row = tl.arange(0, BLOCK_M)
    token = first + row // HEADS
    head = head_tile * HEADS + row % HEADS
    exists = (token < run.num_rows) & (row < TOKENS * HEADS) & (head < SIZES.GROUP)
    pos = run.offset + token
    t = run.first_row + token
    h = hk * SIZES.GROUP + head
    n = (run.b.to(tl.int64) * seq_len + t) * (SIZES.NUM_KV_HEADS * SIZES.GROUP) + h
    return Place(run.b, t, h, n, exists, pos)


@triton.jit
def load_rows(x: Rows, place: Place, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr):
    """The tile's rows of a ``[B, T, HQ, WIDTH]`` tensor; 0 where there are none."""  # [BLOCK_M, BLOCK_W]
    cols = tl.arange(0, BLOCK_W)
    rows = place.t.to(tl.int64) * x.strides[1] + place.h.to(tl.int64) * x.strides[2]
    mask = place.exists[:, None]
    if BLOCK_W != WIDTH:
        mask = mask & (cols < WIDTH)[None, :]
    base = x.ptr + place.b.to(tl.int64) * x.strides[0]
    return tl.load(base + (rows[:, None] + cols[None, :]), mask=mask, other=0.0)


@triton.jit
def keys_base(x: Rows, b, first, hk):
    """Where the keys of a run and a head start in ``k`` or ``v``."""
    return x.ptr + (b.to(tl.int64) * x.strides[0] + first.to(tl.int64) * x.strides[1] + hk.to(tl.int64) * x.strides[2])


@triton.jit
def load_keys(here, stride, left, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK: tl.constexpr,
              MASKED: tl.constexpr):  # fmt: skip
    """The BLOCK keys from ``here`` on; those past ``left`` are 0 if MASKED, and must exist if not."""
    i = tl.arange(0, BLOCK)
    cols = tl.arange(0, BLOCK_W)
    pointers = here + (i[:, None] * stride + cols[None, :])  # [BLOCK, BLOCK_W]
    if MASKED:
        mask = (i < left)[:, None]
        if BLOCK_W != WIDTH:
            mask = mask & (cols < WIDTH)[None, :]
        return tl.load(pointers, mask=mask, other=0.0)
    elif BLOCK_W != WIDTH:
        return tl.load(pointers, mask=(cols < WIDTH)[None, :], other=0.0)
    else:
        return tl.load(pointers)


class Keys(NamedTuple):
    """The keys and values of a run and a head: where they start, and how far apart they lie."""

    k: Any
    k_stride: Any
    v: Any
    v_stride: Any


@triton.jit
def keys_and_values(k: Rows, v: Rows, b, first, hk):
    """Those of ``keys_base``."""
    return Keys(keys_base(k, b, first, hk), k.strides[1], keys_base(v, b, first, hk), v.strides[1])


@triton.jit
def load_k(keys: Keys, i, left, SIZES: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """``load_keys`` from key ``i`` of the run on."""
    here = keys.k + rows_apart(i, keys.k_stride)
    return load_keys(here, keys.k_stride, left, SIZES.HEAD_DIM, SIZES.BLOCK_D, BLOCK, MASKED)


@triton.jit
def load_v(keys: Keys, i, left, SIZES: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Likewise the values."""
    here = keys.v + rows_apart(i, keys.v_stride)
    return load_keys(here, keys.v_stride, left, SIZES.HEAD_DIM_V, SIZES.BLOCK_DV, BLOCK, MASKED)


@triton.jit
def exponent_shift(row_max, factor):
    """What is subtracted from scaled scores; never -inf, so that nothing is NaN by itself."""
    return tl.maximum(row_max * factor, LOWEST)


@triton.jit
def softmax_step(scores, row_max, row_sum, factor):
    """One step of the online softmax.

    ``exponent_shift`` rounds, by 1e-3 at logits of 1e4, but it is the same number in all of a row's weights; a fused
    product adds no rounding of its own. ``softmax_end`` returns to the logarithm what the shift lost.
    """
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    shift = exponent_shift(new_max, factor)
    p = tl.exp2(tl.fma(scores, factor, -shift[:, None]))
    decay = tl.exp2(exponent_shift(row_max, factor) - shift)
    return p, decay, new_max, row_sum * decay + tl.sum(p, 1)


@triton.jit
def softmax_end(acc, row_max, row_sum, factor):
    """The output, and the two softmax statistics, of rows; 0, 0 and -inf of those that saw nothing."""
    empty = row_sum == 0
    out = acc * (1.0 / tl.where(empty, 1.0, row_sum))[:, None]  # a division an element is ten instructions
    lost = tl.fma(row_max, -factor, exponent_shift(row_max, factor))
    log_sum = tl.where(empty, float("-inf"), (tl.log2(tl.where(empty, 1.0, row_sum)) + lost) * LN2)
    return out, tl.where(empty, 0.0, row_max), log_sum


@triton.jit
def store_statistics(shift, log_sum, place: Place, row_shift, row_log_sum):
    """Store the two softmax statistics of a tile's rows."""
    tl.store(shift + place.n, row_shift, mask=place.exists)
    tl.store(log_sum + place.n, row_log_sum, mask=place.exists)


@triton.jit
def output_of_tile(place: Place, seq_len, SIZES: tl.constexpr, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr):
    """Columns, mask and strides with which ``store_output`` stores a tile's rows of ``[B, T, HQ, WIDTH]``."""
    cols, mask = columns(place.exists, WIDTH, BLOCK_W)
    return cols, mask, dense_strides(seq_len, SIZES.NUM_KV_HEADS * SIZES.GROUP, WIDTH)


@triton.jit
def load_weights(rows: Statistics, place: Place, factor):
    """What the probabilities of a backward need of the tile's rows, and delta.

    Returns ``(minus, delta, shift, log_sum)``, log_sum times ``log2(e)``: a weight is ``exp2(score * factor + minus)``.
    ``minus`` rounds, by 1e-3 at logits of 1e4, but by as much in all of a row's weights: ``what_was_lost`` puts the row
    right at the end.
    """
    shift = tl.load(rows.shift + place.n, mask=place.exists, other=0.0)
    log_sum = tl.load(rows.log_sum + place.n, mask=place.exists, other=0.0)
    log_sum = tl.where(log_sum == float("-inf"), 0.0, log_sum) * LOG2E
    delta = tl.load(rows.delta + place.n, mask=place.exists, other=0.0)
    return tl.fma(-shift, factor, -log_sum), delta, shift, log_sum


@triton.jit
def what_was_lost(minus, shift, log_sum, factor):
    """The factor by which all of a row's weights are off."""
    return tl.exp2(-(tl.fma(shift, factor, minus) + log_sum))
