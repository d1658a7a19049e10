"""Which loop order to use: a symbolic cost model, device constants and the choice between them.

    Problem + Device --choose()--> Choice(order, costs in seconds, reason)

The expressions are sympy's and can be printed: ``python -m fsa_compile.cost`` or ``print(describe())``. sympy is
imported when the first cost is evaluated, not when the package is: it would add a third to the time of
``import torch``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .choice import Choice, PassTime, best_other, breakdown, choose, format_seconds, scratch_bytes
from .device import DEVICES, Device, device_for
from .problem import LOOP_ORDERS, Problem

if TYPE_CHECKING:
    from .orders import ORDERS, Order
    from .text import describe

__all__ = [
    "Choice",
    "DEVICES",
    "Device",
    "LOOP_ORDERS",
    "ORDERS",
    "Order",
    "PassTime",
    "Problem",
    "best_other",
    "breakdown",
    "choose",
    "describe",
    "device_for",
    "format_seconds",
    "scratch_bytes",
]

_NEEDS_SYMPY = {"ORDERS": "orders", "Order": "orders", "describe": "text"}


def __getattr__(name: str) -> Any:
    if name in _NEEDS_SYMPY:
        return getattr(importlib.import_module(f".{_NEEDS_SYMPY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
