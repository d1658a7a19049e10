"""What the benchmarks share: inputs, interleaved timing, and result files that carry their versions."""

from __future__ import annotations

import argparse
import csv
import datetime
import functools
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

import fsa_compile
from fsa_compile.testing.timing import seconds_of

RESULTS = Path(__file__).parent / "results"


@functools.cache
def commit() -> str:
    """The commit that is measured: FSA_COMPILE_COMMIT, or the checkout's, with "-dirty" where it was changed."""
    if given := os.environ.get("FSA_COMPILE_COMMIT"):
        return given
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def versions(device: torch.device) -> dict[str, str]:
    """What a number was measured with, and when."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit(),
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


class Times(NamedTuple):
    """The 20th, 50th and 80th percentile of a run's milliseconds."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, milliseconds: list[float]) -> Times:
        """Percentiles, interpolated between the two nearest runs."""
        if len(milliseconds) == 1:
            return cls(*milliseconds * 3)
        tenths = statistics.quantiles(milliseconds, n=10, method="inclusive")
        return cls(tenths[1], statistics.median(milliseconds), tenths[7])

    def columns(self) -> dict[str, str]:
        """As a row has them."""
        return {f"{name}_ms": f"{value:.4f}" for name, value in self._asdict().items()}


def timings(
    variants: Mapping[Any, Callable[..., Any]],
    *,
    prepare: Mapping[Any, Callable[[], Any]] | None = None,
    rounds: int = 10,
    warmup: int = 2,
    seconds: float = float("inf"),
    device: torch.device | str = "cuda",
) -> dict[Any, Times]:
    """Milliseconds of each variant; they take turns, so that drift of a shared machine hits all alike.

    What a variant's `prepare` returns is its argument and not in its time. After `seconds`, three rounds are enough.
    On a GPU it is the GPU's time: the host is given a head start, as it has in the middle of a model.
    """
    device = torch.device(device)
    prepare = prepare or {}
    times: dict[Any, list[float]] = {name: [] for name in variants}
    begin = time.perf_counter()
    for i in range(-warmup, rounds):
        if i >= 3 and time.perf_counter() - begin > seconds:
            break
        for name, run in variants.items():
            arguments = (prepare[name](),) if name in prepare else ()
            seconds_taken = seconds_of(functools.partial(run, *arguments), device)
            if i >= 0:
                times[name].append(seconds_taken * 1e3)
    return {name: Times.of(values) for name, values in times.items()}


def add_turns(parser: argparse.ArgumentParser, *, rounds: int, seconds: float, of: str) -> None:
    """What is timed on, and for how long; `of`: what `seconds` is a limit of."""
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--seconds", type=float, default=seconds, help=f"{of}, after which three rounds are enough")


def measure(
    variants: Mapping[str, Callable[[], Any]], *, rounds: int = 10, warmup: int = 2, device: torch.device | str = "cuda"
) -> dict[str, float]:
    """The medians of `timings`."""
    found = timings(variants, rounds=rounds, warmup=warmup, device=device)
    return {name: times.p50 for name, times in found.items()}
