"""How the score of a block is pooled from the probabilities of compressed keys.

With `steps` windows that start in a block and `overlap` that touch a token's stride, block `j` is touched by the
windows `steps * j + c` for `c` from `1 - overlap` up to `steps - 1`. A score that adds them up as often as they share a
stride with the block, or takes the largest, is `select_blocks`'s, whatever it is written as: slices that are added,
windows that are unfolded, groups that are summed, a pooling function, a product with a matrix of zeros and ones.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .evaluate import NotUnderstood
from .index import Poly, Var
from .terms import (
    FALSE,
    TRUE,
    And,
    Apply,
    Const,
    Exists,
    Int,
    Not,
    Or,
    Reduce,
    Softmax,
    Term,
    conjuncts,
    exists,
    free,
    negate,
    nonneg,
    replaced,
)  # fmt: skip

__all__ = ["Pool", "pooled"]

_MOST = 64  # windows that touch a block
_OTHERWISE = "its block scores are neither the largest of token scores nor pooled from probabilities"


_Conditions = tuple[tuple[Term, float], ...]  # each with what stands where it does not hold


@dataclass(frozen=True)
class _Tap:
    """A probability that goes into a block's score, where `conditions` hold."""

    weight: float
    softmax: Softmax
    heads: Var | None  # that it is summed over
    conditions: _Conditions
    nan_is_zero: bool


@dataclass(frozen=True)
class Pool:
    """A block's score: the sum or the largest of probabilities."""

    kind: str  # as `select_blocks` has it
    softmax: Softmax
    heads: Var | None
    taps: tuple[_Tap, ...]
    block: Var
    where: Sequence[Mapping[Var, Poly]]  # queries and blocks, each all of those that count or more

    def check(self, visible: Term, key: Var, steps: int, overlap: int) -> None:
        """Whether the windows are those that touch a block, each as often as it shall; raises if they are not."""
        wanted: Counter[int] = Counter(m + n + 1 - overlap for m in range(steps) for n in range(overlap))
        found: Counter[int] = Counter()
        for tap in self.taps:
            at = tap.softmax.at
            place = (at - Poly.of(self.block) * steps).constant
            if place is None:
                raise NotUnderstood("its block scores are of windows elsewhere than at the block")
            found[place] += tap.weight  # type: ignore[assignment]
            exist = {_named(nonneg(at)), _named(nonneg(key.size - 1 - at))}
            shown = {_named(exists(key, visible)), *map(_named, conjuncts(replaced(visible, {key: at})))}
            for condition, number in tap.conditions:  # what does not hold otherwise is -inf only outside of the keys
                if any(_named(x) not in (exist if number else exist | shown) for x in conjuncts(condition)):
                    raise NotUnderstood("its block scores are of windows that only count sometimes")
        if self.kind == "max":
            if overlap > 1:
                raise NotUnderstood(
                    "a window that touches two blocks may be the largest of both: which of blocks of one score a topk "
                    "takes is not defined, and select_blocks takes the first"
                )
            wanted = Counter(dict.fromkeys(wanted, 1))
        ratios = {place: found[place] / wanted[place] for place in wanted}
        by = "takes" if self.kind == "max" else "weighs"
        if found.keys() != wanted.keys() or not math.isclose(min(ratios.values()), max(ratios.values()), rel_tol=1e-6):
            raise NotUnderstood(
                f"its block scores weigh the windows from {min(found)} to {max(found)} of a block by "
                f"{[found[i] for i in sorted(found)]}, where select_blocks {by} "
                f"those from {min(wanted)} to {max(wanted)} by {[wanted[i] for i in sorted(wanted)]}"
            )

    def is_zero_where_empty(self, visible: Term, key: Var, fills: Sequence[float]) -> bool:
        """Whether the probabilities of a query that sees no window are zero."""
        return all(
            (tap.nan_is_zero and set(fills) == {-math.inf}) or self._is_hidden(tap, visible, key) for tap in self.taps
        )

    def _is_hidden(self, tap: _Tap, visible: Term, key: Var) -> bool:
        seen = replaced(visible, {key: tap.softmax.at})
        if any(replaced(seen, values) == TRUE for values in self.where):
            return True  # there is no such query
        conditions = {_named(x) for one, _ in tap.conditions for x in conjuncts(one)}
        shown = set(map(_named, conjuncts(seen)))
        return _named(exists(key, visible)) in conditions or shown <= conditions


def pooled(score: Term, block: Var, where: Sequence[Mapping[Var, Poly]]) -> Pool:
    """The pool that a score is for blocks that `where` describes; raises `NotUnderstood` if it is none.

    Args:
        score: of a block.
        block: the variable that numbers it.
        where: queries and blocks, each all of those that count or more.
    """
    reader = _Reader(where)
    parts = list(reader.largest(score, ()))
    largest = len(parts) > 1
    taps = [tap for part, outer in parts for tap in reader.taps(part, outer, (0.0, -math.inf) if largest else (0.0,))]
    if largest and len(taps) != len(parts):
        raise NotUnderstood("its block scores are the largest of sums")
    if not taps:
        raise NotUnderstood(_OTHERWISE)
    first = taps[0]
    if any(_body(tap) != _body(first) for tap in taps):
        raise NotUnderstood("its block scores are of probabilities of several softmaxes")
    if largest and any(tap.weight != first.weight for tap in taps):
        raise NotUnderstood("its block scores weigh what they take the largest of")
    return Pool("max" if largest else "overlap", first.softmax, first.heads, tuple(taps), block, where)


