"""From a call of a semantic operator to its implementation.

An implementation is `fn(tensors..., options, layout)`: the operator's positional arguments in order, then its options
(`ops/options.py`) and where the sequences lie. The checks run before it, and so do the checks of values while
`fsa_compile.debug` validates: it checks nothing itself. `options.scale` and `options.seq_len_k` are never None.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from .. import debug
from .operators import OPERATORS, Operator
from .options import Layout

__all__ = ["implementation", "unchecked"]

_LAYOUT = {"cu_seqlens": "cu_seqlens_k", "seqused": "seqused_k", "leftpad": "leftpad_k"}  # of what has keys only
_FILLED = {
    "scale": "q.shape[3] ** -0.5 if scale is None else scale",
    "seq_len_k": "q.shape[1] if seq_len_k is None else seq_len_k",
}


def implementation(name: str, fn: Callable[..., Any], *, values: bool = True) -> Callable[..., Any]:
    """What to register for `fsa::name`. `values`: whether the checks of values run too, where they are asked for."""
    op = OPERATORS[name]
    lines = []
    if values:
        bound = ", ".join(f"{argument!r}: {argument}" for argument in op.arguments)
        lines.append(f"if is_validating(): check_values({op.public!r}, {{{bound}}})")
    lines.append(_call(op, fn))
    return op.compile(*lines, fn=fn, is_validating=debug.is_validating, check_values=debug.check_values)


def unchecked(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates what is written as an implementation is: with the arguments and defaults of `fsa::name`, no checks."""
    op = OPERATORS.get(f"{name}_forward", OPERATORS[name])  # a public attention operator has no bundle of its own

    def decorated(fn: Callable[..., Any]) -> Callable[..., Any]:
        made = op.compile(_call(op, fn), checked=False, fn=fn)
        made.__doc__ = fn.__doc__
        return made

    return decorated


def _call(op: Operator, fn: Callable[..., Any]) -> str:
    """The line that calls an implementation."""
    parameters = tuple(inspect.signature(fn).parameters)
    want = (*op.inputs, "options", "layout")
    if parameters != want:
        raise TypeError(f"fsa::{op.name}: {fn.__module__}.{fn.__qualname__} takes {parameters}, not {want}")
    assert op.bundle is not None
    fill = op.name != "nsa_attention"
    options = ", ".join(_FILLED.get(x, x) if fill else x for x in op.bundle._fields)
    layout = {_LAYOUT.get(x, x): x for x in op.options}
    given = ", ".join(f"{field}={layout[field]}" for field in Layout._fields if field in layout)
    arguments = ", ".join((*op.inputs, f"{op.bundle.__name__}({options})", f"Layout({given})"))
    return f"return fn({arguments})"
