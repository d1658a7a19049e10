"""What an ATen node's element at an index is, as a term.

Nodes that only move elements are looked through; of the others, those that masks and scores are made of have a rule in
`values`. Everything else is opaque: `At(node, index)`.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import sympy
import torch
from torch import fx

from .index import Div, Mod, Poly, Size, Var, atoms_of, is_nonneg
from .terms import Apply, At, Const, Int, Softmax, Term

__all__ = [
    "MOVES",
    "VALUES",
    "Evaluator",
    "Index",
    "NotUnderstood",
    "axis_of",
    "holds_softmax",
    "is_widening",
    "joined",
    "move",
    "value",
    "with_axis",
]

Index = tuple[Poly, ...]
Move = Callable[..., "tuple[fx.Node, Index] | None"]
_Rule = TypeVar("_Rule", bound=Move)
MOVES: dict[str, Move] = {}  # "aten.view.default": index of the result -> (argument, index in it)
VALUES: dict[str, Callable[..., Term | None]] = {}
_MOST_STEPS = 20_000


class NotUnderstood(Exception):
    """Why something is not recognised, in words for the user."""


def move(*names: str) -> Callable[[_Rule], _Rule]:
    """Register how operators move elements. A rule gives None where it does not say."""
    return lambda fn: MOVES.update(dict.fromkeys([f"aten.{name}" for name in names], fn)) or fn


def value(*names: str) -> Callable[[Callable[..., Term | None]], Callable[..., Term | None]]:
    """Register what operators compute. A rule gives None where it does not say."""
    return lambda fn: VALUES.update(dict.fromkeys([f"aten.{name}" for name in names], fn)) or fn


class Evaluator:
    """Terms of the nodes of one traced region.

    Args:
        guards: what is known of sizes, as `ShapeEnv` holds it.
    """

    def __init__(self, guards: Sequence[Any] = ()) -> None:
        self.known: dict[tuple[fx.Node, Index], Term] = {}
        self.factors: dict[str, int] = {}  # of sizes that are guarded to be multiples
        self.symbols: dict[str, sympy.Expr] = {}
        self._fresh = itertools.count()
        self._steps = 0
        self._expressions: dict[Any, Poly] = {}
        self.factors = dict(filter(None, map(self._multiple, guards)))
        self._expressions.clear()  # written without the factors

    def _multiple(self, guard: Any) -> tuple[str, int] | None:
        """A size and a number that divides it, if that is what a guard says."""
        e = guard.expr
        if not isinstance(e, sympy.Eq) or len(e.free_symbols) != 1:
            return None
        try:
            difference = self.expression(e.lhs) - self.expression(e.rhs)
        except NotUnderstood:
            return None
        for atom in atoms_of(difference):
            by = atom.den.constant if isinstance(atom, (Div, Mod)) else None
            if by is None or by < 2:
                continue
            (symbol,) = e.free_symbols
            size = Poly.of(Size(str(symbol)))
            for zero in (size % by, size - size // by * by, size - (size + (by - 1)) // by * by):
                if difference in (zero, zero * -1):
                    return str(symbol), by
        return None

    def var(self, name: str, size: Any) -> Var:
        """A new index variable."""
        return Var(f"{name}{next(self._fresh)}", self.size(size))

    def value(self, node: Any, index: Sequence[Poly]) -> Term:
        """The element of `node` at `index`; fewer indices than axes, or an axis of size 1, broadcast."""
        index = tuple(index)
        key = (node, index)
        if key not in self.known:
            self._steps += 1
            if self._steps > _MOST_STEPS:
                raise NotUnderstood("the computation around it is too large to be looked into")
            self.known[key] = self._value(node, index)
        return self.known[key]

    def _value(self, node: fx.Node, index: Index) -> Term:
        assert len(index) == len(self.shape(node)), (node, index)
        name = str(node.target)
        if node.op == "get_attr":
            held = getattr(node.graph.owning_module, name)
            held = getattr(held, "constant", held)  # what a fake tensor of one number knows of it
            if type(held) is torch.Tensor and held.numel() == 1:
                number = held.item()
                return Int(Poly.of(number)) if type(number) is int else Const(number)
        moved = self.moved(node, index)
        if moved is not None:
            return self.value(*moved)
        args, kwargs = node.args, node.kwargs
        if node.target is operator.getitem:  # of what gives several tensors
            source: Any = node.args[0]
            name, args, kwargs = f"{source.target}[{node.args[1]}]", source.args, source.kwargs
        if name in VALUES:
            found = VALUES[name](self, node, index, *args, **kwargs)
            if found is not None:
                return found
        return At(node, index)

    def operand_of_product(self, node: fx.Node, index: Sequence[Poly]) -> Term:
        """As `value`, but an element that is neither a multiple of a tensor's nor of a softmax is not looked into."""
        found = self.value(node, index)
        if _is_multiple(found) or holds_softmax(found):
            return found
        at = node, tuple(index)
        while (moved := self.moved(*at)) is not None:
            at = moved
        return At(*at)

    def moved(self, node: fx.Node, index: Index) -> tuple[fx.Node, Index] | None:
        """The argument and the index in it that an element is moved from, if it only is."""
        rule = MOVES.get(str(node.target))
        return None if rule is None else rule(self, index, *node.args, **node.kwargs)

    def shape(self, node: fx.Node) -> tuple[Poly, ...]:
        """Sizes of a node's axes."""
        shape = tuple(self.size(n) for n in node.meta["val"].shape)
        if any(n.constant == 0 for n in shape):
            raise NotUnderstood("a tensor in it is empty")
        return shape

    def size(self, n: Any) -> Poly:
        """A size, or an integer argument, as a polynomial."""
        if isinstance(n, Poly):
            return n
        if isinstance(n, fx.Node):
            n = n.meta["val"]
        if isinstance(n, torch.SymInt):
            return self.expression(n.node.expr)
        if isinstance(n, int) and not isinstance(n, bool):
            return Poly.of(n)
        raise NotUnderstood(f"{n!r} is not an integer")

    def expression(self, e: Any) -> Poly:
        """A size that is written in SymPy."""
        if e not in self._expressions:
            self._expressions[e] = self._expression(e)
        return self._expressions[e]

    def _expression(self, e: Any) -> Poly:
        if e.is_Integer:
            return Poly.of(int(e))
        if e.is_Symbol:
            if not str(e).startswith("s"):
                raise NotUnderstood(f"the size {e} is known only on the device")
            self.symbols[str(e)] = e
            by = self.factors.get(str(e), 1)
            return Poly.of(Size(str(e))) if by == 1 else Poly.of(Size(f"{e}/{by}")) * by
        parts = [self.expression(arg) for arg in e.args]
        name = type(e).__name__
        if name == "Add":
            return sum(parts, Poly.of(0))
        if name == "Mul":
            product = Poly.of(1)
            for part in parts:
                product = product * part
            return product
        if name == "Pow" and parts[1].constant in (2, 3):
            return parts[0] * parts[0] * (parts[0] if parts[1].constant == 3 else 1)
        if name in ("FloorDiv", "CleanDiv"):
            return parts[0] // parts[1]
        if name in ("Mod", "PythonMod"):
            return parts[0] % parts[1]
        if name == "Min" and all(is_nonneg(part - 1) for part in parts):
            return Poly.of(Size(str(e)))
        raise NotUnderstood(f"the size {e} is not understood")

    def aligned(self, node: fx.Node, index: Index) -> Index:
        """The index into an operand that is broadcast."""
        shape = self.shape(node)
        index = index[len(index) - len(shape) :]
        return tuple(Poly.of(0) if n.constant == 1 else i for i, n in zip(index, shape, strict=True))

    def operand(self, x: Any, index: Index) -> Term:
        """The value of a broadcast operand, which may be a number."""
        if isinstance(x, fx.Node) and isinstance(x.meta.get("val"), torch.Tensor):
            return self.value(x, self.aligned(x, index))
        if isinstance(x, (fx.Node, torch.SymInt)):
            return Int(self.size(x))
        if isinstance(x, (bool, int, float)):
            return Int(Poly.of(x)) if type(x) is int else Const(x)
        raise NotUnderstood(f"an operand {x!r}")


