"""Rules for the operators that masks, block ids and scores are made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .evaluate import Evaluator, Index, value
from .index import Poly, is_nonneg
from .terms import (
    And,
    Apply,
    Const,
    Equal,
    Exists,
    Int,
    NonNeg,
    Not,
    Or,
    Reduce,
    Term,
    all_of,
    any_of,
    apply,
    compare,
    negate,
    nonneg,
    where,
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


def truth_of(ev: Evaluator, x: Any, index: Index) -> Term:
    """A tensor's element as a truth value."""
    found = ev.operand(x, index)
    if is_truth(found) or (isinstance(x, fx.Node) and x.meta["val"].dtype == torch.bool):
        return found
    return compare("ne", found, Int(Poly.of(0)))


def dtype_of(x: Any) -> Any:
    return x.meta["val"].dtype if isinstance(x, fx.Node) and isinstance(x.meta["val"], torch.Tensor) else type(x)


def is_float(node: fx.Node) -> bool:
    return node.meta["val"].dtype.is_floating_point


# ---- sources ----


@value("full.default", "new_full.default", "full_like.default")
def _full(ev: Evaluator, node: fx.Node, index: Index, a: Any, b: Any, c: Any = None, **_: Any) -> Term | None:
    return constant(node, c if node.target == torch.ops.aten.new_full.default else b)


@value("scalar_tensor.default")
def _scalar(ev: Evaluator, node: fx.Node, index: Index, x: Any, **_: Any) -> Term | None:
    return constant(node, x)


def constant(node: fx.Node, x: Any) -> Term | None:
    if not isinstance(x, (bool, int, float)):
        return None
    dtype = node.meta["val"].dtype
    if dtype == torch.bool:
        return Const(bool(x))
    if dtype.is_floating_point:
        rounded = torch.tensor(x, dtype=dtype).item() if abs(float(x)) != float("inf") else float(x)
        return Const(float(rounded))
    return Int(Poly.of(x)) if isinstance(x, int) and (0 <= x < 128 or dtype in _WIDE) else None


@value("zeros.default", "zeros_like.default", "new_zeros.default")
def _zeros(ev: Evaluator, node: fx.Node, index: Index, *_: Any, **__: Any) -> Term | None:
    return constant(node, 0)


@value("ones.default", "ones_like.default", "new_ones.default")
def _ones(ev: Evaluator, node: fx.Node, index: Index, *_: Any, **__: Any) -> Term | None:
    return constant(node, 1)


@value("arange.default", "arange.start", "arange.start_step")
def _arange(ev: Evaluator, node: fx.Node, index: Index, *args: Any, **_: Any) -> Term | None:
    if node.meta["val"].dtype not in _WIDE:
        return None
    start, step = (0 if len(args) == 1 else args[0]), (args[2] if len(args) > 2 else 1)
    return Int(ev.size(start) + index[0] * ev.size(step))


# ---- arithmetic ----


@value("detach.default")
def _detach(ev: Evaluator, node: fx.Node, index: Index, x: fx.Node) -> Term | None:
    found = ev.value(x, index)
    return found if isinstance(found, (Const, Int)) else None  # of others, it cuts the gradient


@value("copy.default")
def _copied(ev: Evaluator, node: fx.Node, index: Index, x: fx.Node, src: fx.Node, *_: Any) -> Term | None:
    return ev.operand(src, index) if dtype_of(src) == node.meta["val"].dtype else None


@value("fill.Tensor", "fill.Scalar")
def _filled(ev: Evaluator, node: fx.Node, index: Index, x: fx.Node, number: Any) -> Term | None:
    return constant(node, number_of(ev.operand(number, ())))


@value("_to_copy.default")
def _cast(ev: Evaluator, node: fx.Node, index: Index, x: fx.Node, **kwargs: Any) -> Term | None:
    found, old, new = ev.value(x, index), dtype_of(x), node.meta["val"].dtype
    if old == new:
        return found
    if new == torch.bool:
        return truth_of(ev, x, index)
    if old == torch.bool:
        if isinstance(found, Const):
            return constant(node, int(found.value))
        return apply("truth", found)
    if isinstance(found, Apply) and found.name == "truth":
        return found
    if isinstance(found, Const) and isinstance(found.value, float) and new.is_floating_point:
        # the smallest number of a wide type is -inf in a narrow one
        return constant(node, torch.tensor(found.value, dtype=new).item())
    if not old.is_floating_point:
        if isinstance(found, Int) and new in _WIDE:
            return found
        if isinstance(found, Int) and found.poly.constant is not None:
            return constant(node, found.poly.constant)
        return None
    if not new.is_floating_point:
        return None
    return apply("cast", found, old, new)


