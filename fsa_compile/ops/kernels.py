"""Internal operators `fsa::_...`, one per kernel: schema, fake and eager implementation follow from its record."""

from __future__ import annotations

import torch
import triton

from ..templates import banded, compression, selected, selection
from ..templates.attention_delta import ATTENTION_DELTA
from ..templates.kernel import Kernel
from ..templates.row_weights import ROW_WEIGHTS
from .schema import LIB, define

__all__ = ["KERNELS", "KERNEL_KEYS"]

KERNELS: tuple[Kernel, ...] = (
    ATTENTION_DELTA,
    ROW_WEIGHTS,
    *banded.KERNELS,
    *compression.KERNELS,
    *selected.KERNELS,
    *selection.KERNELS,
)

# Triton's interpreter runs the kernels on CPU tensors.
KERNEL_KEYS = ("CUDA", "CPU") if triton.knobs.runtime.interpret else ("CUDA",)


def _register(kernel: Kernel) -> None:
    define(kernel.schema)
    name = f"_{kernel.name}"
    torch.library.register_fake(f"fsa::{name}", kernel.fake, lib=LIB)
    for key in KERNEL_KEYS:
        LIB.impl(name, kernel, key)


for _kernel in KERNELS:
    _register(_kernel)
