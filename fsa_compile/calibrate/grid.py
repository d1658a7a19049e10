"""The shapes that are measured, and which of them the fit does not see."""

from __future__ import annotations

from dataclasses import dataclass

from .. import cost

__all__ = ["CELLS", "Cell", "Measurement"]

_NUM_KV_HEADS = 4  # times scale with it, and with the batch
# (group, head_dim, block_size, num_selected), what decides first: time may run out. A kernel is compiled for each of
# them, which takes longer than to measure; lengths come for free.
_STATIC = (
    (4, 128, 64, 16), (16, 128, 64, 16), (1, 128, 64, 16), (8, 128, 64, 16), (32, 128, 64, 16), (2, 128, 64, 16),
    (4, 128, 128, 16), (16, 128, 128, 16), (8, 64, 64, 16), (8, 128, 32, 16), (1, 128, 128, 8), (16, 64, 64, 16),
)  # fmt: skip
_LENGTHS = (2048, 8192, 32768, 65536)


@dataclass(frozen=True)
class Cell:
    """One shape; ``held_out``: measured for the report only."""

    problem: cost.Problem
    held_out: bool


@dataclass(frozen=True)
class Measurement:
    """A median time.

    order: a loop order, or "" for the lists by themselves.
    stage: "forward", "backward" or "lists".
    """

    problem: cost.Problem
    held_out: bool
    order: str
    stage: str
    seconds: float


def _cells() -> tuple[Cell, ...]:
    found = []
    for i, (group, head_dim, block_size, num_selected) in enumerate(_STATIC):
        for j, length in enumerate(_LENGTHS):
            sizes = (group, head_dim, head_dim, block_size, num_selected)
            problem = cost.Problem(1, length, length, _NUM_KV_HEADS, *sizes, itemsize=2)
            found.append(Cell(problem, held_out=(i + j) % 2 == 1))
    return tuple(found)


# A chessboard: each length and each kind of shape is seen, no pair of them with all of its neighbours.
CELLS = _cells()
