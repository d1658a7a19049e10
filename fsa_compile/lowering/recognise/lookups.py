"""Rules for reductions, products, softmax, and for reading and writing at computed places."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from .evaluate import Evaluator, Index, axis_of, holds_softmax, joined, value, with_axis
from .index import Poly, Var, is_nonneg
from .terms import (
    FALSE,
    TRUE,
    Apply,
    At,
    Const,
    Int,
    Reduce,
    Softmax,
    Term,
    all_of,
    apply,
    equal,
    exists,
    negate,
    nonneg,
    reduced,
    replaced,
    where,
)
from .values import choice, constant, is_float, is_truth, number_of, truth_of

# ---- reductions ----


def _reduced(ev: Evaluator, x: fx.Node, index: Index, dims: Any, keepdim: bool, name: str) -> tuple[list[Var], Index]:
    shape = ev.shape(x)
    dims = range(len(shape)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    gone = {axis_of(len(shape), d) for d in dims}
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
    found = truth_of(ev, x, inner)
    for name in names:
        found = exists(name, found)
    return found


@value("all.dim", "all.dims", "all.default")
def _all(ev: Evaluator, node: fx.Node, index: Index, x: fx.Node, dim: Any = None, keepdim: bool = False) -> Term:
    names, inner = _reduced(ev, x, index, dim, keepdim, "all")
    found = negate(truth_of(ev, x, inner))
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
    if len(names) > 1 and not is_float(node):
        return None
    for name in names:
        body = Reduce("sum", name, body)
    return body


@value("mean.dim")
def _mean(ev: Evaluator, node: fx.Node, index: Index, x: fx.Node, dim: Any, keepdim: bool = False, **_: Any) -> Any:
    names, inner = _reduced(ev, x, index, dim, keepdim, "mean")
    count, body = 1, ev.value(x, inner)
    for name in names:
        count, body = count * (name.size.constant or 0), Reduce("sum", name, body)
    return apply("mul", body, Const(1 / count)) if count else None


def _of_windows(
    ev: Evaluator, x: fx.Node, index: Index, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    outside: float,
) -> tuple[Term, Var] | None:  # fmt: skip
    """The element of a window along the last axis, and the variable that counts the window's."""
    stride = stride or kernel
    if len(kernel) != 2 or kernel[0] != 1 or stride[0] != 1 or padding[0] != 0:
        return None
    var, size = ev.var("u", Poly.of(kernel[1])), ev.shape(x)[-1]
    place, inner = index[-1] * stride[1] + Poly.of(var) - padding[1], ev.var("y", size)
    element = replaced(ev.value(x, (*index[:-1], Poly.of(inner))), {inner: place})
    return where(all_of(nonneg(place), nonneg(size - 1 - place)), element, Const(outside)), var


@value("avg_pool2d.default")
def _avg_pool(
    ev: Evaluator, node: fx.Node, index: Index, x: fx.Node, kernel: Any, stride: Any = (), padding: Any = (0, 0),
    ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: Any = None,
) -> Term | None:  # fmt: skip
    if ceil_mode or divisor_override is not None or not (count_include_pad or set(padding) == {0}):
        return None
    found = _of_windows(ev, x, index, kernel, stride, padding, 0.0)
    return None if found is None else apply("mul", Reduce("sum", found[1], found[0]), Const(1 / kernel[1]))


@value("max_pool2d_with_indices.default[0]")
def _max_pool(
    ev: Evaluator, node: fx.Node, index: Index, x: fx.Node, kernel: Any, stride: Any = (), padding: Any = (0, 0),
    dilation: Any = (1, 1), ceil_mode: bool = False,
) -> Term | None:  # fmt: skip
    if set(dilation) != {1}:
        return None
    found = _of_windows(ev, x, index, kernel, stride, padding, -math.inf)
    return None if found is None else reduced("max", found[1], found[0])


@value("amax.default")
def _amax(ev: Evaluator, node: fx.Node, index: Index, x: fx.Node, dim: Any = None, keepdim: bool = False) -> Any:
    names, inner = _reduced(ev, x, index, dim, keepdim, "max")
    body = ev.value(x, inner)
    kind = body.args[0] if isinstance(body, Apply) and body.name == "truth" else body
    if not is_truth(kind):
        return reduced("max", names[0], body) if len(names) == 1 and is_float(node) else None
    for name in names:
        kind = exists(name, kind)
    return kind if node.meta["val"].dtype == torch.bool else apply("truth", kind)


