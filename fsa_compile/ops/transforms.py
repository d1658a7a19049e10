"""Nested tensors are refused in words."""

from __future__ import annotations

from typing import Any

from .operators import OPERATORS, Operator
from .schema import LIB


def _refuse_nested(op: Operator) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(op.inputs, args, strict=False)), **kwargs}
        name = next((name for name, x in given.items() if getattr(x, "is_nested", False)), "an argument")
        cu_seqlens = "cu_seqlens" if "cu_seqlens" in op.options else "cu_seqlens_q"
        raise ValueError(
            f"fsa::{op.public}: {name} is a nested tensor, but it should be a plain one: pass sequences of several "
            f"lengths packed, {name}.values()[None] with {cu_seqlens}={name}.offsets().int()"
        )

    for key in ("AutogradNestedTensor", "NestedTensorCPU", "NestedTensorCUDA"):
        LIB.impl(op.name, refuse, key)


for _op in OPERATORS.values():
    _refuse_nested(_op)
