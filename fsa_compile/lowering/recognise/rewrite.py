"""The replacement: block ids as the operator wants them, the call, and what the user's rows without a key gave."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .build import Builder
from .evaluate import NotUnderstood
from .index import Poly, Var, variables
from .prove import Fixed, Listed, Proof
from .ranking import rank, select, top_of
from .region import Graph, tensor
from .terms import TRUE, free

__all__ = ["rewrite"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST_HEAD_DIM = 256


def rewrite(proof: Proof, b: Builder, graph: Graph) -> tuple[fx.Node, str]:
    """Nodes that give what the anchor gives, and words about the block ids."""
    want = tensor(b.anchor)
    assert want is not None
    query, pieces = proof.query, proof.pieces
    heads = (proof.head, proof.group)
    by_query_head = proof.keys_by_query_head or (
        proof.group is not None
        and any(
            isinstance(x, Listed) and (proof.group in free(x.ids) or proof.group in free(x.valid)) for x in proof.blocks
        )
    )
    q = _operand(b, pieces.q, (proof.batch, query, *heads, pieces.inner), want)
    b.lengths.update({query.size: (q, 1), **({proof.batch.size: (q, 0)} if proof.batch else {})})
    key_heads = heads if proof.keys_by_query_head else (proof.head, None)
    k = _operand(b, pieces.k, (proof.batch, pieces.key, *key_heads, pieces.inner), want)
    b.lengths[pieces.key.size] = (k, 1)
    v = _operand(b, pieces.v, (proof.batch, pieces.key, *key_heads, pieces.feature), want)
    q, k, v = _one_dtype(b, (q, k, v), want.dtype)
    k, v = (_whole(b, x, proof) for x in (k, v))
    group = 1 if proof.group is None else int(proof.group.size.constant or 1)
    if by_query_head and not proof.keys_by_query_head:
        k, v = (b.make(torch.repeat_interleave, x, group, 2) for x in (k, v))
    if max(int(b.shape(x)[3]) for x in (q, k, v)) > _MOST_HEAD_DIM:
        raise NotUnderstood(f"its head_dim is more than {_MOST_HEAD_DIM}")
    ranked = _ranked(b, proof, graph)
    ids, sees = _block_indices(b, proof, ranked, q, heads if by_query_head else (proof.head, None))
    options: dict[str, Any] = {"block_size": proof.block_size, "scale": pieces.scale}
    both = b.make(torch.ops.fsa.selected_attention.default, q, k, v, ids, **options)
    out = b.make(operator.getitem, both, 0)
    if proof.never_empty or ranked.never_empty:
        return _as_wanted(b, proof, out, group, want), ranked.words
    if pieces.fills != {-math.inf}:
        out = _average_where_empty(b, proof, out, sees, v, 1 if by_query_head else group, ranked.words)
    elif pieces.empty_is_nan:
        out = _nan_where_empty(b, proof, out, sees, q, k, v, 1 if by_query_head else group)
    return _as_wanted(b, proof, out, group, want), ranked.words


@dataclass
class _Lists:
    """Of lists that are the top-k of block scores, what is known or made of them."""

    graph: Graph
    selected: dict[Listed, fx.Node]  # ids of `select_blocks`, (batch, seq_len, num_kv_heads, group or 1, slots)
    never_empty: bool
    words: str


def _ranked(b: Builder, proof: Proof, graph: Graph) -> _Lists:
    lists = _Lists(graph, {}, False, "")
    for one in proof.blocks:
        if not isinstance(one, Listed):
            continue
        try:
            found = rank(graph, b, proof, one)
            lists.never_empty = True
            inner = Builder(b.ev, found.top, found.region, found.traced, b.fake_mode)
            b.earlier.append(inner)
            try:
                lists.selected[one] = select(found, inner, b, proof, one)
            except NotUnderstood:
                inner.undo()
                raise
            lists.words = ", chosen by select_blocks"
        except NotUnderstood as why:
            lists.words = f"; its block ids are left as they are: {why}"
    return lists


def _operand(b: Builder, at: Any, order: tuple[Var | None, ...], want: torch.Tensor) -> fx.Node:
    """(batch, length, heads, head_dim), the heads of a group next to each other."""
    x = b.laid_out(at, order)
    if b.fake(x).device != want.device:
        raise NotUnderstood("its operands are on different devices")
    return b.make(torch.flatten, x, 2, 3)


def _one_dtype(b: Builder, operands: tuple[fx.Node, ...], out: torch.dtype) -> list[fx.Node]:
    """The widest dtype among operands and result: no rounding that the original does not do."""
    dtype = out
    for x in operands:
        dtype = torch.promote_types(dtype, b.fake(x).dtype)
    if dtype not in _DTYPES:
        raise NotUnderstood(f"it is computed in {dtype}")
    return [x if b.fake(x).dtype == dtype else b.make(torch.Tensor.to, x, dtype) for x in operands]


def _whole(b: Builder, x: fx.Node, proof: Proof) -> fx.Node:
    """Keys or values that are shared along the batch or the heads, expanded over them."""
    sizes: list[Any] = [-1, -1, -1, -1]
    for axis, role in ((0, proof.batch), (2, proof.head)):
        if role is not None and role.size.constant != 1 and b.shape(x)[axis] == 1:
            sizes[axis] = b.length(role.size)
    return x if sizes == [-1] * 4 else b.make(torch.Tensor.expand, x, *sizes)


def _block_indices(
    b: Builder, proof: Proof, ranked: _Lists, q: fx.Node, heads: tuple[Var | None, Var | None]
) -> tuple[fx.Node, fx.Node]:
    """Ids (batch, seq_len, heads, slots), int32, none twice, -1 for what a query does not see; whether it sees any."""
    parts: list[fx.Node] = []
    query, key = proof.query, proof.pieces.key
    shape = [b.length(x.size) if x is not None else 1 for x in (proof.batch, query)]
    shape += [math.prod(int(x.size.constant or 1) for x in heads if x is not None)]
    for one in proof.blocks:
        if isinstance(one, Fixed):
            part = b.numbers(one.block, {query: 1}, 4)
            if not isinstance(part, fx.Node):
                part = b.make(torch.full, [1, 1, 1, 1], part, dtype=torch.int64, device=b.fake(q).device)
            parts.append(b.make(torch.Tensor.expand, part, *shape, 1))
            continue
        if one in ranked.selected:
            part = b.make(torch.Tensor.to, ranked.selected[one], torch.int64)
        else:
            part = _listed(b, one, (proof.batch, query, *heads, one.slot))
        part = b.make(
            torch.Tensor.expand, part, *shape[:2], *(int(x.size.constant or 1) if x else 1 for x in heads), -1
        )
        parts.append(b.make(torch.flatten, part, 2, 3))
    ids = parts[0] if len(parts) == 1 else b.make(torch.cat, parts, -1)
    position = b.numbers(Poly.of(query) + (key.size - query.size), {query: 1}, 4)
    newest = b.make(torch.floor_divide, position, proof.block_size)
    seen = b.make(torch.logical_and, b.make(torch.ge, ids, 0), b.make(torch.le, ids, newest))
    ids = b.make(torch.where, seen, ids, -1)
    if not _distinct(b, proof, ranked) and b.shape(ids)[-1] != 1:
        # A block counts once in a mask, however often it is listed.
        ids = b.make(operator.getitem, b.make(torch.sort, ids, -1), 0)
        first, later = (b.make(operator.getitem, ids, (..., part)) for part in (slice(None, 1), slice(1, None)))
        before = b.make(operator.getitem, ids, (..., slice(None, -1)))
        later = b.make(torch.where, b.make(torch.eq, later, before), -1, later)
        ids = b.make(torch.cat, [first, later], -1)
    return b.make(torch.Tensor.to, ids, torch.int32), b.make(torch.any, seen, -1)


def _listed(b: Builder, one: Listed, order: tuple[Var | None, ...]) -> fx.Node:
    """A list's ids, with -1 for those that do not count."""
    part = b.laid_out(one.ids, order)
    if b.fake(part).dtype not in (torch.int64, torch.int32):
        raise NotUnderstood(f"its block ids are {b.fake(part).dtype}")
    part = b.make(torch.Tensor.to, part, torch.int64)
    if one.shift:
        part = b.make(torch.sub, part, one.shift)
    return part if one.valid == TRUE else b.make(torch.where, b.truth(one.valid, order), part, -1)