@value("cumsum.default")
def _cumsum(ev: Evaluator, node: fx.Node, index: Index, x: fx.Node, dim: int, **_: Any) -> Term | None:
    dim = axis_of(len(index), dim)
    body = ev.value(x, with_axis(index, dim, Poly.of(ev.var("c", ev.shape(x)[dim]))))
    return constant(node, 0) if body == FALSE or number_of(body) == 0 else None


@value("_softmax.default")
def _softmax(ev: Evaluator, node: fx.Node, index: Index, x: fx.Node, dim: int, half_to_float: bool) -> Term:
    dim = axis_of(len(index), dim)
    name = ev.var("w", ev.shape(x)[dim])
    return Softmax(name, ev.value(x, with_axis(index, dim, Poly.of(name))), index[dim])


@value("nan_to_num.default")
def _nan_to_num(
    ev: Evaluator, node: fx.Node, index: Index, x: fx.Node, nan: Any = None, posinf: Any = None, neginf: Any = None
) -> Term | None:
    """Of probabilities, of which none is infinite."""
    found = ev.value(x, index) if nan in (None, 0) else None
    return apply("finite", found) if found is not None and holds_softmax(found) else None


@value("bmm.default", "mm.default")
def _matmul(ev: Evaluator, node: fx.Node, index: Index, a: fx.Node, b: fx.Node, **_: Any) -> Term:
    name = ev.var("e", ev.shape(a)[-1])
    left = ev.operand_of_product(a, (*index[:-1], Poly.of(name)))
    right = ev.operand_of_product(b, (*index[:-2], Poly.of(name), index[-1]))
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


@value("gather.default")
def _gather(ev: Evaluator, node: fx.Node, index: Index, x: fx.Node, dim: int, at: fx.Node, **_: Any) -> Term | None:
    dim = axis_of(len(index), dim)
    found = ev.value(at, index)
    if not isinstance(found, Int) or not is_nonneg(found.poly):
        return None
    return ev.value(x, with_axis(index, dim, found.poly))


@value("index_select.default")
def _index_select(ev: Evaluator, node: fx.Node, index: Index, x: fx.Node, dim: int, at: fx.Node) -> Term | None:
    dim = axis_of(len(index), dim)
    found = ev.value(at, (index[dim],))
    if not isinstance(found, Int) or not is_nonneg(found.poly):
        return None
    return ev.value(x, with_axis(index, dim, found.poly))


@value("index.Tensor")
def _index(ev: Evaluator, node: fx.Node, index: Index, x: fx.Node, at: Sequence[Any]) -> Term | None:
    shape = ev.shape(x)
    by = [d for d, one in enumerate(at) if one is not None]
    if any(at[d].meta["val"].dtype == torch.bool for d in by):
        return None
    rank = max(len(ev.shape(at[d])) for d in by)
    together = by == list(range(by[0], by[-1] + 1))
    first = by[0] if together else 0
    place, rest = index[first : first + rank], [*index[:first], *index[first + rank :]]
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
    dim = axis_of(len(index), dim)
    adds = name == "aten.scatter_add.default" or reduce == "add"
    if reduce not in (None, "add"):
        return None
    var, shape = ev.var("s", ev.shape(at)[dim]), ev.shape(at)
    if any(a != b for d, (a, b) in enumerate(zip(shape, ev.shape(x), strict=True)) if d != dim):
        return None  # writes a part of the rows only
    here = with_axis(index, dim, Poly.of(var) if shape[dim].constant != 1 else Poly.of(0))
    hit = equal(ev.value(at, here), Int(index[dim]))
    base = ev.value(x, index)
    written = ev.value(src, here) if isinstance(src, fx.Node) else constant(node, src)
    if written is None:
        return None
    if adds:
        # A sum of what is not negative is positive iff one of its terms is.
        counted = written.args[0] if isinstance(written, Apply) and written.name == "truth" else None
        if counted is None and number_of(written) == 1:
            counted = Const(True)
        if counted is None or number_of(base) != 0:
            return None
        return Reduce("sum", var, apply("truth", all_of(hit, counted)))
    if not isinstance(written, (Const, Int)) or number_of(written) is None:
        return None  # which of two writes to one place stays is not defined
    return choice(ev, node, exists(var, hit), written, base)


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
    if written is None or number_of(written) is None or any(one.meta["val"].dtype == torch.bool for one in at):
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
        ids = ev.value(one, inner)
        if isinstance(ids, Int) and not is_nonneg(ids.poly):
            return None
        # A negative index counts from the end: it writes too, and is not one of the ids.
        hits.append(equal(ids, Int(i)))
        if not isinstance(ids, Int) and not _never_negative(ids):
            return None
    found = all_of(*hits)
    for name in names:
        found = exists(name, found)
    return choice(ev, node, found, written, ev.value(x, index))


