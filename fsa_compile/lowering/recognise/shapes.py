"""Fake results of operators at a fraction of the time, where only shape, dtype and device count.

With dynamic sizes a fake tensor's comparison or view takes milliseconds: nearly all of it is asking symbolic sizes how
the result lies in memory. What an element is does not depend on that. So the results here are contiguous, whatever the
operator gives: a view is no view, and what is traced with them may hold no operator that tells the one from the other
(`refuse_strides`). What is not clear at once from equal expressions of sizes is left to the fake tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode, track_tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .evaluate import NotUnderstood
from .writes import function_name

__all__ = ["ShapesOnly", "reads_strides", "refuse_strides"]

_STRIDED = frozenset(
    "as_strided as_strided_copy as_strided_scatter _reshape_alias resize sym_stride sym_storage_offset stride "
    "storage_offset is_contiguous".split()
)

_Shape = Sequence[Any]
_Made = list[tuple[_Shape, torch.dtype]] | None  # of each result, if it is clear
_Rule = Callable[..., _Made]
_RULES: dict[Any, _Rule] = {}
_INTS = (torch.int32, torch.int64)


def _rule(*names: str) -> Callable[[_Rule], _Rule]:
    """Register what `aten` operators give: a rule gives None where it does not say."""

    def register(fn: _Rule) -> _Rule:
        for name in names:
            packet, overload = name.split(".")
            found = getattr(getattr(torch.ops.aten, packet, None), overload, None)
            if found is not None:  # not every release of PyTorch has every one
                _RULES[found] = fn
        return fn

    return register


class ShapesOnly(TorchDispatchMode):
    """Records operators in the graph that is traced: what has a rule without running it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tracing = get_proxy_mode()
        rule = None if tracing is None else _RULES.get(func)
        device = None if rule is None else _device(args)
        made = None if rule is None or device is None else rule(*args, **kwargs)
        is_number = made is not None and not made[0][0]  # it may be one that is known
        if tracing is None or is_number or (made is None and func not in _PLAIN):
            return func(*args, **kwargs)
        tracer: Any = tracing.tracer
        with disable_proxy_modes_tracing():
            if made is not None:
                results = [torch.empty(list(shape), dtype=dtype, device=device) for shape, dtype in made]
                result: Any = results[0] if len(results) == 1 else tuple(results)
            else:
                result = func(*args, **kwargs)
        call: Any = pytree.tree_map(tracer.unwrap_proxy, (args, kwargs))
        _track(result, tracer.create_proxy("call_function", func, *call), tracer)
        return result


def _track(result: Any, proxy: Any, tracer: Any) -> None:
    """As `track_tensor_tree`, which also asks how each result lies in memory."""
    proxy.node.meta["val"] = result
    if isinstance(result, torch.Tensor):
        track_tensor(result, proxy, constant=None, tracer=tracer)
    else:
        for i, one in enumerate(result):
            _track(one, proxy[i], tracer)


def reads_strides(graph: fx.Graph) -> bool:
    """Whether a program asks how its tensors lie in memory, which a trace of it would not show."""
    return any(function_name(node) in _STRIDED for node in graph.nodes)


def refuse_strides(traced: fx.GraphModule) -> None:
    """Strides and storages are made up: nothing that is wanted may be made of them."""
    pending, seen = list(traced.graph.find_nodes(op="output")), set[fx.Node]()
    while pending:
        for node in pending.pop().all_input_nodes:
            if node in seen:
                continue
            seen.add(node)
            pending.append(node)
            if function_name(node) in _STRIDED and any(x.op != "placeholder" for x in node.all_input_nodes):
                raise NotUnderstood("a part of it depends on how tensors lie in memory")


def _device(args: Sequence[Any]) -> torch.device | None:
    """The one device of all tensors."""
    found: torch.device | None = None
    for x in args:
        for one in x if isinstance(x, (list, tuple)) else (x,):
            if isinstance(one, torch.Tensor):
                if found is not None and one.device != found:
                    return None
                found = one.device
    return found


