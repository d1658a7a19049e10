"""A GPU as far as the cost model goes, times as it has them."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fsa_compile import cost
from fsa_compile.calibrate.fit import predicted
from fsa_compile.calibrate.grid import CELLS, Cell, Measurement
from fsa_compile.cost import calibration

NAME = "NVIDIA H200"
H200 = cost.DEVICES["H200"]
# Another GPU, as far as the constants go: each of them a good deal from where the fit begins.
TRUTH = replace(
    H200,
    dram_bandwidth=1.9e12,
    l2_bandwidth=5e12,
    sort_rate=6e9,
    launch_overhead=4e-6,
    efficiency=(0.11, 0.16, 0.18, 0.27, 0.19, 0.30, 0.33),
)


def made(device: cost.Device, cells: Sequence[Cell] = CELLS, noise: float = 0.0, spoiled: int = 0) -> list[Measurement]:
    """Times as ``device`` has them, with normal noise of the logarithm; ``spoiled`` of them take five times as long."""
    rng = random.Random(0)
    found = [
        Measurement(cell.problem, cell.held_out, order, stage, seconds * math.exp(rng.gauss(0, noise)))
        for cell in cells
        for (order, stage), seconds in predicted(cell.problem, device).items()
    ]
    for i in rng.sample(range(len(found)), spoiled):
        found[i] = replace(found[i], seconds=5 * found[i].seconds)
    return found


def saved(device: cost.Device = TRUTH) -> Path:
    return calibration.save(replace(device, name=NAME), {"torch": "2.11"})