def _never_negative(x: Term) -> bool:
    return isinstance(x, Apply) and x.name == "clamped"


@value("cat.default")
def _cat(ev: Evaluator, node: fx.Node, index: Index, tensors: Sequence[fx.Node], dim: int = 0) -> Term | None:
    """Integers with one more before them that continues their formula, as in differences of positions."""
    dim, parts = axis_of(len(index), dim), joined(tensors, dim)
    if len(parts) != 2 or ev.shape(parts[0])[dim].constant != 1:
        return None
    place = ev.var("c", ev.shape(node)[dim])
    first = ev.value(parts[0], with_axis(index, dim, Poly.of(0)))
    rest = ev.value(parts[1], with_axis(index, dim, Poly.of(place) - 1))
    if not isinstance(first, Int) or not isinstance(rest, Int) or replaced(rest, {place: Poly.of(0)}) != first:
        return None
    return replaced(rest, {place: index[dim]})


@value("constant_pad_nd.default")
def _pad(ev: Evaluator, node: fx.Node, index: Index, x: fx.Node, widths: Sequence[Any], fill: Any = 0) -> Term | None:
    """Outside of what is padded the index has no meaning; nor has what it finds there, as it is not taken."""
    inner, shape = list(index), ev.shape(x)
    inside: Term = TRUE
    place: dict[Var, Poly] = {}
    for at in range(len(widths) // 2):
        dim = len(index) - 1 - at
        var = ev.var("y", shape[dim])
        place[var], inner[dim] = index[dim] - ev.size(widths[2 * at]), Poly.of(var)
        inside = all_of(inside, nonneg(place[var]), nonneg(shape[dim] - 1 - place[var]))
    number = constant(node, fill)
    return None if number is None else choice(ev, node, inside, replaced(ev.value(x, tuple(inner)), place), number)


@value("clamp.default", "clamp_min.default", "clamp.Tensor")
def _clamp(ev: Evaluator, node: fx.Node, index: Index, x: fx.Node, low: Any = None, high: Any = None) -> Term | None:
    found = ev.value(x, index)
    if isinstance(found, Int):
        if (low is None or is_nonneg(found.poly - ev.size(low))) and (
            high is None or is_nonneg(ev.size(high) - found.poly)
        ):
            return found
        if high is None and type(low) is int:
            return where(nonneg(found.poly - low), found, Int(Poly.of(low)))
        return None
    if isinstance(low, int) and low >= 0 and not is_float(node):
        return apply("clamped", At(node, index))
    return None


@value("slice_scatter.default")
def _slice_scatter(
    ev: Evaluator, node: fx.Node, index: Index, x: fx.Node, src: fx.Node, dim: int = 0, start: Any = None,
    end: Any = None, step: Any = 1,
) -> Term | None:  # fmt: skip
    """What is written to a slice, as `x[:, 2:] = y` does."""
    dim = axis_of(len(index), dim)
    size, given = ev.shape(x)[dim], ev.shape(src)[dim]
    first = Poly.of(0) if start is None else ev.size(start)
    if is_nonneg(first * -1 - 1):
        first = first + size
    if step != 1 or not is_nonneg(first) or not is_nonneg(size - first - given):
        return None
    return _over(ev, node, index, x, src, dim, first, given)


@value("select_scatter.default")
def _select_scatter(
    ev: Evaluator, node: fx.Node, index: Index, x: fx.Node, src: fx.Node, dim: int, at: Any
) -> Term | None:
    dim, size = axis_of(len(index), dim), ev.shape(x)[axis_of(len(index), dim)]
    first = ev.size(at)
    if is_nonneg(first * -1 - 1):
        first = first + size
    if not is_nonneg(first) or not is_nonneg(size - 1 - first):
        return None
    old, new = ev.value(x, index), ev.value(src, (*index[:dim], *index[dim + 1 :]))
    return choice(ev, node, equal(Int(index[dim]), Int(first)), new, old)


def _over(
    ev: Evaluator, node: fx.Node, index: Index, x: fx.Node, src: fx.Node, dim: int, first: Poly, given: Poly
) -> Term | None:
    """`src` laid over `x` from `first` on; outside of it the index in `src` has no meaning and is not taken."""
    var = ev.var("y", given)
    place = index[dim] - first
    inside = all_of(nonneg(place), nonneg(given - 1 - place))
    new = replaced(ev.value(src, with_axis(index, dim, Poly.of(var))), {var: place})
    return choice(ev, node, inside, new, ev.value(x, index))