def _plain(n: Any) -> Any:
    """A size as something that is compared without a guard."""
    return n if isinstance(n, int) else n.node.expr


def same(a: _Shape, b: _Shape) -> bool:
    """Whether shapes are equal by their expressions."""
    return len(a) == len(b) and all(x is y or _plain(x) == _plain(y) for x, y in zip(a, b, strict=True))


def _is_one(n: Any) -> bool:
    return isinstance(n, int) and n == 1


def _broadcast(*operands: Any) -> _Shape | None:
    """The shape of what is computed element by element."""
    out: list[Any] = []
    for x in operands:
        shape = x.shape if isinstance(x, torch.Tensor) else ()
        out = [1] * (len(shape) - len(out)) + out
        for i, n in enumerate(shape, len(out) - len(shape)):
            if _is_one(out[i]):
                out[i] = n
            elif not _is_one(n) and not same((n,), (out[i],)):
                return None
    return out


def _of(dtype: torch.dtype, *operands: Any) -> _Made:
    shape = _broadcast(*operands)
    return None if shape is None else [(shape, dtype)]


def _common(*operands: Any) -> torch.dtype | None:
    """The dtype of all tensors, if numbers beside them do not change it."""
    dtypes = {x.dtype for x in operands if isinstance(x, torch.Tensor)}
    dtype = dtypes.pop() if len(dtypes) == 1 else None
    kinds: tuple[Any, ...] = (int, torch.SymInt)
    if dtype is not None and dtype.is_floating_point:
        kinds = (*kinds, float)
    numbers = [x for x in operands if not isinstance(x, torch.Tensor)]
    return dtype if all(isinstance(x, kinds) and not isinstance(x, bool) for x in numbers) else None


# ---- element by element ----


@_rule(*(f"{name}.{kind}" for name in ("lt", "le", "gt", "ge", "eq", "ne") for kind in ("Tensor", "Scalar")))
@_rule("logical_and.default", "logical_or.default", "logical_xor.default", "logical_not.default")
def _truth(*operands: Any) -> _Made:
    return _of(torch.bool, *operands)


@_rule("bitwise_and.Tensor", "bitwise_or.Tensor", "bitwise_xor.Tensor", "bitwise_not.default")
def _bits(*operands: Any) -> _Made:
    dtypes = {x.dtype if isinstance(x, torch.Tensor) else None for x in operands}
    return _of(torch.bool, *operands) if dtypes == {torch.bool} else None


@_rule(*(f"{name}.{kind}" for name in ("add", "sub", "mul") for kind in ("Tensor", "Scalar")), "neg.default")
def _arithmetic(*operands: Any, alpha: Any = 1) -> _Made:
    dtype = _common(*operands) if len(operands) <= 2 and isinstance(alpha, int) else None
    return None if dtype is None or dtype == torch.bool else _of(dtype, *operands)


@_rule("floor_divide.default", "remainder.Scalar", "remainder.Tensor", "bitwise_right_shift.Tensor_Scalar")
@_rule("__rshift__.Scalar", "abs.default")
def _of_integers(*operands: Any) -> _Made:
    dtype = _common(*operands)
    return _of(dtype, *operands) if dtype in _INTS else None


@_rule("masked_fill.Scalar")
def _masked_fill(x: torch.Tensor, mask: torch.Tensor, fill: Any) -> _Made:
    return _of(x.dtype, x, mask) if x.dtype.is_floating_point and mask.dtype == torch.bool else None