def _distinct(b: Builder, proof: Proof, ranked: _Lists) -> bool:
    """Whether no id can be listed twice: they are the indices of one top-k, along the axis that is listed."""
    if len(proof.blocks) != 1 or not isinstance(proof.blocks[0], Listed):
        return False
    one = proof.blocks[0]
    if one in ranked.selected:
        return True
    source = b.inputs.get(one.ids.node)
    top, which = (None, 0) if source is None else top_of(ranked.graph, source)
    if top is None or which != 1:
        return False
    dim = top.kwargs.get("dim", top.args[2] if len(top.args) > 2 else -1)
    if not isinstance(dim, int):
        return False
    along = one.ids.index[dim]
    rest = [p for d, p in enumerate(one.ids.index) if d != dim % len(one.ids.index)]
    return along == Poly.of(one.slot) and not any(one.slot in variables(p) for p in rest)


def _nan_where_empty(
    b: Builder, proof: Proof, out: fx.Node, sees: fx.Node, q: fx.Node, k: fx.Node, v: fx.Node, group: int
) -> fx.Node:
    """A softmax of nothing but -inf is NaN, and makes the gradients of every value NaN: so does this."""
    if group > 1:
        sees = b.make(torch.repeat_interleave, sees, group, 2)
    sees = b.make(torch.unsqueeze, sees, -1)
    if not any(t.requires_grad for t in map(tensor, b.region.inputs) if t is not None):
        return b.make(torch.where, sees, out, math.nan)
    nothing = b.make(torch.where, sees, 0.0, math.nan)
    heads = int(b.shape(q)[2]) // int(b.shape(k)[2])

    def total(x: fx.Node) -> fx.Node:
        x = b.make(torch.sum, x, 1, keepdim=True, dtype=torch.float32)
        return b.make(torch.repeat_interleave, x, heads, 2) if heads > 1 else x

    reaches = total(v)
    if proof.pieces.additive:
        products = b.make(torch.mul, q, total(k))
        reaches = b.make(torch.add, reaches, b.make(torch.sum, products, -1, keepdim=True))
    added = b.make(torch.mul, nothing, reaches)
    return b.make(torch.Tensor.to, b.make(torch.add, out, added), b.fake(out).dtype)


