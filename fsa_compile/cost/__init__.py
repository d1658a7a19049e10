"""Which loop order to use: a symbolic cost model, device constants and the choice between them.

    Problem + Device --choose()--> Choice(order, costs in seconds, reason)

The expressions are sympy's and can be printed: ``python -m fsa_compile.cost`` or ``print(describe())``. sympy is
imported when the first cost is evaluated, not when the package is: it would add a third to the time of
``import torch``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .choice import Choice, PassTime, breakdown, choose, format_seconds, scratch_bytes
from .device import DEVICES, Device, device_for
from .problem import LOOP_ORDERS, Problem

if TYPE_CHECKING:
    from .expressions import BACKWARD_EXPRESSIONS, EXPRESSIONS, SCRATCH_EXPRESSIONS, describe

__all__ = [
    "BACKWARD_EXPRESSIONS",
    "Choice",
    "DEVICES",
    "Device",
    "EXPRESSIONS",
    "LOOP_ORDERS",
    "PassTime",
    "Problem",
    "SCRATCH_EXPRESSIONS",
    "breakdown",
    "choose",
    "describe",
    "device_for",
    "format_seconds",
    "scratch_bytes",
]

_NEEDS_SYMPY = frozenset({"BACKWARD_EXPRESSIONS", "EXPRESSIONS", "SCRATCH_EXPRESSIONS", "describe"})


def __getattr__(name: str) -> Any:
    if name in _NEEDS_SYMPY:
        from . import expressions

        return getattr(expressions, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
