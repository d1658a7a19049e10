"""What a fit is worth where it has not looked; measurements as a file; a row for the table of devices."""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from .. import cost
from .fit import residuals
from .grid import Measurement

__all__ = ["Judgement", "deviation", "judge", "read", "row", "summary", "write"]

TOLERANCE = 0.05  # how much slower than the best order a choice may be


@dataclass(frozen=True)
class Judgement:
    """One choice against measurements. Times in seconds."""

    problem: cost.Problem
    stage: str  # one of cost.orders.STAGES
    chosen: str
    times: dict[str, float]  # as measured, by order

    @property
    def best(self) -> str:
        """The fastest order."""
        return min(self.times, key=self.times.__getitem__)

    @property
    def slower(self) -> float:
        """By what share the order chosen takes longer than the best."""
        return self.times[self.chosen] / self.times[self.best] - 1


def judge(device: cost.Device, measured: Sequence[Measurement]) -> list[Judgement]:
    """The choices with these constants, for each problem those of a forward, of one whose backward follows, and of a
    backward.
    """
    found = []
    for problem in dict.fromkeys(m.problem for m in measured):
        times = {(m.order, m.stage): m.seconds for m in measured if m.problem == problem}
        for order, stage in itertools.product(cost.LOOP_ORDERS, ("forward", "backward")):
            same = cost.first_like(order, stage), stage
            if same in times:
                times[order, stage] = times[same]
        orders = [o for o in cost.LOOP_ORDERS if {(o, "forward"), (o, "backward")} <= times.keys()]
        forward, backward = ({o: times[o, stage] for o in orders} for stage in ("forward", "backward"))
        trained = {o: s - _left_to_the_backward(o, times.get(("", "lists"), 0.0)) for o, s in forward.items()}
        for stage, by_order, how in (
            ("forward", forward, {}),
            ("trained forward", trained, {"training": True}),
            ("backward", backward, {"backward": True}),
        ):
            chosen = cost.choose(problem, device, **how).order
            if chosen in by_order and len(by_order) > 1:
                found.append(Judgement(problem, stage, chosen, by_order))
    return found


def _left_to_the_backward(order: str, lists: float) -> float:
    """Of a measured forward, what it would not take in a training step; lists: measured seconds of theirs."""
    alone, trained = ({p.name for p in cost.ORDERS[order].passes(s)} for s in ("forward", "trained forward"))
    return lists if "lists" in alone - trained else 0.0


def deviation(device: cost.Device, measured: Sequence[Measurement]) -> float:
    """Root mean square of the log of predicted over measured time."""
    off = residuals(measured, device)
    return math.sqrt(sum(x * x for x in off) / len(off))


def summary(device: cost.Device, measured: Sequence[Measurement]) -> str:
    """A table of the choices on these measurements, worst first at its end, and how far predictions are off."""
    found = judge(device, measured)
    if not found:
        return "no shape was measured in two loop orders: nothing to choose between"
    orders = [o for o in cost.LOOP_ORDERS if any(o in j.times for j in found)]
    lines = [f"{'shape (D, block size x selected)':<34}{'pass':<17}{'chosen':>7}{'slower':>8}"]
    lines[0] += "".join(f"{order + ' ms':>10}" for order in orders)
    for j in found:
        p = j.problem
        shape = f"T={p.seq_len} G={p.gqa_group_size} D={p.head_dim} {p.block_size}x{p.num_selected}"
        times = (f"{j.times[o] * 1e3:>10.3f}" if o in j.times else f"{'-':>10}" for o in orders)
        lines.append(f"{shape:<34}{j.stage:<17}{j.chosen:>7}{j.slower:>8.1%}{''.join(times)}")
    slow = [j for j in found if j.slower > TOLERANCE]
    rms = deviation(device, measured)
    worst = max(found, key=lambda j: j.slower)
    lines.append(f"choices: {len(found)}, more than {TOLERANCE:.0%} slower than the best order: {len(slow)}, worst")
    lines[-1] += f" {worst.slower:.1%}; predictions are off by {math.expm1(rms):.0%} (root mean square)"
    return "\n".join(lines)


def row(device: cost.Device, name: str) -> str:
    """An entry of ``cost/device.py``'s table under this name."""
    rates = {
        "flops": f"{device.flops / 1e12:.4g} * _TERA",
        "flops_fp32": f"{device.flops_fp32 / 1e12:.4g} * _TERA",
        "dram_bandwidth": f"{device.dram_bandwidth / 1e12:.3g} * _TERA",
        "l2_bandwidth": f"{device.l2_bandwidth / 1e12:.3g} * _TERA",
        "sort_rate": f"{device.sort_rate / 1e9:.3g} * _GIGA",
        "launch_overhead": f"{device.launch_overhead:.2g}",
        "num_sms": f"{device.num_sms}",
        "memory": f"{device.memory / 1e9:.3g} * _GIGA",
        "efficiency": "(" + ", ".join(f"{share:.3g}" for share in device.efficiency) + ")",
    }
    return "\n".join(
        [f'    "{name}": _gpu(', f'        "{name}",', *(f"        {k}={v}," for k, v in rates.items()), "    ),"]
    )


_SIZES = tuple(f.name for f in fields(cost.Problem))


def write(file: Path, measured: Iterable[Measurement], about: dict[str, str]) -> None:
    """Measurements as CSV; ``about`` is in every row."""
    rows = []
    for m in measured:
        sizes = asdict(m.problem) | {"agreement": f"{m.problem.agreement:.4f}"}
        times = {"held_out": int(m.held_out), "order": m.order, "stage": m.stage, "ms": f"{m.seconds * 1e3:.4f}"}
        rows.append(sizes | times | about)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(dict.fromkeys(name for one in rows for name in one)))
        writer.writeheader()
        writer.writerows(rows)


def read(file: Path) -> tuple[list[Measurement], str]:
    """What ``write`` wrote, and the device's name. Raises OSError, or ValueError for another file."""
    with file.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    try:
        measured = []
        for one in rows:
            sizes = {name: float(one[name]) if name == "agreement" else int(one[name]) for name in _SIZES}
            problem = cost.Problem(**sizes)  # type: ignore[arg-type]
            held_out, seconds = bool(int(one["held_out"])), float(one["ms"]) / 1e3
            measured.append(Measurement(problem, held_out, one["order"], one["stage"], seconds))
        return measured, rows[0]["device"]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"{file} holds no measurements of this program: {error!r}") from error
