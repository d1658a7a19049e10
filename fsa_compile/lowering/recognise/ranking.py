"""Block ids that are the top-k of block scores: whether a query's own block is always one.

What a top-k is taken of is cut out and evaluated on its own. NaN ranks first in a top-k, and is not -inf: what is
proven holds whatever the scores are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .build import Builder
from .evaluate import NotUnderstood
from .index import Poly, Var, is_nonneg, variables
from .prove import Roles
from .region import Graph, Region, trace
from .selection import Listed
from .terms import TRUE, Const, Int, Term, replaced
from .writes import function_name, tensor

__all__ = ["FORCED", "HIDDEN", "Positions", "Ranked", "rank", "top_of"]

HIDDEN, FORCED = Const(-math.inf), Const(math.inf)
_INDEX, _SCORE = object(), object()  # an element of a top-k's two results
_UNKNOWN = object()


@dataclass(frozen=True)
class Ranked:
    """A list of block ids that holds a block with a key that the query sees, for each query."""

    top: fx.Node  # the call in the pre-grad graph
    region: Region  # what the scores are made of
    traced: fx.GraphModule
    score: Term  # of block `block` for a query
    block: Var
    number: int | None  # of blocks that are listed at most, if it is a constant
    dead_is_hidden: bool  # a listed block whose score is -inf counts for nothing


def rank(graph: Graph, b: Builder, roles: Roles, block_size: int, one: Listed) -> Ranked:
    """What a list's ids are the top-k of; raises `NotUnderstood` if a query may be left without a key."""
    follow = _Follow(graph, b, one)
    live = follow.value(one.ids.node, False)
    if live is not _INDEX or follow.top is None or one.valid != TRUE or one.shift:
        raise NotUnderstood("its block ids are not those of one topk")
    top = follow.top
    scores, number, dim = _arguments(top)
    dim = dim % len(one.ids.index)
    region = graph.region(top, pooling=True)
    traced = trace(Region(region.nodes[:-1], region.inputs, region.autocast), [scores], b.fake_mode)
    (output,) = (n for n in traced.graph.nodes if n.op == "output")
    of: Any = output.args[0]
    captured = tensor(scores)
    if captured is None or of[0].meta["val"].dtype != captured.dtype:
        raise NotUnderstood("its block scores were captured under another autocast")
    block = b.ev.var("c", b.ev.shape(of[0])[dim])
    if not is_along(b, one, dim):
        raise NotUnderstood("its block ids are not all that the topk gives for the query")
    index = tuple(Poly.of(block) if d == dim else p for d, p in enumerate(one.ids.index))
    score = b.ev.value(of[0], index)
    at = Positions(b, roles, block_size)
    beyond, newest = b.ev.var("x", block.size), (roles.pieces.key.size - 1) // block_size
    if replaced(score, at.where(Poly.of(at.block), block, at.block_poly + beyond + 1)) != HIDDEN:
        raise NotUnderstood("blocks of the future are not scored -inf before the topk")
    if replaced(score, at.where(at.block_poly, block, at.block_poly)) != FORCED:
        raise NotUnderstood("the query's own block is not scored +inf before the topk")
    if not is_nonneg(roles.pieces.key.size - roles.query.size) or not is_nonneg(block.size - 1 - newest):
        raise NotUnderstood("not every key has a block of its own")
    dead = follow.value(one.ids.node, True)
    out_of_range = isinstance(dead, Poly) and (is_nonneg(dead * -1 - 1) or is_nonneg(dead - newest - 1))
    return Ranked(top, region, traced, score, block, _number(b, number, block.size), dead is _INDEX or out_of_range)


def is_along(b: Builder, one: Listed, dim: int) -> bool:
    """Whether a list is all that stands along one axis of the ids."""
    rest = [p for d, p in enumerate(one.ids.index) if d != dim]
    whole = b.ev.shape(one.ids.node)[dim] == one.slot.size
    return whole and one.ids.index[dim] == Poly.of(one.slot) and not any(one.slot in variables(p) for p in rest)


def _arguments(top: fx.Node) -> tuple[fx.Node, Any, int]:
    """Of a top-k: what it is taken of, how many, along which axis."""
    names = ("input", "k", "dim", "largest", "sorted")
    call: dict[str, Any] = {"dim": -1, "largest": True}
    call.update(zip(names, top.args, strict=False))
    call.update(top.kwargs)
    scores, dim = call.get("input", call.get("self")), call["dim"]
    if not isinstance(scores, fx.Node) or not isinstance(dim, int) or call["largest"] is not True:
        raise NotUnderstood("its topk is not of the highest scores")
    return scores, call["k"], dim


def _number(b: Builder, number: Any, blocks: Poly) -> int | None:
    """How many blocks are listed at most: `k`, or n of `min(n, number of blocks)`."""
    if isinstance(number, int):
        return number
    size = b.fake(number) if isinstance(number, fx.Node) else None
    parts = size.node.expr.args if isinstance(size, torch.SymInt) and type(size.node.expr).__name__ == "Min" else ()
    numbers = [int(part) for part in parts if part.is_Integer]
    others = [part for part in parts if not part.is_Integer]
    if len(numbers) != 1 or len(others) != 1 or b.ev.expression(others[0]) != blocks:
        return None
    return numbers[0]


