"""Whether an attention is one of NSA's branches: which keys it sees, and which axes are batch, heads and queries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .bands import Band, band, horizons
from .evaluate import NotUnderstood
from .index import Div, Mod, Poly, Var, atoms_of
from .scores import Pieces
from .selection import Selection, selection
from .terms import And, Apply, At, Const, Equal, Exists, Int, NonNeg, Not, Or, free, replaced

__all__ = ["Proof", "Roles", "prove"]


@dataclass(frozen=True)
class Roles:
    """What each axis of an attention is."""

    pieces: Pieces
    axes: tuple[tuple[Var, ...], ...]  # of each of the result's axes, the variables that it counts, slowest first
    batch: Var | None
    head: Var | None  # of keys and values
    group: Var | None  # query heads of one key/value head
    query: Var
    keys_by_query_head: bool  # keys and values have a head for each query head, the selection has one for each group


@dataclass(frozen=True)
class Proof:
    """An attention, and which keys it sees."""

    roles: Roles
    sees: Selection | Band


def prove(pieces: Pieces) -> Proof:
    """The proof; raises `NotUnderstood` with the first reason why there is none."""
    if isinstance(pieces.visible, Const):
        raise NotUnderstood("its mask does not depend on anything")
    found = horizons(pieces.visible, pieces.key, [x for x in pieces.out if x != pieces.feature])
    nearest = found[0]
    for one in found[1:]:
        nearest = one if one.is_stricter(nearest) else nearest
    query, reach = nearest.query, nearest.reach
    if nearest.stride == 1 and pieces.key.size - query.size != reach:
        raise NotUnderstood(
            f"its causal mask lets query i see keys up to i + {reach}, not to its own position counted from the end"
        )
    sees: Selection | Band | None = band(pieces.visible, pieces.key, nearest)
    pieces, axes = _split(pieces, query)
    if sees is None:
        sees = selection(pieces, query, reach)
    return Proof(_roles(pieces, axes, query), sees)


def _roles(pieces: Pieces, axes: tuple[tuple[Var, ...], ...], query: Var) -> Roles:
    by_query_head = False
    others = [x for axis in axes for x in axis if x not in (query, pieces.feature)]
    shared = free(pieces.k) | free(pieces.v)
    alone = [x for x in others if x not in shared and x in free(pieces.q)]
    rest = [x for x in others if x not in alone and (x.size.constant != 1 or x in shared)]
    split = [axis for axis in axes if len(axis) > 1]
    both = free(pieces.k) & free(pieces.v)
    if not alone and both.issuperset(rest) and len(rest) == 3 and len(split) == 1 and tuple(rest[1:]) == split[0]:
        alone, rest, by_query_head = rest[2:], rest[:2], True
    if len(alone) > 1 or len(rest) > 2 or any(x not in free(pieces.q) for x in rest):
        raise NotUnderstood("its axes are not those of batch, heads, queries and head_dim")
    group = alone[0] if alone else None
    batch: Var | None = None
    head: Var | None = None
    if len(rest) == 2:
        batch, head = rest
    elif rest and group is not None:
        batch = rest[0]
    elif rest:
        head = rest[0]
    if (group is not None and group.size.constant is None) or (head is not None and head.size.constant is None):
        raise NotUnderstood("its number of heads is not a constant")
    return Roles(pieces, axes, batch, head, group, query, by_query_head)


def _split(pieces: Pieces, query: Var) -> tuple[Pieces, tuple[tuple[Var, ...], ...]]:
    """Take axes apart that count two things, as a flattened batch of heads or heads of several groups."""
    axes: list[tuple[Var, ...]] = [(x,) for x in pieces.out]
    for _ in range(6):
        found = next(_quotients(pieces, [x for axis in axes for x in axis if x not in (query, pieces.feature)]), None)
        if found is None:
            return pieces, tuple(axes)
        x, by = found
        size = x.size.divided(Poly.of(by))
        if size is None:
            raise NotUnderstood(f"an axis of {x.size} is divided by {by}")
        high, low = Var(f"{x.name}h", size), Var(f"{x.name}l", Poly.of(by))
        values: Mapping[Var, Poly] = {x: Poly.of(high) * by + Poly.of(low)}
        pieces = replace(
            pieces, q=replaced(pieces.q, values), k=replaced(pieces.k, values), v=replaced(pieces.v, values),
            visible=replaced(pieces.visible, values),
        )  # fmt: skip
        axes = [tuple(z for y in axis for z in ((high, low) if y == x else (y,))) for axis in axes]
    raise NotUnderstood("its axes are flattened in too many ways")


def _quotients(pieces: Pieces, names: list[Var]) -> Iterator[tuple[Var, int]]:
    """Variables that only appear divided somewhere, with the largest divisor."""
    found: dict[Var, int] = {}
    polys = [p for at in (pieces.q, pieces.k, pieces.v) for p in at.index]
    for p in (*polys, *_indices(pieces.visible)):
        for atom in atoms_of(p):
            if isinstance(atom, (Div, Mod)) and isinstance(atom.num.atom, Var) and atom.num.atom in names:
                by = atom.den.constant
                if by is not None and by > 1:
                    found[atom.num.atom] = max(by, found.get(atom.num.atom, 0))
    yield from found.items()


def _indices(x: Any) -> Iterator[Poly]:
    if isinstance(x, At):
        yield from x.index
    elif isinstance(x, (Int, NonNeg)):
        yield x.poly
    elif isinstance(x, (And, Or)):
        for part in x.parts:
            yield from _indices(part)
    elif isinstance(x, Not):
        yield from _indices(x.part)
    elif isinstance(x, Equal):
        yield from _indices(x.left)
        yield from _indices(x.right)
    elif isinstance(x, Exists):
        yield from _indices(x.body)
    elif isinstance(x, Apply):
        for part in x.args:
            yield from _indices(part)
