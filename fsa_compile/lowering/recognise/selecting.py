"""`fsa::select_blocks` in place of a top-k of block scores: pooled token scores, or compressed probabilities."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .bands import band, horizons
from .build import Builder
from .compressed import Windows, complete
from .evaluate import NotUnderstood
from .index import Poly, Var
from .pools import pooled
from .prove import Roles
from .ranking import FORCED, HIDDEN, Positions, Ranked
from .scores import Scores, factor
from .selection import Listed, is_implied
from .terms import FALSE, TRUE, Apply, At, Const, Int, Reduce, Term, conjuncts, free, replaced
from .writes import written

__all__ = ["select"]

_MOST_INIT, _MOST_LOCAL = 4, 64
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class _Scores:
    """What blocks are ranked by, if they are not forced: products of `q` and `k`."""

    q: At
    k: At
    key: Var
    inner: Var
    scale: float
    summed: Var | None  # heads of a group, whose probabilities are added up
    windows: Windows | None  # of compressed keys that the probabilities are of; None: products of single tokens
    pool: str = "max"


def select(found: Ranked, b: Builder, outer: Builder, roles: Roles, block_size: int, one: Listed) -> fx.Node:
    """`select_blocks` in place of the list: ids (batch, seq_len, heads, slots); raises `NotUnderstood`.

    Args:
        found: what the list is the top-k of.
        b: makes nodes before the top-k, where the scores' operands are still what they were.
        outer: makes the nodes of the attention.
        roles: the axes of the attention.
        block_size: of its blocks.
        one: the list.
    """
    if not found.dead_is_hidden:
        raise NotUnderstood("a block whose score is -inf may count")
    if found.number is None:
        raise NotUnderstood("the number of blocks that are selected is not a constant")
    if not _only_here(found, outer):
        raise NotUnderstood("the topk is also used otherwise, and so are its scores")
    at = Positions(b, roles, block_size)
    forced = _forced(found, b, at)
    if forced.init + forced.local > found.number:
        raise NotUnderstood("more blocks are forced than are selected")
    x = _pooled(forced, found.block, b, at, roles) or _probabilities(found.score, forced, found.block, b, at, roles)
    group = roles.group if roles.group is not None and roles.group in free(one.ids) else None
    if x.summed is not None and group is not None:
        raise NotUnderstood("its block scores are sums over heads that choose for themselves")
    q = b.make(torch.flatten, _whole(b, x.q, (roles.batch, roles.query, roles.head, group or x.summed, x.inner)), 2, 3)
    b.lengths.update({roles.query.size: (q, 1), **({roles.batch.size: (q, 0)} if roles.batch else {})})
    k = b.make(torch.flatten, _whole(b, x.k, (roles.batch, x.key, roles.head, group, x.inner)), 2, 3)
    b.lengths[x.key.size] = (k, 1)
    dtype = torch.promote_types(b.fake(q).dtype, b.fake(k).dtype)
    if dtype not in _DTYPES or b.shape(q)[3] > 256:
        raise NotUnderstood(f"its scores are of {b.shape(q)[3]} features in {dtype}")
    q, k = (y if b.fake(y).dtype == dtype else b.make(torch.Tensor.to, y, dtype) for y in (q, k))
    options: dict[str, Any] = {
        "kernel_size": 1, "kernel_stride": 1, "scale": x.scale,
        "seq_len_k": None if at.keys == roles.query.size else b.length(at.keys),
    }  # fmt: skip
    lse: fx.Node | None = None
    if x.windows is not None:
        k = x.windows.cut(b, k)
        options.update(kernel_size=x.windows.kernel, kernel_stride=x.windows.stride)
        lse = _log_sum_exp(b, q, k, options)
    options.update(block_size=block_size, num_selected=found.number, init_blocks=forced.init, local_blocks=forced.local)
    options["pool"] = x.pool
    ids = b.make(torch.ops.fsa.select_blocks.default, q, k, lse, **options)
    return b.make(torch.Tensor.unflatten, ids, 2, (-1, _count(group)))


def _whole(b: Builder, at: At, order: tuple[Var | None, ...]) -> fx.Node:
    """A tensor's elements, expanded over the batch and the heads where it does not depend on them."""
    x = b.laid_out(at, order)
    missing = [v is not None and axis not in (1, 4) and v not in free(at) for axis, v in enumerate(order)]
    if not any(missing):
        return x
    sizes = [b.length(v.size) if v is not None and gone else -1 for v, gone in zip(order, missing, strict=True)]
    return b.make(torch.Tensor.expand, x, *sizes)


