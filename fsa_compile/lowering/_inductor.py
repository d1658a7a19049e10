"""The only module that names anything private of ``torch._inductor``; differences between torch 2.11 and 2.15 end here.

Importing it costs what ``torch._inductor.config`` costs; the compiler itself is imported on first use, because only
compiling needs it.
"""

from __future__ import annotations

import functools
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch._inductor.config as _config
from torch._inductor.custom_graph_pass import CustomGraphPass

from .registers import limit_registers

__all__ = [
    "CustomGraphPass",
    "PRE_GRAD_SLOT",
    "SLOT",
    "append_choice",
    "autotune",
    "triton_template",
    "contiguous_layout",
    "empty",
    "fallback",
    "is_compiler_imported",
    "max_autotune",
    "on_compile_start",
    "optimization_hint",
    "realize",
    "register_lowering",
    "set_slot",
    "set_slot_default",
    "slot_passes",
    "slot_takes_sequence",
    "view",
]

SLOT = "joint_custom_pre_pass"
PRE_GRAD_SLOT = "pre_grad_custom_pass"


# ---- the custom-pass slots ----


def slot_takes_sequence() -> bool:
    """Whether the slot may hold a list of passes (2.13 and later)."""
    import torch._inductor.custom_graph_pass as module

    return hasattr(module, "get_custom_graph_passes")


def slot_passes(slot: str = SLOT) -> tuple[Any, ...]:
    """The passes in the slot as this thread sees it, in order."""
    value = getattr(_config, slot)
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def set_slot(value: Any, slot: str = SLOT) -> None:
    """Write the slot, for this thread where the configuration is per thread."""
    setattr(_config, slot, value)


def set_slot_default(value: Any, slot: str = SLOT) -> bool:
    """Write what a thread sees that has not set the slot itself; False where there is no such value.

    Since 2.13 a configuration value is a context variable: what the importing thread sets, other threads do not see.
    """
    entry = _config._config.get(slot)  # type: ignore[attr-defined]
    override = getattr(entry, "user_override", None)
    if entry is None or not hasattr(override, "get"):
        return False
    entry.default = value
    return True


def is_compiler_imported() -> bool:
    """Whether lowerings can be registered without importing much."""
    return "torch._inductor.lowering" in sys.modules


def on_compile_start(callback: Callable[[], None]) -> None:
    """Call back when a compilation starts, before Inductor is entered."""
    from torch._dynamo.callback import callback_handler

    callback_handler.register_start_callback(lambda *_: callback())


# ---- lowerings ----


def register_lowering(op: torch._ops.OpOverload, fn: Callable[..., Any]) -> None:
    """Lower ``op`` with ``fn``, which gets and returns Inductor's tensor boxes."""
    from torch._inductor import lowering

    lowering.register_lowering(op, type_promotion_kind=None)(fn)


