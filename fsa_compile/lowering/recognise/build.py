"""Nodes of a pre-grad graph, made one by one with their fake values; taken back if the whole does not come about."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from .evaluate import Evaluator, NotUnderstood, joined
from .index import Div, Mod, Poly, Size, Var, is_nonneg, variables
from .region import Region, _autocast, guard_at_most
from .terms import And, Apply, At, Const, Equal, Int, NonNeg, Not, Or, Term
from .writes import tensor

__all__ = ["Builder"]

_COMPARE: dict[str, Callable[..., Any]] = {"lt": torch.lt, "le": torch.le, "gt": torch.gt, "ge": torch.ge}
_VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)
_KEPT_META = ("stack_trace", "nn_module_stack", "source_fn_stack", "custom")


class Builder:
    """Makes nodes before `anchor`."""

    def __init__(self, ev: Evaluator, anchor: fx.Node, region: Region, traced: fx.GraphModule, fake_mode: Any) -> None:
        self.ev = ev
        self.graph, self.anchor, self.region, self.fake_mode = anchor.graph, anchor, region, fake_mode
        self.inputs = dict(
            zip([n for n in traced.graph.nodes if n.op == "placeholder"], region.inputs, strict=True)
        )  # fmt: skip
        self.made: list[fx.Node] = []
        self.inlined: dict[fx.Node, Any] = {}
        self.earlier: list[Builder] = []  # of what is made for this one further up
        self.lengths: dict[Poly, tuple[fx.Node, int]] = {}  # sizes that can be read off a tensor's axis

    def undo(self) -> None:
        """Erase every node that was made."""
        for node in reversed(self.made):
            self.graph.erase_node(node)
        self.made.clear()
        for builder in self.earlier:
            builder.undo()

    def make(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A call."""
        with self.graph.inserting_before(self.anchor):
            node = self.graph.call_function(target, args, kwargs)
        self.made.append(node)
        node.meta.update({name: self.anchor.meta[name] for name in _KEPT_META if name in self.anchor.meta})
        values: Any = fx.node.map_arg(args, self.fake)
        options: Any = fx.node.map_arg(kwargs, self.fake)
        with _autocast(self.region.autocast), self.fake_mode, torch.no_grad():
            node.meta["example_value"] = target(*values, **options)
        return node

    @staticmethod
    def fake(node: fx.Node) -> Any:
        """The fake value of a node of the pre-grad graph."""
        return node.meta["example_value"] if "example_value" in node.meta else node.meta["val"]

    def shape(self, node: fx.Node) -> torch.Size:
        return self.fake(node).shape

    def inline(self, node: fx.Node) -> Any:
        """A node of the traced region, made again in the graph."""
        if node in self.inputs:
            return self.inputs[node]
        if node not in self.inlined:
            if node.target is torch.ops.aten.cat.default:
                parts = joined(*node.args)  # type: ignore[arg-type]
                if len(parts) == 1:
                    return self.inline(parts[0])
            if node.op != "call_function":
                raise NotUnderstood("it holds a constant tensor")
            if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
                raise NotUnderstood("one of its operands is random")
            args: Any = fx.node.map_arg(node.args, self.inline)
            kwargs: Any = fx.node.map_arg(node.kwargs, self.inline)
            if node.target is torch.ops.aten.copy.default:  # which has no derivative
                given = self.make(torch.Tensor.to, args[1], self.fake(args[0]).dtype)
                self.inlined[node] = self.make(torch.Tensor.expand_as, given, args[0])
                return self.inlined[node]
            # A view of what lies in memory otherwise than it did in the trace may be a copy.
            target: Any = torch.reshape if node.target in _VIEWS else node.target
            self.inlined[node] = self.make(target, *args, **kwargs)
        return self.inlined[node]

    def length(self, size: Poly) -> Any:
        """A size as a number or node."""
        if size.constant is not None:
            return size.constant
        for known, (node, axis) in self.lengths.items():
            more = (size - known).constant
            if more is not None:
                found = self.make(torch.Tensor.size, node, axis)
                return self.make(operator.add, found, more) if more else found
        raise NotUnderstood(f"the size {size} is not one of its operands'")

    # ---- tensors in an order of axes ----

    def laid_out(self, at: At, order: Sequence[Var | None]) -> fx.Node:
        """A tensor's elements at `at.index`, its axes in `order`; what it does not depend on has size 1."""
        x = self.inline(at.node)
        axes: list[Var] = []
        shape = at.node.meta["val"].shape
        for p, n in zip(at.index, shape, strict=True):
            dim = len(axes)
            if not variables(p):
                if p.constant is None:
                    raise NotUnderstood("an operand is taken at an index that is a size")
                x = self.make(torch.select, x, dim, p.constant)
                continue
            digits = _digits(p)
            if digits is None or any(v in axes for v in digits[1]):
                if len(variables(p)) != 1:
                    raise NotUnderstood(f"an operand is taken at {p}")
                (only,) = variables(p)
                if not is_nonneg(p) or not is_nonneg(self.ev.size(n) - 1 - p):
                    raise NotUnderstood(f"an operand is taken at {p}, which may lie outside of it")
                x = self.make(torch.index_select, x, dim, self.numbers(p, {only: 0}, 1))
                digits = (0, [only])
                if only in axes:
                    raise NotUnderstood("an operand is taken along a diagonal")
            else:
                x = self._narrowed(x, dim, digits, n)
            if len(digits[1]) > 1:
                sizes = [-1, *(self.length(v.size) for v in digits[1][1:])]
                x = self.make(torch.Tensor.unflatten, x, dim, sizes)
            axes += digits[1]
        if any(v not in order for v in axes):
            raise NotUnderstood("an operand depends on an axis that it may not depend on")
        present = [v for v in order if v in axes]
        if present != axes:
            x = self.make(torch.permute, x, [axes.index(v) for v in present])  # type: ignore[arg-type]
        for dim, v in enumerate(order):
            if v not in axes:
                x = self.make(torch.unsqueeze, x, dim)
        return x

    def _narrowed(self, x: fx.Node, dim: int, digits: tuple[int, list[Var]], size: Any) -> fx.Node:
        total = Poly.of(1)
        for v in digits[1]:
            total = total * v.size
        if digits[0] == 0 and total == self.ev.size(size):
            return x
        if digits[0] == 0 and total.constant is None:
            length = self.length(total)
            if guard_at_most(self.fake(length), size):
                return self.make(torch.narrow, x, dim, 0, length)
        if total.constant is None or not isinstance(size, int) or digits[0] + total.constant > size:
            raise NotUnderstood("an operand is a part of a tensor whose size changes")
        return self.make(torch.narrow, x, dim, digits[0], total.constant)

    def numbers(self, p: Poly, axes: Mapping[Var, int], ndim: int) -> Any:
        """A polynomial of indices as an int64 tensor that broadcasts over `ndim` axes, or a number."""
        total: Any = None
        for monomial, c in p.terms:
            product: Any = c
            for atom in monomial:
                factor = self._number(atom, axes, ndim)
                product = factor if isinstance(product, int) and product == 1 else self.make(torch.mul, factor, product)
            total = product if total is None else self.make(torch.add, *_tensor_first(total, product))
        return 0 if total is None else total

    def _number(self, atom: Any, axes: Mapping[Var, int], ndim: int) -> Any:
        if isinstance(atom, Var):
            if atom not in axes:
                raise NotUnderstood("an index depends on an axis that it may not depend on")
            line = self.make(torch.arange, self.length(atom.size), device=self.fake(self.anchor).device)
            shape = [1] * ndim
            shape[axes[atom]] = -1
            return self.make(torch.reshape, line, shape)
        if isinstance(atom, Size):
            return self.length(Poly.of(atom))
        assert isinstance(atom, (Div, Mod))
        if atom.den.constant is None:
            raise NotUnderstood(f"an index is divided by {atom.den}")
        number = self.numbers(atom.num, axes, ndim)
        if isinstance(atom, Div):
            return self.divided(number, atom.den.constant)
        return self.make(torch.remainder, number, atom.den.constant)

    def divided(self, x: Any, by: int) -> fx.Node:
        """Rounded down; by a power of two as a shift, which fake tensors do not take apart into ten operators."""
        if isinstance(x, fx.Node) and tensor(x) is not None and by > 0 and by & (by - 1) == 0:
            return self.make(torch.bitwise_right_shift, x, by.bit_length() - 1)
        return self.make(torch.floor_divide, x, by)

    def truth(self, x: Term, order: Sequence[Var | None]) -> Any:
        """A condition as a bool tensor whose axes are `order`, or broadcast over it."""
        if isinstance(x, Const):
            return bool(x.value)
        if isinstance(x, (At, Int)):
            return self._element(x, order)
        if isinstance(x, NonNeg):
            return self.make(torch.ge, self._element(Int(x.poly), order), 0)
        if isinstance(x, Equal):
            return self.make(torch.eq, self._element(x.left, order), self._element(x.right, order))
        if isinstance(x, Not):
            return self.make(torch.logical_not, self.truth(x.part, order))
        if isinstance(x, (And, Or)):
            fn = torch.logical_and if isinstance(x, And) else torch.logical_or
            found = self.truth(x.parts[0], order)
            for part in x.parts[1:]:
                found = self.make(fn, found, self.truth(part, order))
            return found
        if isinstance(x, Apply) and x.name in _COMPARE:
            a, b = (self._element(arg, order) for arg in x.args)
            if not isinstance(a, fx.Node):
                a, b = b, a
                swapped = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le"}
                return self.make(_COMPARE[swapped[x.name]], a, b)
            return self.make(_COMPARE[x.name], a, b)
        raise NotUnderstood("its block ids count under a condition that is not looked through")

    def _element(self, x: Term, order: Sequence[Var | None]) -> Any:
        if isinstance(x, At):
            return self.laid_out(x, order)
        if isinstance(x, Int):
            return self.numbers(x.poly, {v: d for d, v in enumerate(order) if v is not None}, len(order))
        if isinstance(x, Const):
            return x.value
        raise NotUnderstood("its block ids count under a condition that is not looked through")


def _tensor_first(a: Any, b: Any) -> tuple[Any, Any]:
    return (a, b) if isinstance(a, fx.Node) else (b, a)


def _digits(p: Poly) -> tuple[int, list[Var]] | None:
    """`constant + the number whose digits are these variables`, slowest first; None if it is no such sum."""
    left: dict[Var, Poly] = {}
    start = 0
    for monomial, c in p.terms:
        found = [a for a in monomial if isinstance(a, Var)]
        if not monomial:
            start = c
        elif len(found) == 1 and all(isinstance(a, (Var, Size)) for a in monomial) and found[0] not in left:
            left[found[0]] = Poly.make([(tuple(a for a in monomial if a is not found[0]), c)])
        else:
            return None
    order: list[Var] = []
    weight = Poly.of(1)
    while left:
        fitting = [v for v, w in left.items() if w == weight]
        if len(fitting) != 1:
            return None
        order.insert(0, fitting[0])
        del left[fitting[0]]
        weight = weight * fitting[0].size
    return (start, order) if start >= 0 else None