class _Reader:
    """Takes a score apart."""

    def __init__(self, where: Sequence[Mapping[Var, Poly]]) -> None:
        self.where = where

    def largest(self, x: Term, conditions: _Conditions) -> Iterator[tuple[Term, _Conditions]]:
        """What a term is the largest of."""
        outer, inner, _ = self._peeled(x, (0.0, -math.inf))
        if isinstance(inner, Reduce) and inner.kind == "max":
            if any(inner.var in free(one.body) for one in _softmaxes(inner.body)):
                raise NotUnderstood("its block scores are the largest of heads, say, which select_blocks adds up")
            for part in self._each(inner):
                yield from self.largest(part, (*conditions, *outer))
        else:
            yield x, conditions

    def taps(
        self, x: Term, conditions: _Conditions, numbers: tuple[float, ...] = (0.0,), weight: float = 1.0,
        nan_is_zero: bool = False,
    ) -> Iterator[_Tap]:  # fmt: skip
        """The probabilities that a term is the sum of; one of `numbers` may stand where it does not count."""
        more, x, finite = self._peeled(x, numbers)
        conditions, nan_is_zero = (*conditions, *more), nan_is_zero or finite
        given: tuple[Any, ...] = conditions, (0.0,), weight, nan_is_zero
        if isinstance(x, Softmax):
            yield _Tap(weight, x, None, conditions, nan_is_zero)
        elif isinstance(x, (Const, Int)) and _number(x) == 0:
            pass
        elif isinstance(x, Apply) and x.name == "mul" and x.args[1].value > 0:
            yield from self.taps(x.args[0], conditions, (0.0,), weight * x.args[1].value, nan_is_zero)
        elif isinstance(x, Apply) and x.name == "add":
            for part in x.args:
                yield from self.taps(part, *given)
        elif isinstance(x, Reduce) and x.kind == "sum" and isinstance(x.body, Apply) and x.body.name == "dot":
            raise NotUnderstood("its block scores are a product of probabilities and a matrix: add up slices of them")
        elif isinstance(x, Reduce) and x.kind == "sum" and any(x.var in free(one.body) for one in _softmaxes(x.body)):
            for tap in self.taps(x.body, *given):
                if tap.heads is not None or x.var in _place(tap):
                    raise NotUnderstood("its block scores are summed over heads in a way that is not looked through")
                yield replace(tap, heads=x.var)
        elif isinstance(x, Reduce) and x.kind == "sum":
            for part in self._each(x):
                yield from self.taps(part, *given)
        else:
            raise NotUnderstood(_OTHERWISE)

    def _each(self, x: Reduce) -> list[Term]:
        size = x.var.size.constant
        if size is None or size > _MOST:
            raise NotUnderstood(_OTHERWISE)
        return [replaced(x.body, {x.var: Poly.of(i)}) for i in range(size)]

    def _peeled(self, x: Term, numbers: tuple[float, ...]) -> tuple[_Conditions, Term, bool]:
        """What is inside of casts and choices, under which conditions, and whether NaN is 0 there."""
        conditions: list[tuple[Term, float]] = []
        finite = False
        while isinstance(x, Apply) and x.name in ("where", "finite", "cast"):
            if x.name != "where":
                finite |= x.name == "finite"
                x = x.args[0]
                continue
            condition, a, b = x.args
            decided = [replaced(condition, values) for values in self.where]
            if TRUE in decided or FALSE in decided:
                x = a if TRUE in decided else b
                continue
            if _number(a) in numbers:
                condition, a, b = negate(condition), b, a
            if _number(b) not in numbers:
                raise NotUnderstood("blocks of the past are forced or hidden")
            conditions.append((condition, float(_number(b))))
            x = a
        return tuple(conditions), x, finite


def _place(tap: _Tap) -> frozenset[Var]:
    """What the place of a probability and whether it counts depend on."""
    return free(Int(tap.softmax.at)).union(*(free(condition) for condition, _ in tap.conditions))


def _softmaxes(x: Any) -> Iterator[Softmax]:
    if isinstance(x, Softmax):
        yield x
    elif isinstance(x, Apply):
        for part in x.args:
            yield from _softmaxes(part)
    elif isinstance(x, Reduce):
        yield from _softmaxes(x.body)


def _number(x: Term) -> Any:
    return x.poly.constant if isinstance(x, Int) else x.value if isinstance(x, Const) else None


def _body(tap: _Tap) -> Any:
    """A softmax in a form that does not depend on how its variables are called."""
    body, heads = tap.softmax.body, None
    if tap.heads is not None:
        heads = Var("heads", tap.heads.size)
        body = replaced(body, {tap.heads: Poly.of(heads)})
    return heads, tap.softmax.var.size, _named(Softmax(tap.softmax.var, body, Poly.of(0)))


def _named(x: Any, depth: int = 0) -> Any:
    """A term with bound variables that are named by their depth, and no order of what is joined."""
    if isinstance(x, (Exists, Reduce, Softmax)):
        bound = Var(f"bound{depth}", x.var.size)
        kind = x.kind if isinstance(x, Reduce) else type(x).__name__
        at = x.at if isinstance(x, Softmax) else None
        return kind, bound, _named(replaced(x.body, {x.var: Poly.of(bound)}), depth + 1), at
    if isinstance(x, (And, Or)):
        return type(x).__name__, frozenset(_named(part, depth) for part in x.parts)
    if isinstance(x, Apply):
        return x.name, tuple(_named(arg, depth) for arg in x.args)
    return ("not", _named(x.part, depth)) if isinstance(x, Not) else x
