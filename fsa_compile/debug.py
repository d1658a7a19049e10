"""Checks of values that only the device knows: they synchronise, so they run only when asked for."""

from __future__ import annotations

import os

import torch

_validating = os.environ.get("FSA_COMPILE_VALIDATE", "0").lower() not in ("", "0", "false", "off")


def validate(on: bool = True) -> None:
    """Switch the checks of values on or off (off after import, unless the environment has `FSA_COMPILE_VALIDATE=1`).

    While on, every eager `fsa` operator reads its index tensors back to the host and raises ValueError for a block id that is out of
    range, in the future or repeated within a row, and for `cu_seqlens` that do not start at 0, decrease, or do not end at the total
    length. Each such check waits for the device.
    """
    global _validating
    _validating = bool(on)


def is_validating() -> bool:
    """Whether the checks of values run."""
    return _validating
