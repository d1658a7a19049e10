"""Which keys a query tile sees, and which queries a key tile: banded attention's device functions; see ``sizes.py``."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..query_tiles import Place, keys_and_values, load_keys, place_of_tile
from ..sequences import Rows, Run, Sequences, batched_run, find_run, packed_run, run_of_tile, run_start
from ..tiles import add_met, rows_apart


class Band(NamedTuple):
    """Of a query tile, by key: seen by some row from ``some_from`` to ``some_to``, by all in ``all_from, all_to``.

    row_from, row_to: ``[BLOCK_M]``; a row sees the keys from one to the other.
    """

    some_from: Any
    all_from: Any
    all_to: Any
    some_to: Any
    row_from: Any
    row_to: Any


@triton.jit
def keys_of_run(run: Run, seqs: Sequences, num_key_rows, SIZES: tl.constexpr):
    """First row of ``k`` and number of keys of a run."""
    first = run.first_key
    count = run.num_keys
    if SIZES.WINDOW == 0:
        count = tl.maximum(count - SIZES.FIRST_END - 1 + SIZES.STRIDE, 0) // SIZES.STRIDE
        if seqs.cu_seqlens_q is not None:
            first = first // SIZES.STRIDE
        else:
            first = first * 0
        count = tl.maximum(tl.minimum(count, num_key_rows - first), 0)
    return first, count


@triton.jit
def keys_up_to(pos, count, SIZES: tl.constexpr):
    """How many of ``count`` keys have ``last(i) <= pos``."""
    return tl.minimum(tl.maximum(pos - SIZES.FIRST_END + SIZES.STRIDE, 0) // SIZES.STRIDE, count)


@triton.jit
def band_of_tile(run: Run, first, count, place: Place, SIZES: tl.constexpr, TOKENS: tl.constexpr):
    """The keys that the TOKENS tokens from ``first`` of a run see; none of a tile past the run's end."""
    low = run.offset + first
    high = run.offset + tl.minimum(first + TOKENS, run.num_rows) - 1
    some_from = first * 0
    all_from = first * 0
    row_from = place.pos * 0
    if SIZES.WINDOW > 0:
        some_from = keys_up_to(low - SIZES.WINDOW, count, SIZES)
        all_from = keys_up_to(high - SIZES.WINDOW, count, SIZES)
        row_from = keys_up_to(place.pos - SIZES.WINDOW, count, SIZES)
    some_to = tl.where(first < run.num_rows, keys_up_to(high, count, SIZES), some_from)
    row_to = keys_up_to(place.pos, count, SIZES)
    return Band(some_from, all_from, keys_up_to(low, count, SIZES), some_to, row_from, row_to)


