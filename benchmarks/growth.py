"""How each stage's time grows with the length, and what share of its floor it reaches: the tables of docs/growth.md.

    python -m benchmarks.growth benchmarks/results/{lengths,whole}_h100.csv --page docs/growth.md

Of several CSVs' rows of the same, the first counts. A floor is the longest of three times on an H100: the products'
FLOPs, the exponentials, and memory traffic where all inputs are read and all results written once.
"""

from __future__ import annotations

import argparse
import csv
import functools
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from benchmarks.whole import SELECTION, STAGES, WINDOW, WINDOWS

# A second, of one H100: bf16 peak; 16 per clock of 1.7 GHz and multiprocessor; HBM3.
RATES = {"products": 989e12, "exponentials": 16 * 132 * 1.7e9, "memory": 3.35e12}
BEGIN = "<!-- benchmarks: growth, begin (filled from benchmarks/results/) -->"
END = "<!-- benchmarks: growth, end -->"
PASSES = ("forward", "backward", "step")
Row = dict[str, str]
Times = dict[tuple[str, str], dict[int, float]]  # by stage and pass, by length


class Shape(NamedTuple):
    """Of a call of one sequence in 16 bits."""

    heads: int
    kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.heads}/{self.kv_heads} heads of {self.head_dim}"


def merged(paths: Iterable[Path]) -> list[Row]:
    """The rows of CSVs of `benchmarks.whole`; of those of the same, the first."""
    names = ("what", "pass", "provider", "seq_len", "num_q_heads", "num_kv_heads", "head_dim")
    found: dict[tuple[str, ...], Row] = {}
    for path in paths:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                found.setdefault(tuple(row[name] for name in names), row)
    return list(found.values())


