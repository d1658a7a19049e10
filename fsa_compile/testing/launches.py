"""Which kernels a piece of code launches, with their plans."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from ..ops.kernels import KERNELS
from ..templates.kernel import Kernel, Plan

__all__ = ["Launches"]


class Launches(TorchDispatchMode):
    """The plans of the kernels that run inside the block, one for each kernel and static sizes; on fake tensors too."""

    def __init__(self) -> None:
        super().__init__()
        self.plans: dict[tuple[str, Any], tuple[Kernel, Plan]] = {}
        self._kernels = {f"fsa::_{kernel.name}": kernel for kernel in KERNELS}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kernel = self._kernels.get(op._schema.name)
        if kernel is not None:
            plan = kernel.plan(*args, **(kwargs or {}))
            wanted = tuple(output.shape is not None for output in plan.outputs.values())
            self.plans[f"{kernel.name}{wanted}", plan.sizes] = (kernel, plan)
        return op(*args, **(kwargs or {}))
