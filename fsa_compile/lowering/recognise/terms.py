"""Values of tensor elements as terms: what stands at an index, written in the values of a region's inputs.

The functions build terms in one normal form: negations inside, conjunctions and disjunctions flat, comparisons of
indices as `NonNeg`, constants folded. Two equal terms are the same value; the reverse need not hold.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from .index import Poly, Var, is_nonneg, substitute, variables

__all__ = [
    "And", "Apply", "At", "Const", "Equal", "Exists", "Int", "NonNeg", "Not", "Or", "Reduce", "Softmax", "Term",
    "all_of", "any_of", "apply", "compare", "conjuncts", "equal", "exists", "free", "negate", "nonneg", "reduced",
    "replaced", "where",
]  # fmt: skip


@dataclass(frozen=True)
class Term:
    """The value of one element."""

    @functools.cached_property
    def free(self) -> frozenset[Var]:
        """The index variables that it depends on."""
        if isinstance(self, (Int, NonNeg)):
            return variables(self.poly)
        if isinstance(self, At):
            return frozenset().union(*map(variables, self.index)) if self.index else frozenset()
        found: frozenset[Var] = frozenset().union(*(free(part) for part in _parts(self)))
        if isinstance(self, (Exists, Reduce, Softmax)):
            found -= {self.var}
        return found | variables(self.at) if isinstance(self, Softmax) else found


@dataclass(frozen=True, eq=False)
class Const(Term):
    """A number or truth value."""

    value: Any

    def __eq__(self, other: object) -> bool:
        # 1 and True are different terms
        return isinstance(other, Const) and type(other.value) is type(self.value) and other.value == self.value

    def __hash__(self) -> int:
        return hash((type(self.value), self.value))


@dataclass(frozen=True)
class Int(Term):
    """An integer that follows from the index."""

    poly: Poly


@dataclass(frozen=True)
class At(Term):
    """An element of a tensor that is not looked into."""

    node: fx.Node
    index: tuple[Poly, ...]


@dataclass(frozen=True)
class Apply(Term):
    """A function of terms: `mul`, `add`, `where`, `cast`, `lt`, ..."""

    name: str
    args: tuple[Any, ...]


@dataclass(frozen=True)
class NonNeg(Term):
    """`poly >= 0`."""

    poly: Poly


@dataclass(frozen=True)
class Equal(Term):
    """Equality of two integers."""

    left: Term
    right: Term


@dataclass(frozen=True)
class Not(Term):
    part: Term


@dataclass(frozen=True)
class And(Term):
    parts: tuple[Term, ...]


@dataclass(frozen=True)
class Or(Term):
    parts: tuple[Term, ...]


@dataclass(frozen=True)
class Exists(Term):
    """Whether `body` holds for some value of `var`."""

    var: Var
    body: Term


@dataclass(frozen=True)
class Reduce(Term):
    """Sum or maximum of `body` over `var`."""

    kind: str
    var: Var
    body: Term


@dataclass(frozen=True)
class Softmax(Term):
    """The softmax over `var` of `body`, taken where `var` is `at`."""

    var: Var
    body: Term
    at: Poly


TRUE, FALSE = Const(True), Const(False)


def nonneg(p: Poly) -> Term:
    """`p >= 0`, decided where the ranges decide it."""
    if is_nonneg(p):
        return TRUE
    return FALSE if is_nonneg(p * -1 - 1) else NonNeg(p)


def equal(a: Term, b: Term) -> Term:
    """`a == b` for integers."""
    a, b = _as_int(a), _as_int(b)
    if isinstance(a, Int) and isinstance(b, Int):
        difference = a.poly - b.poly
        if not difference.terms:
            return TRUE
        if is_nonneg(difference - 1) or is_nonneg(difference * -1 - 1):
            return FALSE
    elif isinstance(a, Int):
        a, b = b, a
    if isinstance(a, Apply) and a.name == "where" and isinstance(b, Int) and {type(x) for x in a.args[1:]} == {Int}:
        condition, left, right = a.args
        return any_of(all_of(condition, equal(left, b)), all_of(negate(condition), equal(right, b)))
    return Equal(a, b)


def _as_int(x: Term) -> Term:
    return Int(Poly.of(x.value)) if isinstance(x, Const) and type(x.value) is int else x


def negate(x: Term) -> Term:
    """`not x`."""
    if isinstance(x, Const):
        return Const(not x.value)
    if isinstance(x, Not):
        return x.part
    if isinstance(x, NonNeg):
        return nonneg(x.poly * -1 - 1)
    if isinstance(x, And):
        return any_of(*map(negate, x.parts))
    if isinstance(x, Or):
        return all_of(*map(negate, x.parts))
    return Not(x)


def _flat(kind: type, parts: tuple[Term, ...], neutral: Term, absorbing: Term) -> Term:
    found: dict[Term, None] = {}
    for part in parts:
        for one in part.parts if isinstance(part, (And, Or)) and type(part) is kind else (part,):
            if one == absorbing:
                return absorbing
            if one != neutral:
                found[one] = None
    if not found:
        return neutral
    return next(iter(found)) if len(found) == 1 else kind(tuple(found))


def all_of(*parts: Term) -> Term:
    """Conjunction."""
    return _flat(And, parts, TRUE, FALSE)


def any_of(*parts: Term) -> Term:
    """Disjunction."""
    return _flat(Or, parts, FALSE, TRUE)


def conjuncts(x: Term) -> tuple[Term, ...]:
    """The terms that all have to hold."""
    return x.parts if isinstance(x, And) else (x,)


def exists(var: Var, body: Term) -> Term:
    """Whether `body` holds for some `var`: what does not depend on it is taken out, equalities with it solved."""
    if isinstance(body, Or):
        return any_of(*(exists(var, part) for part in body.parts))
    if var not in free(body):
        return body  # a range is not empty
    if isinstance(body, And):
        outside = [part for part in body.parts if var not in free(part)]
        if outside:
            inside = all_of(*(part for part in body.parts if var in free(part)))
            return all_of(*outside, exists(var, inside))
    for part in body.parts if isinstance(body, And) else (body,):
        if isinstance(part, Equal) and isinstance(part.left, Int) and isinstance(part.right, Int):
            solved = _solved(var, part.left.poly - part.right.poly)
            if solved is not None:
                inside = replaced(body, {var: solved})
                return all_of(nonneg(solved), nonneg(var.size - 1 - solved), inside)
    if isinstance(body, NonNeg):
        slope = dict(body.poly.terms).get((var,), 0)
        if slope and var not in variables(body.poly - Poly.of(var) * slope):  # it is enough to look at one end
            return nonneg(substitute(body.poly, {var: var.size - 1 if slope > 0 else Poly.of(0)}))
    return Exists(var, body)


def _solved(var: Var, p: Poly) -> Poly | None:
    """The value of `var` where `p` is 0, if `p` is `±var` and something without it."""
    c = dict(p.terms).get((var,), 0)
    rest = p - Poly.of(var) * c
    return rest * -c if abs(c) == 1 and var not in variables(rest) else None


_NUMBERS: dict[str, Callable[[Any, Any], Any]] = {
    "lt": lambda a, b: a < b, "le": lambda a, b: a <= b, "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b,
}  # fmt: skip


def compare(op: str, a: Term, b: Term) -> Term:
    """`a op b`, with a comparison of a choice as a choice of comparisons."""
    a, b = _as_int(a), _as_int(b)
    if isinstance(a, Int) and isinstance(b, Int):
        p = a.poly - b.poly
        if op in ("eq", "ne"):
            return equal(a, b) if op == "eq" else negate(equal(a, b))
        return nonneg({"lt": p * -1 - 1, "le": p * -1, "gt": p - 1, "ge": p}[op])
    x, y = _number(a), _number(b)
    if x is not None and y is not None:
        return Const(_NUMBERS[op](x, y))
    if isinstance(a, Int) and isinstance(b, Apply) and op in _SWAPPED:
        return compare(_SWAPPED[op], b, a)
    if isinstance(a, Apply) and isinstance(b, Int) and a.name == "abs" and op in _SWAPPED:
        if op in ("gt", "ge"):
            return negate(compare("le" if op == "gt" else "lt", a, b))
        return all_of(*(compare(op, Int(a.args[0].poly * sign), b) for sign in (1, -1)))
    if isinstance(a, Apply) and a.name == "where" and (y is not None or _of_indices(a, b)):
        return where(a.args[0], compare(op, a.args[1], b), compare(op, a.args[2], b))
    if isinstance(a, Apply) and a.name == "truth" and y is not None:  # a truth value as the number 0 or 1
        return where(a.args[0], Const(_NUMBERS[op](1, y)), Const(_NUMBERS[op](0, y)))
    if isinstance(a, Reduce) and y is not None:
        counted = a.body.args[0] if isinstance(a.body, Apply) and a.body.name == "truth" else None
        if counted is not None and (op, y) in (("gt", 0), ("ne", 0), ("ge", 1)):
            return exists(a.var, counted)
        if counted is not None and (op, y) in (("eq", 0), ("lt", 1), ("le", 0)):
            return negate(exists(a.var, counted))
    if op == "eq":
        return equal(a, b)
    if op == "ne":
        return negate(equal(a, b))
    return Apply(op, (a, b))


_SWAPPED = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le"}


def _of_indices(x: Apply, other: Term) -> bool:
    return isinstance(other, Int) and all(isinstance(one, Int) for one in x.args[1:])


def _number(x: Term) -> Any:
    if isinstance(x, Int):
        return x.poly.constant
    return x.value if isinstance(x, Const) else None


def is_low(x: Term, scale: float = 1.0) -> bool:
    """Whether a score that is `x`, times `scale`, has a weight of exactly 0 beside any key that is seen.

    Only float32 and bfloat16 have numbers so low, as `torch.finfo(dtype).min` is, and no product of queries and keys
    that is not on the way to -inf is.
    """
    return isinstance(x, Const) and isinstance(x.value, float) and x.value * scale <= -1e30


def where(condition: Term, a: Term, b: Term) -> Term:
    """`a if condition else b`."""
    if isinstance(condition, Const):
        return a if condition.value else b
    if a == b:
        return a
    if isinstance(a, Const) and isinstance(b, Const) and isinstance(a.value, bool) and isinstance(b.value, bool):
        return condition if a.value else negate(condition)
    if a == TRUE or b == FALSE:
        return any_of(condition, b) if a == TRUE else all_of(condition, a)
    if a == FALSE or b == TRUE:
        return all_of(negate(condition), b) if a == FALSE else any_of(negate(condition), a)
    if is_low(a):  # what hides comes last
        return Apply("where", (negate(condition), b, a))
    return Apply("where", (condition, a, b))


def reduced(kind: str, var: Var, body: Term) -> Term:
    """Sum or maximum over `var`."""
    return body if kind == "max" and var not in free(body) else Reduce(kind, var, body)


def apply(name: str, *args: Any) -> Term:
    """A function that has no rule of its own."""
    return Apply(name, args)


# ---- structure ----


def _parts(x: Term) -> Iterator[Any]:
    if isinstance(x, Apply):
        yield from x.args
    elif isinstance(x, Equal):
        yield from (x.left, x.right)
    elif isinstance(x, (And, Or)):
        yield from x.parts
    elif isinstance(x, Not):
        yield x.part
    elif isinstance(x, (Exists, Reduce, Softmax)):
        yield x.body


def free(x: Any) -> frozenset[Var]:
    """The index variables that a term depends on; none of what is no term."""
    return x.free if isinstance(x, Term) else frozenset()


def replaced(x: Any, values: Mapping[Var, Poly]) -> Any:
    """A term with index variables replaced, simplified again. Bound variables are never among `values`."""
    if not isinstance(x, Term) or not any(v in values for v in free(x)):
        return x
    if isinstance(x, Int):
        return Int(substitute(x.poly, values))
    if isinstance(x, NonNeg):
        return nonneg(substitute(x.poly, values))
    if isinstance(x, At):
        return At(x.node, tuple(substitute(p, values) for p in x.index))
    if isinstance(x, Equal):
        return equal(replaced(x.left, values), replaced(x.right, values))
    if isinstance(x, Not):
        return negate(replaced(x.part, values))
    if isinstance(x, And):
        return all_of(*(replaced(part, values) for part in x.parts))
    if isinstance(x, Or):
        return any_of(*(replaced(part, values) for part in x.parts))
    if isinstance(x, Exists):
        return exists(x.var, replaced(x.body, values))
    if isinstance(x, Reduce):
        return reduced(x.kind, x.var, replaced(x.body, values))
    if isinstance(x, Softmax):
        return Softmax(x.var, replaced(x.body, values), substitute(x.at, values))
    assert isinstance(x, Apply)
    args = tuple(replaced(arg, values) for arg in x.args)
    if x.name == "where":
        return where(*args)
    return compare(x.name, *args) if x.name in _NUMBERS else Apply(x.name, args)
