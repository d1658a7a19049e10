"""The kernels compiled ahead, in several processes: one after the other they take longer than all that is measured.

They leave what they compile in Triton's cache on disk, where the process that measures finds it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from .grid import Cell

__all__ = ["compile_ahead", "kinds", "run_once"]

_MOST_PROCESSES = 4  # each has a context on the GPU


def kinds(cells: Sequence[Cell]) -> list[Cell]:
    """One of the shortest cells for each set of sizes that kernels are compiled for."""
    found: dict[Any, Cell] = {}
    for cell in sorted(cells, key=lambda cell: cell.problem.seq_len):
        found.setdefault(replace(cell.problem, seq_len=1, seq_len_k=1), cell)
    return list(found.values())


def run_once(cells: Sequence[Cell], device: str) -> None:
    """Run each variant of the cells once. What fails here fails again, and is told of, where it is measured."""
    from .timing import variants

    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # this process is a helper: nobody reads its complaints
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(device)
    for cell in cells:
        runs: list[Callable[[], Any]] = []
        with contextlib.suppress(Exception):
            runs += variants(cell.problem, torch.device(device))[1].values()
        for run in runs:
            with contextlib.suppress(Exception):
                run()


def compile_ahead(
    cells: Sequence[Cell], device: torch.device, seconds: float, target: Callable[..., None] = run_once
) -> None:
    """Run ``target(some of the cells, device)`` in several processes, and wait until they end, or end them."""
    work = kinds(cells)
    count = min(_MOST_PROCESSES, len(work), (os.cpu_count() or 1) // 2)
    if count < 2:
        return
    deadline = time.monotonic() + seconds
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    processes = [context.Process(target=target, args=(work[i::count], str(device)), daemon=True) for i in range(count)]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()  # it would disturb what is timed
                process.join()