@functools.cache
def pairs(stage: str, length: int) -> int:
    """(query, key) pairs of a query head that have a weight; of "partials", (query, selected block) pairs."""
    (size, stride), (block, most, *_) = WINDOWS.values(), SELECTION.values()
    seen: dict[str, Callable[[int], int]] = {
        "mean": lambda t: 0,
        "compressed": lambda t: max(0, (t + 1 - size) // stride + 1),
        "select": lambda t: max(0, (t + 1 - size) // stride + 1),
        "selected": lambda t: min(t // block, most - 1) * block + t % block + 1,
        "window": lambda t: min(t + 1, WINDOW["window_size"]),
        "partials": lambda t: min(t // block + 1, most),
    }
    return sum(map(seen[stage], range(length)))


def floor(stage: str, name: str, shape: Shape, length: int, partials: bool = False) -> tuple[float, str]:
    """Milliseconds, and what they are of; with the `partials` of the key/value-outer order, written and read once."""
    if stage == "whole":
        parts = ("mean", *(s for s in STAGES if s != "whole" and (s, name) != ("select", "backward")))  # means of k, v
        return sum(floor(part, name, shape, length)[0] for part in parts), "sum of stages"
    forward = name == "forward"
    q, k = (2 * length * heads * shape.head_dim for heads in shape[:2])  # bytes
    compressed = k // WINDOWS["kernel_stride"]
    statistics, ids = 8 * length * shape.heads, 4 * length * shape.kv_heads * SELECTION["num_selected"]
    attention = statistics + 2 * (q + (compressed if stage == "compressed" else k)) * (1 if forward else 2)
    special = {"mean": k + compressed, "select": q + compressed + statistics // 2 + ids, "selected": attention + ids}
    moved = special.get(stage, attention)
    if partials:
        moved += 2 * pairs("partials", length) * shape.heads * (2 * shape.head_dim + (8 if forward else 0))
    weights = pairs(stage, length) * shape.heads
    products = 1 if stage == "select" else 2 if forward else 5  # of head_dim multiply-adds a weight
    amounts = (2 * products * shape.head_dim * weights, weights, moved)
    seconds = {kind: x / rate for x, (kind, rate) in zip(amounts, RATES.items(), strict=True)}
    kind = max(seconds, key=seconds.__getitem__)
    return seconds[kind] * 1e3, kind


def times_of(rows: list[Row], shape: Shape, column: str = "p50_ms") -> Times:
    """Of what was compiled."""
    found: Times = {(stage, name): {} for stage in STAGES for name in PASSES}
    for row in rows:
        mine = Shape(int(row["num_q_heads"]), int(row["num_kv_heads"]), int(row["head_dim"]))
        if mine == shape and row["provider"] == "compiled" and row["pass"] in PASSES:
            found[row["what"], row["pass"]][int(row["seq_len"])] = float(row[column])
    return {key: dict(sorted(values.items())) for key, values in found.items() if values}


def turn(times: Times, passes: tuple[str, ...]) -> float:
    """The length from which on compressed attention and selection take longer than the rest, interpolated."""
    before: tuple[float, float] | None = None
    for length in times["whole", "forward"]:
        parts = {s: sum(times.get((s, name), {}).get(length, 0.0) for name in passes) for s in STAGES if s != "whole"}
        parts["mean"] *= 2  # of keys and of values
        slow = parts["compressed"] + parts["select"]
        here = math.log2(length), math.log(slow / (sum(parts.values()) - slow))
        if before and before[1] < 0 <= here[1]:
            return float(2 ** (before[0] - before[1] * (here[0] - before[0]) / (here[1] - before[1])))
        before = here
    return math.nan


def _growth(rows: list[Row], shape: Shape) -> list[str]:
    times, memory = times_of(rows, shape), times_of(rows, shape, "peak_mib")
    lengths = list(times["whole", "forward"])
    lines = [f"| {shape} | " + " | ".join(f"{n:,}" for n in lengths) + " |", "| --- " + "| ---: " * len(lengths) + "|"]
    for (stage, name), values in times.items():
        cells, before = [], 0
        for n in lengths:
            power = math.log(values[n] / values[before]) / math.log(n / before) if before else 0.0
            cells.append(f"{values[n]:.3g}" + (f" ({power:.2f})" if before else ""))
            before = n
        lines.append(f"| {stage} {name} | " + " | ".join(cells) + " |")
    for name in ("forward", "step"):
        values = memory["whole", name]
        lines.append(f"| peak of {name}, MiB | " + " | ".join(f"{values[n]:,.0f}" for n in lengths) + " |")
    return lines


def _shares(rows: list[Row], cases: dict[Shape, int]) -> list[str]:
    title = " | ".join(f"{shape}, {n:,}: ms | floor | of | reached" for shape, n in cases.items())
    lines = [f"| | {title} |", "| --- " + "| ---: | ---: | --- | ---: " * len(cases) + "|"]
    for stage, name in (key for key in times_of(rows, next(iter(cases))) if key[1] != "step"):
        for partials in (False, True) if stage == "selected" else (False,):
            cells = []
            for shape, n in cases.items():
                ms = times_of(rows, shape)[stage, name][n]
                least, kind = floor(stage, name, shape, n, partials)
                cells.append(f"{ms:.3g} | {least:.3g} | {kind} | {least / ms:.0%}")
            lines.append(f"| {stage} {name}{', with partials' * partials} | " + " | ".join(cells) + " |")
    return lines


def tables(rows: list[Row]) -> str:
    """Markdown."""
    long, wide = Shape(4, 1, 64), Shape(32, 8, 128)
    blocks = [_growth(rows, wide), _growth(rows, long), _shares(rows, {wide: 65536, long: 1048576})]
    turns = []
    for shape in (wide, long):
        forward, both = (turn(times_of(rows, shape), p) for p in (("forward",), ("forward", "backward")))
        turns.append(f"{round(forward, -3):,.0f} tokens forward and {round(both, -3):,.0f} with the backward ({shape})")
    blocks.append([f"Compressed attention and selection take longer than the rest from {' and '.join(turns)} on."])
    return "\n\n".join("\n".join(lines) for lines in blocks)


def filled(page: str, rows: list[Row]) -> str:
    """The page with these rows' tables between its markers."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{tables(rows)}\n\n{END}{rest.split(END)[1]}"


def main(arguments: list[str] | None = None) -> int:
    """Print the tables, and fill them in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, nargs="+")
    parser.add_argument("--page", type=Path, help="with the markers between which the tables belong")
    options = parser.parse_args(arguments)
    rows = merged(options.csv)
    if options.page:
        options.page.write_text(filled(options.page.read_text(encoding="utf-8"), rows), encoding="utf-8")
    print(tables(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
