"""Whether a mask is "block `j // block_size` is one that the query selected", beside causality."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .evaluate import NotUnderstood
from .index import Div, Poly, Var, atoms_of, is_nonneg, variables
from .scores import Pieces
from .terms import And, Apply, At, Equal, Exists, Int, NonNeg, Not, Or, Term, all_of, conjuncts, free

__all__ = ["Fixed", "Listed", "Selection", "is_implied", "left_padding", "selection", "why"]

_MOST_FIXED = 64
_AN_INPUT = "a mask that is an input, such as a padding mask, which the operators take as leftpad_k or seqused_k"

_LEFT = (
    "keys before a number, as left padding does: its blocks and windows are counted from the first row, those of the "
    "operators' leftpad_k from the first key that counts"
)
_RIGHT = (
    "keys from a number on, as right padding does, from queries behind it too, which the operators' seqused_k takes "
    "for the last ones: pad on the left and pass leftpad_k, or pack the sequences and pass cu_seqlens"
)
_COUNTS = (torch.int32, torch.int64)


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
class Selection:
    """The blocks of which a query sees its past."""

    block_size: int
    blocks: tuple[Listed | Fixed, ...]
    never_empty: bool  # the mask itself shows each query a block with a key that it sees


def selection(pieces: Pieces, query: Var, offset: Poly) -> Selection:
    """The selection; raises `NotUnderstood` with the first reason why there is none."""
    key, position = Poly.of(pieces.key), Poly.of(query) + offset
    left = [part for part in conjuncts(pieces.visible) if not is_implied(part, key, position)]
    selections = [part for part in left if _has_list(part)]
    others = [part for part in left if not _has_list(part)]
    if not selections:
        odd = min(others, key=lambda part: (isinstance(part, NonNeg), left_padding(part, pieces.key) is not None))
        raise NotUnderstood(f"its mask is not made of a list of block ids ({why(odd, pieces.key)})")
    if others:
        raise NotUnderstood(f"its mask also hides keys otherwise ({why(others[0], pieces.key)})")
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
    return Selection(block_size, tuple(blocks), never_empty)


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


def left_padding(part: Term, key: Var) -> At | None:
    """The number of keys at the beginning that a part of a mask hides, `key >= number`, if it does."""
    names = ("lt", "gt") if isinstance(part, Not) else ("ge", "le")
    part = part.part if isinstance(part, Not) else part
    if isinstance(part, Apply) and part.name in names:
        at, limit = part.args if part.name in ("ge", "lt") else reversed(part.args)
        if at == Int(Poly.of(key)) and isinstance(limit, At) and key not in free(limit):
            return limit if limit.node.meta["val"].dtype in _COUNTS else None
    return None


def _is_right_padding(part: Term, key: Var) -> bool:
    swapped = isinstance(part, Not)
    part = part.part if isinstance(part, Not) else part
    if not isinstance(part, Apply) or part.name not in ("lt", "le", "gt", "ge"):
        return False
    at, limit = part.args if (part.name in ("lt", "le")) != swapped else reversed(part.args)
    return isinstance(at, Int) and key in free(at) and key not in free(limit)


def why(part: Term, key: Var) -> str:
    """What a part of a mask looks like, in words."""
    if isinstance(part, NonNeg):
        if dict(part.poly.terms).get((key,)) == 1:
            return "keys far behind the query, as a window does"
        return "by position"
    if left_padding(part, key) is not None:
        return _LEFT
    if _is_right_padding(part, key):
        return _RIGHT
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
    raise NotUnderstood(f"its mask also shows keys outside of the listed blocks ({why(part, pieces.key)})")
