"""Sequences one by one, on a CPU: where each lies, and an attention's forward and backward over all of them.

What each gives is, bit for bit, what it gives alone (in the same loop order), and rows of none are zeros.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .options import Layout

__all__ = ["Run", "each_backward", "each_forward", "runs_of", "windows_of"]

_ALIGNMENT = 64  # bytes; products of operands that lie otherwise may round otherwise

Results = tuple[Tensor, Tensor, Tensor]


class Run(NamedTuple):
    """Consecutive query rows that share keys. The queries are the last of `num_keys` positions; those before the first
    key, which see nothing, are not among `rows`. `keys` are rows of what is attended to.
    """

    batch: slice
    rows: slice
    keys: slice
    num_keys: int


def runs_of(layout: Layout, q: Tensor, seq_len_k: int, *, by_row: bool = False) -> list[Run]:
    """The runs of a call, those without queries or keys left out. Reads the layout, which is on the CPU here.

    by_row: a run per batch row even if all rows are alike.
    """
    batch, seq_len = q.shape[:2]
    found = []
    if layout.cu_seqlens_q is not None:
        bounds_q = _bounds(layout.cu_seqlens_q, seq_len)
        bounds_k = bounds_q if layout.cu_seqlens_k is None else _bounds(layout.cu_seqlens_k, seq_len_k)
        found = [(slice(0, 1), *ends) for ends in zip(bounds_q, bounds_k, strict=True)]
    elif layout.is_padded:
        first = [0] * batch if layout.leftpad_k is None else layout.leftpad_k.clamp(0, seq_len_k).tolist()
        end = [seq_len_k] * batch if layout.seqused_k is None else layout.seqused_k.clamp(0, seq_len_k).tolist()
        found = [(slice(b, b + 1), (0, seq_len), (first[b], end[b])) for b in range(batch)]
    elif by_row:
        found = [(slice(b, b + 1), (0, seq_len), (0, seq_len_k)) for b in range(batch)]
    else:
        found = [(slice(0, batch), (0, seq_len), (0, seq_len_k))]
    runs = []
    for b, (start, stop), (first_key, end_key) in found:
        num_keys = end_key - first_key
        start = max(start, stop - num_keys)
        if b.stop > b.start and stop > start and num_keys > 0:
            runs.append(Run(b, slice(start, stop), slice(first_key, end_key), num_keys))
    return runs


def _bounds(cu_seqlens: Tensor, total: int) -> list[tuple[int, int]]:
    return list(itertools.pairwise(cu_seqlens.clamp(0, total).tolist()))


def windows_of(runs: list[Run], layout: Layout, kernel_size: int, kernel_stride: int, rows: int) -> list[Run]:
    """The same runs where what is attended to are the `rows` compressed tokens of their keys."""
    made = []
    for run in runs:
        first = run.keys.start // kernel_stride if layout.cu_seqlens_q is not None else 0
        count = max(0, (run.num_keys - kernel_size) // kernel_stride + 1)
        made.append(run._replace(keys=slice(first, min(first + count, rows))))
    return made


def each_forward(
    attend: Callable[..., Results], runs: list[Run], q: Tensor, k: Tensor, v: Tensor, *rows: Tensor
) -> Results:
    """`attend(run, q, k, v, *rows)` -> (out, shift, log_sum) of each run; `rows` are further tensors with q's rows."""
    if len(runs) == 1 and _is_all(runs[0], q, k):
        return attend(runs[0], q, k, v, *rows)
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    shift, log_sum = torch.zeros(q.shape[:3]), torch.full(q.shape[:3], -torch.inf)
    for run in runs:
        at, of = run[:2], (run.batch, run.keys)
        parts = attend(run, *map(_aligned, (q[at], k[of], v[of])), *(x[at] for x in rows))
        out[at], shift[at], log_sum[at] = parts
    return out, shift, log_sum


def each_backward(
    backward: Callable[..., Results], runs: list[Run], grads: tuple[Tensor | None, Tensor | None], q: Tensor, k: Tensor,
    v: Tensor, results: Results, *rows: Tensor,
) -> Results:  # fmt: skip
    """`backward(run, grads, q, k, v, results, *rows)` -> (dq, dk, dv) of each run."""
    if len(runs) == 1 and _is_all(runs[0], q, k):
        return backward(runs[0], grads, q, k, v, results, *rows)
    dq, dk, dv = q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    for run in runs:
        at, of = run[:2], (run.batch, run.keys)
        dq[at], dk[of], dv[of] = backward(
            run, tuple(None if x is None else _aligned(x[at]) for x in grads), *map(_aligned, (q[at], k[of], v[of])),
            tuple(_aligned(x[at]) for x in results), *(x[at] for x in rows),
        )  # fmt: skip
    return dq, dk, dv


def _is_all(run: Run, q: Tensor, k: Tensor) -> bool:
    whole = slice(0, q.shape[0]), slice(0, q.shape[1]), slice(0, k.shape[1])
    return run[:3] == whole


def _aligned(x: Tensor) -> Tensor:
    return x.clone() if x.data_ptr() % _ALIGNMENT else x
