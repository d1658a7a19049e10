"""The library of the `fsa` operators, and the one way to register what they do.

There is a single `torch.library.Library`; every module that defines or implements an operator goes through it.
`Library.define` and `Library.impl` rather than `torch.library.custom_op`: they cost half as much per call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .dispatch import implementation
from .operators import ATTENTION_OPS, BACKWARD_OPS, OPERATORS, SEMANTIC_OPS

__all__ = ["ATTENTION_OPS", "BACKWARD_OPS", "LIB", "SEMANTIC_OPS", "bound_arguments", "define", "fake", "impl"]

LIB = torch.library.Library("fsa", "DEF")


def define(schema: str) -> None:
    """Define one operator of namespace `fsa`. Nothing here mutates its inputs, so every operator is pt2 compliant."""
    LIB.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def bound_arguments(op: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by name, defaults filled in."""
    values: dict[str, Any] = {}
    for i, argument in enumerate(op._schema.arguments):
        if i < len(args) and not argument.kwarg_only:
            values[argument.name] = args[i]
        else:
            values[argument.name] = kwargs.get(argument.name, argument.default_value)
    return values


def impl(name: str, fn: Callable[..., Any], *keys: str) -> None:
    """Register `fn` as what `fsa::name` does on the dispatch keys `keys` ("CPU", "CUDA", ...).

    Of a semantic operator it is an implementation as `ops/dispatch.py` has it; of an internal one it takes the
    operator's arguments.
    """
    for key in keys:
        # A composite also runs on fake tensors, which have no values; the operators that it calls check theirs.
        values = not key.startswith("Composite")
        LIB.impl(name, implementation(name, fn, values=values) if name in OPERATORS else fn, key)


def fake(name: str, fn: Callable[..., Any]) -> None:
    """Register `fn` as the fake kernel of an internal operator; a semantic one has that of its record."""
    torch.library.register_fake(f"fsa::{name}", fn, lib=LIB)


for _op in OPERATORS.values():
    define(_op.schema)
    if not _op.is_composite:
        fake(_op.name, _op.fake())
