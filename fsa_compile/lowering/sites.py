"""What became of the semantic operators that the pass met."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

__all__ = ["Site", "collect_sites", "report", "retract"]


@dataclass(frozen=True)
class Site:
    """What became of one semantic operator in one graph.

    The pass meets a forward and its backward as sites of their own. `explain` sees calls, whose backward, where one
    will follow, is in the last two fields.
    """

    op: str  # "fsa::selected_attention"
    matched: bool  # replaced by kernels
    loop_order: str | None
    costs: dict[str, float] = field(default_factory=dict)  # seconds by loop order, of the operator's own direction
    reason: str = ""
    where: str | None = None  # "file:line" of the user's call
    stages: tuple[str, ...] = ()  # of a public operator: the semantic operators that it consists of, in order
    backward_order: str | None = None
    backward_costs: dict[str, float] = field(default_factory=dict)  # seconds by loop order


_collectors: list[list[Site]] = []


@contextlib.contextmanager
def collect_sites() -> Iterator[list[Site]]:
    """The sites that the pass meets inside the block, appended as they come. A graph from a cache is not met again."""
    sites: list[Site] = []
    _collectors.append(sites)
    try:
        yield sites
    finally:
        _collectors[:] = [one for one in _collectors if one is not sites]


def report(site: Site) -> None:
    """Tell whoever collects."""
    for sites in _collectors:
        sites.append(site)


def retract(site: Site) -> None:
    """Take back what was told of a site that is looked at once more."""
    for sites in _collectors:
        sites[:] = [one for one in sites if one is not site]