def _average_where_empty(
    b: Builder, proof: Proof, out: fx.Node, sees: fx.Node, v: fx.Node, group: int, words: str
) -> fx.Node:
    """A softmax of one number for every key, those of the future too, weighs all values alike."""
    fills = proof.pieces.fills
    if len(fills) > 1 or proof.pieces.additive:
        number = min(x for x in fills if x > -math.inf)
        raise NotUnderstood(
            f"hidden scores are {number:g}, which is not the same as -inf where a query sees no key: show each query "
            f"its own block in the mask, or fill with -inf{words}"
        )
    if group > 1:
        sees = b.make(torch.repeat_interleave, sees, group, 2)
    average = b.make(torch.mean, v, 1, keepdim=True, dtype=torch.float32)
    heads = int(b.shape(out)[2]) // int(b.shape(v)[2])
    if heads > 1:
        average = b.make(torch.repeat_interleave, average, heads, 2)
    average = b.make(torch.Tensor.to, average, b.fake(out).dtype)
    return b.make(torch.where, b.make(torch.unsqueeze, sees, -1), out, average)


def _as_wanted(b: Builder, proof: Proof, x: fx.Node, group: int, want: torch.Tensor) -> fx.Node:
    """The result (batch, seq_len, num_q_heads, head_dim_v) in the anchor's axes, dtype and strides."""
    x = b.make(torch.Tensor.unflatten, x, 2, (-1, group))
    roles = [proof.batch, proof.query, proof.head, proof.group, proof.pieces.feature]
    for at in reversed(range(5)):
        if roles[at] is None:
            x = b.make(torch.squeeze, x, at)
            del roles[at]
    order = [v for axis in proof.axes for v in axis]
    present = [v for v in order if v in roles]
    if len(present) != len(roles):
        raise NotUnderstood("the result lacks an axis")
    x = b.make(torch.permute, x, [roles.index(v) for v in present])
    for dim, v in enumerate(order):
        if v not in roles:
            x = b.make(torch.unsqueeze, x, dim)
    for dim, axis in enumerate(proof.axes):
        if len(axis) > 1:
            x = b.make(torch.flatten, x, dim, dim + len(axis) - 1)
    if b.fake(x).dtype != want.dtype:
        x = b.make(torch.Tensor.to, x, want.dtype)
    if not _same(b.fake(x).shape, want.shape):
        raise NotUnderstood(f"the result would be {tuple(b.fake(x).shape)}, not {tuple(want.shape)}")
    if not _same_strides(b.fake(x), want):
        order_ = _by_stride(want)
        x = b.make(torch.Tensor.contiguous, b.make(torch.permute, x, order_))
        x = b.make(torch.permute, x, [order_.index(d) for d in range(len(order_))])
        if not _same_strides(b.fake(x), want):
            raise NotUnderstood("the result's strides cannot be had")
    return x


def _by_stride(x: torch.Tensor) -> list[int]:
    strides = [s if isinstance(s, int) else s.node.hint for s in x.stride()]
    return sorted(range(x.dim()), key=lambda d: (-strides[d], d))


def _same_strides(a: torch.Tensor, b: torch.Tensor) -> bool:
    """A view of one is a view of the other: strides of axes of size 1 do not count."""
    axes = [d for d in range(b.dim()) if not isinstance(b.shape[d], int) or b.shape[d] != 1]
    return _same([a.stride()[d] for d in axes], [b.stride()[d] for d in axes])


def _same(a: Any, b: Any) -> bool:
    """Equality that needs no guard."""

    def plain(n: Any) -> Any:
        return n if isinstance(n, int) else n.node.expr

    return len(a) == len(b) and all(plain(x) == plain(y) for x, y in zip(a, b, strict=True))
