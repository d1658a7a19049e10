"""The choice between the loop orders. Pure: the same arguments give the same Choice, and it is cached."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

from ..tiling import ENTRIES_PER_TILE, WORKSPACE
from .device import DEVICES, HOST_LAUNCH, Device
from .problem import KV_OUTER_ROWS, LOOP_ORDERS, Problem

# A loop order whose temporaries exceed this share of the device's memory is not chosen by itself: slow beats failing.
SCRATCH_SHARE = 0.5


@dataclass(frozen=True)
class Choice:
    """A loop order, what each that was considered is predicted to cost (seconds) and why this one."""

    order: str
    costs: dict[str, float]
    reason: str

    @property
    def speedup(self) -> float:
        """Predicted time of the best other order over this one's; below 1 when this one was forced."""
        return self.costs[best_other(self.costs, self.order)] / self.costs[self.order]


def best_other(costs: dict[str, float], order: str) -> str:
    """The cheapest of the orders that are not ``order``."""
    return min((other for other in costs if other != order), key=costs.__getitem__)


@dataclass(frozen=True)
class PassTime:
    """Predicted seconds of one pass, and the term that decides them."""

    direction: str
    name: str
    seconds: float
    bound: str  # "arithmetic", "L2", "DRAM", "sort" or "launch"


_Values = Callable[..., Any]


def _arguments(problem: Problem, device: Device) -> tuple[float, ...]:
    p = problem
    sizes = (p.batch, p.seq_len, p.seq_len_k, p.num_kv_heads, p.gqa_group_size, p.head_dim, p.head_dim_v)
    rows = (p.block_size, p.num_selected, p.itemsize, p.agreement)
    tiles = (p.query_rows, KV_OUTER_ROWS, ENTRIES_PER_TILE, p.union_tokens, p.chunks, WORKSPACE)
    flops = device.flops if p.itemsize <= 2 else device.flops_fp32
    rates = (device.dram_bandwidth, device.l2_bandwidth, device.sort_rate)
    # In floats: the products of large sizes stay finite where they would be slow as big integers.
    values = (*sizes, *rows, *tiles, flops, *rates)
    return tuple(map(float, (*values, device.launch_overhead, device.num_sms, *device.efficiency)))


def _compile(expressions: Any) -> _Values:
    import sympy

    from .expressions import CONSTANTS, DERIVED, SIZES, TILES

    derived = list(DERIVED)
    inner = sympy.lambdify([*SIZES, *TILES, *CONSTANTS, *derived], expressions, modules="math", cse=True)
    prepare = sympy.lambdify([*SIZES, *TILES, *CONSTANTS], _resolved(derived, DERIVED), modules="math")
    return lambda *arguments: inner(*arguments, *prepare(*arguments))


def _resolved(symbols: list[Any], definitions: dict[Any, Any]) -> list[Any]:
    """Definitions in terms of plain symbols only (W is written with E)."""
    return [definitions[s].subs(definitions) for s in symbols]


@cache
def _totals() -> _Values:
    """By loop order and stage: seconds, bytes of temporaries and launches."""
    from .orders import ORDERS, STAGES

    orders = [ORDERS[o] for o in LOOP_ORDERS]
    return _compile([[(o.seconds(stage), o.scratch(stage), o.launches(stage)) for stage in STAGES] for o in orders])


def _evaluated(problem: Problem, device: Device, stage: str) -> tuple[dict[str, float], ...]:
    """Seconds, bytes of temporaries and launches, by loop order."""
    from .orders import STAGES

    values = _totals()(*_arguments(problem, device))
    rows = {o: by_stage[STAGES.index(stage)] for o, by_stage in zip(LOOP_ORDERS, values, strict=True)}
    return tuple({o: float(row[i]) for o, row in rows.items()} for i in range(3))


def seconds(problem: Problem, device: Device) -> dict[tuple[str, str], float]:
    """Predicted seconds by loop order and stage: "forward", "trained forward" or "backward".

    As ``choose`` has them, and not remembered: for those who ask for many devices.
    """
    from .orders import STAGES

    values = _totals()(*_arguments(problem, device))
    return {
        (order, stage): float(by_stage[i][0])
        for order, by_stage in zip(LOOP_ORDERS, values, strict=True)
        for i, stage in enumerate(STAGES)
    }


@cache
def _terms(order: str) -> tuple[list[tuple[str, str]], _Values]:
    from .orders import ORDERS

    passes = [(direction, p) for direction in ("forward", "backward") for p in ORDERS[order].passes(direction)]
    return [(direction, p.name) for direction, p in passes], _compile([list(p.terms().values()) for _, p in passes])


def _any_of(names: Iterable[str]) -> str:
    *others, last = map(repr, names)
    return f"{', '.join(others)} or {last}"


def _check_order(order: str) -> None:
    if order not in LOOP_ORDERS:
        raise ValueError(f"order is {order!r}; it should be {_any_of(LOOP_ORDERS)}")


