"""What tests of kernels run on: a GPU (`-m gpu`), or without one Triton's interpreter.

`test_interpreter.py` runs them with `TRITON_INTERPRET=1`. bf16 is left to the GPU: the interpreter's matrix product
does not know it.
"""

from __future__ import annotations

import pytest
import torch
import triton

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)
kernels = pytest.mark.interpreter if INTERPRETED else pytest.mark.gpu
