"""`torch.vmap` in a pre-grad graph: calls that open and close a level, and tensors that are batched in between.

When such calls are run again, other levels may be open around them, so that the numbers that they hold do not count.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from .writes import function_name

__all__ = ["BATCHED", "Levels", "is_batched", "is_level"]

_OPEN, _CLOSE, _ENTER, _LEAVE = (
    "_vmap_increment_nesting", "_vmap_decrement_nesting", "_add_batch_dim", "_remove_batch_dim",
)  # fmt: skip
BATCHED = frozenset((_ENTER, _LEAVE))


def is_batched(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and bool(torch._C._functorch.is_batchedtensor(x))


def is_level(node: fx.Node) -> bool:
    """Whether it opens or closes a level."""
    return function_name(node) in (_OPEN, _CLOSE)


class Levels:
    """The levels that are open while nodes are run; all are closed at the end, come what may."""

    def __init__(self) -> None:
        self._open: list[int] = []
        self._offset: int | None = None  # between numbers in the graph and how many are open
        self._close: Callable[[], Any] | None = None

    def __enter__(self) -> Levels:
        return self

    def __exit__(self, *_: Any) -> None:
        while self._open:
            self._open.pop()
            torch._C._functorch._vmap_decrement_nesting()

    def call(self, node: fx.Node, args: tuple[Any, ...]) -> Any:
        """The result of a node, if it has to do with levels; `NotImplemented` otherwise."""
        name = function_name(node)
        if name == _OPEN:
            self._open.append(torch._C._functorch._vmap_increment_nesting(*args))
            return self._open[-1]
        if name == _CLOSE:
            if self._open:
                self._open.pop()
                torch._C._functorch._vmap_decrement_nesting()
            return None
        if name == _ENTER:
            x, dim, level = args
            return torch._C._functorch._add_batch_dim(x, dim, self._now(level))
        if name == _LEAVE:
            x, level, size, dim = args
            return torch._C._functorch._remove_batch_dim(x, self._now(level), size, dim)
        return NotImplemented

    def _now(self, level: int) -> int:
        """The innermost level, which is what `vmap` names."""
        depth = len(self._open)
        if self._offset is None:
            self._offset = level - depth
        if not depth or level - depth != self._offset:
            raise ValueError(f"level {level} of vmap is not the innermost one")
        return self._open[-1]
