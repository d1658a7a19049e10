"""Which loop order to use: a symbolic cost model, device constants and the choice between them.

    Problem + Device --choose()--> Choice(order, costs in seconds, reason)

The expressions are sympy's and can be printed: ``python -m fsa_compile.cost`` or ``print(describe())``. sympy is
imported when the first cost is evaluated, not when the package is: it would add a third to the time of
``import torch``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .calibration import calibrations
from .choice import (
    Choice,
    PassTime,
    agreement_of,
    best_other,
    breakdown,
    choose,
    format_seconds,
    scratch_bytes,
    seconds,
)
from .device import DEVICES, EFFICIENCY, Device, Properties, uncalibrated
from .problem import LIKELY_AGREEMENT, LOOP_ORDERS, Problem

if TYPE_CHECKING:
    from .orders import ORDERS, Order, first_like
    from .text import describe

__all__ = [
    "Choice",
    "DEVICES",
    "Device",
    "EFFICIENCY",
    "LIKELY_AGREEMENT",
    "LOOP_ORDERS",
    "ORDERS",
    "Order",
    "PassTime",
    "Problem",
    "Properties",
    "agreement_of",
    "best_other",
    "breakdown",
    "choose",
    "describe",
    "device_for",
    "first_like",
    "format_seconds",
    "scratch_bytes",
    "seconds",
    "uncalibrated",
]


def device_for(name: str, type: str = "cuda", properties: Properties | None = None) -> Device:
    """The constants of a device as torch names it.

    Args:
        name: ``torch.cuda.get_device_name(...)``, such as ``"NVIDIA H200"``; ignored for ``type="cpu"``.
        type: ``tensor.device.type``. Every type but ``"cpu"`` is taken for a GPU.
        properties: what the driver says of it.

    Calibrated on this machine, else the row of ``DEVICES``, else derived from the properties, else the generic row.
    """
    if type == "cpu":
        return DEVICES["cpu"]
    return calibrations().get(name) or uncalibrated(name, properties)


_NEEDS_SYMPY = {"ORDERS": "orders", "Order": "orders", "first_like": "orders", "describe": "text"}


def __getattr__(name: str) -> Any:
    if name in _NEEDS_SYMPY:
        return getattr(importlib.import_module(f".{_NEEDS_SYMPY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
