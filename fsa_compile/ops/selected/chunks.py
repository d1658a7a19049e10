"""Calls of the key/value-outer order cut in parts, so that their partials take a bounded workspace.

Every (token, query head, slot) leaves a partial, which the merge reads: 8.6 GB at 64K tokens, 32 heads, D = 128. Heads
do not depend on each other, so that parts of them take turns in one workspace; only dk and dv are sums over a group.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...templates.kernel import Kernel
from ...tiling import WORKSPACE
from ..problem import is_traced, size_hint
from ..rules import Runs

__all__ = ["Chunk", "chunks", "dense", "joined", "results", "whole_of"]


class Chunk(NamedTuple):
    """Batch rows and key/value heads of a call, and of each of those heads ``group`` query heads from ``first`` on."""

    rows: slice
    kv_heads: slice
    first: int
    group: int

    def of_query_heads(self, x: Tensor, whole_group: int) -> Tensor:
        """Its part of a ``[B, T, HQ, ...]`` tensor: a view."""
        start = self.kv_heads.start * whole_group + self.first
        stop = (self.kv_heads.stop - 1) * whole_group + self.first + self.group
        return _cut(_cut(x, 0, self.rows), 2, slice(start, stop))

    def of_kv_heads(self, x: Tensor) -> Tensor:
        """Its part of a ``[B, T, HK, ...]`` tensor: a view."""
        return _cut(_cut(x, 0, self.rows), 2, self.kv_heads)

    def of_rows(self, x: Tensor) -> Tensor:
        """Its batch rows of a tensor, with all heads: a view."""
        return _cut(x, 0, self.rows)

    def of_runs(self, runs: Runs) -> Runs:
        """cu_seqlens_q and cu_seqlens_k, which have no batch, and its part of seqused_k and leftpad_k."""
        cu_seqlens_q, cu_seqlens_k, *keys = runs
        seqused_k, leftpad_k = (None if x is None else _cut(x, 0, self.rows) for x in keys)
        return cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k


def chunks(q: Tensor, k: Tensor, width: int, num_slots: int) -> list[list[list[Chunk]]]:
    """How a call is cut: by batch rows, within them by key/value heads, within those by heads of the group.

    Args:
        q: (B, T, HQ, D). k: (B, Tk, HK, D).
        width: elements of a partial.
        num_slots: partials of a token and query head.

    A group is cut as its batch row alone would be, so that no result depends on the batch. Of lengths and a batch that
    are not known, what is likely decides; no guard is added.
    """
    batch, num_kv_heads, group = q.shape[0], int(k.shape[2]), int(q.shape[2]) // int(k.shape[2])
    head = max(1, size_hint(q.shape[1])) * num_slots * width * q.dtype.itemsize
    fixed = isinstance(batch, int)
    if not fixed:
        head *= max(1, size_hint(batch))
    part = _largest_divisor(group, WORKSPACE // head)
    heads = _largest_divisor(num_kv_heads, WORKSPACE // (head * group)) if part == group else 1
    rows = max(1, WORKSPACE // (head * group * num_kv_heads)) if heads == num_kv_heads else 1
    whole = [slice(None)]
    rows_at_once = [slice(i, min(i + rows, batch)) for i in range(0, batch, rows)] if fixed and rows < batch else whole
    return [
        [
            [Chunk(rows_, slice(h, h + heads), first, part) for first in range(0, group, part)]
            for h in range(0, num_kv_heads, heads)
        ]
        for rows_ in rows_at_once
    ]


def dense(part: Tensor, whole: Tensor) -> Tensor:
    """A part of ``whole`` as kernels want it that take no strides: a copy, unless it is all."""
    return part if part is whole else part.clone(memory_format=torch.contiguous_format)


def _cut(x: Tensor, dim: int, part: slice) -> Tensor:
    """A view of a part of an axis; the tensor itself where that is all of it."""
    if part == slice(None) or (part.start == 0 and part.stop == x.shape[dim]):
        return x
    return x.narrow(dim, part.start, part.stop - part.start)


def whole_of(
    cuts: list[list[list[Chunk]]], like: Tensor, *wanted: tuple[tuple[Any, ...], torch.dtype]
) -> tuple[Tensor, ...] | None:
    """Tensors that all parts write to, of the given shapes and dtypes; None if parts are to be ``joined``.

    Of a traced call they are: Inductor fuses the copy into what reads them, and could not fuse what is written in
    place.
    """
    if sum(len(heads) for cut in cuts for heads in cut) == 1 or is_traced(like):
        return None
    return tuple(like.new_empty(shape, dtype=dtype) for shape, dtype in wanted)


def results(
    kernel: Kernel, whole: tuple[Tensor, ...] | None, place: Callable[[Tensor], Tensor], *inputs: Any, **options: Any
) -> tuple[Tensor, ...]:
    """The results of a part, or of none, if they are in their ``place`` in ``whole``."""
    if whole is None:
        found = getattr(torch.ops.fsa, f"_{kernel.name}")(*inputs, **options)
        return found if isinstance(found, tuple) else (found,)
    kernel.into([place(x) for x in whole], *inputs, **options, row_heads=int(whole[0].shape[2]))
    return ()


def joined(parts: Sequence[Sequence[Sequence[tuple[Tensor, ...]]]]) -> tuple[Tensor, ...]:
    """The results of all chunks, each ``[B, T, heads, ...]``, as those of one call."""

    def cat(xs: list[Tensor], dim: int) -> Tensor:
        return xs[0] if len(xs) == 1 else torch.cat(xs, dim)

    rows = [[cat(list(xs), 2) for xs in zip(*itertools.chain(*heads), strict=True)] for heads in parts]
    return tuple(cat(list(xs), 0) for xs in zip(*rows, strict=True))


def _largest_divisor(n: int, most: int) -> int:
    """The largest divisor of ``n`` that is at most ``most``, or 1."""
    return max(d for d in range(1, n + 1) if n % d == 0 and d <= max(1, most))
