"""Where a call's rows and keys lie: one description for batched, packed and padded calls.

A *run* is consecutive query rows that share keys. Batched, every batch row is one; packed, every sequence, and the rows
before the first and after the last sequence, which have no keys. A run's queries are the last ``num_rows`` of its
``num_keys`` positions; one that would stand before the first key sees nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Rows(NamedTuple):
    """A ``[B, T, H, W]`` tensor as a kernel sees it: pointer, and strides of all axes but the last, which is dense."""

    ptr: Any
    strides: Any


class Sequences(NamedTuple):
    """What tells a kernel the runs of a call. Values are ints and int32 tensors, or None.

    seq_len, seq_len_k: rows of a batch row (all of them when packed), of the queries and of the keys.
    num_seqs: batch, or the number of packed sequences.
    cu_seqlens_q, cu_seqlens_k: (num_seqs + 1,), None when batched.
    seqused_k, leftpad_k: (batch,), the end and the start of a batch row's keys; None: all of them.
    """

    seq_len: Any
    seq_len_k: Any
    num_seqs: Any
    cu_seqlens_q: Any = None
    cu_seqlens_k: Any = None
    seqused_k: Any = None
    leftpad_k: Any = None


class Run(NamedTuple):
    """One run. Query row ``first_row + i`` stands at position ``offset + i``, key ``j`` is row ``first_key + j``.

    b: batch index. seq: which sequence it is (the batch index when batched), -1 for rows of no sequence.
    """

    b: Any
    seq: Any
    first_row: Any
    num_rows: Any
    first_key: Any
    num_keys: Any
    offset: Any


@triton.jit
def run_start(cu_seqlens, num_seqs, total, r):
    """Where packed run ``r`` starts: run 0 is what lies before the first sequence, ``num_seqs + 1`` after the last."""
    i = tl.minimum(tl.maximum(r - 1, 0), num_seqs)
    bound = tl.minimum(tl.maximum(tl.load(cu_seqlens + i), 0), total)
    return tl.where(r <= 0, 0, tl.where(r > num_seqs + 1, total, bound))


@triton.jit
def find_run(cu_seqlens, num_seqs, total, value, BLOCK: tl.constexpr, APART: tl.constexpr = True):
    """The last packed run that starts at or before ``value``; with a BLOCK, counted in tiles that no run shares.

    Run ``r`` owns the tiles from ``run_start(r) // BLOCK + r`` on: as many as it can need, known without any table. Not
    APART, from ``run_start(r) // BLOCK`` on: as many as it fills.
    """
    lo = value * 0
    hi = value * 0 + num_seqs + 1
    width = num_seqs + 1
    while width > 0:
        mid = (lo + hi + 1) // 2
        start = run_start(cu_seqlens, num_seqs, total, mid)
        if BLOCK > 0:
            start = start // BLOCK + (mid if APART else 0)
        below = start <= value
        lo = tl.where(below, mid, lo)
        hi = tl.where(below, hi, mid - 1)
        width = width // 2
    return lo


@triton.jit
def packed_run(seqs: Sequences, r):
    """Packed run ``r`` (scalar or tile)."""
    inside = (r >= 1) & (r <= seqs.num_seqs)
    first_row = run_start(seqs.cu_seqlens_q, seqs.num_seqs, seqs.seq_len, r)
    num_rows = tl.maximum(run_start(seqs.cu_seqlens_q, seqs.num_seqs, seqs.seq_len, r + 1) - first_row, 0)
    first_key = run_start(seqs.cu_seqlens_k, seqs.num_seqs, seqs.seq_len_k, r)
    num_keys = run_start(seqs.cu_seqlens_k, seqs.num_seqs, seqs.seq_len_k, r + 1) - first_key
    num_keys = tl.where(inside, tl.maximum(num_keys, 0), 0)
    return Run(r * 0, tl.where(inside, r - 1, -1), first_row, num_rows, first_key, num_keys, num_keys - num_rows)


@triton.jit
def batched_run(seqs: Sequences, b):
    """The run of batch row ``b`` (scalar or tile). ``first_row`` is on the time axis, so 0."""
    first_key = b * 0
    if seqs.leftpad_k is not None:
        first_key = tl.minimum(tl.maximum(tl.load(seqs.leftpad_k + b), 0), seqs.seq_len_k)
    end = b * 0 + seqs.seq_len_k
    if seqs.seqused_k is not None:
        end = tl.minimum(tl.maximum(tl.load(seqs.seqused_k + b), 0), end)
    num_keys = tl.maximum(end - first_key, 0)
    return Run(b, b, b * 0, b * 0 + seqs.seq_len, first_key, num_keys, num_keys - seqs.seq_len)


@triton.jit
def run_of_row(seqs: Sequences, n):
    """The run of query row ``n`` (scalar or tile; rows of a batch are numbered ``b * seq_len + t``), and ``t``, the
    row on the time axis: its position is ``run.offset + t - run.first_row``.
    """
    if seqs.cu_seqlens_q is not None:
        run = packed_run(seqs, find_run(seqs.cu_seqlens_q, seqs.num_seqs, seqs.seq_len, n, 0))
        t = n
    else:
        b = n // seqs.seq_len
        run = batched_run(seqs, b)
        t = n - b * seqs.seq_len
    return run, t


@triton.jit
def run_of_tile(seqs: Sequences, w, BLOCK: tl.constexpr):
    """The run that query tile ``w`` is of, and the first of its BLOCK query rows, counted within the run.

    The first row may be past the end: such a tile has nothing to do. There are ``num_tiles`` of them.
    """
    if seqs.cu_seqlens_q is not None:
        r = find_run(seqs.cu_seqlens_q, seqs.num_seqs, seqs.seq_len, w, BLOCK)
        run = packed_run(seqs, r)
        first = (w - run.first_row // BLOCK - r) * BLOCK
    else:
        tiles = tl.cdiv(seqs.seq_len, BLOCK)
        b = w // tiles
        run = batched_run(seqs, b)
        first = (w - b * tiles) * BLOCK
    return run, first


@triton.jit
def run_of_block(seqs: Sequences, w, BLOCK_SIZE: tl.constexpr):
    """The run that block ``w`` is of, its number within the run, and how many rows of ``k`` the run's blocks cover.

    Blocks count from a run's first key, and are numbered as key tiles of BLOCK_SIZE are. Together they cover every row
    of ``k`` once: relative row ``i`` of a run is row ``(first_key + i) % seq_len_k``, which of a padded batch row comes
    round to what lies before the first key.
    """
    if seqs.cu_seqlens_k is not None:
        r = find_run(seqs.cu_seqlens_k, seqs.num_seqs, seqs.seq_len_k, w, BLOCK_SIZE)
        run = packed_run(seqs, r)
        start = run_start(seqs.cu_seqlens_k, seqs.num_seqs, seqs.seq_len_k, r)
        block = w - start // BLOCK_SIZE - r
        num_rows = run_start(seqs.cu_seqlens_k, seqs.num_seqs, seqs.seq_len_k, r + 1) - start
    else:
        blocks = tl.cdiv(seqs.seq_len_k, BLOCK_SIZE)
        b = w // blocks
        run = batched_run(seqs, b)
        block = w - b * blocks
        num_rows = b * 0 + seqs.seq_len_k
    return run, block, num_rows


@triton.jit
def run_of_compressed(seqs: Sequences, b, rows, STRIDE: tl.constexpr):
    """The runs of ``rows`` (a tile) of the compressed tokens of batch row ``b``, and which of its run each row is.

    Packed, a run's first is row ``first_key // STRIDE``, and no other run has one before that run's last. Not every row
    is a compressed token: a run may be too short to have it.
    """
    if seqs.cu_seqlens_k is not None:
        r = find_run(seqs.cu_seqlens_k, seqs.num_seqs, seqs.seq_len_k, rows, STRIDE, False)
        run = packed_run(seqs, r)
        window = rows - run.first_key // STRIDE
    else:
        run = batched_run(seqs, b)
        window = rows
    return run, window


def num_tiles(batch: Any, rows: Any, num_seqs: Any, packed: bool, block: int, cdiv: Any) -> Any:
    """How many tiles of ``block`` rows ``run_of_tile`` and ``run_of_block`` number."""
    return cdiv(rows - (block - 1), block) + num_seqs + 2 if packed else batch * cdiv(rows, block)