def _is_multiple(x: Any) -> bool:
    while isinstance(x, Apply) and (x.name == "mul" or (x.name == "cast" and is_widening(x.args[1], x.args[2]))):
        x = x.args[0]
    return isinstance(x, At)


def is_widening(old: torch.dtype, new: torch.dtype) -> bool:
    """Whether a cast loses nothing."""
    return torch.promote_types(old, new) == new


def holds_softmax(x: Any) -> bool:
    """Whether there is a softmax in a term."""
    return isinstance(x, Softmax) or (isinstance(x, Apply) and any(map(holds_softmax, x.args)))


def axis_of(ndim: int, dim: int) -> int:
    return dim % ndim if ndim else 0


def with_axis(index: Index, dim: int, new: Poly) -> Index:
    return (*index[:dim], new, *index[dim + 1 :])


# ---- operators that move elements ----


@move(
    "clone.default", "alias.default", "lift_fresh.default", "contiguous.default",
    "lift_fresh_copy.default",
)  # fmt: skip
def _same(ev: Evaluator, index: Index, x: fx.Node, **_: Any) -> tuple[fx.Node, Index]:
    return x, index


@move("view.default", "_unsafe_view.default", "reshape.default")
def _view(ev: Evaluator, index: Index, x: fx.Node, size: Sequence[Any]) -> tuple[fx.Node, Index]:
    sizes = _view_sizes(ev, x, size)
    old = ev.shape(x)
    # Axes that stay in place at the left are not flattened: less to divide again.
    kept = 0
    while kept < min(len(old), len(sizes)) and old[kept] == sizes[kept]:
        kept += 1
    flat = Poly.of(0)
    for i, n in zip(index[kept:], sizes[kept:], strict=True):
        flat = flat * n + i
    found: list[Poly] = []
    for n in reversed(old[kept:]):
        found.append(flat % n if n.constant != 1 else Poly.of(0))
        flat = flat // n
    return x, (*index[:kept], *reversed(found))


