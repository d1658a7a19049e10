"""Rules for the operators that masks, block ids and scores are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from .evaluate import Evaluator, Index, NotUnderstood, _axis, _set, value
from .index import Poly, Var, is_nonneg
from .terms import (
    And, Apply, At, Const, Equal, Exists, Int, NonNeg, Not, Or, Reduce, Softmax, Term, all_of, any_of, apply, compare,
    equal, exists, negate, nonneg, where,
)  # fmt: skip

__all__ = ["is_truth"]

_WIDE = (torch.int32, torch.int64)


def is_truth(x: Term) -> bool:
    """Whether a term is a truth value by its form."""
    if isinstance(x, Const):
        return isinstance(x.value, bool)
    return isinstance(x, (And, Or, Not, NonNeg, Equal, Exists)) or (
        isinstance(x, Apply) and x.name in ("lt", "le", "gt", "ge")
    )


def _truth(ev: Evaluator, x: Any, index: Index) -> Term:
    """A tensor's element as a truth value."""
    found = ev.operand(x, index)
    if is_truth(found) or (isinstance(x, fx.Node) and x.meta["val"].dtype == torch.bool):
        return found
    return compare("ne", found, Int(Poly.of(0)))


def _dtype(x: Any) -> Any:
    return x.meta["val"].dtype if isinstance(x, fx.Node) and isinstance(x.meta["val"], torch.Tensor) else type(x)


def _is_float(node: fx.Node) -> bool:
    return node.meta["val"].dtype.is_floating_point


# ---- sources ----


@value("full.default", "new_full.default", "full_like.default")
def _full(ev: Evaluator, node: fx.Node, index: Index, a: Any, b: Any, c: Any = None, **_: Any) -> Term | None:
    return _constant(node, c if node.target == torch.ops.aten.new_full.default else b)


@value("scalar_tensor.default")
def _scalar(ev: Evaluator, node: fx.Node, index: Index, x: Any, **_: Any) -> Term | None:
    return _constant(node, x)


def _constant(node: fx.Node, x: Any) -> Term | None:
    if not isinstance(x, (bool, int, float)):
        return None
    dtype = node.meta["val"].dtype
    if dtype == torch.bool:
        return Const(bool(x))
    if dtype.is_floating_point:
        rounded = torch.tensor(x, dtype=dtype).item() if abs(float(x)) != float("inf") else float(x)
        return Const(float(rounded))
    return Int(Poly.of(x)) if isinstance(x, int) and -128 <= x < 128 or dtype in _WIDE else None


@value("zeros.default", "zeros_like.default", "new_zeros.default")
def _zeros(ev: Evaluator, node: fx.Node, index: Index, *_: Any, **__: Any) -> Term | None:
    return _constant(node, 0)


@value("ones.default", "ones_like.default", "new_ones.default")
def _ones(ev: Evaluator, node: fx.Node, index: Index, *_: Any, **__: Any) -> Term | None:
    return _constant(node, 1)


@value("arange.default", "arange.start", "arange.start_step")
def _arange(ev: Evaluator, node: fx.Node, index: Index, *args: Any, **_: Any) -> Term | None:
    if node.meta["val"].dtype not in _WIDE:
        return None
    start, step = (0 if len(args) == 1 else args[0]), (args[2] if len(args) > 2 else 1)
    return Int(ev.size(start) + index[0] * ev.size(step))


# ---- arithmetic ----


@value("copy.default")
def _copied(ev: Evaluator, node: fx.Node, index: Index, x: fx.Node, src: fx.Node, *_: Any) -> Term | None:
    return ev.operand(src, index) if _dtype(src) == node.meta["val"].dtype else None


