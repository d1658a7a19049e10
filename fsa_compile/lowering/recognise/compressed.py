"""Compressed keys as the operators take them: the window's length and where the queries stand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from .bands import Horizon
from .build import Builder
from .evaluate import NotUnderstood
from .index import Poly, is_nonneg
from .region import guard_not_empty

__all__ = ["Windows", "complete", "windows"]


@dataclass(frozen=True)
class Windows:
    """Windows of `kernel` tokens, one every `stride`, in a sequence of `length`."""

    kernel: int
    stride: int
    length: Poly
    seen: Poly  # how many windows the last query sees
    given: Poly  # how many there are

    def cut(self, b: Builder, x: fx.Node) -> fx.Node:
        """Keys or values (batch, windows, ...) without those that no query sees."""
        guard_not_empty(b.shape(x)[1])
        return x if self.seen == self.given else b.make(torch.narrow, x, 1, 0, b.length(self.seen))


def windows(horizon: Horizon, given: Poly) -> Windows:
    """The windows whose masks are `horizon`; raises `NotUnderstood` where the operators would want more keys.

    Any window that is a multiple of the stride does, if `seq_len_k` puts the queries where they see the same.
    """
    stride, reach, queries = horizon.stride, horizon.reach, horizon.query.size
    kernel = 1 - dict(reach.terms).get((), 0)  # queries stand where their number says, if that is a window
    if kernel < stride or kernel % stride:
        kernel = stride
    return complete(kernel, stride, queries + reach + (kernel - 1), given)


def complete(kernel: int, stride: int, length: Poly, given: Poly) -> Windows:
    """The windows that are complete in a sequence of `length`; raises `NotUnderstood` if fewer are given."""
    seen = (length - kernel) // stride + 1
    if not is_nonneg(length) or (seen != given and not (is_nonneg(seen - 1) and is_nonneg(given - seen))):
        raise NotUnderstood(f"it has {given} compressed keys, where the last query sees {seen}")
    return Windows(kernel, stride, length, seen, given)
