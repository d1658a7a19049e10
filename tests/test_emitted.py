"""What the code that Inductor emits computes, its kernels in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import triton
from programs import backward, gated, whole
from torch import Tensor

import fsa_compile
from fsa_compile.testing.fake_gpu import Harness
from fsa_compile.testing.inputs import make_inputs
from fsa_compile.testing.specs import Spec

fsa = torch.ops.fsa

_BATCHED = Spec(batch=2, seq_len=19, gqa_group_size=3, head_dim=24, head_dim_v=40, num_selected=3)
_PACKED = Spec(lengths=(9, 17, 2), extra_keys=21, num_selected=3)
# (function, order, spec, dynamic)
_PROGRAMS = {
    "forward-nsa-batched-dynamic": (gated, "nsa", _BATCHED, True),
    "forward-fsa-packed-static": (gated, "fsa", _PACKED, False),
    "forward-fsa-batched-dynamic": (gated, "fsa", _BATCHED, True),
    "backward-nsa-packed-static": (backward, "nsa", _PACKED, False),
    "backward-fsa-batched-dynamic": (backward, "fsa", _BATCHED, True),
    "whole-fsa-batched-dynamic": (whole, "fsa", _BATCHED, True),
    "whole-nsa-packed-static": (whole, "nsa", _PACKED, False),
}


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    """What each program computed, its kernels in Triton's interpreter, and what it should have."""
    version = triton.__version__
    if version.startswith("3.6.") and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
        pytest.skip("triton 3.6's interpreter cannot loop up to a tensor with numpy 2.4 and later")
    directory = tmp_path_factory.mktemp("emitted")
    wanted, files = {}, []
    for name, (make, order, spec, dynamic) in _PROGRAMS.items():
        options = {"block_size": spec.block_size, "scale": spec.scale}
        if make is whole:
            options |= {**spec.windows, **spec.selection, "window_size": spec.window_size}
        fn, args = make(order, **options), _arguments(make, spec)
        harness = Harness()
        shapes = [(a, (1,) if dynamic and a.dim() > 1 else ()) for a in args]
        code = harness.emit(fn, *(harness.tensor(*a.shape, dtype=a.dtype, dynamic=axes) for a, axes in shapes))
        triple = [directory / f"{name}.{ending}" for ending in ("py", "in", "out")]
        triple[0].write_text(code)
        torch.save(args, triple[1])
        files += triple
        wanted[name] = list(fn(*args))
    path = os.pathsep.join((str(Path(fsa_compile.__file__).parent.parent), os.environ.get("PYTHONPATH", "")))
    command = [sys.executable, str(Path(__file__).with_name("interpret_emitted.py")), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: (torch.load(directory / f"{name}.out"), want) for name, want in wanted.items()}


def _arguments(make: Callable[..., Any], spec: Spec) -> list[Tensor]:
    x = make_inputs(spec)
    cu_seqlens = [t for t in (x.cu_seqlens_q, x.cu_seqlens_k) if t is not None]
    shape = (*x.q.shape[:3], spec.head_dim_v)
    args = [x.q, x.k, x.v, x.block_indices]
    if make is whole:
        args = [x.q, x.k, x.v, *x.gates, torch.randn(shape)]
    elif make is gated:
        args += [torch.randn(shape), torch.randn(shape), *x.gates]
    else:
        packed = dict(zip(("cu_seqlens_q", "cu_seqlens_k"), cu_seqlens, strict=False))
        options = {"block_size": spec.block_size, "scale": spec.scale}
        args += fsa.selected_attention_forward(*args, **options, **packed)
        args += [torch.randn(shape), torch.randn(shape[:3]), x.g_slc]
    return [a.detach().contiguous() for a in (*args, *cu_seqlens)]


@pytest.mark.parametrize("name", _PROGRAMS)
def test_emitted_program_computes_what_it_should(
    name: str, programs: dict[str, tuple[list[Tensor], list[Tensor]]]
) -> None:
    make, _, spec, _ = _PROGRAMS[name]
    got, want = programs[name]
    if make is gated:  # any shift will do, and a CPU's is another one
        scale = spec.scale or spec.head_dim**-0.5
        got, want = ([out, scale * shift + log_sum] for out, shift, log_sum in (got, want))
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)
