"""What the benchmarks share: inputs, interleaved timing, and result files that carry their versions."""

from __future__ import annotations

import csv
import platform
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import triton

import fsa_compile

RESULTS = Path(__file__).parent / "results"


def versions(device: torch.device) -> dict[str, str]:
    """What a number was measured with."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "fsa_compile": fsa_compile.__version__,
    }


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]], device: torch.device) -> None:
    """Write rows, each followed by the versions, in the order of the first row's keys."""
    rows = [{**row, **versions(device)} for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def measure(
    variants: Mapping[str, Callable[[], Any]], *, rounds: int = 10, warmup: int = 2, device: torch.device | str = "cuda"
) -> dict[str, float]:
    """Median milliseconds of each variant; they take turns, so that drift of a shared machine hits all alike."""
    for _ in range(warmup):
        for run in variants.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            times[name].append(_once(run, torch.device(device)))
    return {name: statistics.median(values) for name, values in times.items()}


def _once(run: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        import time

        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)
