"""What tests of kernels run on: a GPU (`-m gpu`), or without one Triton's interpreter.

`test_interpreter.py` runs them with `TRITON_INTERPRET=1`. bf16 is left to the GPU: the interpreter's matrix product
does not know it.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)
kernels = pytest.mark.interpreter if INTERPRETED else pytest.mark.gpu


def patch_the_language_once() -> None:
    """Put the interpreter's builtins in `triton.language` for good: half of its time goes into doing so.

    It does at every launch and again at every call of a device function, with what does not depend on the call. A
    process that interprets kernels compiles none, which would want the builtins that were there before.
    """
    from triton.runtime import interpreter

    everywhere = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    interpreter._patch_lang(everywhere)
    interpreter._patch_lang = lambda fn: interpreter._LangPatchScope()


def work_out_nothing_twice() -> None:
    """Leave out what the interpreter works out at every operation, a third of its time.

    Whether an integer overflows, for an assertion that it then does not make (`debug` is off); and numpy's name of a
    type, out of a table that it writes anew.
    """
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = replace(builder.options, sanitize_overflow=False)
    work_out = interpreter._get_np_dtype
    known = functools.cache(work_out)  # of numbers: other types cannot be looked up
    interpreter._get_np_dtype = lambda type: work_out(type) if type.scalar.is_ptr() else known(type.scalar)


def round_sums_once(patch: pytest.MonkeyPatch) -> None:
    """Make the interpreter's matrix products sums in float64, rounded once, which do not depend on an order."""
    from triton.runtime import interpreter

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        product = a.data.astype(numpy.float64) @ b.data.astype(numpy.float64)
        return interpreter.TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)

    patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


if INTERPRETED:
    patch_the_language_once()
    work_out_nothing_twice()
