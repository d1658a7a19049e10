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


def remember_types() -> None:
    """Make the type of a block once, and what a tensor says of its type: they stand for the same whoever asks."""
    make_type, make_tensor = tl.block_type.__init__, tl.tensor.__init__
    types: dict[Any, dict[str, Any]] = {}
    tensors: dict[str, dict[str, Any]] = {}

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *(getattr(n, "value", n) for n in shape))
        if key in types:
            vars(self).update(types[key])
        else:
            make_type(self, element_ty, shape)
            types[key] = dict(vars(self))

    def tensor(self: Any, handle: Any, type: Any) -> None:
        known = tensors.get(type.name)
        if known is None:
            make_tensor(self, handle, type)
            tensors[type.name] = dict(vars(self))
        else:
            vars(self).update(known, handle=handle)

    tl.block_type.__init__, tl.tensor.__init__ = block_type, tensor


def combine_whole_arrays() -> None:
    """Reduce and scan by halves and by doubling steps, as a GPU does: the interpreter goes element by element."""
    from triton.runtime import interpreter

    def combine(self: Any, left: list[Any], right: list[Any], types: list[Any]) -> list[Any]:
        tensors = (self.to_tensor(x, t) for half in (left, right) for x, t in zip(half, types, strict=True))
        found = self.combine_fn.fn(*tensors)
        return [x.handle.data for x in (found if isinstance(found, tuple | tl.tuple) else (found,))]

    def reduce(self: Any, input: Any) -> list[Any]:
        rank = len(input[0].shape)
        input, axis = self.unravel(input, self.axis)
        types, parts = [x.dtype for x in input], [x.handle.data for x in input]
        while (count := parts[0].shape[axis]) > 1:
            left, right = ([x.take(range(i, count, 2), axis) for x in parts] for i in range(2))
            parts = combine(self, left, right, types)
        parts = [x.squeeze(axis) for x in parts]
        if self.keep_dims:
            parts = [x.reshape((1,) * rank) if self.axis is None else numpy.expand_dims(x, axis) for x in parts]
        return [self.to_tensor(x, t) for x, t in zip(parts, types, strict=True)]

    def scan(self: Any, input: Any) -> list[Any]:
        types, parts = [x.dtype for x in input], [x.handle.data for x in input]
        shape = [1] * parts[0].ndim
        shape[self.axis] = count = parts[0].shape[self.axis]
        i, step = numpy.arange(count).reshape(shape), 1
        while step < count:
            earlier = [numpy.roll(x, step, self.axis) for x in parts]
            met = combine(self, earlier, parts, types)
            parts = [numpy.where(i >= step, new, x) for new, x in zip(met, parts, strict=True)]
            step *= 2
        return [self.to_tensor(x, t) for x, t in zip(parts, types, strict=True)]

    interpreter.ReduceOps.generic_reduce = reduce
    interpreter.ScanOps.generic_scan = scan


def ask_for_masks_of_one_bit() -> None:
    """Refuse, as Triton 3.9's interpreter does, masks of numbers: what it makes of a block and a scalar condition."""
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def create_masked_load(self: Any, ptrs: Any, mask: Any, *options: Any, **named: Any) -> Any:
        assert mask.data.dtype == bool, mask.data.dtype
        return load(self, ptrs, mask, *options, **named)

    def create_masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *options: Any, **named: Any) -> Any:
        assert mask.data.dtype == bool, mask.data.dtype
        return store(self, ptrs, value, mask, *options, **named)

    builder.create_masked_load, builder.create_masked_store = create_masked_load, create_masked_store


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
    remember_types()
    combine_whole_arrays()
    ask_for_masks_of_one_bit()
