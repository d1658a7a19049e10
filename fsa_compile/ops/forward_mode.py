"""Forward-mode differentiation, which the operators do not have, is refused instead of answered with zeros."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["refuse_tangents"]


def refuse_tangents(name: str, *inputs: Any) -> None:
    """Raise NotImplementedError if one of the inputs of `fsa::name` carries a tangent."""
    if forward_ad._current_level < 0:
        return
    for x in inputs:
        if isinstance(x, Tensor) and x.is_floating_point() and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(
                f"fsa::{name} has no forward-mode derivative (torch.func.jvp, jacfwd, forward_ad); "
                "use reverse mode: torch.func.vjp, jacrev or autograd.grad"
            )
