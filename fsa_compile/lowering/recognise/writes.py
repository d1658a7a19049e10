"""What a node of a pre-grad graph calls, gives and writes to."""

from __future__ import annotations

import functools
import inspect
import operator
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

__all__ = ["function_name", "storage_of", "tensor", "written"]

_IN_PLACE_OPERATORS = frozenset(
    "iadd isub imul itruediv ifloordiv imod ipow iand ior ixor ilshift irshift imatmul setitem".split()
)


def function_name(node: fx.Node) -> str:
    """The name of what a node calls, without its namespace; empty if it calls nothing."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return ""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name).split("::")[-1]
    return str(getattr(target, "__name__", target))


def tensor(node: Any) -> torch.Tensor | None:
    """What the node gave while it was captured, if that is one tensor."""
    value = node.meta.get("example_value", node.meta.get("val")) if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def storage_of(node: Any) -> int | None:
    found = tensor(node)
    while found is not None and torch._C._functorch.is_batchedtensor(found):  # inside of `vmap`
        found = torch._C._functorch.get_unwrapped(found)
    return None if found is None else found.untyped_storage()._cdata


def written(node: fx.Node) -> list[Any]:
    """The arguments that a node writes to."""
    name = function_name(node)
    if not name or (node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator)):
        writes = "mutation" in name or any(map(_writes_to_inputs, _bodies(node)))
        return [x for x in node.all_input_nodes if tensor(x) is not None] if writes else []
    found: list[Any] = [node.kwargs["out"]] if isinstance(node.kwargs.get("out"), fx.Node) else []
    schema = getattr(node.target, "_schema", None)
    if schema is None and isinstance(node.target, torch._ops.OpOverloadPacket):
        schema = getattr(node.target, "default", None) and node.target.default._schema
    if schema is not None:
        return [
            node.args[i] if i < len(node.args) else node.kwargs.get(a.name)
            for i, a in enumerate(schema.arguments)
            if a.alias_info is not None and a.alias_info.is_write
        ]
    dunder = name.startswith("__") and name.endswith("__")
    in_place = name.endswith("_") and not dunder and not (node.op == "call_function" and _is_operator(node.target))
    in_place = in_place or (dunder and name[2:-2] in _IN_PLACE_OPERATORS) or _is_told_to_write(node)
    if in_place or (name in _IN_PLACE_OPERATORS and _is_operator(node.target)):
        found.append(node.args[0] if node.args else None)
    return found


def _is_told_to_write(node: fx.Node) -> bool:
    """By `inplace`, as functions of `torch.nn.functional` are."""
    at = _place_of_inplace(node.target) if node.op == "call_function" else None
    given = node.args[at] if at is not None and at < len(node.args) else node.kwargs.get("inplace")
    return given is not None and given is not False


@functools.cache
def _place_of_inplace(target: Any) -> int | None:
    try:
        names = list(inspect.signature(target).parameters)
    except (TypeError, ValueError):
        return None
    return names.index("inplace") if "inplace" in names else None


def _bodies(node: fx.Node) -> Iterator[fx.Graph]:
    """The graphs that a higher-order operator calls."""
    for x in node.all_input_nodes:
        found = getattr(node.graph.owning_module, str(x.target), None) if x.op == "get_attr" else None
        if isinstance(found, fx.GraphModule):
            yield found.graph


_writing: weakref.WeakKeyDictionary[fx.Graph, bool] = weakref.WeakKeyDictionary()


def _writes_to_inputs(body: fx.Graph) -> bool:
    if body not in _writing:
        given = {storage_of(node) for node in body.nodes if node.op == "placeholder"}
        written_to = {storage_of(x) for node in body.nodes for x in written(node)}
        _writing[body] = bool(written_to & (given | {None}))
    return _writing[body]


def _is_operator(target: Any) -> bool:
    return getattr(operator, getattr(target, "__name__", ""), None) is target  # `operator.and_` writes nothing