def _product(ev: Evaluator, node: fx.Node, a: Term, b: Term) -> Term | None:
    if isinstance(a, Int) and isinstance(b, Int) and not is_float(node):
        return Int(a.poly * b.poly) if node.meta["val"].dtype in _WIDE else None
    if is_truth(a) and is_truth(b):
        return all_of(a, b)
    parts = [x.args[0] for x in (a, b) if isinstance(x, Apply) and x.name == "truth"]
    if len(parts) == 2:
        return apply("truth", all_of(*parts))
    if number_of(a) is not None and not isinstance(a, Reduce):
        a, b = b, a
    number = number_of(b)
    if number is None or not is_float(node):
        return None
    return Const(number_of(a) * number) if number_of(a) is not None else apply("mul", a, Const(float(number)))


def number_of(x: Term) -> Any:
    if isinstance(x, Int):
        return x.poly.constant
    return x.value if isinstance(x, Const) else None


@value("mul.Tensor", "mul.Scalar")
def _mul(ev: Evaluator, node: fx.Node, index: Index, a: Any, b: Any) -> Term | None:
    return _product(ev, node, ev.operand(a, index), ev.operand(b, index))


@value("div.Tensor", "div.Scalar")
def _div(ev: Evaluator, node: fx.Node, index: Index, a: Any, b: Any) -> Term | None:
    number = number_of(ev.operand(b, index))
    if not number or not is_float(node):
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


@value("abs.default")
def _abs(ev: Evaluator, node: fx.Node, index: Index, x: fx.Node) -> Term | None:
    found = ev.value(x, index)
    return apply("abs", found) if isinstance(found, Int) else None


def _sum(ev: Evaluator, node: fx.Node, a: Term, b: Term, sign: int) -> Term | None:
    if isinstance(a, Int) and isinstance(b, Int) and not is_float(node):
        return Int(a.poly + b.poly * sign) if node.meta["val"].dtype in _WIDE else None
    if not is_float(node):
        parts = [x.args[0] for x in (a, b) if isinstance(x, Apply) and x.name == "truth"]
        if len(parts) == 2 and sign == 1:
            return apply("count", parts[0], parts[1])
    if is_float(node):
        x, y = number_of(a), number_of(b)
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
            known = [t for t in (x, y) if isinstance(t, Const) or number_of(t) is not None]
            other = y if known and known[0] is x else x
            if op not in ("eq", "ne") or not known:
                return None
            holds = bool(number_of(known[0])) == (op == "eq")
            return (other if holds else negate(other)) if is_truth(other) else None
        return compare(op, x, y)


for _op in ("lt", "le", "gt", "ge", "eq", "ne"):
    _comparison(_op)


@value("logical_and.default", "bitwise_and.Tensor", "__and__.Tensor")
def _and(ev: Evaluator, node: fx.Node, index: Index, a: Any, b: Any) -> Term | None:
    return all_of(truth_of(ev, a, index), truth_of(ev, b, index)) if node.meta["val"].dtype == torch.bool else None


@value("logical_or.default", "bitwise_or.Tensor", "__or__.Tensor")
def _or(ev: Evaluator, node: fx.Node, index: Index, a: Any, b: Any) -> Term | None:
    return any_of(truth_of(ev, a, index), truth_of(ev, b, index)) if node.meta["val"].dtype == torch.bool else None


@value("logical_not.default", "bitwise_not.default")
def _not(ev: Evaluator, node: fx.Node, index: Index, a: Any) -> Term | None:
    return negate(truth_of(ev, a, index)) if node.meta["val"].dtype == torch.bool else None


@value("where.self", "where.ScalarSelf", "where.ScalarOther", "where.Scalar")
def _where(ev: Evaluator, node: fx.Node, index: Index, condition: Any, a: Any, b: Any) -> Term | None:
    return choice(ev, node, truth_of(ev, condition, index), ev.operand(a, index), ev.operand(b, index))


def choice(ev: Evaluator, node: fx.Node, condition: Term, a: Term, b: Term) -> Term | None:
    if not is_float(node) and node.meta["val"].dtype != torch.bool:
        # Of block ids, the node itself is the shortest name.
        return where(condition, a, b) if isinstance(condition, Const) or {type(a), type(b)} == {Int} else None
    if is_float(node):
        a, b = (Const(float(number_of(x))) if number_of(x) is not None else x for x in (a, b))
    return where(condition, a, b)


@value("masked_fill.Scalar", "masked_fill.Tensor")
def _masked_fill(ev: Evaluator, node: fx.Node, index: Index, x: Any, mask: Any, fill: Any) -> Term | None:
    return choice(ev, node, truth_of(ev, mask, index), ev.operand(fill, index), ev.operand(x, index))


def _triangle(lower: bool) -> Any:
    def rule(ev: Evaluator, node: fx.Node, index: Index, x: fx.Node, diagonal: Any = 0) -> Term | None:
        over = index[-1] - index[-2] - ev.size(diagonal)  # columns right of the diagonal
        inside = nonneg(over * -1 if lower else over)
        return choice(ev, node, inside, ev.value(x, index), constant(node, 0) or Const(0.0))

    return rule


value("tril.default")(_triangle(True))
value("triu.default")(_triangle(False))