@value("_to_copy.default")
def _cast(ev: Evaluator, node: fx.Node, index: Index, x: fx.Node, **kwargs: Any) -> Term | None:
    found, old, new = ev.value(x, index), _dtype(x), node.meta["val"].dtype
    if old == new:
        return found
    if new == torch.bool:
        return _truth(ev, x, index)
    if old == torch.bool:
        if isinstance(found, Const):
            return _constant(node, int(found.value))
        return apply("truth", found)
    if isinstance(found, Apply) and found.name == "truth":
        return found
    if isinstance(found, Const) and isinstance(found.value, float) and new.is_floating_point:
        # the smallest number of a wide type is -inf in a narrow one
        return _constant(node, torch.tensor(found.value, dtype=new).item())
    if not old.is_floating_point:
        if isinstance(found, Int) and new in _WIDE:
            return found
        if isinstance(found, Int) and found.poly.constant is not None:
            return _constant(node, found.poly.constant)
        return None
    if not new.is_floating_point:
        return None
    return apply("cast", found, old, new)


def _product(ev: Evaluator, node: fx.Node, a: Term, b: Term) -> Term | None:
    if isinstance(a, Int) and isinstance(b, Int) and not _is_float(node):
        return Int(a.poly * b.poly) if node.meta["val"].dtype in _WIDE else None
    if is_truth(a) and is_truth(b):
        return all_of(a, b)
    parts = [x.args[0] for x in (a, b) if isinstance(x, Apply) and x.name == "truth"]
    if len(parts) == 2:
        return apply("truth", all_of(*parts))
    if _number(a) is not None and not isinstance(a, Reduce):
        a, b = b, a
    number = _number(b)
    if number is None or not _is_float(node):
        return None
    return Const(_number(a) * number) if _number(a) is not None else apply("mul", a, Const(float(number)))


def _number(x: Term) -> Any:
    if isinstance(x, Int):
        return x.poly.constant
    return x.value if isinstance(x, Const) else None


@value("mul.Tensor", "mul.Scalar")
def _mul(ev: Evaluator, node: fx.Node, index: Index, a: Any, b: Any) -> Term | None:
    return _product(ev, node, ev.operand(a, index), ev.operand(b, index))


@value("div.Tensor", "div.Scalar")
def _div(ev: Evaluator, node: fx.Node, index: Index, a: Any, b: Any) -> Term | None:
    number = _number(ev.operand(b, index))
    if not number or not _is_float(node):
        return None
    return _product(ev, node, ev.operand(a, index), Const(1 / number))


