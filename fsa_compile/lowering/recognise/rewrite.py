"""The replacement: the operands, the call, and what the user's rows without a key gave."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .bands import Band
from .build import Builder
from .compressed import windows
from .evaluate import NotUnderstood
from .index import Var
from .lists import block_indices, ranked
from .prove import Proof, Roles
from .region import Graph
from .selection import Listed, Selection
from .terms import At, free
from .writes import tensor

__all__ = ["rewrite"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST_HEAD_DIM = 256


@dataclass
class _Operands:
    """Queries, keys and values (batch, length, heads, head_dim), and how many query heads have one key/value head."""

    q: fx.Node
    k: fx.Node
    v: fx.Node
    group: int


@dataclass
class _Call:
    """The operator's results, and what became of queries without a key."""

    both: fx.Node  # (out, lse)
    sees: fx.Node | None  # whether a query sees a key, (batch, seq_len, heads) or broadcast; None: each does
    words: str
    hint: str = ""  # on its block ids


def rewrite(proof: Proof, b: Builder, graph: Graph) -> tuple[fx.Node, str]:
    """Nodes that give what the anchor gives, and words about what it is now."""
    want = tensor(b.anchor)
    assert want is not None
    roles, pieces = proof.roles, proof.roles.pieces
    x = _operands(b, roles, want, _selects_by_query_head(proof))
    if isinstance(proof.sees, Selection):
        call = _selected(b, roles, proof.sees, x, graph)
    else:
        call = _banded(b, roles, proof.sees, x)
    out = b.make(operator.getitem, call.both, 0)
    if pieces.nan_is_zero:  # whatever made it NaN: a product that is not finite does, too
        lse = b.make(torch.unsqueeze, b.make(operator.getitem, call.both, 1), -1)
        out = b.make(torch.where, b.make(torch.lt, lse, math.inf), out, 0.0)
    if call.sees is None or pieces.empty_is_zero:
        pass
    elif pieces.fills != {-math.inf}:
        out = _average_where_empty(b, roles, out, call, x)
    elif not pieces.nan_is_zero:
        out = _nan_where_empty(b, roles, out, call.sees, x)
    group = 1 if roles.group is None else int(roles.group.size.constant or 1)
    return _as_wanted(b, roles, out, group, want), call.words


def _selects_by_query_head(proof: Proof) -> bool:
    group, sees = proof.roles.group, proof.sees
    if group is None or not isinstance(sees, Selection):
        return False
    return any(isinstance(x, Listed) and (group in free(x.ids) or group in free(x.valid)) for x in sees.blocks)


def _operands(b: Builder, roles: Roles, want: torch.Tensor, repeat: bool) -> _Operands:
    """The operands; keys and values are repeated for each query head where the selection is one for each."""
    query, pieces, heads = roles.query, roles.pieces, (roles.head, roles.group)
    q = _operand(b, pieces.q, (roles.batch, query, *heads, pieces.inner), want)
    b.lengths.update({query.size: (q, 1), **({roles.batch.size: (q, 0)} if roles.batch else {})})
    key_heads = heads if roles.keys_by_query_head else (roles.head, None)
    k = _operand(b, pieces.k, (roles.batch, pieces.key, *key_heads, pieces.inner), want)
    b.lengths[pieces.key.size] = (k, 1)
    v = _operand(b, pieces.v, (roles.batch, pieces.key, *key_heads, pieces.feature), want)
    q, k, v = _one_dtype(b, (q, k, v), want.dtype)
    k, v = (_whole(b, x, roles) for x in (k, v))
    group = 1 if roles.group is None else int(roles.group.size.constant or 1)
    if repeat and not roles.keys_by_query_head:
        k, v = (b.make(torch.repeat_interleave, x, group, 2) for x in (k, v))
    if max(int(b.shape(x)[3]) for x in (q, k, v)) > _MOST_HEAD_DIM:
        raise NotUnderstood(f"its head_dim is more than {_MOST_HEAD_DIM}")
    return _Operands(q, k, v, 1 if repeat or roles.keys_by_query_head else group)


# ---- the calls ----


def _selected(b: Builder, roles: Roles, sees: Selection, x: _Operands, graph: Graph) -> _Call:
    lists = ranked(b, roles, sees, graph)
    heads = (roles.head, roles.group if x.group == 1 else None)
    ids, any_seen = block_indices(b, roles, sees, lists, x.q, heads)
    options: dict[str, Any] = {"block_size": sees.block_size, "scale": roles.pieces.scale}
    both = b.make(torch.ops.fsa.selected_attention.default, x.q, x.k, x.v, ids, **options)
    words = f"recognised as selected attention, blocks of {sees.block_size}{lists.words}"
    if sees.never_empty or lists.never_empty:
        return _Call(both, None, words)
    if x.group > 1:
        any_seen = b.make(torch.repeat_interleave, any_seen, x.group, 2)
    return _Call(both, any_seen, words, lists.words)


def _banded(b: Builder, roles: Roles, sees: Band, x: _Operands) -> _Call:
    if sees.window is not None:
        options: dict[str, Any] = {"window_size": sees.window, "scale": roles.pieces.scale}
        if sees.padding is not None:
            options["leftpad_k"] = _leftpad(b, roles, sees.padding, x)
        both = b.make(torch.ops.fsa.sliding_window_attention.default, x.q, x.k, x.v, **options)
        padded = "" if sees.padding is None else ", padded on the left"
        words = f"recognised as sliding-window attention, {sees.window} keys{padded}"
    else:
        both, words = _compressed(b, roles, sees, x)
    order = (roles.batch, roles.query, None)
    return _Call(both, None if sees.never_empty else b.truth(sees.sees, order), words)