def fallback(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """The lowering that calls the op's own kernel."""
    from torch._inductor import lowering

    return lowering.fallback_handler(op, add_to_fallback_set=False)


def view(x: Any, size: Sequence[Any]) -> Any:
    """Another shape of the same storage."""
    from torch._inductor import lowering

    return lowering.lowerings[torch.ops.aten.view.default](x, list(size))


def empty(size: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Any:
    """An uninitialised contiguous buffer that a template may write as a mutated input."""
    from torch._inductor import lowering

    box = lowering.empty_strided(list(size), None, dtype=dtype, device=device)
    box.realize()
    return box


def realize(x: Any, *, contiguous: bool) -> Any:
    """A node with storage and a fixed layout whose last axis has stride 1 (all axes dense when ``contiguous``)."""
    from torch._inductor.ir import ExternKernel, FlexibleLayout
    from torch._inductor.virtualized import V

    box = x
    x = ExternKernel.realize_input(x)
    stride = x.get_stride()
    flexible = isinstance(x.get_layout(), FlexibleLayout)
    last_is_dense = len(stride) == 0 or V.graph.sizevars.statically_known_equals(stride[-1], 1)
    if contiguous or flexible or not last_is_dense:
        x = ExternKernel.realize_input(ExternKernel.require_contiguous(box))
    x.freeze_layout()
    return x


def contiguous_layout(device: torch.device, dtype: torch.dtype, size: Sequence[Any]) -> Any:
    """A dense layout in row-major order."""
    from torch._inductor.ir import FixedLayout

    return FixedLayout(device, dtype, list(size))


def storage(x: Any) -> Any:
    """The node under a tensor box."""
    from torch._inductor.ir import TensorBox

    return x.data if isinstance(x, TensorBox) else x


def boxed(x: Any) -> Any:
    """A node with storage as lowerings return it."""
    from torch._inductor.ir import TensorBox

    return x if isinstance(x, TensorBox) else TensorBox(x)


def call(op: torch._ops.OpOverload, *args: Any) -> Any:
    """Inductor's own lowering of an ATen operator."""
    from torch._inductor import lowering

    return lowering.lowerings[op](*args)


def to_float(x: Any) -> Any:
    """float32 values of ``x``."""
    from torch._inductor import lowering

    return lowering.to_dtype(x, torch.float32)


def current_node() -> torch.fx.Node:
    """The node that is being lowered."""
    from torch._inductor.virtualized import V

    return V.graph.current_node


def fake_mode() -> Any:
    """The mode of the graph's fake tensors."""
    from torch._inductor.virtualized import V

    return V.fake_mode


def expression(size: Any) -> Any:
    """An int or SymInt as Inductor's expression; what else counts, as a number."""
    return size.node.expr if isinstance(size, torch.SymInt) else int(size)


def forbid_fusion(x: Any) -> None:
    """Keep the kernel that makes ``x`` free of epilogues."""
    from torch._inductor.virtualized import V

    V.graph.no_fuse_buffer_names.add(x.get_name())


def statically_less(a: Any, b: int) -> bool:
    """Whether ``a < b`` is known without a guard."""
    from torch._inductor.virtualized import V

    return bool(V.graph.sizevars.statically_known_lt(a, b))


def optimization_hint(expr: Any, fallback: int) -> int:
    """A likely value of a size or SymInt, never guarded; ``fallback`` where nothing is known (an unbacked symbol)."""
    if isinstance(expr, int):
        return expr
    node = getattr(expr, "node", None)
    if node is not None:
        hint = node.hint if node.has_hint() else None
        return fallback if hint is None else int(hint)
    from torch._inductor.virtualized import V

    return int(V.graph.sizevars.optimization_hint(expr, fallback=fallback))


def max_autotune() -> bool:
    """Whether the user asked for measured configurations, and they are measured where our inputs for that are."""
    return bool(_config.max_autotune) and not _config.autotune_in_subproc


# ---- templates ----


@functools.cache
def _kernel_type(imports: str) -> type:
    from sympy import sympify
    from torch._inductor.select_algorithm import TritonTemplateKernel

    class PackageTemplateKernel(TritonTemplateKernel):
        """A template kernel whose source can name the package's device functions."""

        @classmethod
        @functools.cache
        def gen_common_triton_imports(cls) -> str:
            limits = f"from {limit_registers.__module__} import {limit_registers.__name__}"
            return f"{super().gen_common_triton_imports()}\n{imports}\n{limits}\n"

        @property
        def index_dtype(self) -> str:
            # Type of the dynamic sizes. Strides are products of them, and may pass 2**31 where no size does.
            return "tl.int64"

        def jit_lines(self) -> str:
            # Inductor's decorator has no word for it.
            lines, most = super().jit_lines(), self.meta.get("MAX_REGISTERS")
            return lines if most is None else f"@{limit_registers.__name__}({most})\n{textwrap.dedent(lines).strip()}"

        def render(self, template: Any, kwargs: dict[str, Any], *args: Any) -> Any:
            self._numbers_from = kwargs.get("NUMBERS_FROM", 0)
            self._hides_lengths = kwargs.get("HIDES_LENGTHS", False)
            self._register_extra_template_env_fns(self.number)
            return super().render(template, kwargs, *args)

        def number(self, index: int) -> str:
            """Hook of the shells: a run-time number, out of the choice's ``call_sizes`` behind the grid's."""
            from torch._inductor.codegen.triton import texpr

            code = texpr(self.rename_indexing(sympify(self.call_sizes[self._numbers_from + index])))
            if not code.isdecimal():
                return f"({code}).to(tl.int32)"  # lengths fit 32 bits
            constant = f"tl.full([], {code}, tl.int32)"
            # a launch is compiled for a 1, and knows of no other number
            return f"at_run_time({constant})" if self._hides_lengths and code != "1" else constant

    return PackageTemplateKernel


def triton_template(name: str, source: str, imports: Iterable[str], grid: Callable[..., tuple[Any, Any, Any]]) -> Any:
    """A Triton template.

    Args:
        name: unique among all templates of the process.
        source: the jinja shell.
        imports: import statements for the generated module.
        grid: ``grid(*call_sizes, meta, cdiv=...) -> (x, y, z)``.
    """
    from torch._inductor.select_algorithm import SymbolicGridFn, TritonTemplate

    template = TritonTemplate(name=name, grid=SymbolicGridFn(grid), source=source)
    template.kernel_type = _kernel_type("\n".join(imports))
    if hasattr(template, "always_freeze_layout"):
        template.always_freeze_layout = True
    return template


def append_choice(template: Any, choices: list[Any], **kwargs: Any) -> None:
    """Generate the template's code for one configuration; raises what the generation raised."""
    error = template.maybe_append_choice(choices=choices, **kwargs)
    if error is not None:
        raise error


def autotune(
    name: str, choices: list[Any], inputs: Sequence[Any], layout: Any, input_gen_fns: dict[int, Callable[..., Any]]
) -> Any:
    """The tensor box of the only choice, or of the fastest."""
    from torch._inductor.select_algorithm import autotune_select_algorithm

    result = autotune_select_algorithm(name, choices, list(inputs), layout, input_gen_fns=input_gen_fns)
    return result[0] if isinstance(result, tuple) else result
