"""Integer index expressions: polynomials over index variables and sizes, with floor division and remainder.

Every variable and size is known to be non-negative, so that bounds of a polynomial come from its terms one by one. What
cannot be shown is not assumed: `floordiv` keeps an atom for what it cannot divide, `is_nonneg` answers False.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import gcd
from typing import Any

__all__ = ["Atom", "Div", "Mod", "Poly", "Size", "Var", "atoms_of", "is_nonneg", "substitute", "variables"]


@dataclass(frozen=True)
class Size:
    """A length known only at run time, at least 1."""

    name: str


@dataclass(frozen=True)
class Var:
    """An index, from 0 up to `size - 1`."""

    name: str
    size: Poly

    def __hash__(self) -> int:
        return hash(self.name)


@dataclass(frozen=True)
class Div:
    """`num // den`, rounded down."""

    num: Poly
    den: Poly


@dataclass(frozen=True)
class Mod:
    """`num - den * (num // den)`."""

    num: Poly
    den: Poly


Atom = Size | Var | Div | Mod
Monomial = tuple[Atom, ...]


@dataclass(frozen=True)
class Poly:
    """A sum of `coefficient * product of atoms`, in one order."""

    terms: tuple[tuple[Monomial, int], ...]

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self.terms)

    @staticmethod
    def of(x: Poly | Atom | int) -> Poly:
        if isinstance(x, Poly):
            return x
        if isinstance(x, int):
            return Poly((((), x),) if x else ())
        return Poly((((x,), 1),))

    @staticmethod
    def make(terms: Iterable[tuple[Monomial, int]]) -> Poly:
        total: dict[Monomial, int] = {}
        for monomial, coefficient in terms:
            total[monomial] = total.get(monomial, 0) + coefficient
        kept = [(m, c) for m, c in total.items() if c]
        return _rejoined(Poly(tuple(sorted(kept, key=lambda term: _order(term[0])))))

    @property
    def constant(self) -> int | None:
        """The value of a polynomial without atoms."""
        if not self.terms:
            return 0
        return self.terms[0][1] if len(self.terms) == 1 and not self.terms[0][0] else None

    @property
    def atom(self) -> Atom | None:
        """The atom that this is, and nothing else."""
        if len(self.terms) == 1 and self.terms[0][1] == 1 and len(self.terms[0][0]) == 1:
            return self.terms[0][0][0]
        return None

    def __add__(self, other: Any) -> Poly:
        return Poly.make((*self.terms, *Poly.of(other).terms))

    def __sub__(self, other: Any) -> Poly:
        return self + Poly.of(other) * -1

    def __mul__(self, other: Any) -> Poly:
        other = Poly.of(other)
        return Poly.make(
            (tuple(sorted((*m, *n), key=_name)), c * d) for m, c in self.terms for n, d in other.terms
        )  # fmt: skip

    __radd__ = __add__
    __rmul__ = __mul__

    def divided(self, by: Poly) -> Poly | None:
        """The exact quotient; None where there is none that is found."""
        if len(by.terms) > 1:
            whole = _leading(self, by)
            return whole if self == whole * by else None
        parts = [_divide(term, by.terms[0]) for term in self.terms] if by.terms else [None]
        return None if any(p is None for p in parts) else Poly.make(p for p in parts if p is not None)

    def __floordiv__(self, other: Any) -> Poly:
        return _divmod(self, Poly.of(other))[0]

    def __mod__(self, other: Any) -> Poly:
        return _divmod(self, Poly.of(other))[1]

    def __str__(self) -> str:
        return " + ".join("*".join(map(str, (c, *(_show(a) for a in m)))) for m, c in self.terms) or "0"


@functools.lru_cache(maxsize=65536)
def _name(atom: Atom) -> str:
    return f"{type(atom).__name__} {_show(atom)}"


def _order(monomial: Monomial) -> tuple[str, ...]:
    return tuple(map(_name, monomial))


def _show(atom: Atom) -> str:
    if isinstance(atom, (Size, Var)):
        return atom.name
    return f"({atom.num} {'//' if isinstance(atom, Div) else '%'} {atom.den})"


def _divide(term: tuple[Monomial, int], by: tuple[Monomial, int]) -> tuple[Monomial, int] | None:
    atoms = list(term[0])
    for atom in by[0]:
        if atom not in atoms:
            return None
        atoms.remove(atom)
    return (tuple(atoms), term[1] // by[1]) if by[1] > 0 and term[1] % by[1] == 0 else None


def _leading(p: Poly, d: Poly) -> Poly:
    """What `p` has of the first term of `d` that is not a constant."""
    first = next(term for term in d.terms if term[0])
    return Poly.make(q for q in (_divide(term, first) for term in p.terms) if q is not None)


def _rejoined(p: Poly) -> Poly:
    """`den * (num // den) + num % den` is `num` again."""
    terms = dict(p.terms)
    for monomial, c in p.terms:
        for i, atom in enumerate(monomial):
            if not isinstance(atom, Mod):
                continue
            rest = Poly(((monomial[:i] + monomial[i + 1 :], c),))
            whole = rest * Poly(atom.den.terms) * Poly.of(Div(atom.num, atom.den))
            if len(whole.terms) == 1 and terms.get(whole.terms[0][0]) == whole.terms[0][1]:
                left = [t for t in p.terms if t[0] not in (monomial, whole.terms[0][0])]
                return Poly.make((*left, *(rest * atom.num).terms))
    return p


def _divmod(p: Poly, d: Poly) -> tuple[Poly, Poly]:
    if d.constant == 1:
        return p, Poly.of(0)
    if len(d.terms) > 1:
        whole = _leading(p, d)
        rest = p - whole * d
        if is_nonneg(rest) and is_nonneg(d - rest - 1):
            return whole, rest
    if (d.constant is not None and d.constant <= 0) or len(d.terms) != 1:
        return Poly.of(Div(p, d)), Poly.of(Mod(p, d))
    if d.constant is not None and p.terms and all(c < 0 or not m for m, c in p.terms) and p.constant is None:
        # floor(-x / d) = -floor((x + d - 1) / d): one form for a quotient that is rounded up
        quotient = ((p * -1) + (d.constant - 1)) // d
        return quotient * -1, p + d * quotient
    parts = [(_divide(term, d.terms[0]), term) for term in p.terms]
    whole = Poly.make(q for q, _ in parts if q is not None)
    rest = Poly.make(term for q, term in parts if q is None)
    if d.constant is not None:
        # the constant between 0 and d - 1, so that (n - 1) // d and (n + d - 1) // d - 1 are one
        number = dict(rest.terms).get((), 0)
        whole, rest = whole + number // d.constant, rest - number + number % d.constant
    if rest.constant is not None and d.constant is not None:
        return whole + rest.constant // d.constant, Poly.of(rest.constant % d.constant)
    if is_nonneg(rest) and is_nonneg(d - rest - 1):
        return whole, rest
    for factor in _factors(rest, d):
        # rest = factor * high + low with 0 <= low < factor, and factor divides d
        pieces = [(_divide(term, factor.terms[0]), term) for term in rest.terms]
        high = Poly.make(q for q, _ in pieces if q is not None)
        low = Poly.make(term for q, term in pieces if q is None)
        smaller = d.divided(factor)
        if smaller is not None and high.terms and is_nonneg(low) and is_nonneg(factor - low - 1):
            quotient, remainder = _divmod(high, smaller)
            return whole + quotient, factor * remainder + low
    inner = rest.atom
    if isinstance(inner, Div) and inner.den.constant and d.constant and is_nonneg(inner.num):
        return whole + inner.num // (inner.den * d), Poly.of(Mod(rest, d))
    if isinstance(inner, Mod) and inner.den.divided(d) is not None:
        return whole + Poly.of(Div(rest, d)), inner.num % d
    return whole + Poly.of(Div(rest, d)), Poly.of(Mod(rest, d))


def _factors(rest: Poly, d: Poly) -> list[Poly]:
    """Single terms, greater than 1, that may divide both `d` and a part of `rest`."""
    found: dict[Poly, None] = {}
    ((d_atoms, d_number),) = d.terms
    for atoms, number in rest.terms:
        shared, left = [], list(d_atoms)
        for atom in atoms:
            if atom in left:
                left.remove(atom)
                shared.append(atom)
        common = gcd(number, d_number)
        if shared or common > 1:
            found[Poly.make([(tuple(shared), common)])] = None
    return list(found)


# ---- bounds ----


@functools.lru_cache(maxsize=4096)
def _bound(p: Poly, upper: bool) -> Poly | None:
    """A bound of `p` in sizes alone; None where there is none."""
    total = Poly.of(0)
    for monomial, c in p.terms:
        product = Poly.of(c)
        for atom in monomial:
            limit = _limit(atom, upper == (c > 0))
            if limit is None:
                return None
            product = product * limit
        total = total + product
    return total


def _limit(atom: Atom, upper: bool) -> Poly | None:
    if isinstance(atom, Size):
        return Poly.of(atom)
    if isinstance(atom, Var):
        return atom.size - 1 if upper else Poly.of(0)
    if not is_nonneg(atom.den - 1):
        return None
    if isinstance(atom, Mod):
        return atom.den - 1 if upper else Poly.of(0)
    if not is_nonneg(atom.num):
        return None
    if not variables(atom.num) and not variables(atom.den):
        return Poly.of(atom)
    if not upper:
        return Poly.of(0)
    most = _bound(atom.num, True)
    return None if most is None else most // atom.den


@functools.lru_cache(maxsize=4096)
def is_nonneg(p: Poly) -> bool:
    """Whether `p >= 0` follows from the ranges of its variables and sizes."""
    least = _bound(p, False)
    if least is None:
        return False
    if all(c >= 0 for _, c in least.terms):
        return True
    # In terms of how far sizes and their quotients are above their least, no coefficient may be negative.
    shifted = Poly.of(0)
    for monomial, c in least.terms:
        product = Poly.of(c)
        for atom in monomial:
            product = product * (Poly.of(atom) + _least(atom))
        shifted = shifted + product
    if all(c >= 0 for _, c in shifted.terms):
        return True
    for smaller in (_with_one_quotient(least), _without_quotients(least)):
        if smaller != least and is_nonneg(smaller):
            return True
    return False


def _with_one_quotient(p: Poly) -> Poly:
    """A bound of `p` from below: `(num + n) // den <= num // den + ceil(n / den)`."""
    single = [(monomial[0], c) for monomial, c in p.terms if len(monomial) == 1 and isinstance(monomial[0], Div)]
    for taken, c in single:
        for other, added in single:
            more, by = (taken.num - other.num).constant, taken.den.constant
            if c < 0 < added and taken.den == other.den and more is not None and by is not None and by > 0:
                return p + (Poly.of(other) - (-more // by) - Poly.of(taken)) * c
    return p


def _without_quotients(p: Poly) -> Poly:
    """A bound of `p` from below: `num - (den - 1) <= den * (num // den) <= num`."""
    total = Poly.of(0)
    for monomial, c in p.terms:
        term = Poly(((monomial, c),))
        for i, atom in enumerate(monomial):
            if isinstance(atom, Div) and atom.den.constant and c % atom.den.constant == 0:
                rest = Poly(((monomial[:i] + monomial[i + 1 :], c // atom.den.constant),))
                term = rest * (atom.num - (atom.den.constant - 1) if c > 0 else atom.num)
                break
        total = total + term
    return total


def _least(atom: Atom) -> int:
    """A bound from below of a size, or of a quotient of them: a size is at least 1."""
    if isinstance(atom, Size):
        return 1
    if not isinstance(atom, Div) or not atom.den.constant:
        return 0
    sizes_only = all(isinstance(a, Size) for m, _ in atom.num.terms for a in m)
    rises = all(c > 0 for m, c in atom.num.terms if m)
    return sum(c for _, c in atom.num.terms) // atom.den.constant if sizes_only and rises else 0


# ---- structure ----


@functools.lru_cache(maxsize=4096)
def atoms_of(p: Poly) -> frozenset[Atom]:
    """Every atom of `p`, those inside quotients and remainders too."""
    found: set[Atom] = set()
    for monomial, _ in p.terms:
        for atom in monomial:
            found.add(atom)
            if isinstance(atom, (Div, Mod)):
                found |= atoms_of(atom.num) | atoms_of(atom.den)
    return frozenset(found)


@functools.lru_cache(maxsize=4096)
def variables(p: Poly) -> frozenset[Var]:
    """The index variables of `p`."""
    return frozenset(a for a in atoms_of(p) if isinstance(a, Var))


def substitute(p: Poly, values: Mapping[Var, Poly]) -> Poly:
    """`p` with variables replaced, simplified again."""
    if not any(v in values for v in variables(p)):
        return p
    total = Poly.of(0)
    for monomial, c in p.terms:
        product = Poly.of(c)
        for atom in monomial:
            product = product * _replaced(atom, values)
        total = total + product
    return total


def _replaced(atom: Atom, values: Mapping[Var, Poly]) -> Poly:
    if isinstance(atom, Var):
        return values.get(atom, Poly.of(atom))
    if isinstance(atom, Size):
        return Poly.of(atom)
    num, den = substitute(atom.num, values), substitute(atom.den, values)
    return num // den if isinstance(atom, Div) else num % den