def breakdown(problem: Problem, device: Device, order: str) -> list[PassTime]:
    """Predicted seconds of every pass of ``order``, forward then backward, with what bounds it."""
    _check_order(order)
    keys, values = _terms(order)
    result = []
    for (direction, name), terms in zip(keys, values(*_arguments(problem, device)), strict=True):
        arithmetic, l2, dram, sort, launch = terms
        parts = {"arithmetic": arithmetic, "L2": l2, "DRAM": dram, "sort": sort, "launch": launch}
        bound = max(parts, key=parts.__getitem__)
        result.append(PassTime(direction, name, max(arithmetic, l2, dram) + sort + launch, bound))
    return result


@cache
def _union() -> _Values:
    from .expressions import U

    return _compile([U])


def agreement_of(problem: Problem, union_blocks: float) -> float:
    """``Problem.agreement`` of a selection whose query tiles have unions of so many blocks on average.

    A tile has ``problem.union_tokens`` tokens.
    """
    any_device = DEVICES["cuda"]
    (most,) = _union()(*_arguments(replace(problem, agreement=0.0), any_device))
    least = problem.num_selected
    return min(1.0, max(0.0, (most - union_blocks) / (most - least))) if most > least else 0.0


def scratch_bytes(problem: Problem, order: str, *, training: bool = False) -> float:
    """Bytes of temporaries that ``order`` allocates at its largest moment: of the forward, or with ``training`` of
    either direction.
    """
    _check_order(order)
    any_device = DEVICES["cuda"]  # bytes do not depend on it
    stages = ("forward", "backward") if training else ("forward",)
    return max(_evaluated(problem, any_device, stage)[1][order] for stage in stages)


def format_seconds(seconds: float) -> str:
    """A time for people, three digits: ``1.23 s``, ``4.56 ms`` or ``78.9 us``."""
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


@lru_cache(maxsize=4096)
def choose(
    problem: Problem, device: Device, loop_order: str = "auto", *, training: bool = False, backward: bool = False,
    eager: bool = False,
) -> Choice:  # fmt: skip
    """The loop order for one direction of a selected-attention call; the other direction has its own.

    Args:
        problem: its sizes.
        device: its device's rates.
        loop_order: one of ``LOOP_ORDERS`` overrides the model; the costs are given all the same.
        training: of a forward whose backward follows in the same graph: its cost without the passes that every order's
            backward has too, the lists, as these are made once.
        backward: of a backward, lists included; excludes ``training``.
        eager: of a call that the host launches kernel by kernel, which takes no less than ``HOST_LAUNCH`` for each.

    Where the device has one path only it is that, and ``loop_order`` makes no difference. Otherwise it is the one with
    the lowest cost among those whose temporaries take at most half of the device's memory, or of all if none does.

    Raises ValueError for another ``loop_order``, or when both ``training`` and ``backward`` are set.
    """
    if loop_order not in ("auto", *LOOP_ORDERS):
        raise ValueError(f"loop_order is {loop_order!r}; it should be {_any_of(('auto', *LOOP_ORDERS))}")
    if training and backward:
        raise ValueError("training and backward are both set; training is of a forward whose backward follows")
    stage = "trained forward" if training else "backward" if backward else "forward"
    from .orders import ORDERS

    seconds, scratch, launches = _evaluated(problem, device, stage)
    host = HOST_LAUNCH if eager else 0.0
    costs = {order: max(seconds[order], host * launches[order]) for order in ORDERS}
    scope = "forward of a training step" if training else stage

    def versus(order: str) -> str:
        other = best_other(costs, order)
        mine, others = costs[order], costs[other]
        ratio = f"{others / mine:.1f}x faster" if others >= mine else f"{mine / others:.1f}x slower"
        return (
            f"{order} ({LOOP_ORDERS[order]}) {scope} is predicted at {format_seconds(mine)}, {ratio} than "
            f"{other} ({LOOP_ORDERS[other]}) at {format_seconds(others)}, "
            f"for gqa_group_size {problem.gqa_group_size} and seq_len {problem.seq_len} on {device.name} "
            f"(constants {device.source})"
        )

    only = device.only_order
    if only is not None:
        ignored = "" if loop_order in ("auto", only) else f'; loop_order="{loop_order}" makes no difference there'
        reason = f"the {device.kind.upper()} path is {LOOP_ORDERS[only]}{ignored}; {versus(only)}"
        return Choice(only, costs, reason)
    if loop_order != "auto":
        return Choice(loop_order, costs, f'loop_order="{loop_order}" was asked for; {versus(loop_order)}')

    def cheapest(orders: Iterable[str]) -> str:
        """Where all wait for the host, the one that leaves the device the most time."""
        return min(orders, key=lambda order: (costs[order], seconds[order]))

    best = cheapest(costs)
    fitting = [order for order in costs if scratch[order] <= SCRATCH_SHARE * device.memory]
    if fitting and best not in fitting:
        instead = cheapest(fitting)
        return Choice(
            instead,
            costs,
            f"{best} would need {scratch[best] / 1e9:.3g} GB of temporaries, more than half of the "
            f"{device.memory / 1e9:.3g} GB of {device.name}; {versus(instead)}",
        )
    return Choice(best, costs, versus(best))