def _log_sum_exp(b: Builder, q: fx.Node, k: fx.Node, options: dict[str, Any]) -> fx.Node:
    """That of the compressed branch, if it stands before the top-k; else of a call of its own, of few features."""
    op = torch.ops.fsa.compressed_attention.default
    for node in b.graph.nodes:
        if node is b.anchor:
            break
        if node.target is op and _alike(node.args[:2], (q, k)) and _alike(dict(node.kwargs), options):
            return b.make(operator.getitem, node, 1)
    few = b.make(torch.narrow, k, 3, 0, min(16, int(b.shape(k)[3])))
    return b.make(operator.getitem, b.make(op, q, k, few, **options), 1)


def _alike(a: Any, b: Any) -> bool:
    """Whether two values are made by the same calls."""
    if isinstance(a, fx.Node) and isinstance(b, fx.Node):
        made = a.op == b.op == "call_function" and a.target is b.target
        return a is b or (made and _alike(a.args, b.args) and _alike(dict(a.kwargs), dict(b.kwargs)))
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_alike, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_alike(a[name], b[name]) for name in a)
    return type(a) is type(b) and not isinstance(a, fx.Node) and a == b


def _count(x: Var | None) -> int:
    return 1 if x is None else int(x.size.constant or 1)


def _only_here(found: Ranked, outer: Builder) -> bool:
    """Whether all that is made of the top-k goes into nodes that have no use once the attention is replaced."""
    inside = set(outer.region.nodes)
    pending, seen = [found.top], {outer.anchor}
    while pending:
        for user in pending.pop().users:
            if user in seen:
                continue
            seen.add(user)
            pending.append(user)
            writes = written(user)
            if user not in inside and (writes or user.is_impure() or user.op in ("call_module", "output")):
                return False
            pending += [x for x in writes if isinstance(x, fx.Node)]
    return True


@dataclass(frozen=True)
class _Forced:
    """How many blocks are selected in any case, the first and those up to the query's own, and the others' score."""

    init: int
    local: int
    score: Term
    where: tuple[dict[Var, Poly], ...]  # queries and blocks of their past that are not forced, each all of them or more

    def decided(self, x: Term) -> Term:
        """What a score is for blocks that are not forced, out of choices and casts around it."""
        while isinstance(x, Apply) and x.name in ("where", "finite", "cast"):
            if x.name != "where":
                x = x.args[0]
                continue
            conditions = [replaced(x.args[0], values) for values in self.where]
            if TRUE not in conditions and FALSE not in conditions:
                if any(one in (Const(0.0), Int(Poly.of(0))) for one in x.args[1:]):
                    return x  # neither forced nor hidden, be it one or the other
                raise NotUnderstood("blocks of the past are forced or hidden")
            x = x.args[1] if TRUE in conditions else x.args[2]
        return x


