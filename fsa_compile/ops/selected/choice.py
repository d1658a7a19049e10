"""The loop order of one call. Without Triton, as `explain` tells it where there is none."""

from __future__ import annotations

from typing import Any

from ... import cost
from ..problem import device_of, problem_of

__all__ = ["choose"]


def choose(
    arguments: dict[str, Any], *, training: bool = False, backward: bool = False, eager: bool = False
) -> cost.Choice:
    """The cost model's order for one direction of a call; ``cost.choose`` says what the flags mean."""
    q, k, v, block_indices = (arguments[name] for name in ("q", "k", "v", "block_indices"))
    problem = problem_of(q, k, v, block_indices, arguments["block_size"])
    flags = {"training": training, "backward": backward, "eager": eager}
    return cost.choose(problem, device_of(q), arguments["loop_order"], **flags)