@triton.jit
def query_tile(
    k: Rows, v: Rows, seqs: Sequences, num_key_rows, w, hk, head_tile, SIZES: tl.constexpr, BLOCK_M: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Of query tile ``w``: where its rows lie, its run's keys and values, and which of them it sees."""
    run, first = run_of_tile(seqs, w, TOKENS)
    first_key, count = keys_of_run(run, seqs, num_key_rows, SIZES)
    place = place_of_tile(run, first, hk, head_tile, seqs.seq_len, SIZES, BLOCK_M, TOKENS, HEADS)
    band = band_of_tile(run, first, count, place, SIZES, TOKENS)
    return place, keys_and_values(k, v, run.b, first_key, hk), band


@triton.jit
def whole_tiles(band: Band, SIZES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr):
    """From where to where keys are whole tiles of BLOCK_N that every row sees; tiles of BLOCK_E lead up to them."""
    start = band.some_from
    if SIZES.WINDOW > 0:
        start += tl.cdiv(band.all_from - band.some_from, BLOCK_E) * BLOCK_E
    return start, start + tl.maximum(tl.minimum(band.all_to, band.some_to) - start, 0) // BLOCK_N * BLOCK_N


@triton.jit
def in_band(start, band: Band, SIZES: tl.constexpr, BLOCK: tl.constexpr):
    """Which of the keys from ``start`` on the rows see: a row's bounds move, so that an element has constants."""
    i = tl.arange(0, BLOCK)[None, :]
    visible = i < (band.row_to - start)[:, None]  # [BLOCK_M, BLOCK]
    if SIZES.WINDOW > 0:
        visible = visible & (i >= (band.row_from - start)[:, None])
    return visible


@triton.jit
def nan_of_keys(
    base, stride, band: Band, SIZES: tl.constexpr, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_M: tl.constexpr
):
    """NaN where a row sees a key whose ``k`` or ``v`` is not finite in that column, else 0: a careful sum's start."""
    met = tl.zeros([BLOCK_M, BLOCK_W], tl.float32)
    here = base + rows_apart(band.some_from, stride)
    for i in tl.range(band.some_from, band.some_to, 16, num_stages=1):
        x = load_keys(here, stride, band.some_to - i, WIDTH, BLOCK_W, 16, True)
        met = add_met(met, in_band(i, band, SIZES, 16), x)
        here += rows_apart(16, stride)
    return tl.where(met > 0, float("nan"), 0.0)


class KeyTile(NamedTuple):
    """A tile of keys. first: its first key, counted within the run.

    row_end: the rows of ``k`` to write end there. some_from to some_to: the tokens of the run that see some of the
    keys; all_from to all_to: those that see them all.
    """

    run: Run
    first: Any
    first_key: Any
    count: Any
    row_end: Any
    some_from: Any
    all_from: Any
    all_to: Any
    some_to: Any


@triton.jit
def _clamped(pos, run: Run):
    return tl.minimum(tl.maximum(pos - run.offset, 0), run.num_rows)


@triton.jit
def key_tile(seqs: Sequences, num_key_rows, w, SIZES: tl.constexpr, BLOCK_N: tl.constexpr):
    """Key tile ``w``. Tiles cover every row of ``k``, those of no run as well, whose gradients are zero.

    They count from a run's first key, so that its sums do not depend on where it lies; ``rows_of_keys`` tells where.
    """
    if seqs.cu_seqlens_k is not None:
        SPAN: tl.constexpr = BLOCK_N * SIZES.STRIDE
        r = find_run(seqs.cu_seqlens_k, seqs.num_seqs, seqs.seq_len_k, w, SPAN)
        run = packed_run(seqs, r)
        first = (w - run.first_key // SPAN - r) * BLOCK_N
        row_end = run_start(seqs.cu_seqlens_k, seqs.num_seqs, seqs.seq_len_k, r + 1) // SIZES.STRIDE
        row_end = tl.where(r > seqs.num_seqs, num_key_rows, tl.minimum(row_end, num_key_rows))
        first_key, count = keys_of_run(run, seqs, num_key_rows, SIZES)
    else:
        tiles = tl.cdiv(num_key_rows, BLOCK_N)
        b = w // tiles
        run = batched_run(seqs, b)
        first_key, count = keys_of_run(run, seqs, num_key_rows, SIZES)
        first = (w - b * tiles) * BLOCK_N
        row_end = w * 0 + num_key_rows
    low = first * SIZES.STRIDE + SIZES.FIRST_END
    high = (tl.minimum(first + BLOCK_N, count) - 1) * SIZES.STRIDE + SIZES.FIRST_END
    some_from = _clamped(low, run)
    all_from = _clamped(high, run)
    all_to = run.num_rows
    some_to = run.num_rows
    if SIZES.WINDOW > 0:
        all_to = _clamped(low + SIZES.WINDOW, run)
        some_to = _clamped(high + SIZES.WINDOW, run)
    some_to = tl.where(low > high, some_from, some_to)
    return KeyTile(run, first, first_key, count, row_end, some_from, all_from, all_to, some_to)


@triton.jit
def rows_of_keys(tile: KeyTile, seqs: Sequences, num_key_rows, BLOCK_N: tl.constexpr):
    """The rows of ``k`` that a tile's keys are, and which of them there are.

    A padded batch row's come round to what lies before its first key, as in ``run_of_block``.
    """  # [BLOCK_N]
    row = tile.first_key + tile.first + tl.arange(0, BLOCK_N)
    if seqs.leftpad_k is not None:
        exists = tile.first + tl.arange(0, BLOCK_N) < num_key_rows
        return tl.where(row >= num_key_rows, row - num_key_rows, row), exists
    return row, row < tile.row_end