def _forced(found: Ranked, b: Builder, at: Positions) -> _Forced:
    for local in range(1, _MOST_LOCAL + 1):
        where = at.where(at.block_poly + local, found.block, at.block_poly)
        if replaced(found.score, where) != FORCED:
            break
    later, before = b.ev.var("x", at.block.size), b.ev.var("y", at.block.size)
    own = (at.keys - 1) // at.size - before
    from_last = at.where(own, found.block, own - local - later)
    for init in range(_MOST_INIT + 1):
        first = at.block_poly + init
        from_first = at.where(first + local + later, found.block, first)
        forced = _Forced(init, local, found.score, (from_first, from_last))
        try:
            score = forced.decided(found.score)
        except NotUnderstood:
            if init == _MOST_INIT:
                raise
        else:
            break
    for block in range(init):
        first = Poly.of(block)
        if replaced(found.score, at.where(first + local + later, found.block, first)) != FORCED:
            raise NotUnderstood("blocks of the past are forced or hidden")
    if score in (FORCED, HIDDEN):
        raise NotUnderstood("blocks of the past are forced or hidden")
    return _Forced(init, local, score, forced.where)


def _pooled(forced: _Forced, block: Var, b: Builder, at: Positions, roles: Roles) -> _Scores | None:
    """The largest token score of a block, if that is what blocks are ranked by."""
    pooled = forced.score
    if not isinstance(pooled, Reduce) or pooled.kind != "max" or pooled.var.size.constant != at.size:
        return None
    token = Poly.of(block) * at.size + Poly.of(pooled.var)
    scores = Scores(pooled.body)
    position = Poly.of(roles.query) + at.offset
    if any(not is_implied(part, token, position) for part in conjuncts(scores.visible) if part != TRUE):
        raise NotUnderstood("its token scores are hidden otherwise than those of the future")
    (q, by_q), (k, by_k) = map(factor, scores.operands)
    if block in free(q):
        q, k = k, q
    scale = scores.scale * by_q * by_k
    key = b.ev.var("j", at.keys)
    k = At(k.node, tuple(Poly.of(key) if p == token else p for p in k.index))
    inside = {block, pooled.var}
    if inside & (free(q) | free(k)) or key not in free(k) or roles.query in free(k) or not scale > 0:
        raise NotUnderstood("its token scores are not products of a query and a key")
    return _Scores(q, k, key, scores.inner, scale, None, None)


def _probabilities(score: Term, forced: _Forced, block: Var, b: Builder, at: Positions, roles: Roles) -> _Scores:
    """Probabilities of compressed keys, summed over heads and pooled over the windows that touch a block."""
    pool = pooled(score, block, forced.where)
    key = b.ev.var("j", pool.softmax.var.size)
    scores = Scores(replaced(pool.softmax.body, {pool.softmax.var: Poly.of(key)}))
    found = horizons(scores.visible, key, [roles.query])
    kernel = (at.offset - found[0].reach + 1).constant if len(found) == 1 else None
    stride = found[0].stride
    if kernel is None or kernel < stride or kernel % stride or at.size % stride:
        raise NotUnderstood(
            f"its block scores are probabilities of other keys than windows of a multiple of {stride} tokens, which "
            "divide the block, each seen when it is complete"
        )
    band(scores.visible, key, found[0])
    pool.check(scores.visible, key, at.size // stride, kernel // stride)
    others = (kernel - 2) // at.size - forced.init - forced.local + 1  # blocks of a query before the first window's end
    if others > 1:
        raise NotUnderstood("before the first window is complete, a query has several blocks of one score")
    if others == 1 and not pool.is_zero_where_empty(scores.visible, key, scores.fills):
        raise NotUnderstood(
            "before the first window is complete, its block scores are not 0: set probabilities that are NaN or of "
            "hidden windows to 0"
        )
    (q, by_q), (k, by_k) = map(factor, scores.operands)
    if key in free(q):
        q, k = k, q
    inside = {block, pool.softmax.var, key}
    scale = scores.scale * by_q * by_k
    if inside & free(q) or key not in free(k) or {roles.query, pool.heads} & free(k) or not scale > 0:
        raise NotUnderstood("its probabilities are not of products of a query and a key")
    given = complete(kernel, stride, at.keys, key.size)
    return _Scores(q, k, key, scores.inner, scale, pool.heads, given, pool.kind)
