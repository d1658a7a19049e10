"""Measure the cost model's constants on this machine's GPU, in under three minutes, and keep them.

    python -m fsa_compile.calibrate

Times the selected branch in each loop order over a grid of shapes, fits the constants to one half of it, tells for the
other half how much slower the model's choices are than the best order, and writes a file that loop_order="auto" reads
from then on. What was compiled with other constants is compiled anew.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import cost, debug
from ..cost import calibration
from ..cost.device import known
from ..ops.problem import gpu_of
from . import report
from .ahead import compile_ahead
from .fit import fit
from .grid import CELLS, Cell, Measurement
from .timing import measure

_FEWEST = 6  # cells that a fit needs
# Twice as long or half as long as predicted, on average: the machine was busy, or the expressions are not of it.
_FURTHEST = 0.7


def progress(cells: Sequence[Cell], seconds: float) -> Iterator[Cell]:
    """The cells, with a bar on stderr, until they or the seconds are used up."""
    start = time.perf_counter()
    bar = _bar(len(cells))
    try:
        for i, cell in enumerate(cells):
            if time.perf_counter() - start > seconds:
                break
            p = cell.problem
            text = f"T={p.seq_len} G={p.gqa_group_size} D={p.head_dim} {p.block_size}x{p.num_selected}"
            bar(i, text)
            yield cell
            bar(i + 1, text)
    finally:
        bar(None, "")


def _bar(total: int) -> Any:
    """``bar(done, text)``, or ``bar(None, "")`` at the end: tqdm's if there is one."""
    try:
        tqdm = importlib.import_module("tqdm").tqdm(total=total, unit="shape", file=sys.stderr)
    except ImportError:
        return _plain_bar(total)

    def bar(done: int | None, text: str) -> None:
        if done is None:
            tqdm.close()
        else:
            tqdm.set_description(text)
            tqdm.update(done - tqdm.n)

    return bar


def _plain_bar(total: int) -> Any:
    width, start = 30, time.perf_counter()
    ending = "\r" if sys.stderr.isatty() else "\n"

    def bar(done: int | None, text: str) -> None:
        if done is None:
            print(file=sys.stderr)
            return
        filled = "#" * (width * done // total)
        line = f"[{filled:<{width}}] {done}/{total} {time.perf_counter() - start:4.0f} s  {text}"
        print(f"{line:<78}", end=ending, file=sys.stderr, flush=True)

    return bar


def _measured(device: torch.device, seconds: float) -> list[Measurement]:
    found: list[Measurement] = []
    failures: list[str] = []
    done = 0
    start = time.perf_counter()
    print("compiling the kernels", file=sys.stderr, flush=True)
    compile_ahead(CELLS, device, seconds / 2)
    for cell in progress(CELLS, seconds - (time.perf_counter() - start)):
        times, failed = measure(cell, device)
        found, failures, done = found + times, failures + failed, done + 1
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if done < len(CELLS):
        print(f"{done} of {len(CELLS)} shapes were measured in {seconds:.0f} s; --seconds gives it more")
    for failure in failures:
        print(f"not measured: {failure}")
    return found


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fsa_compile.calibrate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"), help="of several GPUs")
    parser.add_argument("--seconds", type=float, default=140.0, help="after which no shape is begun (140)")
    parser.add_argument("--save", type=Path, metavar="CSV", help="keep the measurements, too")
    parser.add_argument("--load", type=Path, metavar="CSV", help="fit what --save kept; needs no GPU, writes nothing")
    parser.add_argument("--row", action="store_true", help="print a row for the table in fsa_compile/cost/device.py")
    options = parser.parse_args(arguments)
    if options.device.type != "cuda":
        parser.error(f"--device is {options.device}; only a GPU has a choice to calibrate")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Calibrate; 0 if all went well, and 1, with a line on stderr, if there is no GPU or nothing worth keeping."""
    options = _options(arguments)
    about = {"date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")}
    if options.load:
        try:
            measured, name = report.read(options.load)
        except (OSError, ValueError) as error:
            print(error, file=sys.stderr)
            return 1
        before = cost.uncalibrated(name)
    elif not torch.cuda.is_available():
        print("there is no GPU here: on a CPU the selected branch has one loop order", file=sys.stderr)
        return 1
    else:
        if options.device.index is not None:
            torch.cuda.set_device(options.device)
        debug.validate(False)  # it waits for the device
        name, properties = gpu_of(torch.cuda.current_device())
        before = cost.uncalibrated(name, properties)
        about |= {"device": name, "torch": torch.__version__, "triton": _version("triton")}
        about["kernels"] = calibration.kernels_version()
        print(f"{name}: constants are {cost.device_for(name, 'cuda', properties).source}")
        measured = _measured(torch.device("cuda", torch.cuda.current_device()), options.seconds)
        if options.save and measured:
            report.write(options.save, measured, about)
            print(f"measurements written to {options.save}")
    seen, held_out = ([m for m in measured if m.held_out is out] for out in (False, True))
    if len({m.problem for m in seen}) < _FEWEST:
        print(f"too few shapes were measured for a fit, which needs {_FEWEST}; nothing is kept", file=sys.stderr)
        return 1
    after = fit(before, seen)
    print("\nShapes that the fit has not seen, random selections:\n")
    print(report.summary(after, held_out))
    worse = _worse(before, after, held_out)
    if options.row:
        print("\n" + report.row(after, (known(name) or after).name))
    if worse:
        print(f"nothing is kept: {worse}", file=sys.stderr)
        return 1
    if not options.load:
        try:
            file = calibration.save(replace(after, name=name), about)
        except (OSError, RuntimeError) as error:  # not writable; no home directory
            print(f"cannot be kept: {error}; FSA_COMPILE_CACHE_DIR can name another directory", file=sys.stderr)
            return 1
        print(f'\nkept in {file}: loop_order="auto" reads it from now on; remove it to go back')
    return 0


def _worse(before: cost.Device, after: cost.Device, held_out: list[Measurement]) -> str:
    """Why a fit is not to be used; empty if it is."""
    if not held_out or (off := report.deviation(after, held_out)) > _FURTHEST:
        return f"predictions are off by {math.expm1(off):.0%}" if held_out else "nothing was measured to judge it by"
    was, now = ([j.slower for j in report.judge(device, held_out)] for device in (before, after))
    if not now:
        return "no shape was measured in two loop orders"
    print(f"with constants {before.source} the worst choice is {max(was):.1%} slower, {_mean(was):.2%} on average,")
    print(f"with those fitted {max(now):.1%} and {_mean(now):.2%}")
    return "" if _mean(now) <= _mean(was) + 1e-3 else f"constants {before.source} choose better"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _version(module: str) -> str:
    return str(getattr(importlib.import_module(module), "__version__", "unknown"))


if __name__ == "__main__":
    raise SystemExit(main())
