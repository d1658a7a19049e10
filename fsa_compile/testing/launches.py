"""Which kernels a piece of code launches, with their plans."""

from __future__ import annotations

from typing import Any

from ..templates.kernel import Kernel, Plan, watchers

__all__ = ["Launches"]


class Launches:
    """The plans of the kernels that run inside the block, one for each kernel and static sizes; on fake tensors too.

    Kernels run inside other operators, and some in autograd's threads, where a dispatch mode does not see them.
    """

    def __init__(self) -> None:
        self.plans: dict[tuple[str, Any], tuple[Kernel, Plan]] = {}

    def __enter__(self) -> Launches:
        watchers.append(self._watch)
        return self

    def __exit__(self, *error: object) -> None:
        watchers.remove(self._watch)

    def _watch(self, kernel: Kernel, plan: Plan) -> None:
        wanted = tuple(output.shape is not None for output in plan.outputs.values())
        self.plans[f"{kernel.name}{wanted}", plan.sizes] = (kernel, plan)
