"""`vmap`: what is mapped over joins the batch. And nested tensors, which are refused in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.nested._internal.nested_tensor import NestedTensor

from .operators import OPERATORS, Operator
from .schema import LIB

_BATCHED = torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchBatched)


def _batching_rule(op: Operator) -> Callable[..., Any]:
    call = getattr(torch.ops.fsa, op.name).default

    def rule(*args: Any, **kwargs: Any) -> Any:
        interpreter = retrieve_current_functorch_interpreter()
        level, size = interpreter.level(), interpreter.batch_size()  # type: ignore[attr-defined]
        given = {**dict(zip(op.inputs, args, strict=False)), **kwargs}
        mapped, plain = {}, {}
        for name, x in given.items():
            tensor, dim = torch._C._functorch._unwrap_batched(x, level) if isinstance(x, Tensor) else (x, None)
            if dim is None:
                plain[name] = tensor
            else:
                mapped[name] = tensor.movedim(dim, 0)
        with torch._C._ExcludeDispatchKeyGuard(_BATCHED):
            results = _each(call, mapped, plain, size) if _is_packed(given) else _joined(call, mapped, plain, size)
        wrapped = [torch._C._functorch._add_batch_dim(x, 0, level) for x in results]
        return wrapped[0] if len(op.results) == 1 else tuple(wrapped)

    return rule


def _is_packed(given: dict[str, Any]) -> bool:
    return given.get("cu_seqlens") is not None or given.get("cu_seqlens_q") is not None


def _tuple(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def _joined(call: Any, mapped: dict[str, Tensor], plain: dict[str, Any], size: int) -> list[Tensor]:
    """One call whose batch is that of all together."""
    spread = {name: x.expand(size, *x.shape) for name, x in plain.items() if isinstance(x, Tensor)}
    joined = {name: x.flatten(0, 1) for name, x in (mapped | spread).items()}
    return [x.unflatten(0, (size, x.shape[0] // size)) for x in _tuple(call(**(plain | joined)))]


def _each(call: Any, mapped: dict[str, Tensor], plain: dict[str, Any], size: int) -> list[Tensor]:
    """A call for each: packed sequences have a batch of 1."""
    parts = [_tuple(call(**plain, **{name: x[i] for name, x in mapped.items()})) for i in range(size)]
    return [torch.stack(column) for column in zip(*parts, strict=True)]


def _refuse_nested(op: Operator) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(op.inputs, args, strict=False)), **kwargs}
        name = next((name for name, x in given.items() if getattr(x, "is_nested", False)), "an argument")
        cu_seqlens = "cu_seqlens" if "cu_seqlens" in op.options else "cu_seqlens_q"
        raise ValueError(
            f"fsa::{op.public}: {name} is a nested tensor, but it should be a plain one: pass sequences of several "
            f"lengths packed, {name}.values()[None] with {cu_seqlens}={name}.offsets().int()"
        )

    return refuse


for _op in OPERATORS.values():
    if not _op.is_composite:
        LIB.impl(_op.name, _batching_rule(_op), "FuncTorchBatched")
    for _key in ("AutogradNestedTensor", "NestedTensorCPU", "NestedTensorCUDA"):
        LIB.impl(_op.name, _refuse_nested(_op), _key)
    _refuse = _refuse_nested(_op)
    torch.library.register_torch_dispatch(  # in inference mode, which skips those keys
        f"fsa::{_op.name}",
        NestedTensor,
        lambda cls, func, types, args, kwargs, refuse=_refuse: refuse(*args, **kwargs or {}),
        lib=LIB,
    )
