"""The parts of an attention: queries, keys, values, scale and what hides keys, out of a term or a call."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .evaluate import Evaluator, NotUnderstood, is_widening
from .index import Poly, Var
from .terms import (
    And,
    Apply,
    At,
    Const,
    Exists,
    Int,
    Not,
    Or,
    Reduce,
    Softmax,
    Term,
    all_of,
    exists,
    free,
    is_low,
    negate,
    replaced,
)  # fmt: skip

__all__ = ["Pieces", "Scores", "factor", "of_call", "of_term"]


@dataclass(frozen=True)
class Pieces:
    """`out[...] = sum_j softmax_j(scale * sum_e q * k, hidden where not visible) * v`."""

    out: tuple[Var, ...]  # the result's axes
    feature: Var  # the last of v's
    key: Var  # j
    inner: Var  # e
    q: At
    k: At
    v: At
    scale: float
    visible: Term
    empty_is_zero: bool  # what a row gives that sees no key; otherwise what a softmax of `fills` alone does
    nan_is_zero: bool  # of probabilities
    additive: bool  # hidden by adding, so that the gradient of a hidden score reaches q and k
    fills: frozenset[float]  # what is in place of hidden scores, as the softmax meets it: -inf, or a lowest number


def of_call(
    ev: Evaluator, q: fx.Node, k: fx.Node, v: fx.Node, mask: fx.Node, scale: float | None, grouped: bool
) -> Pieces:
    """Of `scaled_dot_product_attention(q, k, v, mask)`, which gives 0 for a row that sees nothing."""
    shape_q, shape_k, shape_v = map(ev.shape, (q, k, v))
    if len(shape_q) not in (3, 4) or len(shape_k) != len(shape_q) or len(shape_v) != len(shape_q):
        raise NotUnderstood("its operands have neither three nor four axes")
    axes = [ev.var("o", n) for n in shape_q[:-1]]
    feature, key, inner = ev.var("d", shape_v[-1]), ev.var("j", shape_k[-2]), ev.var("e", shape_q[-1])
    batch = [Poly.of(x) if x.size.constant != 1 else Poly.of(0) for x in axes[:-1]]
    batch_k = list(batch)
    if grouped and len(shape_q) == 4:
        group = shape_q[1].divided(shape_k[1])
        if group is None or shape_k[1] != shape_v[1]:
            raise NotUnderstood("its numbers of heads do not divide")
        batch_k[1] = batch[1] // group
    keys = (*batch_k, Poly.of(key))
    terms = (
        ev.operand_of_product(q, (*batch, Poly.of(axes[-1]), Poly.of(inner))),
        ev.operand_of_product(k, ev.aligned(k, (*keys, Poly.of(inner)))),
        ev.operand_of_product(v, ev.aligned(v, (*keys, Poly.of(feature)))),
    )
    (q_at, by_q), (k_at, by_k), (v_at, by_v) = map(factor, terms)
    if by_v != 1:
        raise NotUnderstood("its values are scaled")
    element = ev.value(mask, ev.aligned(mask, (*batch, Poly.of(axes[-1]), Poly.of(key))))
    is_bool = mask.meta["val"].dtype == torch.bool
    fills = [-math.inf]
    visible = element if is_bool else all_of(*_added(element, fills := []))
    size = shape_q[-1].constant
    if scale is None and size is None:
        raise NotUnderstood("its head_dim is not a constant")
    by_size = scale if scale is not None else size**-0.5  # type: ignore[operator]
    return Pieces(
        (*axes, feature), feature, key, inner, q_at, k_at, v_at, by_size * by_q * by_k, visible,
        set(fills) == {-math.inf}, False, not is_bool, frozenset(fills),
    )  # fmt: skip


def of_term(ev: Evaluator, out: fx.Node) -> Pieces:
    """Of a product of a softmax with values, which gives NaN for a row that sees nothing."""
    axes = tuple(ev.var("o", n) for n in ev.shape(out))
    index = tuple(Poly.of(x) if x.size.constant != 1 else Poly.of(0) for x in axes)
    term = ev.value(out, index)
    while isinstance(term, Apply) and term.name == "cast":
        term = term.args[0]
    if not (isinstance(term, Reduce) and isinstance(term.body, Apply) and term.body.name == "dot"):
        raise NotUnderstood("what follows the softmax is not one product with the values")
    key = term.var
    weights, value = map(_Weights, term.body.args)
    if weights.softmax is None:
        weights, value = value, weights
    softmax = weights.softmax
    if softmax is None or value.softmax is not None:
        raise NotUnderstood("the probabilities are changed between the softmax and the product with the values")
    if softmax.at != Poly.of(key):
        raise NotUnderstood("the softmax is not over the keys")
    v, by_v = factor(value.term)
    if by_v != 1:
        raise NotUnderstood("its values are scaled")
    found = Scores(replaced(softmax.body, {softmax.var: Poly.of(key)}))
    if not found.fills:
        raise NotUnderstood("no mask hides a key: dense attention")
    (q, by_q), (k, by_k) = map(factor, found.operands)
    if key in free(q):
        q, k = k, q
    if key in free(q) or key not in free(k):
        raise NotUnderstood("its scores are not products of queries and keys")
    feature = [x for x in axes if x in free(v) and x not in free(q)]
    feature = [x for x in feature if x not in free(k) and x not in free(found.visible)]
    if len(feature) != 1:
        raise NotUnderstood("its values have no axis of their own")
    scale = found.scale * by_q * by_k
    return Pieces(
        axes, feature[0], key, found.inner, q, k, v, scale, found.visible, weights.are_hidden(found, key),
        weights.nan_is_zero, found.additive, frozenset(found.fills),
    )  # fmt: skip


class _Weights:
    """A softmax, perhaps with a number in place of NaN or zeros where a condition does not hold."""

    def __init__(self, x: Term) -> None:
        self.term = x
        self.kept: list[Term] = []  # zeros but where these hold
        self.nan_is_zero = False
        while isinstance(x, Apply) and x.name in ("cast", "finite", "where"):
            if x.name == "where":
                condition, a, b = x.args
                if _number(a) == 0:
                    condition, a, b = negate(condition), b, a
                if _number(b) != 0:
                    break
                self.kept.append(condition)
                x = a
                continue
            self.nan_is_zero |= x.name == "finite"
            x = x.args[0]
        self.softmax = x if isinstance(x, Softmax) else None

    def are_hidden(self, scores: Scores, key: Var) -> bool:
        """Whether rows that see no key have weights of zero, and others all that they see; raises if it is neither."""
        shown = _named(scores.visible)
        for condition in self.kept:
            if _named(condition) not in (shown, _named(exists(key, scores.visible))):
                raise NotUnderstood("the probabilities are changed between the softmax and the product with the values")
        if (self.kept or self.nan_is_zero) and scores.additive and -math.inf in scores.fills:
            raise NotUnderstood("-inf is added, which makes gradients NaN where a query sees no key: fill with it")
        return bool(self.kept)


def _number(x: Term) -> Any:
    return x.poly.constant if isinstance(x, Int) else x.value if isinstance(x, Const) else None


def _named(x: Any, depth: int = 0) -> Any:
    """A condition with bound variables that are named by their depth, and no order of what is joined."""
    if isinstance(x, Exists):
        bound = Var(f"bound{depth}", x.var.size)
        return Exists(bound, _named(replaced(x.body, {x.var: Poly.of(bound)}), depth + 1))
    if isinstance(x, (And, Or)):
        return type(x).__name__, frozenset(_named(part, depth) for part in x.parts)
    return ("not", _named(x.part, depth)) if isinstance(x, Not) else x


def factor(x: Term) -> tuple[At, float]:
    """An operand and the constant that it is multiplied by. A cast is looked through if it loses nothing."""
    by = 1.0
    while isinstance(x, Apply):
        if x.name == "mul":
            by *= x.args[1].value
            x = x.args[0]
        elif x.name == "cast" and is_widening(x.args[1], x.args[2]):
            x = x.args[0]
        else:
            break
    if not isinstance(x, At):
        raise NotUnderstood("an operand of its products is computed in a way that is not looked through")
    return x, by


class Scores:
    """What a softmax is taken of: a product of q and k, times constants, with keys hidden by -inf or what is as low."""

    def __init__(self, x: Term) -> None:
        self.scale = 1.0
        self.additive = False
        self.fills: list[float] = []
        masks: list[Term] = []
        narrowed = False
        while True:
            if isinstance(x, Apply) and x.name == "cast":
                narrowed |= not is_widening(x.args[1], x.args[2])
                x = x.args[0]
            elif isinstance(x, Apply) and x.name == "mul":
                if not x.args[1].value > 0:
                    raise NotUnderstood("its scores are multiplied by a number that is not positive")
                self.scale *= x.args[1].value
                x = x.args[0]
            elif isinstance(x, Apply) and x.name == "where":
                visible, x, fill = x.args
                if isinstance(x, Const) or not is_low(fill, self.scale):
                    fill = x if isinstance(x, Const) else fill
                    raise NotUnderstood(f"hidden scores are {_shown(fill)}, which is not the same as -inf")
                masks.append(visible)
                self.fills.append(fill.value * self.scale)
                if narrowed or self.scale > 1:  # may have become -inf
                    self.fills.append(-math.inf)
            elif isinstance(x, Apply) and x.name == "add":
                a, b = x.args
                mask, x = (a, b) if _holds_product(b) else (b, a)
                masks += _added(mask, self.fills)
                self.additive = True
            else:
                break
        if not (isinstance(x, Reduce) and x.kind == "sum" and isinstance(x.body, Apply) and x.body.name == "dot"):
            raise NotUnderstood("its scores are not products of queries and keys, a scale and a mask")
        self.inner = x.var
        self.operands = x.body.args
        self.visible = all_of(*masks)


def _holds_product(x: Any) -> bool:
    if isinstance(x, Reduce):
        return isinstance(x.body, Apply) and x.body.name == "dot"
    return isinstance(x, Apply) and any(_holds_product(part) for part in x.args)


def _added(x: Term, fills: list[float]) -> list[Term]:
    """The masks of which a term is 0 where all hold, and -inf or as low elsewhere."""
    if isinstance(x, Apply) and x.name == "cast":
        return _added(x.args[0], fills)
    if isinstance(x, Apply) and x.name == "add":
        return [*_added(x.args[0], fills), *_added(x.args[1], fills)]
    if isinstance(x, Apply) and x.name == "where":
        visible, inner, fill = x.args
        if not is_low(fill):
            raise NotUnderstood(f"the mask adds {_shown(fill)} to hidden scores, which is not the same as -inf")
        fills.append(fill.value)
        return [visible, *_added(inner, fills)]
    if isinstance(x, (Const, Int)) and (x.poly.constant if isinstance(x, Int) else x.value) == 0:
        return []
    raise NotUnderstood("something other than a mask of 0 and -inf is added to its scores")


def _shown(x: Any) -> str:
    return f"{x.value:g}" if isinstance(x, Const) and isinstance(x.value, float) else "no constant"
