"""Plots from the CSVs of `benchmarks.whole` and `benchmarks.models`, and from nothing else.

    python -m benchmarks.plot benchmarks/results/whole_h100.csv --out benchmarks/results
    python -m benchmarks.plot benchmarks/results/{lengths,whole}_h100.csv --together --out benchmarks/results

One picture a kind, over the length. Of `whole`: `<name>_whole.png` (forward, training step), `<name>_stages.png`,
`<name>_memory.png`, for each shape of heads if there are several (`<name>_32_8_128_whole.png`); points are medians,
bars reach from the 20th to the 80th percentile. `<name>_growth.png` has all shapes: time per token of each stage as
compiled, and peak memory. Of `models`: `<name>_tokens.png`, tokens a second by model and pass, times the layers, of
which fewer fit at great lengths.
"""

from __future__ import annotations

import argparse
import csv
import itertools
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.growth import Row, Shape, merged, times_of
from benchmarks.whole import STAGES

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogFormatter
from PIL import Image

DPI = 110


def read(path: Path) -> list[Row]:
    """The rows of a CSV."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _series(rows: list[Row], what: str, name: str) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if (row["what"], row["pass"]) == (what, name):
            found[row["provider"]].append(row)
    return {provider: sorted(points, key=lambda row: int(row["seq_len"])) for provider, points in found.items()}


class _Plain(LogFormatter):
    """Ticks as 0.01, where the formatter has one."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def _tokens(length: float, _: Any) -> str:
    """A tick: 8K, 1M."""
    return f"{length / 2**20:g}M" if length >= 2**20 else f"{length / 2**10:g}K" if length >= 2**10 else f"{length:g}"


def _draw(axis: Any, series: dict[str, list[Row]], column: str, title: str, unit: str) -> None:
    for provider, points in series.items():
        color = f"C{STAGES.index(provider)}" if provider in STAGES else None
        points = [row for row in points if row[column] and float(row[column]) > 0]
        x, y = [int(row["seq_len"]) for row in points], [float(row[column]) for row in points]
        if not points:
            continue
        if column == "p50_ms":
            low = [max(0.0, m - float(row["p20_ms"])) for m, row in zip(y, points, strict=True)]
            high = [max(0.0, float(row["p80_ms"]) - m) for m, row in zip(y, points, strict=True)]
            axis.errorbar(x, y, [low, high], marker="o", markersize=3, capsize=2, color=color, label=provider)
        else:
            axis.plot(x, y, marker="o", markersize=3, color=color, label=provider)
    axis.set_title(title)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.xaxis.set_major_formatter(FuncFormatter(_tokens))
    for side in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        side(_Plain(labelOnlyBase=False, minor_thresholds=(1.2, 0.6)))
    axis.tick_params(which="both", labelsize=8)
    axis.set_xlabel("seq_len, tokens")
    axis.set_ylabel(unit)
    axis.grid(alpha=0.3)
    if axis.has_data():
        beside = {"loc": "center left", "bbox_to_anchor": (1, 0.5)} if len(series) > 4 else {}
        axis.legend(fontsize=7, **beside)


def shapes(rows: list[Row]) -> dict[Shape, list[Row]]:
    """The rows of each shape of heads; dense attention may have been given keys that were repeated beforehand."""
    found: dict[tuple[int, int], list[Row]] = defaultdict(list)
    for row in rows:
        found[int(row["num_q_heads"]), int(row["head_dim"])].append(row)
    return {Shape(h, min(int(r["num_kv_heads"]) for r in mine), d): mine for (h, d), mine in found.items()}


def _save(figure: Any, rows: list[Row], about: str, path: Path) -> Path:
    """With where the rows are from."""
    kinds = {column: ", ".join(dict.fromkeys(row[column] for row in rows)) for column in ("device", "date", "commit")}
    figure.suptitle(f"{kinds['device']}, {about}{kinds['date']}, {kinds['commit']}", fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)  # a fifth of the bytes
    return path


def plot(rows: list[Row], name: str, out: Path) -> list[Path]:
    """The pictures of one CSV; those that would be empty are left out."""
    found, written = shapes(rows), []
    for shape, mine in found.items():
        suffix = "" if len(found) == 1 else "_" + "_".join(map(str, shape))
        written += _plot_shape(mine, shape, out / f"{name}{suffix}")
    return written + plot_growth(rows, out / f"{name}_growth.png")


