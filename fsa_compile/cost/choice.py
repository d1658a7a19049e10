"""The choice between the loop orders. Pure: the same arguments give the same Choice, and it is cached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

from ..tiling import ENTRIES_PER_TILE
from .device import DEVICES, Device
from .problem import KV_OUTER_ROWS, LOOP_ORDERS, Problem

# A loop order whose temporaries exceed this share of the device's memory is not chosen by itself: slow beats failing.
SCRATCH_SHARE = 0.5

_OTHER = {"fsa": "nsa", "nsa": "fsa"}
_LONG_NAME = {"fsa": "KV-outer", "nsa": "query-outer"}


@dataclass(frozen=True)
class Choice:
    """A loop order, what each was predicted to cost (seconds) and why this one."""

    order: str
    costs: dict[str, float]
    reason: str

    @property
    def speedup(self) -> float:
        """Predicted time of the other order over this one's; below 1 when this one was forced."""
        return self.costs[_OTHER[self.order]] / self.costs[self.order]


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
    tiles = (p.query_rows, KV_OUTER_ROWS, ENTRIES_PER_TILE, p.chunks)
    flops = device.flops if p.itemsize <= 2 else device.flops_fp32
    rates = (device.dram_bandwidth, device.l2_bandwidth, device.sort_rate)
    # In floats: the products of large sizes stay finite where they would be slow as big integers.
    values = (*sizes, p.block_size, p.num_selected, p.itemsize, *tiles, flops, *rates)
    return tuple(map(float, (*values, device.launch_overhead, device.num_sms)))


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
    from .expressions import BACKWARD_EXPRESSIONS, EXPRESSIONS, LISTS_EXPRESSION, SCRATCH_EXPRESSIONS

    rows = [[EXPRESSIONS[o], BACKWARD_EXPRESSIONS[o], *SCRATCH_EXPRESSIONS[o]] for o in LOOP_ORDERS]
    return _compile([*rows, LISTS_EXPRESSION])


@cache
def _terms() -> tuple[list[tuple[str, str, str]], _Values]:
    from .expressions import BACKWARD_PASSES, FORWARD_PASSES

    keys, terms = [], []
    for direction, by_order in (("forward", FORWARD_PASSES), ("backward", BACKWARD_PASSES)):
        for order, passes in by_order.items():
            for p in passes:
                keys.append((direction, order, p.name))
                terms.append(list(p.terms().values()))
    return keys, _compile(terms)


def _check_order(order: str) -> None:
    if order not in LOOP_ORDERS:
        raise ValueError(f"order is {order!r}; it should be 'fsa' or 'nsa'")


def breakdown(problem: Problem, device: Device, order: str) -> list[PassTime]:
    """Predicted seconds of every pass of ``order``, forward then backward, with what bounds it."""
    _check_order(order)
    keys, values = _terms()
    result = []
    for (direction, of, name), terms in zip(keys, values(*_arguments(problem, device)), strict=True):
        if of == order:
            arithmetic, l2, dram, sort, launch = terms
            parts = {"arithmetic": arithmetic, "L2": l2, "DRAM": dram, "sort": sort, "launch": launch}
            bound = max(parts, key=parts.__getitem__)
            result.append(PassTime(direction, name, max(arithmetic, l2, dram) + sort + launch, bound))
    return result


def scratch_bytes(problem: Problem, order: str, *, training: bool = False) -> float:
    """Bytes of temporaries that ``order`` allocates at its largest moment (forward; with ``training`` backward too)."""
    _check_order(order)
    any_device = DEVICES["cuda"]  # bytes do not depend on it
    _, _, forward, backward = _totals()(*_arguments(problem, any_device))[LOOP_ORDERS.index(order)]
    return float(max(forward, backward) if training else forward)


def format_seconds(seconds: float) -> str:
    """A time for people, three digits: ``1.23 s``, ``4.56 ms`` or ``78.9 us``."""
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


@lru_cache(maxsize=4096)
def choose(
    problem: Problem, device: Device, loop_order: str = "auto", *, training: bool = False, backward: bool = False
) -> Choice:
    """The loop order for one selected-attention call.

    Args:
        problem: its sizes.
        device: its device's rates.
        loop_order: ``"fsa"`` or ``"nsa"`` overrides the model; the costs are given all the same.
        training: cost of forward and backward together, the lists built once.
        backward: cost of the backward alone (for a backward op that stands by itself); excludes ``training``.

    On a CPU the order is always ``"fsa"``: the ATen path there is KV-outer, and ``loop_order`` makes no difference.
    Otherwise it is the one with the lowest cost, unless its temporaries would take more than half of the device's
    memory and the other's would not.

    Raises ValueError for another ``loop_order``, or when both ``training`` and ``backward`` are set.
    """
    if loop_order not in ("auto", *LOOP_ORDERS):
        raise ValueError(f"loop_order is {loop_order!r}; it should be 'auto', 'fsa' or 'nsa'")
    if training and backward:
        raise ValueError("training and backward are both set; training already counts the backward")
    *rows, lists = _totals()(*_arguments(problem, device))
    costs, scratch = {}, {}
    for order, (fwd, bwd, fwd_scratch, bwd_scratch) in zip(LOOP_ORDERS, rows, strict=True):
        both = fwd + bwd - (lists if order == "fsa" else 0.0)
        costs[order] = float(both if training else bwd if backward else fwd)
        scratch[order] = max(fwd_scratch, bwd_scratch) if training else bwd_scratch if backward else fwd_scratch

    scope = "forward + backward" if training else "backward" if backward else "forward"

    def versus(order: str) -> str:
        mine, other = costs[order], costs[_OTHER[order]]
        ratio = f"{other / mine:.1f}x faster" if other >= mine else f"{mine / other:.1f}x slower"
        return (
            f"{order} ({_LONG_NAME[order]}) {scope} is predicted at {format_seconds(mine)}, {ratio} than "
            f"{_OTHER[order]} ({_LONG_NAME[_OTHER[order]]}) at {format_seconds(other)}, "
            f"for gqa_group_size {problem.gqa_group_size} and seq_len {problem.seq_len} on {device.name}"
        )

    if device.kind == "cpu":
        ignored = "" if loop_order in ("auto", "fsa") else f'; loop_order="{loop_order}" makes no difference there'
        return Choice("fsa", costs, f"the CPU path is KV-outer{ignored}; {versus('fsa')}")
    if loop_order != "auto":
        return Choice(loop_order, costs, f'loop_order="{loop_order}" was asked for; {versus(loop_order)}')

    best = min(LOOP_ORDERS, key=costs.__getitem__)
    limit = SCRATCH_SHARE * device.memory
    if scratch[best] > limit >= scratch[_OTHER[best]]:
        return Choice(
            _OTHER[best],
            costs,
            f"{best} would need {scratch[best] / 1e9:.3g} GB of temporaries, more than half of the "
            f"{device.memory / 1e9:.3g} GB of {device.name}; {versus(_OTHER[best])}",
        )
    return Choice(best, costs, versus(best))
