"""Forward and backward of the differentiable operators wired together, and autocast.

A backward is an operator of its own, so that a compiler sees one node for it. Gradients that nobody asked for stay None
instead of becoming zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd.function import _SingleLevelFunction

from . import schema
from .forward_mode import refuse_tangents

_AUTOGRAD_KEYS = torch._C._after_autograd_keyset


def _wanted(args: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)


def _apply(function: type[_SingleLevelFunction], *args: Any) -> Any:
    """An autograd kernel sees one level of `torch.func` at a time, and differentiates that one."""
    if not torch._C._are_functorch_transforms_active():
        return function.apply(*args)  # type: ignore[attr-defined]
    with enable_single_level_autograd_function():
        return function.apply(*args)  # type: ignore[attr-defined]


def _below(name: str) -> Callable[..., Any]:
    """The operator past its autograd kernel."""
    redispatch = getattr(torch.ops.fsa, name).default.redispatch

    def call(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return redispatch(keyset & _AUTOGRAD_KEYS, *args, **kwargs)

    return call


def _differentiable(name: str) -> None:
    """Register the autograd kernel of an attention forward: results (out, shift, log_sum), gradients (dq, dk, dv).

    `shift` counts as a constant: whatever it is, `scale * shift + log_sum` is the log-sum-exp, with the gradient that
    `log_sum` has.
    """
    forward = _below(f"{name}_forward")
    backward_op = getattr(torch.ops.fsa, f"{name}_backward").default

    class Attention(_SingleLevelFunction):
        @staticmethod
        def forward(ctx: Any, keyset: Any, options: dict[str, Any], *inputs: Tensor) -> Any:
            results = forward(keyset, *inputs, **options)
            tensors = {key: value for key, value in options.items() if isinstance(value, Tensor)}
            ctx.save_for_backward(*inputs, *results, *tensors.values())
            ctx.mark_non_differentiable(results[1])
            ctx.num_saved, ctx.num_inputs, ctx.tensor_options = len(inputs) + len(results), len(inputs), tuple(tensors)
            ctx.options = {key: value for key, value in options.items() if key not in tensors}
            ctx.set_materialize_grads(False)
            return results

        @staticmethod
        def backward(ctx: Any, grad_out: Tensor | None, _: None, grad_log_sum: Tensor | None) -> Any:
            unused = (None,) * (ctx.num_inputs - 3)
            if grad_out is None and grad_log_sum is None:
                return None, None, None, None, None, *unused
            saved = ctx.saved_tensors  # may be read once only, under checkpointing
            saved, tensors = saved[: ctx.num_saved], saved[ctx.num_saved :]
            options = {**ctx.options, **dict(zip(ctx.tensor_options, tensors, strict=True))}
            return None, None, *backward_op(grad_out, grad_log_sum, *saved, **options), *unused

    Attention.__name__ = Attention.__qualname__ = f"fsa_{name}"

    def kernel(keyset: Any, *inputs: Tensor, **options: Any) -> Any:
        refuse_tangents(name, *inputs)
        if _wanted(inputs):
            return _apply(Attention, keyset, options, *inputs)
        return forward(keyset, *inputs, **options)

    schema.LIB.impl(f"{name}_forward", kernel, "Autograd", with_keyset=True)


def _differentiable_mean() -> None:
    forward = _below("mean_compress")
    backward_op = torch.ops.fsa.mean_compress_backward.default

    class MeanCompress(_SingleLevelFunction):
        @staticmethod
        def forward(ctx: Any, keyset: Any, x: Tensor, options: dict[str, Any]) -> Tensor:
            tensors = {key: value for key, value in options.items() if isinstance(value, Tensor)}
            ctx.save_for_backward(*tensors.values())
            ctx.tensor_options = tuple(tensors)
            ctx.options = {key: value for key, value in options.items() if key not in tensors}
            ctx.seq_len = x.shape[1]
            ctx.set_materialize_grads(False)
            return forward(keyset, x, **options)

        @staticmethod
        def backward(ctx: Any, grad_out: Tensor | None) -> Any:
            if grad_out is None:
                return None, None, None
            options = {**ctx.options, **dict(zip(ctx.tensor_options, ctx.saved_tensors, strict=True))}
            return None, backward_op(grad_out, seq_len=ctx.seq_len, **options), None

    def kernel(keyset: Any, x: Tensor, **options: Any) -> Tensor:
        refuse_tangents("mean_compress", x)
        if _wanted((x,)):
            return _apply(MeanCompress, keyset, x, options)
        return forward(keyset, x, **options)

    schema.LIB.impl("mean_compress", kernel, "Autograd", with_keyset=True)


def _not_differentiable(name: str, why: str) -> None:
    """Register an autograd kernel that computes, and raises once somebody differentiates through the result."""
    forward = _below(name)

    class NotDifferentiable(_SingleLevelFunction):
        @staticmethod
        def forward(ctx: Any, keyset: Any, options: dict[str, Any], *inputs: Tensor | None) -> Any:
            return forward(keyset, *inputs, **options)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            raise RuntimeError(f"fsa::{name} is not differentiable: {why}")

    def kernel(keyset: Any, *inputs: Tensor | None, **options: Any) -> Any:
        refuse_tangents(name, *inputs)
        if _wanted(inputs):
            return _apply(NotDifferentiable, keyset, options, *inputs)
        return forward(keyset, *inputs, **options)

    schema.LIB.impl(name, kernel, "Autograd", with_keyset=True)


def _selection() -> None:
    """Block ids carry no gradient, whatever they were computed from."""
    schema.LIB.impl("select_blocks", _below("select_blocks"), "Autograd", with_keyset=True)


# Neither gates nor `lse` nor indices: SPEC keeps those as they are given.
_AUTOCAST_ARGUMENTS = frozenset(("q", "k", "v", "k_cmp", "v_cmp", "x"))


def _autocast(name: str, device_type: str, key: str) -> None:
    """Register a kernel that casts the data to the autocast dtype, as a matmul does."""
    op = getattr(torch.ops.fsa, name).default
    cast_positions = [
        i for i, a in enumerate(op._schema.arguments) if a.name in _AUTOCAST_ARGUMENTS and not a.kwarg_only
    ]
    cast_keywords = [a.name for a in op._schema.arguments if a.name in _AUTOCAST_ARGUMENTS and a.kwarg_only]
    keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast(x: Any, dtype: torch.dtype) -> Any:
        eligible = isinstance(x, Tensor) and x.device.type == device_type and x.is_floating_point()
        return x.to(dtype) if eligible and x.dtype is not torch.float64 else x

    def kernel(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype(device_type)
        new = list(args)
        for i in cast_positions:
            new[i] = cast(new[i], dtype)
        for keyword in cast_keywords:
            if keyword in kwargs:
                kwargs[keyword] = cast(kwargs[keyword], dtype)
        with torch._C._ExcludeDispatchKeyGuard(keyset):
            return op(*new, **kwargs)

    schema.LIB.impl(name, kernel, key)


for _name in schema.ATTENTION_OPS:
    _differentiable(_name)
_differentiable_mean()
_selection()
for _name in schema.BACKWARD_OPS:
    _not_differentiable(_name, "there is no second derivative of sparse attention, so no create_graph=True through it")
for _name in ("nsa_attention", "mean_compress", "select_blocks", *schema.ATTENTION_OPS):
    _autocast(_name, "cpu", "AutocastCPU")
    _autocast(_name, "cuda", "AutocastCUDA")
