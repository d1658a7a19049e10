"""Run a module that Inductor emitted for CUDA on the CPU, its kernels in Triton's interpreter.

    python interpret_emitted.py CODE INPUTS OUTPUTS [CODE INPUTS OUTPUTS ...]

A script of its own because TRITON_INTERPRET=1 has to be set before any kernel is defined.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import kernel_runs  # noqa: F401  a faster interpreter
import torch
import triton

import fsa_compile  # noqa: F401  registers the operators that the module calls


class _Kernel:
    """A kernel source as the emitted module launches it: ``run(*args, grid_0, grid_1, grid_2, stream=...)``."""

    def __init__(self, name: str, source: str) -> None:
        self.name = name
        self.is_template = "triton_heuristics.template" in source
        parameters = re.search(rf"def {name}\((.*?)\):", source).group(1)  # type: ignore[union-attr]
        self.parameters = [p.split(":")[0].strip() for p in parameters.split(",")]
        source = source.replace("triton_helpers.set_driver_to_gpu()", "")
        # Without Inductor's heuristics around it, which want a device.
        source = re.sub(r"@triton_heuristics\.\w+\(.*?\n\)\n@triton\.jit", "@triton.jit", source, flags=re.DOTALL)
        path = f"{tempfile.mkdtemp()}/{name}.py"  # the interpreter reads sources from files
        with open(path, "w") as file:
            file.write(source)
        namespace: dict[str, Any] = {"__name__": name, "__file__": path}
        exec(compile(source, path, "exec"), namespace)
        self.fn = namespace[name]

    def run(self, *args: Any, stream: int) -> None:
        if self.is_template:
            self.fn[tuple(map(int, args[-3:]))](*args[:-3])
            return
        blocks = {p: 64 for p in self.parameters if p.endswith("BLOCK")}
        sizes = dict(zip(self.parameters, args, strict=False))
        grid = [
            triton.cdiv(sizes[f"{axis}numel"], blocks[f"{axis.upper()}BLOCK"])
            for axis in "xyz"
            if f"{axis}numel" in sizes
        ]
        self.fn[(*grid, 1, 1)[:3]](*args, **blocks)


class _AsyncCompile:
    def triton(self, name: str, source: str, device_str: str) -> _Kernel:
        return _Kernel(name, source)

    def wait(self, scope: dict[str, Any]) -> None:
        pass


def _empty(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    # What is read without having been written must show.
    x = torch.empty_strided(size, stride, dtype=dtype)
    return x.fill_(float("nan") if dtype.is_floating_point else -(10**6))


def run(code: str, inputs: str, outputs: str) -> None:
    with open(code) as file:
        source = file.read()
    source = re.sub(
        r"^async_compile = AsyncCompile\(\)$", "async_compile = _AsyncCompile()", source, flags=re.MULTILINE
    )
    source = re.sub(r"^empty_strided_cuda = .*$", "empty_strided_cuda = _empty", source, flags=re.MULTILINE)
    source = re.sub(r"^from torch\._C import .* as get_raw_stream$", "get_raw_stream = int", source, flags=re.MULTILINE)
    torch.cuda._DeviceGuard = lambda index: contextlib.nullcontext()  # type: ignore[misc, assignment]
    torch.cuda.set_device = lambda index: None  # type: ignore[assignment]
    namespace: dict[str, Any] = {
        "__name__": "emitted",
        "_AsyncCompile": _AsyncCompile,
        "_empty": _empty,
        "triton": triton,
    }
    exec(compile(source, code, "exec"), namespace)
    torch.save(list(namespace["call"](torch.load(inputs))), outputs)


if __name__ == "__main__":
    for i in range(1, len(sys.argv), 3):
        run(*sys.argv[i : i + 3])
