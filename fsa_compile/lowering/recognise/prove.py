"""Whether an attention's mask is "block `j // block_size` is one that the query selected, and `j <= i`"."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .evaluate import NotUnderstood
from .index import Div, Mod, Poly, Var, atoms_of, is_nonneg, variables
from .scores import Pieces
from .terms import (
    And,
    Apply,
    At,
    Const,
    Equal,
    Exists,
    Int,
    NonNeg,
    Not,
    Or,
    Term,
    all_of,
    free,
    replaced,
)  # fmt: skip

__all__ = ["Fixed", "Listed", "Proof", "conjuncts", "is_implied", "prove"]

_MOST_FIXED = 64
_AN_INPUT = "a mask that is an input, such as a padding mask"


@dataclass(frozen=True)
class Listed:
    """Blocks `ids - shift` for every value of `slot`, where `valid`."""

    slot: Var
    ids: At
    shift: int
    valid: Term


@dataclass(frozen=True)
class Fixed:
    """One block that follows from the query's position."""

    block: Poly


@dataclass(frozen=True)
class Proof:
    """An attention that is selected attention, in the roles of its axes."""

    pieces: Pieces
    axes: tuple[tuple[Var, ...], ...]  # of each of the result's axes, the variables that it counts, slowest first
    batch: Var | None
    head: Var | None  # of keys and values
    group: Var | None  # query heads of one key/value head
    query: Var
    block_size: int
    blocks: tuple[Listed | Fixed, ...]
    never_empty: bool
    keys_by_query_head: bool  # keys and values have a head for each query head, the selection has one for each group


def prove(pieces: Pieces) -> Proof:
    """The proof; raises `NotUnderstood` with the first reason why there is none."""
    if isinstance(pieces.visible, Const):
        raise NotUnderstood("its mask does not depend on anything")
    query, offset = _causal(pieces)
    if pieces.key.size - query.size != offset:
        raise NotUnderstood(
            f"its causal mask lets query i see keys up to i + {offset}, not to its own position counted from the end"
        )
    pieces, axes = _split(pieces, query)
    block_size, blocks, never_empty = _selection(pieces, query, offset)
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
    return Proof(pieces, axes, batch, head, group, query, block_size, blocks, never_empty, by_query_head)


def conjuncts(x: Term) -> tuple[Term, ...]:
    """The terms that all have to hold."""
    return x.parts if isinstance(x, And) else (x,)


def _causal(pieces: Pieces) -> tuple[Var, Poly]:
    """The query's axis, and how far it sees beyond its own number: from the literal `i + offset - j >= 0`."""
    found: list[tuple[Var, Poly]] = []
    for part in conjuncts(pieces.visible):
        if not isinstance(part, NonNeg) or dict(part.poly.terms).get((pieces.key,)) != -1:
            continue
        rest = part.poly + Poly.of(pieces.key)
        for x in pieces.out:
            offset = rest - Poly.of(x)
            if x not in (pieces.feature,) and x in variables(rest) and not variables(offset):
                found.append((x, offset))
    if not found:
        given = any(isinstance(part, At) and pieces.key in free(part) for part in conjuncts(pieces.visible))
        hint = "; a part of it is an input, such as one made outside of a checkpointed function" if given else ""
        raise NotUnderstood(f"its mask is not causal token by token (key <= query){hint}")
    best = found[0]
    for one in found[1:]:  # the strictest
        best = one if one[0] == best[0] and is_nonneg(best[1] - one[1]) else best
    return best


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


# ---- the selection ----


