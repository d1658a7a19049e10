"""Block ids as the operator wants them, of the lists that a mask is made of."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass

import torch
from torch import fx

from .build import Builder
from .evaluate import NotUnderstood
from .index import Poly, Var, variables
from .prove import Roles
from .ranking import rank, top_of
from .region import Graph
from .selecting import select
from .selection import Fixed, Listed, Selection
from .terms import TRUE

__all__ = ["Lists", "block_indices", "ranked"]


@dataclass
class Lists:
    """Of lists that are the top-k of block scores, what is known or made of them."""

    graph: Graph
    selected: dict[Listed, fx.Node]  # ids of `select_blocks`, (batch, seq_len, num_kv_heads, group or 1, slots)
    never_empty: bool
    words: str


def ranked(b: Builder, roles: Roles, selection: Selection, graph: Graph) -> Lists:
    """The lists that are a top-k, with `select_blocks` in place of those that are its."""
    lists = Lists(graph, {}, False, "")
    for one in selection.blocks:
        if not isinstance(one, Listed):
            continue
        try:
            found = rank(graph, b, roles, selection.block_size, one)
            lists.never_empty = True
            inner = Builder(b.ev, found.top, found.region, found.traced, b.fake_mode)
            b.earlier.append(inner)
            try:
                lists.selected[one] = select(found, inner, b, roles, selection.block_size, one)
            except NotUnderstood:
                inner.undo()
                raise
            lists.words = ", chosen by select_blocks"
        except NotUnderstood as why:
            lists.words = f"; its block ids are left as they are: {why}"
    return lists


def block_indices(
    b: Builder, roles: Roles, selection: Selection, lists: Lists, q: fx.Node, heads: tuple[Var | None, Var | None]
) -> tuple[fx.Node, fx.Node]:
    """Ids (batch, seq_len, heads, slots), int32, none twice, -1 for what a query does not see; whether it sees any."""
    parts: list[fx.Node] = []
    query, key = roles.query, roles.pieces.key
    shape = [b.length(x.size) if x is not None else 1 for x in (roles.batch, query)]
    shape += [math.prod(int(x.size.constant or 1) for x in heads if x is not None)]
    for one in selection.blocks:
        if isinstance(one, Fixed):
            part = b.numbers(one.block, {query: 1}, 4)
            if not isinstance(part, fx.Node):
                part = b.make(torch.full, [1, 1, 1, 1], part, dtype=torch.int64, device=b.fake(q).device)
            parts.append(b.make(torch.Tensor.expand, part, *shape, 1))
            continue
        if one in lists.selected:
            part = b.make(torch.Tensor.to, lists.selected[one], torch.int64)
        else:
            part = _listed(b, one, (roles.batch, query, *heads, one.slot))
        part = b.make(
            torch.Tensor.expand, part, *shape[:2], *(int(x.size.constant or 1) if x else 1 for x in heads), -1
        )
        parts.append(b.make(torch.flatten, part, 2, 3))
    ids = parts[0] if len(parts) == 1 else b.make(torch.cat, parts, -1)
    position = b.numbers(Poly.of(query) + (key.size - query.size), {query: 1}, 4)
    newest = b.divided(position, selection.block_size)
    seen = b.make(torch.logical_and, b.make(torch.ge, ids, 0), b.make(torch.le, ids, newest))
    ids = b.make(torch.where, seen, ids, -1)
    if not _distinct(b, selection, lists) and b.shape(ids)[-1] != 1:
        # A block counts once in a mask, however often it is listed.
        ids = b.make(operator.getitem, b.make(torch.sort, ids, -1), 0)
        first, later, before = (b.make(torch.ops.aten.slice.Tensor, ids, -1, *part) for part in ((0, 1), (1,), (0, -1)))
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


def _distinct(b: Builder, selection: Selection, lists: Lists) -> bool:
    """Whether no id can be listed twice: they are the indices of one top-k, along the axis that is listed."""
    if len(selection.blocks) != 1 or not isinstance(selection.blocks[0], Listed):
        return False
    one = selection.blocks[0]
    if one in lists.selected:
        return True
    source = b.inputs.get(one.ids.node)
    top, which = (None, 0) if source is None else top_of(lists.graph, source)
    if top is None or which != 1:
        return False
    dim = top.kwargs.get("dim", top.args[2] if len(top.args) > 2 else -1)
    if not isinstance(dim, int):
        return False
    along = one.ids.index[dim]
    rest = [p for d, p in enumerate(one.ids.index) if d != dim % len(one.ids.index)]
    return along == Poly.of(one.slot) and not any(one.slot in variables(p) for p in rest)