def _view_sizes(ev: Evaluator, x: fx.Node, size: Sequence[Any]) -> list[Poly]:
    sizes = [Poly.of(-1) if isinstance(n, int) and n == -1 else ev.size(n) for n in size]
    if Poly.of(-1) in sizes:
        total = known = Poly.of(1)
        for n in ev.shape(x):
            total = total * n
        for n in sizes:
            known = known * n if n.constant != -1 else known
        missing = total.divided(known)
        if missing is None:
            raise NotUnderstood("a view's size is not understood")
        sizes = [missing if n.constant == -1 else n for n in sizes]
    return sizes


@move("expand.default")
def _expand(ev: Evaluator, index: Index, x: fx.Node, size: Any, **_: Any) -> tuple[fx.Node, Index]:
    return x, ev.aligned(x, index)


@move("repeat.default")
def _repeat(ev: Evaluator, index: Index, x: fx.Node, repeats: Any) -> tuple[fx.Node, Index]:
    shape = ev.shape(x)
    index = index[len(index) - len(shape) :]
    return x, tuple(i % n for i, n in zip(index, shape, strict=True))


@move("permute.default")
def _permute(ev: Evaluator, index: Index, x: fx.Node, dims: Sequence[int]) -> tuple[fx.Node, Index]:
    old: list[Poly] = [Poly.of(0)] * len(dims)
    for i, dim in zip(index, dims, strict=True):
        old[axis_of(len(dims), dim)] = i
    return x, tuple(old)


