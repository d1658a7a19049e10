"""How long one run takes, for benchmarks and calibration."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["seconds_of"]

_HEAD_START = 4_000_000  # cycles that a GPU waits before a run, some two milliseconds


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one run; on a GPU its own time, the host having a head start, as in the middle of a model."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    torch.cuda._sleep(_HEAD_START)
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) * 1e-3
