"""Whether a mask is a band: a sliding window, or compressed tokens whose windows are in the past."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .evaluate import NotUnderstood
from .index import Div, Poly, Var, is_nonneg, variables
from .selection import is_implied, left_padding, why
from .terms import Apply, At, Int, NonNeg, Term, all_of, conjuncts, free

__all__ = ["Band", "Horizon", "band", "horizons"]


@dataclass(frozen=True)
class Horizon:
    """Query `i` sees keys `j` with `stride * j <= i + reach`, if nothing else hides them."""

    query: Var
    reach: Poly
    stride: int

    def is_stricter(self, other: Horizon) -> bool:
        """Whether it hides all that the other hides; of two strides, token by token comes first."""
        if (self.query, self.stride) != (other.query, other.stride):
            return self.stride == 1 < other.stride
        return is_nonneg(other.reach - self.reach)


@dataclass(frozen=True)
class Band:
    """Keys `j` with `stride * j <= i + reach`, and of these the newest only if there is a `window`."""

    horizon: Horizon
    window: int | None
    padding: At | None = None  # how many keys at the beginning nobody sees, in each sequence

    @property
    def never_empty(self) -> bool:
        """Whether each query sees a key: the first one, or its own."""
        return self.padding is None and is_nonneg(self.nearest)

    @property
    def sees(self) -> Term:
        """Whether a query sees a key: if it does any, then the newest."""
        newest = NonNeg(self.nearest)
        return newest if self.padding is None else all_of(newest, Apply("ge", (Int(self.nearest), self.padding)))

    @property
    def nearest(self) -> Poly:
        """A query sees a key iff this is not negative."""
        return Poly.of(self.horizon.query) + self.horizon.reach


def horizons(visible: Term, key: Var, axes: Iterable[Var]) -> list[Horizon]:
    """What hides keys beyond a query, which is one of `axes`; raises `NotUnderstood` if nothing does."""
    found: list[Horizon] = []
    for part in conjuncts(visible):
        if not isinstance(part, NonNeg):
            continue
        p = unfloored(part.poly)
        stride = -dict(p.terms).get((key,), 0)
        rest = p + Poly.of(key) * stride
        for x in axes:
            reach = rest - Poly.of(x)
            if stride > 0 and x in variables(rest) and not variables(reach):
                found.append(Horizon(x, reach, stride))
    if not found:
        given = any(isinstance(part, At) and key in free(part) for part in conjuncts(visible))
        hint = "; a part of it is an input, of which nothing is known" if given else ""
        raise NotUnderstood(f"its mask is not causal token by token (key <= query){hint}")
    return found


def unfloored(p: Poly) -> Poly:
    """`num - den * k`, which is not negative iff `num // den - k` is; `p` itself if it has no such form."""
    for monomial, c in p.terms:
        if len(monomial) == 1 and isinstance(monomial[0], Div) and c > 0 and (monomial[0].den.constant or 0) > 0:
            div, rest = monomial[0], p - Poly(((monomial, c),))
            if all(n % c == 0 for m, n in rest.terms if m):
                return div.num + Poly.make((m, n // c) for m, n in rest.terms) * monomial[0].den
    return p


def band(visible: Term, key: Var, horizon: Horizon) -> Band | None:
    """The band that a mask is; None if it may be made of a list of blocks. Raises `NotUnderstood` if it is neither."""
    position = Poly.of(horizon.query) + horizon.reach
    edge = position - Poly.of(key) * horizon.stride
    left = [part for part in conjuncts(visible) if not _follows(part, edge)]
    if horizon.stride == 1:
        left = [part for part in left if not is_implied(part, Poly.of(key), position)]
        if not left:
            raise NotUnderstood("its mask is only causal: dense attention")
        padding = [at for at in (left_padding(part, key) for part in left) if at is not None]
        windows = [_window(part, edge) for part in left if left_padding(part, key) is None]
        sizes = [n for n in windows if n is not None]
        if not sizes or len(sizes) < len(windows) or len(padding) > 1:
            return None
        return Band(horizon, min(sizes), padding[0] if padding else None)
    if left:
        raise NotUnderstood(f"its mask of compressed keys also hides them otherwise ({why(left[0], key)})")
    return Band(horizon, None)


def _follows(part: Term, edge: Poly) -> bool:
    """Whether `edge >= 0` implies it."""
    return isinstance(part, NonNeg) and (is_nonneg(part.poly - edge) or is_nonneg(unfloored(part.poly) - edge))


def _window(part: Term, edge: Poly) -> int | None:
    """How many keys are seen, if a part hides all but the newest."""
    if not isinstance(part, NonNeg):
        return None
    last = (part.poly + edge).constant  # keys at edge <= last
    return last + 1 if last is not None and last >= 0 else None