def _selection(pieces: Pieces, query: Var, offset: Poly) -> tuple[int, tuple[Listed | Fixed, ...], bool]:
    key, position = Poly.of(pieces.key), Poly.of(query) + offset
    left = [part for part in conjuncts(pieces.visible) if not is_implied(part, key, position)]
    if not left:
        raise NotUnderstood("its mask is only causal: dense attention")
    selections = [part for part in left if _has_list(part)]
    others = [part for part in left if not _has_list(part)]
    if not selections:
        raise NotUnderstood(f"its mask is not made of a list of block ids ({_why(others[0], pieces)})")
    if others:
        raise NotUnderstood(f"its mask also hides keys otherwise ({_why(others[0], pieces)})")
    if len(selections) > 1:
        raise NotUnderstood("its mask wants a key's block in two lists at once")
    options = selections[0].parts if isinstance(selections[0], Or) else (selections[0],)
    sizes = {_block_size(option, pieces.key) for option in options if _has_list(option)}
    if len(sizes) != 1:
        raise NotUnderstood("its lists are of blocks of different sizes")
    (block_size,) = sizes
    if block_size < 16 or block_size & (block_size - 1):
        raise NotUnderstood(f"its block size is {block_size}, not a power of two of at least 16")
    block = key // block_size
    blocks: list[Listed | Fixed] = []
    for option in options:
        blocks += _blocks(option, key, position, block, block_size, pieces)
    fixed = [x.block for x in blocks if isinstance(x, Fixed)]
    never_empty = is_nonneg(position) and any(x in (Poly.of(0), position // block_size) for x in fixed)
    return block_size, tuple(blocks), never_empty


def _has_list(x: Term) -> bool:
    return isinstance(x, Exists) or (isinstance(x, (And, Or)) and any(map(_has_list, x.parts)))


def is_implied(part: Term, key: Poly, position: Poly) -> bool:
    """Whether `key <= position` implies it."""
    if not isinstance(part, NonNeg):
        return False
    if is_nonneg(part.poly - (position - key)):
        return True
    for atom in atoms_of(part.poly):
        if isinstance(atom, Div) and atom.den.constant and atom.num == key:
            by = atom.den.constant
            if is_nonneg(part.poly - (position // by - key // by)):
                return True
    return False


def _why(part: Term, pieces: Pieces) -> str:
    if isinstance(part, NonNeg):
        if dict(part.poly.terms).get((pieces.key,)) == 1:
            return "keys far behind the query, as a window does"
        return "by position"
    if isinstance(part, Not):
        return "keys of listed blocks are hidden, not shown" if _has_list(part.part) else _AN_INPUT
    if isinstance(part, At):
        return _AN_INPUT
    if isinstance(part, Or):
        return "several conditions of which one suffices"
    return "a comparison of values"


def _hits(option: Term) -> tuple[Exists, list[Term], list[Term]]:
    """The list, its conditions, and the conditions outside."""
    parts = conjuncts(option)
    lists = [x for x in parts if isinstance(x, Exists)]
    if len(lists) != 1:
        raise NotUnderstood("its list of blocks comes with conditions that are not looked through")
    inner = list(conjuncts(lists[0].body))
    return lists[0], inner, [x for x in parts if x is not lists[0]]


def _hit(found: Exists, inner: list[Term], key: Var) -> tuple[Equal, Term, Poly]:
    """The comparison of an id with a block: itself, the id, the block."""
    for part in inner:
        if isinstance(part, Equal) and isinstance(part.right, Int) and found.var in free(part.left):
            if key in variables(part.right.poly):
                return part, part.left, part.right.poly
    raise NotUnderstood("its mask does not compare a list of ids with the block of a key")


def _block_size(option: Term, key: Var) -> int:
    found, inner, _ = _hits(option)
    _, _, block = _hit(found, inner, key)
    for atom in atoms_of(block):
        if isinstance(atom, Div) and atom.num == Poly.of(key) and atom.den.constant:
            return atom.den.constant
    raise NotUnderstood(
        "its ids are of tokens or of shifted blocks, not of blocks that start at multiples of their size"
    )


def _blocks(
    option: Term, key: Poly, position: Poly, block: Poly, block_size: int, pieces: Pieces
) -> Iterator[Listed | Fixed]:
    if not _has_list(option):
        yield from _fixed(option, key, position, block, block_size, pieces)
        return
    found, inner, outer = _hits(option)
    hit, ids, column = _hit(found, inner, pieces.key)
    shift = (column - block).constant
    if shift is None:
        raise NotUnderstood("its ids are compared with something else than the block of a key")
    outer = [part for part in outer if not is_implied(part, key, position)]
    if isinstance(ids, Apply) and ids.name == "clamped":
        ids = ids.args[0]
    if not isinstance(ids, At):
        raise NotUnderstood("its block ids are computed in a way that is not looked through")
    valid = [part for part in (*inner, *outer) if part is not hit]
    if any(pieces.key in free(part) for part in valid) or pieces.key in free(ids):
        raise NotUnderstood("which ids count depends on the key")
    yield Listed(found.var, ids, shift, all_of(*valid))


def _fixed(option: Term, key: Poly, position: Poly, block: Poly, block_size: int, pieces: Pieces) -> Iterator[Fixed]:
    """Blocks that every query sees: `j // B == f(i)`, the newest (`j // B >= i // B - c`), the first (`j < c * B`)."""
    parts = [part for part in conjuncts(option) if not is_implied(part, key, position)]
    if len(parts) != 1:
        raise NotUnderstood("its mask also shows keys outside of the listed blocks, under several conditions")
    part = parts[0]
    allowed = variables(position)
    if isinstance(part, Equal) and isinstance(part.left, Int) and isinstance(part.right, Int):
        difference = part.left.poly - part.right.poly
        for sign in (1, -1):
            rest = block - difference * sign
            if variables(rest) <= allowed:
                yield Fixed(rest)
                return
    if isinstance(part, NonNeg):
        newest = position // block_size - block
        behind = (part.poly + newest).constant  # block >= position // B - behind
        if behind is not None and 0 <= behind < _MOST_FIXED:
            yield from (Fixed(position // block_size - n) for n in range(behind + 1))
            return
        for first in range(1, _MOST_FIXED):
            if part.poly in (Poly.of(first * block_size - 1) - key, Poly.of(first - 1) - block):
                yield from (Fixed(Poly.of(n)) for n in range(first))
                return
    raise NotUnderstood(f"its mask also shows keys outside of the listed blocks ({_why(part, pieces)})")
