"""Inductor lowerings of the internal operators: one for all kernels, from their records.

The node's fake tensors go through the record's ``plan``, which says what the kernel reads, what it writes and how big
all of it is; the tensors of the plan are then those of the graph.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..templates.kernel import Kernel, Plan, device_of
from . import _inductor
from .benchmark_inputs import generators
from .deltas import lower_apart
from .shell import Shell, shell_of

__all__ = ["register"]

log = logging.getLogger(__name__)


def _plan(kernel: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Plan, dict[int, Any]]:
    """The call's plan, and the graph's tensor for each of its fake ones."""
    node = _inductor.current_node()
    boxes: dict[int, Any] = {}

    def value(given: Any, box: Any) -> Any:
        if not isinstance(given, fx.Node):
            return given
        fake = given.meta["val"]
        boxes[id(fake)] = box
        return fake

    fakes = [value(given, box) for given, box in zip(node.args, args, strict=True)]
    named = {name: value(given, kwargs[name]) for name, given in node.kwargs.items()}
    with _inductor.fake_mode():
        return kernel.plan(*fakes, **named), boxes


@functools.cache
def _template(name: str, text: str, imports: tuple[str, ...], grid: Callable[..., Any]) -> Any:
    _template_names[name] = _template_names.get(name, -1) + 1
    number = _template_names[name]
    return _inductor.triton_template(f"fsa_{name}" + (f"_{number}" if number else ""), text, imports, grid)


_template_names: dict[str, int] = {}


@functools.cache
def _grid_of(kernel: Kernel, count: int) -> Callable[..., Any]:
    """The record's grid as Inductor calls it; what follows the extent in ``sizes`` is the kernel's run-time numbers."""

    def grid(*sizes: Any, cdiv: Any) -> tuple[Any, Any, Any]:
        *sizes, meta = sizes  # type: ignore[assignment]
        return kernel.grid(tuple(sizes[:count]), meta, cdiv)

    return grid


def _sizes_text(sizes: Any) -> str:
    return f"{type(sizes).__name__}({', '.join(f'{name}={value!r}' for name, value in sizes._asdict().items())})"


def _main_size(plan: Plan, rank: int) -> list[Any]:
    """The main result's size with as many axes as its store has indices: leading ones count as one."""
    size = [_inductor.expression(s) for s in next(iter(plan.outputs.values())).shape or ()]
    leading = len(size) - rank + 1
    return [math.prod(size[:leading]), *size[leading:]]


def lower(kernel: Kernel, *args: Any, **kwargs: Any) -> Any:
    """The template's results in the operator's order."""
    plan, boxes = _plan(kernel, args, kwargs)
    shell = shell_of(kernel, plan)
    main, *others = plan.outputs.items()
    written: dict[str, Any] = {}
    nodes: dict[str, Any] = {}
    device: Any = None
    for name, tensor in shell.inputs.items():
        if isinstance(tensor, torch.Tensor):
            box = _inductor.realize(boxes[id(tensor)], contiguous=name not in shell.strided)
            device = box.get_device()
            nodes[name] = _inductor.storage(box)
    for name, output in others:
        size = [0] if output.shape is None else [_inductor.expression(s) for s in output.shape]
        written[name] = _inductor.empty(size, output.dtype, device)
        if output.shape is not None:
            nodes[f"{name}_ptr"] = _inductor.storage(written[name])
    nodes = {name: nodes[name] for name in shell.inputs}
    size = _main_size(plan, shell.rank)
    result = _choose(kernel, plan, shell, nodes, size, main[1].dtype, device)
    if not kernel.fuses_epilogue:
        _inductor.forbid_fusion(result)
    full = [_inductor.expression(s) for s in main[1].shape or ()]
    results = (result if len(full) == len(size) else _inductor.view(result, full), *written.values())
    return results[0] if len(results) == 1 else results


def _choose(
    kernel: Kernel, plan: Plan, shell: Shell, nodes: dict[str, Any], size: list[Any], dtype: torch.dtype, device: Any
) -> Any:
    """The main result of the configuration in use, or of the fastest where the user wants them measured."""
    layout = _inductor.contiguous_layout(device, dtype, size)
    # What follows in an epilogue divides the output's index, element by element: in 32 bits wherever they suffice.
    narrow = _inductor.statically_less(math.prod(size), 2**31)
    constants = {"INDEX": "tl.int32" if narrow else "tl.int64", "SIZES": _sizes_text(plan.sizes)}
    template = _template(kernel.name, shell.text, tuple(shell.imports), _grid_of(kernel, len(plan.extent)))
    where = device_of(device)
    configurations = [kernel.config(plan.sizes, where)]
    if _inductor.max_autotune():
        configurations += [c for c in kernel.candidates(plan.sizes, where) if c not in configurations]
    numbers = [_inductor.expression(x) for x in (*plan.extent, *shell.numbers)]
    written = [f"{name}_ptr" for name, output in list(plan.outputs.items())[1:] if output.shape is not None]
    choices: list[Any] = []
    for configuration in configurations:
        _inductor.append_choice(
            template,
            choices,
            input_nodes=tuple(nodes.values()),
            layout=layout,
            mutated_inputs=[nodes[name] for name in written],
            call_sizes=numbers,
            num_warps=configuration.num_warps,
            num_stages=configuration.num_stages,
            MAX_REGISTERS=configuration.max_registers,
            NUMBERS_FROM=len(plan.extent),
            HIDES_LENGTHS=kernel.hides_lengths,
            **configuration.tiles,
            **constants,
        )
    makers = generators(plan, list(nodes)) if len(choices) > 1 else {}
    return _inductor.autotune(template.name, choices, list(nodes.values()), layout, makers)


def _attention_delta(grad_out: Any, grad_log_sum: Any, out: Any) -> Any:
    """Plain pointwise operators and a sum, so that it fuses with the gates' backward, which reads the same tensors.

    Not in float32, where the order of the sum matters (see the kernel).
    """
    if out.get_dtype() == torch.float32:
        return _inductor.fallback(torch.ops.fsa._attention_delta.default)(grad_out, grad_log_sum, out)
    aten = torch.ops.aten
    product = _inductor.call(aten.mul.Tensor, _inductor.to_float(grad_out), _inductor.to_float(out))
    delta = _inductor.call(aten.sum.dim_IntList, product, [-1])
    return delta if grad_log_sum is None else _inductor.call(aten.sub.Tensor, delta, grad_log_sum)


def _or_as_it_is(op: torch._ops.OpOverload, lowering: Callable[..., Any]) -> Callable[..., Any]:
    """A lowering that calls the operator itself where the template cannot be made."""

    def lowered(*args: Any, **kwargs: Any) -> Any:
        if args[0].get_device().type == "cuda":
            try:
                return lowering(*args, **kwargs)
            except Exception as error:
                log.warning("%s is called as it is: %s: %s", op, type(error).__name__, error, exc_info=True)
        return _inductor.fallback(op)(*args, **kwargs)

    return lowered


@functools.cache
def register() -> None:
    """Register every lowering, once."""
    from ..ops.kernels import KERNELS  # only now: they need Triton, which a CPU does not

    for kernel in KERNELS:
        op = getattr(torch.ops.fsa, f"_{kernel.name}").default
        lowering = _attention_delta if kernel.name == "attention_delta" else functools.partial(lower, kernel)
        _inductor.register_lowering(op, _or_as_it_is(op, lowering))
    _inductor.register_lowering(torch.ops.fsa._apart.default, lower_apart)
