"""Compile a kernel for a GPU that is not there, exactly as its launcher would, and read off what it needs."""

from __future__ import annotations

import ast
import os
import re
import runpy
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..templates.kernel import Kernel, Plan, argument
from ..tiling import Config, Device

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Shared memory one program may take, bytes.
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}

_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_OPTIONS = ("num_warps", "num_stages")


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel needs: bytes of shared memory, registers a thread, bytes spilled a thread; its assembly
    (PTX or GCN).
    """

    shared: int
    registers: int
    spilled: int
    assembly: str = field(default="", repr=False)


def compile_record(kernel: Kernel, plan: Plan, config: Config, target: str) -> Usage:
    """Compile ``kernel`` as a launch of ``plan`` with ``config`` on ``target`` would; the plan's tensors hold nothing
    that is looked at.
    """
    like = {name: None if output.shape is None else output.dtype for name, output in plan.outputs.items()}
    values = {name: argument(value) for name, value in plan.inputs.items()} | like
    values |= {"SIZES": plan.sizes, **config.tiles}
    return _compile(kernel.fn, values, config.options, target)


def compile_emitted(code: str) -> list[tuple[list[str], Usage]]:
    """Compile the templates in a module that Inductor emitted for `pretend_h200`, with their configurations.

    With the modules of the package that each imports, of which its kernel's is the first that holds a kernel.
    """
    found = []
    for name, source in re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", code, flags=re.DOTALL):
        ours = re.findall(r"from (fsa_compile\.templates\.[\w.]+) import", source)
        if not ours:
            continue
        signature, attributes = (
            ast.literal_eval(re.search(pattern, source)[1])  # type: ignore[index]
            for pattern in (r"'signature': (\{.*?\})", r"'configs': \[(\{.*?\})\]")
        )
        options = {key: int(re.search(rf"{key}=(\d+)", source)[1]) for key in _OPTIONS}  # type: ignore[index]
        limit = re.search(r"@limit_registers\((\d+)\)\n", source)
        if limit:
            options["maxnreg"] = int(limit[1])
        decorators = r"(@limit_registers\(\d+\)\n)?@triton_heuristics\.\w+\(.*?\n\)\n@triton\.jit"
        bare = re.sub(decorators, "@triton.jit", source, flags=re.DOTALL)
        with tempfile.TemporaryDirectory() as folder:  # Triton reads a function's source from its file
            path = Path(folder) / f"{name}.py"
            path.write_text(bare)
            function = runpy.run_path(str(path))[name]
            compiled = triton.compile(
                ASTSource(function, signature, {}, attributes), target=TARGETS["sm_90"], options=options
            )
        registers, stack = _cubin_usage(compiled.asm["cubin"])
        found.append((ours, Usage(compiled.metadata.shared, registers, stack, compiled.asm["ptx"])))
    return found


def takes_turns(usage: Usage) -> bool:
    """Whether ptxas gave up running matrix products of an sm_90 kernel beside other work: it takes them one by one.

    For want of registers, which its count of spilled bytes does not tell; a loop takes 20 % longer.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(usage.assembly)
        command: list[Any] = [_tool("ptxas"), "-v", "--gpu-name=sm_90a", path, "-o", path.with_suffix(".cubin")]
        said = subprocess.run(command, capture_output=True, text=True, check=True)
    return "wgmma.mma_async instructions are serialized" in said.stdout + said.stderr


def device_of(target: str) -> Device:
    """What a record's heuristic and candidates are asked with."""
    return Device("hip" if target.startswith("gfx") else target, "")


class _Signature:
    """Types of a kernel's arguments, tuples of arguments by their place in them, and what is known of the values."""

    def __init__(self) -> None:
        self.constants: dict[tuple[int, ...], Any] = {}
        self.attributes: dict[tuple[int, ...], Any] = {}

    def of(self, path: tuple[int, ...], value: Any, is_constant: bool = False) -> Any:
        if is_constant or value is None or (isinstance(value, int) and value == 1):
            self.constants[path] = value
            return "constexpr"
        if isinstance(value, tuple):
            parts = [self.of((*path, i), part) for i, part in enumerate(value)]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        if isinstance(value, (torch.Tensor, torch.dtype)):
            self.attributes[path] = [["tt.divisibility", 16]]
            return _POINTERS[value if isinstance(value, torch.dtype) else value.dtype]
        if isinstance(value, int):
            if value % 16 == 0:
                self.attributes[path] = [["tt.divisibility", 16]]
            return "i32" if value < 2**31 else "i64"
        return "fp32"


def _compile(kernel: Any, values: dict[str, Any], options: dict[str, Any], target: str) -> Usage:
    types = _Signature()
    signature = {
        name: types.of((i,), values[name], kernel.params[i].is_constexpr) for i, name in enumerate(kernel.arg_names)
    }
    source = ASTSource(kernel, signature, types.constants, types.attributes)
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    if target.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        spills = re.findall(r"\.vgpr_spill_count:\s*(\d+)", text)
        registers = re.findall(r"\.vgpr_count:\s*(\d+)", text)
        return Usage(compiled.metadata.shared, int(registers[0]), 4 * sum(map(int, spills)), text)
    registers_used, stack = _cubin_usage(compiled.asm["cubin"])
    return Usage(compiled.metadata.shared, registers_used, stack, compiled.asm["ptx"])


def _tool(name: str) -> Path:
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def _cubin_usage(cubin: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin", delete=False) as file:
        file.write(cubin)
    try:
        text = subprocess.run(
            [_tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    finally:
        os.unlink(file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])