@_rule("where.self")
def _where(condition: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> _Made:
    return _of(a.dtype, condition, a, b) if a.dtype == b.dtype and condition.dtype == torch.bool else None


@_rule("_to_copy.default")
def _to_copy(
    x: torch.Tensor, *, dtype: torch.dtype | None = None, device: Any = None, memory_format: Any = None, **others: Any
) -> _Made:
    stays = device is None or torch.device(device) == x.device
    return [(x.shape, dtype or x.dtype)] if stays and not any(others.values()) else None


@_rule("tril.default", "triu.default", "clone.default", "alias.default")
def _alike(x: torch.Tensor, *_: Any, **__: Any) -> _Made:
    return [(x.shape, x.dtype)]


# ---- views ----


@_rule("view.default", "_unsafe_view.default")
def _view(x: torch.Tensor, size: _Shape) -> _Made:
    if any(isinstance(n, int) and n < 0 for n in size):
        return None
    old, new = (sympy.Mul(*map(_plain, shape)) for shape in (x.shape, size))
    return [(size, x.dtype)] if old == new else None


@_rule("unsqueeze.default")
def _unsqueeze(x: torch.Tensor, dim: int) -> _Made:
    dim = dim % (x.dim() + 1)
    return [((*x.shape[:dim], 1, *x.shape[dim:]), x.dtype)]


@_rule("permute.default")
def _permute(x: torch.Tensor, dims: Sequence[int]) -> _Made:
    return [([x.shape[dim] for dim in dims], x.dtype)]


@_rule("transpose.int")
def _transpose(x: torch.Tensor, a: int, b: int) -> _Made:
    shape = list(x.shape)
    if shape:
        shape[a], shape[b] = shape[b], shape[a]
    return [(shape, x.dtype)]


@_rule("expand.default")
def _expand(x: torch.Tensor, size: _Shape, *, implicit: bool = False) -> _Made:
    old = (*[1] * (len(size) - x.dim()), *x.shape)
    new = [n if isinstance(m, int) and m == -1 else m for n, m in zip(old, size, strict=False)]
    fits = len(old) == len(new) and all(_is_one(n) or same((n,), (m,)) for n, m in zip(old, new, strict=True))
    return [(new, x.dtype)] if fits and not any(isinstance(n, int) and n < 0 for n in new) else None


@_rule("select.int")
def _select(x: torch.Tensor, dim: int, index: Any) -> _Made:
    dim = dim % x.dim()
    inside = isinstance(index, int) and isinstance(x.shape[dim], int) and -x.shape[dim] <= index < x.shape[dim]
    return [((*x.shape[:dim], *x.shape[dim + 1 :]), x.dtype)] if inside else None


# ---- along axes ----


def _without(x: torch.Tensor, dims: Sequence[int], keepdim: bool) -> _Shape:
    gone = {dim % x.dim() for dim in dims} if x.dim() else set()
    return [1 if d in gone else n for d, n in enumerate(x.shape) if keepdim or d not in gone]


@_rule("any.dim")
def _any(x: torch.Tensor, dim: int, keepdim: bool = False) -> _Made:
    return [(_without(x, [dim], keepdim), torch.bool)] if x.dtype == torch.bool else None


@_rule("sum.dim_IntList")
def _sum(
    x: torch.Tensor, dim: Sequence[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> _Made:
    if not dim:
        return None
    kept = x.dtype if x.dtype.is_floating_point else torch.int64
    return [(_without(x, dim, keepdim), dtype or kept)]


@_rule("sort.default", "sort.stable")
def _sort(x: torch.Tensor, *_: Any, **__: Any) -> _Made:
    return [(x.shape, x.dtype), (x.shape, torch.int64)]


@_rule("index.Tensor")
def _index(x: torch.Tensor, indices: Sequence[torch.Tensor | None]) -> _Made:
    if len(indices) != x.dim() or any(one is None or one.dtype not in _INTS for one in indices):
        return None
    return _of(x.dtype, *indices)


# ---- without a rule: what fake tensors give is recorded, without looking at how it lies in memory ----

_PLAIN = frozenset(
    found
    for name in """
        slice.Tensor arange.default arange.start arange.start_step zeros.default ones.default full.default
        new_zeros.default new_ones.default new_full.default constant_pad_nd.default scatter.value scatter.src
        index_put.default gather.default index_select.default nan_to_num.default _softmax.default bmm.default mm.default
        div.Tensor amax.default max_pool2d_with_indices.default avg_pool2d.default cat.default scalar_tensor.default
        view.default _unsafe_view.default expand.default squeeze.dim select.int unfold.default
    """.split()
    if (found := getattr(getattr(torch.ops.aten, name.split(".")[0]), name.split(".")[1], None)) is not None
)