@value("floor_divide.default", "floor_divide.Scalar")
def _floor_divide(ev: Evaluator, node: fx.Node, index: Index, a: Any, b: Any) -> Term | None:
    x, y = ev.operand(a, index), ev.operand(b, index)
    if isinstance(x, Int) and isinstance(y, Int) and node.meta["val"].dtype in _WIDE and is_nonneg(y.poly - 1):
        return Int(x.poly // y.poly)
    return None


@value("div.Tensor_mode", "div.Scalar_mode")
def _div_mode(ev: Evaluator, node: fx.Node, index: Index, a: Any, b: Any, rounding_mode: str | None = None) -> Any:
    x = ev.operand(a, index)
    if rounding_mode == "floor" or (rounding_mode == "trunc" and isinstance(x, Int) and is_nonneg(x.poly)):
        return _floor_divide(ev, node, index, a, b)
    return None


@value("remainder.Tensor", "remainder.Scalar")
def _remainder(ev: Evaluator, node: fx.Node, index: Index, a: Any, b: Any) -> Term | None:
    x, y = ev.operand(a, index), ev.operand(b, index)
    if isinstance(x, Int) and isinstance(y, Int) and node.meta["val"].dtype in _WIDE and is_nonneg(y.poly - 1):
        return Int(x.poly % y.poly)
    return None


@value("__rshift__.Scalar", "bitwise_right_shift.Tensor_Scalar")
def _shift(ev: Evaluator, node: fx.Node, index: Index, a: Any, b: Any) -> Term | None:
    x = ev.operand(a, index)
    if isinstance(x, Int) and isinstance(b, int) and 0 <= b < 31 and node.meta["val"].dtype in _WIDE:
        return Int(x.poly // (1 << b))
    return None


def _sum(ev: Evaluator, node: fx.Node, a: Term, b: Term, sign: int) -> Term | None:
    if isinstance(a, Int) and isinstance(b, Int) and not _is_float(node):
        return Int(a.poly + b.poly * sign) if node.meta["val"].dtype in _WIDE else None
    if not _is_float(node):
        parts = [x.args[0] for x in (a, b) if isinstance(x, Apply) and x.name == "truth"]
        if len(parts) == 2 and sign == 1:
            return apply("count", parts[0], parts[1])
    if _is_float(node):
        x, y = _number(a), _number(b)
        if x is not None and y is not None:
            return Const(float(x + sign * y))
        return apply("add", a, b) if sign == 1 else _one_minus(x, b)
    return None


def _one_minus(x: Any, b: Term) -> Term | None:
    """`1 - m` of a mask as numbers is the mask's complement."""
    return apply("truth", negate(b.args[0])) if x == 1 and isinstance(b, Apply) and b.name == "truth" else None


@value("add.Tensor", "add.Scalar")
def _add(ev: Evaluator, node: fx.Node, index: Index, a: Any, b: Any, alpha: Any = 1) -> Term | None:
    return _sum(ev, node, ev.operand(a, index), ev.operand(b, index), 1) if alpha == 1 else None


@value("sub.Tensor", "sub.Scalar")
def _sub(ev: Evaluator, node: fx.Node, index: Index, a: Any, b: Any, alpha: Any = 1) -> Term | None:
    return _sum(ev, node, ev.operand(a, index), ev.operand(b, index), -1) if alpha == 1 else None


@value("rsub.Scalar", "rsub.Tensor")
def _rsub(ev: Evaluator, node: fx.Node, index: Index, a: Any, b: Any, alpha: Any = 1) -> Term | None:
    return _sum(ev, node, ev.operand(b, index), ev.operand(a, index), -1) if alpha == 1 else None


# ---- truth values ----


def _comparison(op: str) -> None:
    @value(f"{op}.Tensor", f"{op}.Scalar")
    def rule(ev: Evaluator, node: fx.Node, index: Index, a: Any, b: Any) -> Term | None:
        x, y = ev.operand(a, index), ev.operand(b, index)
        if is_truth(x) or is_truth(y):
            known = [t for t in (x, y) if isinstance(t, Const) or _number(t) is not None]
            other = y if known and known[0] is x else x
            if op not in ("eq", "ne") or not known:
                return None
            holds = bool(_number(known[0])) == (op == "eq")
            return (other if holds else negate(other)) if is_truth(other) else None
        return compare(op, x, y)


for _op in ("lt", "le", "gt", "ge", "eq", "ne"):
    _comparison(_op)


@value("logical_and.default", "bitwise_and.Tensor", "__and__.Tensor")
def _and(ev: Evaluator, node: fx.Node, index: Index, a: Any, b: Any) -> Term | None:
    return all_of(_truth(ev, a, index), _truth(ev, b, index)) if node.meta["val"].dtype == torch.bool else None


@value("logical_or.default", "bitwise_or.Tensor", "__or__.Tensor")
def _or(ev: Evaluator, node: fx.Node, index: Index, a: Any, b: Any) -> Term | None:
    return any_of(_truth(ev, a, index), _truth(ev, b, index)) if node.meta["val"].dtype == torch.bool else None


@value("logical_not.default", "bitwise_not.default")
def _not(ev: Evaluator, node: fx.Node, index: Index, a: Any) -> Term | None:
    return negate(_truth(ev, a, index)) if node.meta["val"].dtype == torch.bool else None


@value("where.self", "where.ScalarSelf", "where.ScalarOther", "where.Scalar")
def _where(ev: Evaluator, node: fx.Node, index: Index, condition: Any, a: Any, b: Any) -> Term | None:
    return _choice(ev, node, _truth(ev, condition, index), ev.operand(a, index), ev.operand(b, index))


def _choice(ev: Evaluator, node: fx.Node, condition: Term, a: Term, b: Term) -> Term | None:
    if not _is_float(node) and node.meta["val"].dtype != torch.bool:
        # Of block ids, the node itself is the shortest name.
        return where(condition, a, b) if isinstance(condition, Const) or {type(a), type(b)} == {Int} else None
    if _is_float(node):
        a, b = (Const(float(_number(x))) if _number(x) is not None else x for x in (a, b))
    return where(condition, a, b)


@value("masked_fill.Scalar", "masked_fill.Tensor")
def _masked_fill(ev: Evaluator, node: fx.Node, index: Index, x: Any, mask: Any, fill: Any) -> Term | None:
    return _choice(ev, node, _truth(ev, mask, index), ev.operand(fill, index), ev.operand(x, index))


def _triangle(lower: bool) -> Any:
    def rule(ev: Evaluator, node: fx.Node, index: Index, x: fx.Node, diagonal: Any = 0) -> Term | None:
        over = index[-1] - index[-2] - ev.size(diagonal)  # columns right of the diagonal
        inside = nonneg(over * -1 if lower else over)
        return _choice(ev, node, inside, ev.value(x, index), _constant(node, 0) or Const(0.0))

    return rule


value("tril.default")(_triangle(True))
value("triu.default")(_triangle(False))


# ---- reductions ----


def _reduced(ev: Evaluator, x: fx.Node, index: Index, dims: Any, keepdim: bool, name: str) -> tuple[list[Var], Index]:
    shape = ev.shape(x)
    dims = range(len(shape)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    gone = {_axis(len(shape), d) for d in dims}
    left = iter([i for d, i in enumerate(index) if not (keepdim and d in gone)])
    names: list[Var] = []
    inner: list[Poly] = []
    for d, n in enumerate(shape):
        if d in gone:
            names.append(ev.var(name, n))
            inner.append(Poly.of(names[-1]) if n.constant != 1 else Poly.of(0))
        else:
            inner.append(next(left))
    return names, tuple(inner)


@value("any.dim", "any.dims", "any.default")
def _any(ev: Evaluator, node: fx.Node, index: Index, x: fx.Node, dim: Any = None, keepdim: bool = False) -> Term:
    names, inner = _reduced(ev, x, index, dim, keepdim, "any")
    found = _truth(ev, x, inner)
    for name in names:
        found = exists(name, found)
    return found


@value("all.dim", "all.dims", "all.default")
def _all(ev: Evaluator, node: fx.Node, index: Index, x: fx.Node, dim: Any = None, keepdim: bool = False) -> Term:
    names, inner = _reduced(ev, x, index, dim, keepdim, "all")
    found = negate(_truth(ev, x, inner))
    for name in names:
        found = exists(name, found)
    return negate(found)


@value("sum.dim_IntList")
def _sum_dim(
    ev: Evaluator, node: fx.Node, index: Index, x: fx.Node, dim: Any, keepdim: bool = False, **_: Any
) -> Term | None:
    names, inner = _reduced(ev, x, index, dim, keepdim, "sum")
    body = ev.value(x, inner)
    if is_truth(body):
        body = apply("truth", body)
    return Reduce("sum", names[0], body) if len(names) == 1 else None


@value("amax.default")
def _amax(ev: Evaluator, node: fx.Node, index: Index, x: fx.Node, dim: Any = None, keepdim: bool = False) -> Any:
    names, inner = _reduced(ev, x, index, dim, keepdim, "max")
    body = ev.value(x, inner)
    kind = body.args[0] if isinstance(body, Apply) and body.name == "truth" else body
    if not is_truth(kind):
        return None
    for name in names:
        kind = exists(name, kind)
    return kind if node.meta["val"].dtype == torch.bool else apply("truth", kind)


@value("_softmax.default")
def _softmax(ev: Evaluator, node: fx.Node, index: Index, x: fx.Node, dim: int, half_to_float: bool) -> Term:
    dim = _axis(len(index), dim)
    name = ev.var("w", ev.shape(x)[dim])
    return Softmax(name, ev.value(x, _set(index, dim, Poly.of(name))), index[dim])


@value("bmm.default", "mm.default")
def _matmul(ev: Evaluator, node: fx.Node, index: Index, a: fx.Node, b: fx.Node, **_: Any) -> Term:
    name = ev.var("e", ev.shape(a)[-1])
    left = ev.value(a, (*index[:-1], Poly.of(name)))
    right = ev.value(b, (*index[:-2], Poly.of(name), index[-1]))
    return Reduce("sum", name, apply("dot", left, right))


@value("baddbmm.default")
def _baddbmm(
    ev: Evaluator, node: fx.Node, index: Index, x: fx.Node, a: fx.Node, b: fx.Node, beta: Any = 1, alpha: Any = 1
) -> Term | None:
    if not isinstance(alpha, (int, float)) or not isinstance(beta, (int, float)):
        return None
    product = apply("mul", _matmul(ev, node, index, a, b), Const(float(alpha)))
    if beta == 0:
        return product
    return apply("add", ev.operand(x, index), product) if beta == 1 else None


# ---- lookups ----


def _position(ev: Evaluator, x: Any, index: Index, size: Poly, what: str) -> Poly:
    """An index computed from indices, which must lie inside."""
    found = ev.operand(x, index)
    if not isinstance(found, Int):
        raise NotUnderstood(f"{what} by values that are known only on the device")
    if not is_nonneg(found.poly):
        raise NotUnderstood(f"{what} by an index that may be negative")
    return found.poly


@value("gather.default")
def _gather(ev: Evaluator, node: fx.Node, index: Index, x: fx.Node, dim: int, at: fx.Node, **_: Any) -> Term | None:
    dim = _axis(len(index), dim)
    found = ev.value(at, index)
    if not isinstance(found, Int) or not is_nonneg(found.poly):
        return None
    return ev.value(x, _set(index, dim, found.poly))


@value("index_select.default")
def _index_select(ev: Evaluator, node: fx.Node, index: Index, x: fx.Node, dim: int, at: fx.Node) -> Term | None:
    dim = _axis(len(index), dim)
    found = ev.value(at, (index[dim],))
    if not isinstance(found, Int) or not is_nonneg(found.poly):
        return None
    return ev.value(x, _set(index, dim, found.poly))


@value("index.Tensor")
def _index(ev: Evaluator, node: fx.Node, index: Index, x: fx.Node, at: Sequence[Any]) -> Term | None:
    shape = ev.shape(x)
    by = [d for d, one in enumerate(at) if one is not None]
    if any(at[d].meta["val"].dtype == torch.bool for d in by):
        return None
    rank = max(len(ev.shape(at[d])) for d in by)
    together = by == list(range(by[0], by[-1] + 1))
    first = by[0] if together else 0
    place, rest = index[first : first + rank], list((*index[:first], *index[first + rank :]))
    inner: list[Poly] = []
    for d in range(len(shape)):
        if d in by:
            found = ev.operand(at[d], place)
            if not isinstance(found, Int) or not is_nonneg(found.poly):
                return None
            inner.append(found.poly)
        else:
            inner.append(rest.pop(0))
    return ev.value(x, tuple(inner))


@value("scatter.value", "scatter.src", "scatter.reduce", "scatter.value_reduce", "scatter_add.default")
def _scatter(
    ev: Evaluator, node: fx.Node, index: Index, x: fx.Node, dim: int, at: fx.Node, src: Any, reduce: str | None = None
) -> Term | None:
    name = str(node.target)
    dim = _axis(len(index), dim)
    adds = name == "aten.scatter_add.default" or reduce == "add"
    if reduce not in (None, "add"):
        return None
    var, shape = ev.var("s", ev.shape(at)[dim]), ev.shape(at)
    if any(a != b for d, (a, b) in enumerate(zip(shape, ev.shape(x), strict=True)) if d != dim):
        return None  # writes a part of the rows only
    here = _set(index, dim, Poly.of(var) if shape[dim].constant != 1 else Poly.of(0))
    hit = equal(_ids(ev, at, here), Int(index[dim]))
    base = ev.value(x, index)
    written = ev.value(src, here) if isinstance(src, fx.Node) else _constant(node, src)
    if written is None:
        return None
    if adds:
        # A sum of what is not negative is positive iff one of its terms is.
        counted = written.args[0] if isinstance(written, Apply) and written.name == "truth" else None
        if counted is None and _number(written) == 1:
            counted = Const(True)
        if counted is None or _number(base) != 0:
            return None
        return Reduce("sum", var, apply("truth", all_of(hit, counted)))
    if not isinstance(written, (Const, Int)) or _number(written) is None:
        return None  # which of two writes to one place stays is not defined
    return _choice(ev, node, exists(var, hit), written, base)


@value("scatter_reduce.two")
def _scatter_reduce(
    ev: Evaluator, node: fx.Node, index: Index, x: fx.Node, dim: int, at: fx.Node, src: fx.Node, reduce: str,
    include_self: bool = True,
) -> Term | None:  # fmt: skip
    if not include_self or reduce not in ("sum", "amax"):
        return None
    added = _scatter(ev, node, index, x, dim, at, src, "add")
    if reduce == "sum" or not isinstance(added, Reduce) or not isinstance(added.body, Apply):
        return added if reduce == "sum" else None
    return apply("truth", exists(added.var, added.body.args[0]))


@value("index_put.default")
def _index_put(
    ev: Evaluator, node: fx.Node, index: Index, x: fx.Node, at: Sequence[Any], src: fx.Node, accumulate: bool = False
) -> Term | None:
    if accumulate or any(one is None for one in at) or len(at) != len(index):
        return None
    written = ev.value(src, ()) if len(ev.shape(src)) == 0 else None
    if written is None or _number(written) is None or any(one.meta["val"].dtype == torch.bool for one in at):
        return None
    sizes: list[Poly] = []
    for one in at:
        shape = ev.shape(one)
        for k, n in enumerate(reversed(shape)):
            if k == len(sizes):
                sizes.append(n)
            elif sizes[k].constant == 1:
                sizes[k] = n
    names = [ev.var("s", n) for n in reversed(sizes)]
    here = tuple(Poly.of(v) if v.size.constant != 1 else Poly.of(0) for v in names)
    hits = []
    for one, i in zip(at, index, strict=True):
        inner = ev.aligned(one, here)
        ids = _ids(ev, one, inner)
        if isinstance(ids, Int) and not is_nonneg(ids.poly):
            return None
        # A negative index counts from the end: it writes too, and is not one of the ids.
        hits.append(equal(ids, Int(i)))
        if not isinstance(ids, Int) and not _never_negative(ids):
            return None
    found = all_of(*hits)
    for name in names:
        found = exists(name, found)
    return _choice(ev, node, found, written, ev.value(x, index))


def _never_negative(x: Term) -> bool:
    return isinstance(x, Apply) and x.name == "clamped"


@value("clamp.default", "clamp_min.default", "clamp.Tensor")
def _clamp(ev: Evaluator, node: fx.Node, index: Index, x: fx.Node, low: Any = None, high: Any = None) -> Term | None:
    found = ev.value(x, index)
    if isinstance(found, Int):
        if (low is None or is_nonneg(found.poly - ev.size(low))) and (
            high is None or is_nonneg(ev.size(high) - found.poly)
        ):
            return found
        return None
    if isinstance(low, int) and low >= 0 and not _is_float(node):
        return apply("clamped", At(node, index))
    return None


def _ids(ev: Evaluator, at: fx.Node, index: Index) -> Term:
    """Block ids, as an element of one tensor where they are not known from the index."""
    return ev.value(at, index)