@move("transpose.int")
def _transpose(ev: Evaluator, index: Index, x: fx.Node, a: int, b: int) -> tuple[fx.Node, Index]:
    dims = list(range(len(index)))
    a, b = axis_of(len(dims), a), axis_of(len(dims), b)
    dims[a], dims[b] = dims[b], dims[a]
    return _permute(ev, index, x, dims)


@move("t.default")
def _t(ev: Evaluator, index: Index, x: fx.Node) -> tuple[fx.Node, Index]:
    return (x, index) if len(index) < 2 else _transpose(ev, index, x, -1, -2)


@move("unsqueeze.default")
def _unsqueeze(ev: Evaluator, index: Index, x: fx.Node, dim: int) -> tuple[fx.Node, Index]:
    dim = axis_of(len(index), dim)
    return x, (*index[:dim], *index[dim + 1 :])


@move("squeeze.dim", "squeeze.dims", "squeeze.default")
def _squeeze(ev: Evaluator, index: Index, x: fx.Node, dim: Any = None) -> tuple[fx.Node, Index]:
    shape = ev.shape(x)
    dims = range(len(shape)) if dim is None else [dim] if isinstance(dim, int) else dim
    gone = {axis_of(len(shape), d) for d in dims if shape[axis_of(len(shape), d)].constant == 1}
    left = iter(index)
    return x, tuple(Poly.of(0) if d in gone else next(left) for d in range(len(shape)))


@move("slice.Tensor")
def _slice(
    ev: Evaluator, index: Index, x: fx.Node, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1
) -> tuple[fx.Node, Index]:
    dim = axis_of(len(index), dim)
    if start is None or (isinstance(start, int) and start == 0):
        first = Poly.of(0)
    else:
        first, size = ev.size(start), ev.shape(x)[dim]
        if is_nonneg(first * -1 - 1):
            first = first + size
        if not is_nonneg(first) or not is_nonneg(size - first):
            raise NotUnderstood("a slice's start may lie outside of what is sliced")
    return x, with_axis(index, dim, first + index[dim] * ev.size(step))


@move("select.int")
def _select(ev: Evaluator, index: Index, x: fx.Node, dim: int, i: Any) -> tuple[fx.Node, Index]:
    shape = ev.shape(x)
    dim, at = axis_of(len(shape), dim), ev.size(i)
    if is_nonneg(at * -1 - 1):
        at = at + shape[dim]
    return x, (*index[:dim], at, *index[dim:])


@move("unfold.default")
def _unfold(ev: Evaluator, index: Index, x: fx.Node, dim: int, size: int, step: int) -> tuple[fx.Node, Index]:
    dim = axis_of(len(index) - 1, dim)
    return x, with_axis(index[:-1], dim, index[dim] * ev.size(step) + index[-1])


@move("flip.default")
def _flip(ev: Evaluator, index: Index, x: fx.Node, dims: Sequence[int]) -> tuple[fx.Node, Index]:
    shape = ev.shape(x)
    for dim in dims:
        dim = axis_of(len(shape), dim)
        index = with_axis(index, dim, shape[dim] - 1 - index[dim])
    return x, index


@move("cat.default")
def _cat_of_one(ev: Evaluator, index: Index, tensors: Sequence[fx.Node], dim: int = 0) -> tuple[fx.Node, Index] | None:
    """Joined with nothing but empty tensors, as a cache that was just made holds them."""
    parts = joined(tensors, dim)
    return (parts[0], index) if len(parts) == 1 else None


def joined(tensors: Sequence[fx.Node], dim: int = 0) -> list[fx.Node]:
    """Of tensors that are joined along `dim`, those that have elements; all of them if joining casts some."""
    values = [x.meta["val"] for x in tensors]
    if len({x.dtype for x in values}) > 1:
        return list(tensors)
    empty = [x.shape == (0,) or (isinstance(x.shape[dim], int) and x.shape[dim] == 0) for x in values]
    return [x for x, none in zip(tensors, empty, strict=True) if not none]
