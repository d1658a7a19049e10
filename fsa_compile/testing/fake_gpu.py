"""Look at the Triton code that Inductor emits for CUDA on a machine without a GPU.

Graphs are traced on fake CUDA tensors, device properties are made up and nothing is compiled or run. Autograd on fake
CUDA tensors aborts a CPU-only build of torch, so a backward is looked at by calling the backward operators themselves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch._inductor import config, scheduler
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from triton.backends.compiler import GPUTarget

from ..lowering import PASS

_PROPERTIES = DeviceProperties(
    type="cuda",
    index=0,
    multi_processor_count=132,
    cc=90,
    major=9,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
)
_CUDA_PROPERTIES = SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=141 * 2**30,
    gcnArchName="",
    warp_size=32,
    shared_memory_per_block_optin=227 * 1024,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
)


class _Driver:
    """As much of a Triton driver as code generation asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def is_active(self) -> bool:
        return True


@contextlib.contextmanager
def pretend_h200() -> Iterator[None]:
    """Let Inductor believe in an H200."""
    from triton.runtime import driver

    with contextlib.ExitStack() as stack:
        stack.callback(driver.set_active, getattr(driver, "_active", None))
        driver.set_active(_Driver())
        for owner, name, value in (
            (DeviceProperties, "create", staticmethod(lambda device: _PROPERTIES)),
            (torch.cuda, "get_device_properties", lambda device=None: _CUDA_PROPERTIES),
            (torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
            (torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200"),
            (torch.cuda, "current_device", lambda: 0),
            (scheduler, "has_triton", lambda *args: True),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


class Harness:
    """Fake CUDA tensors and what Inductor makes of a function of them."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=False)
        self.graph: torch.fx.Graph | None = None  # after the pass

    def tensor(self, *shape: int, dtype: torch.dtype = torch.bfloat16, dynamic: tuple[int, ...] = ()) -> torch.Tensor:
        """A contiguous fake CUDA tensor; the sizes of the axes in ``dynamic`` are symbols (equal ones where equal)."""
        kinds = [DimDynamic.DUCK if i in dynamic else DimDynamic.STATIC for i in range(len(shape))]
        real = torch.empty(shape, dtype=dtype, device="meta")
        context: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(dynamic_sizes=kinds)
        meta = self.mode.from_tensor(real, symbolic_context=context)
        with self.mode:
            return torch.empty(meta.shape, dtype=dtype, device="cuda")

    def emit(self, fn: Callable[..., Any], *tensors: torch.Tensor, **options: Any) -> str:
        """The generated module for ``fn(*tensors)``, after the joint-graph pass; ``options`` are Inductor's."""
        with pretend_h200(), self.mode, torch.no_grad():
            gm = make_fx(fn, select_decomp_table(), tracing_mode="real")(*tensors)
        return self._emit(gm, self.mode, tensors, options)

    def emit_exported(self, model: torch.nn.Module, *tensors: torch.Tensor, dynamic_shapes: Any) -> str:
        """The same of the program that `torch.export` makes of a model."""
        with pretend_h200(), torch.no_grad():
            program = torch.export.export(model, tensors, dynamic_shapes=dynamic_shapes)
            gm = program.run_decompositions(select_decomp_table()).graph_module
        values = tuple(n.meta["val"] for n in gm.graph.nodes if n.op == "placeholder")
        return self._emit(gm, values[0].fake_mode, values, {})

    def _emit(self, gm: torch.fx.GraphModule, mode: FakeTensorMode, tensors: Any, options: dict[str, Any]) -> str:
        with pretend_h200(), config.patch(options), mode, V.set_fake_mode(mode), torch.no_grad():
            PASS(gm.graph)
            gm.recompile()
            self.graph = gm.graph
            lowering = GraphLowering(gm, example_inputs=list(tensors), shape_env=mode.shape_env)
            with V.set_graph_handler(lowering), V.set_extern_kernel_nodes([]), DebugContext():
                lowering.run(*tensors)
                code = lowering.codegen()[0]
        return str(getattr(code, "value", code))