def _plot_shape(rows: list[Row], shape: Shape, out: Path) -> list[Path]:
    there = {(row["what"], row["pass"]) for row in rows}
    stages = [(w, p) for w, p in dict.fromkeys((row["what"], row["pass"]) for row in rows) if w != "whole"]
    measured = {(row["what"], row["pass"]) for row in rows if row["peak_mib"]}
    whole = [("whole", p) for p in ("forward", "step") if ("whole", p) in there]
    kinds = {
        "whole": (whole, "p50_ms", "ms"),
        "stages": (stages, "p50_ms", "ms"),
        "memory": ([pair for pair in whole if pair in measured], "peak_mib", "MiB beyond inputs and results"),
    }
    written = []
    for kind, (pairs, column, unit) in kinds.items():
        if not pairs:
            continue
        columns = min(3, len(pairs))
        lines = -(-len(pairs) // columns)
        figure, axes = plt.subplots(lines, columns, figsize=(5 * columns, 3.6 * lines), squeeze=False)
        for axis in axes.flat[len(pairs) :]:
            axis.remove()
        for axis, (what, name_of_pass) in zip(axes.flat, pairs, strict=False):
            _draw(axis, _series(rows, what, name_of_pass), column, f"{what}, {name_of_pass}", unit)
        path = out.with_name(f"{out.name}_{kind}.png")
        written.append(_save(figure, rows, f"{shape}, {rows[0]['dtype']}, ", path))
    return written


def plot_growth(rows: list[Row], path: Path) -> list[Path]:
    """Microseconds a token of each stage as compiled, where what is linear is level, and the whole's peak memory."""
    rows = [row for row in rows if row["provider"] == "compiled"]
    found = shapes(rows)
    if not rows:
        return []
    figure, axes = plt.subplots(len(found), 3, figsize=(15, 3.9 * len(found)), squeeze=False)
    for line, shape in zip(axes, found, strict=True):
        times, memory = times_of(rows, shape), times_of(rows, shape, "peak_mib")
        panels = [
            *(("microseconds a token", [k for k in times if k[1] == p], times, p) for p in ("forward", "backward")),
            ("MiB beyond inputs and results", [k for k in memory if k[0] == "whole"], memory, "peak memory"),
        ]
        for axis, (unit, keys, values, title) in zip(line, panels, strict=True):
            series = {
                name_of_pass if values is memory else stage: [
                    {"seq_len": str(n), "value": str(value if values is memory else value * 1e3 / n)}
                    for n, value in values[stage, name_of_pass].items()
                ]
                for stage, name_of_pass in keys
            }
            _draw(axis, series, "value", f"{shape}: {title}", unit)
    return [_save(figure, rows, "", path)]


def plot_models(rows: list[Row], name: str, out: Path) -> list[Path]:
    """Tokens a second times the layers, so that lengths at which fewer layers fit can be compared."""
    rows = [row for row in rows if row["p50_ms"]]
    models, passes = (list(dict.fromkeys(row[column] for row in rows)) for column in ("model", "pass"))
    if not rows:
        return []
    size = (5 * len(passes), 3.6 * len(models))
    figure, axes = plt.subplots(len(models), len(passes), figsize=size, squeeze=False)
    for axis, (model, name_of_pass) in zip(axes.flat, itertools.product(models, passes), strict=True):
        series: dict[str, list[Row]] = defaultdict(list)
        for row in rows:
            if (row["model"], row["pass"]) == (model, name_of_pass):
                blocks = f" {row['block_size']}x{row['num_selected']}" if row["block_size"] else ""
                rate = float(row["tokens_per_s"]) * int(row["layers"])
                series[row["provider"] + blocks].append({**row, "rate": str(rate)})
        found = {label: sorted(points, key=lambda row: int(row["seq_len"])) for label, points in series.items()}
        _draw(axis, found, "rate", f"{model}, {name_of_pass}", "tokens x layers / s")
    return [_save(figure, rows, "", out / f"{name}_tokens.png")]


def main(arguments: list[str] | None = None) -> int:
    """Draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder")
    parser.add_argument("--together", action="store_true", help="CSVs of `whole` as one, named after the first")
    options = parser.parse_args(arguments)
    for path in options.csv[:1] if options.together else options.csv:
        rows = merged(options.csv) if options.together else read(path)
        draw = plot_models if "model" in rows[0] else plot
        for picture in draw(rows, path.stem, options.out):
            print(picture)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