class Positions:
    """A query's position as `block_size * block + place`."""

    def __init__(self, b: Builder, roles: Roles, block_size: int) -> None:
        size = self.keys = roles.pieces.key.size
        self.size, self.query = block_size, roles.query
        self.offset = size - roles.query.size
        self.block = b.ev.var("p", (size - 1) // self.size + 1)
        self.block_poly = Poly.of(self.block)
        self.place = b.ev.var("p", Poly.of(self.size))

    def where(self, own: Poly, block: Var, scored: Poly) -> dict[Var, Poly]:
        """The query in block `own`, the block that is scored: for `replaced`."""
        return {self.query: own * self.size + Poly.of(self.place) - self.offset, block: scored}


def top_of(graph: Graph, source: fx.Node) -> tuple[fx.Node | None, int]:
    """The top-k that a node is a result of, and which; none if the result is written to in place."""
    if function_name(source) != "getitem" or graph.is_written(source):
        return None, 0
    top, which = source.args
    is_one = isinstance(top, fx.Node) and function_name(top) == "topk" and which in (0, 1)
    return (top, int(which == 1)) if is_one else (None, 0)  # type: ignore[return-value]


class _Follow:
    """An id's value in terms of the top-k's results, on the assumption that the score is -inf (dead) or is not."""

    def __init__(self, graph: Graph, b: Builder, one: Listed) -> None:
        self.graph, self.b, self.shape = graph, b, b.ev.shape(one.ids.node)
        self.top: fx.Node | None = None

    def value(self, x: Any, dead: bool) -> Any:
        """`_INDEX`, `_SCORE`, a truth value, a number as a polynomial or float, or `_UNKNOWN`."""
        if isinstance(x, (bool, float)):
            return x
        if not isinstance(x, fx.Node) or not isinstance(x.meta["val"], torch.Tensor):
            return self.b.ev.size(x)
        if x.meta["val"].dim() == 0:
            found = self.b.ev.value(x, ())
            return found.poly if isinstance(found, Int) else found.value if isinstance(found, Const) else _UNKNOWN
        if self.b.ev.shape(x) != self.shape:
            return _UNKNOWN
        if x.op == "placeholder":
            return self._result(self.b.inputs[x])
        rule = getattr(self, "of_" + str(x.target).split(".")[1], None) if x.op == "call_function" else None
        return _UNKNOWN if rule is None else rule(dead, x, *x.args)

    def _result(self, source: fx.Node) -> Any:
        top, which = top_of(self.graph, source)
        if top is None or self.top not in (None, top):
            return _UNKNOWN
        self.top = top
        return _INDEX if which else _SCORE

    def of_alias(self, dead: bool, node: fx.Node, x: Any, *_: Any) -> Any:
        return self.value(x, dead)

    of_clone = of_alias

    def of__to_copy(self, dead: bool, node: fx.Node, x: Any) -> Any:
        found, wide = self.value(x, dead), node.meta["val"].dtype in (torch.int32, torch.int64)
        return found if wide and (found is _INDEX or isinstance(found, Poly)) else _UNKNOWN

    def of_where(self, dead: bool, node: fx.Node, condition: Any, a: Any, b: Any) -> Any:
        holds = self.value(condition, dead)
        return self.value(a if holds else b, dead) if isinstance(holds, bool) else _UNKNOWN

    def of_masked_fill(self, dead: bool, node: fx.Node, x: Any, mask: Any, fill: Any) -> Any:
        return self.of_where(dead, node, mask, fill, x)

    def of_logical_not(self, dead: bool, node: fx.Node, x: Any) -> Any:
        found = self.value(x, dead)
        return not found if isinstance(found, bool) else _UNKNOWN

    of_bitwise_not = of_logical_not

    def of_eq(self, dead: bool, node: fx.Node, x: Any, y: Any) -> Any:
        a, b = self.value(x, dead), self.value(y, dead)
        if a is _SCORE and b == -math.inf:
            return dead
        return False if self._below(a, b) or self._below(b, a) else _UNKNOWN

    def of_ne(self, dead: bool, node: fx.Node, x: Any, y: Any) -> Any:
        found = self.of_eq(dead, node, x, y)
        return not found if isinstance(found, bool) else _UNKNOWN

    def of_lt(self, dead: bool, node: fx.Node, x: Any, y: Any) -> Any:
        a, b = self.value(x, dead), self.value(y, dead)
        return True if self._below(a, b) else False if self._below(b, a, equal=True) else _UNKNOWN

    def of_ge(self, dead: bool, node: fx.Node, x: Any, y: Any) -> Any:
        found = self.of_lt(dead, node, x, y)
        return not found if isinstance(found, bool) else _UNKNOWN

    @staticmethod
    def _below(a: Any, b: Any, equal: bool = False) -> bool:
        """Whether `a < b`, or `a <= b`, for sure; of an index it is known that it is not negative."""
        least = Poly.of(0) if b is _INDEX else b
        return isinstance(a, Poly) and isinstance(least, Poly) and is_nonneg(least - a - (0 if equal else 1))