def _leftpad(b: Builder, roles: Roles, padding: At, x: _Operands) -> fx.Node:
    """How many keys of each sequence are padding, [batch]: none if it is negative, and all at most."""
    count = b.make(torch.flatten, b.laid_out(padding, (roles.batch,)))
    count = b.make(torch.clamp, b.make(torch.Tensor.to, count, torch.int64), 0, b.length(roles.pieces.key.size))
    batch = b.make(torch.Tensor.size, x.q, 0) if roles.batch is None else b.length(roles.batch.size)
    return b.make(
        torch.Tensor.contiguous, b.make(torch.Tensor.expand, b.make(torch.Tensor.to, count, torch.int32), batch)
    )


def _compressed(b: Builder, roles: Roles, sees: Band, x: _Operands) -> tuple[fx.Node, str]:
    found = windows(sees.horizon, roles.pieces.key.size)
    k, v = (found.cut(b, one) for one in (x.k, x.v))
    options = {
        "kernel_size": found.kernel, "kernel_stride": found.stride, "scale": roles.pieces.scale,
        "seq_len_k": None if found.length == roles.query.size else b.length(found.length),
    }  # fmt: skip
    both = b.make(torch.ops.fsa.compressed_attention.default, x.q, k, v, **options)
    return both, f"recognised as compressed attention, windows of {found.kernel} every {found.stride}"


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


def _whole(b: Builder, x: fx.Node, roles: Roles) -> fx.Node:
    """Keys or values that are shared along the batch or the heads, expanded over them."""
    sizes: list[Any] = [-1, -1, -1, -1]
    for axis, role in ((0, roles.batch), (2, roles.head)):
        if role is not None and role.size.constant != 1 and b.shape(x)[axis] == 1:
            sizes[axis] = b.length(role.size)
    return x if sizes == [-1] * 4 else b.make(torch.Tensor.expand, x, *sizes)


def _nan_where_empty(b: Builder, roles: Roles, out: fx.Node, sees: fx.Node, x: _Operands) -> fx.Node:
    """A softmax of nothing but -inf is NaN, and makes the gradients of every value NaN: so does this."""
    sees = b.make(torch.unsqueeze, sees, -1)
    if not _is_trained(b):
        return b.make(torch.where, sees, out, math.nan)
    nothing = b.make(torch.where, sees, 0.0, math.nan)
    heads = int(b.shape(x.q)[2]) // int(b.shape(x.k)[2])

    def total(one: fx.Node) -> fx.Node:
        one = b.make(torch.sum, one, 1, keepdim=True, dtype=torch.float32)
        return b.make(torch.repeat_interleave, one, heads, 2) if heads > 1 else one

    reaches = total(x.v)
    if roles.pieces.additive:
        products = b.make(torch.mul, x.q, total(x.k))
        reaches = b.make(torch.add, reaches, b.make(torch.sum, products, -1, keepdim=True))
    added = b.make(torch.mul, nothing, reaches)
    return b.make(torch.Tensor.to, b.make(torch.add, out, added), b.fake(out).dtype)


def _is_trained(b: Builder) -> bool:
    return any(t.requires_grad for t in map(tensor, b.region.inputs) if t is not None)


def _average_where_empty(b: Builder, roles: Roles, out: fx.Node, call: _Call, x: _Operands) -> fx.Node:
    """A softmax of one number for every key, those of the future too, weighs all values alike."""
    fills = roles.pieces.fills
    if len(fills) > 1 or roles.pieces.additive:
        number = min(x for x in fills if x > -math.inf)
        raise NotUnderstood(
            f"hidden scores are {number:g}, which is not the same as -inf where a query sees no key: show each query "
            f"its own block in the mask, or fill with -inf{call.hint}"
        )
    average = b.make(torch.mean, x.v, 1, keepdim=True, dtype=torch.float32)
    heads = int(b.shape(out)[2]) // int(b.shape(x.v)[2])
    if heads > 1:
        average = b.make(torch.repeat_interleave, average, heads, 2)
    average = b.make(torch.Tensor.to, average, b.fake(out).dtype)
    return b.make(torch.where, b.make(torch.unsqueeze, call.sees, -1), out, average)


def _as_wanted(b: Builder, roles: Roles, x: fx.Node, group: int, want: torch.Tensor) -> fx.Node:
    """The result (batch, seq_len, num_q_heads, head_dim_v) in the anchor's axes, dtype and strides."""
    x = b.make(torch.Tensor.unflatten, x, 2, (-1, group))
    named = [roles.batch, roles.query, roles.head, roles.group, roles.pieces.feature]
    for at in reversed(range(5)):
        if named[at] is None:
            x = b.make(torch.squeeze, x, at)
            del named[at]
    order = [v for axis in roles.axes for v in axis]
    present = [v for v in order if v in named]
    if len(present) != len(named):
        raise NotUnderstood("the result lacks an axis")
    x = b.make(torch.permute, x, [named.index(v) for v in present])
    for dim, v in enumerate(order):
        if v not in named:
            x = b.make(torch.unsqueeze, x, dim)
    for dim, axis in enumerate(roles.axes):
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
