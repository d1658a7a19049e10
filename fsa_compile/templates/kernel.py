"""One record per kernel: everything else about it, eager and compiled, follows from the record.

``plan`` says, from the operator's arguments, what the kernel reads and writes; its tensors may be real or fake. The
fake kernel allocates the plan's outputs, the eager one also launches, and the lowering (``lowering/emit.py``) makes an
Inductor template of the kernel's own source with the same plan.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..tiling import Config, Device, configured
from .sequences import Rows, Sequences

__all__ = ["SEQUENCES", "Dense", "Kernel", "Output", "Plan", "Strided", "argument", "device_of", "sequences"]


class Strided(NamedTuple):
    """An input read through its strides; the last axis is made dense if it is not. The kernel sees ``Rows``."""

    tensor: Tensor


class Dense(NamedTuple):
    """An input read as a contiguous array. The kernel sees a pointer."""

    tensor: Tensor


class Output(NamedTuple):
    """A contiguous result. The kernel sees a pointer; ``None`` for ``shape``: not wanted, and the kernel sees None."""

    shape: Sequence[Any] | None
    dtype: torch.dtype


@dataclass(frozen=True)
class Plan:
    """One launch.

    inputs: by kernel parameter: ``Strided``, ``Dense``, a number, None, or a NamedTuple of these.
    outputs: by kernel parameter; the first is the one that an epilogue may follow.
    sizes: the static sizes, a NamedTuple of ints, bools and None; the kernel's constexpr ``SIZES``.
    extent: what the grid depends on, besides the configuration.
    """

    inputs: dict[str, Any]
    outputs: dict[str, Output]
    sizes: Any
    extent: tuple[Any, ...]


@functools.cache
def _properties(index: int | None) -> Device:
    if torch.version.hip:
        return Device("hip", torch.cuda.get_device_name(index))
    major, minor = torch.cuda.get_device_capability(index)
    return Device(f"sm_{major}{minor}", torch.cuda.get_device_name(index))


def device_of(device: torch.device) -> Device:
    """What configurations go by; of a GPU that is not here, or of a CPU (the interpreter), a generic one."""
    if device.type == "cuda":
        try:
            return _properties(device.index)
        except (AssertionError, RuntimeError):
            pass
    return Device("generic", "")


# Called with each kernel and plan of a launch or of its fake: what a piece of code launches, for tests and benchmarks.
watchers: list[Callable[[Kernel, Plan], None]] = []


@dataclass(frozen=True)
class Kernel:
    """A kernel and what is needed to run it.

    fn: the ``@triton.jit`` function. Parameters: the plan's inputs and outputs by name, then ``SIZES`` and the tiles.
    schema: of the internal operator, ``"_name(...) -> ..."``; its results are the plan's outputs, in order.
    plan: takes the operator's arguments.
    grid: ``grid(extent, tiles, cdiv) -> (x, y, z)``.
    heuristic, candidates: the configuration for given sizes on a device, and those worth measuring.
    fuses_epilogue: whether pointwise work that follows is fused into the first output's store, as was measured.
    hides_lengths: whether the compiler must not see a template's lengths where they are constants (``at_run_time``).
    """

    fn: Any
    schema: str
    plan: Callable[..., Plan]
    grid: Callable[[tuple[Any, ...], dict[str, Any], Any], tuple[Any, Any, Any]]
    heuristic: Callable[[Any, Device], Config]
    candidates: Callable[[Any, Device], list[Config]]
    fuses_epilogue: bool = True
    hides_lengths: bool = False
    name: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.schema.split("(", 1)[0].lstrip("_"))

    def config(self, sizes: Any, device: Device) -> Config:
        """The tuned configuration, or the heuristic's."""
        return configured(self.name, self.heuristic, sizes, device)

    def fake(self, *args: Any, **kwargs: Any) -> Any:
        """Empty results."""
        return self._results(self.allocate(self._watched_plan(*args, **kwargs)))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Allocate and launch."""
        plan = self._watched_plan(*args, **kwargs)
        made = self.allocate(plan)
        self._launch_if_any(plan, made)
        return self._results(made)

    def into(self, results: Sequence[Tensor], *args: Any, **kwargs: Any) -> None:
        """Launch, with tensors that are there to take the plan's outputs."""
        plan = self._watched_plan(*args, **kwargs)
        self._launch_if_any(plan, dict(zip(plan.outputs, results, strict=True)))

    def _launch_if_any(self, plan: Plan, outputs: dict[str, Tensor]) -> None:
        if outputs[next(iter(plan.outputs))].numel():
            self.launch(plan, outputs, self.config(plan.sizes, device_of(_like(plan).device)))

    def _watched_plan(self, *args: Any, **kwargs: Any) -> Plan:
        plan = self.plan(*args, **kwargs)
        for watch in watchers:
            watch(self, plan)
        return plan

    def launch(self, plan: Plan, outputs: dict[str, Tensor], config: Config) -> None:
        """Launch a plan with given results and configuration."""
        tiles = config.tiles
        grid = self.grid(plan.extent, tiles, triton.cdiv)
        if not all(grid):
            return
        arguments = {name: argument(value) for name, value in plan.inputs.items()}
        for name, output in plan.outputs.items():
            arguments[name] = None if output.shape is None else outputs[name]
        self.fn[grid](**arguments, SIZES=plan.sizes, **tiles, **config.options)

    @staticmethod
    def allocate(plan: Plan) -> dict[str, Tensor]:
        """Empty tensors for the outputs of a plan."""
        like = _like(plan)
        return {
            name: like.new_empty((0,) if output.shape is None else output.shape, dtype=output.dtype)
            for name, output in plan.outputs.items()
        }

    @staticmethod
    def _results(made: dict[str, Tensor]) -> Any:
        results = tuple(made.values())
        return results[0] if len(results) == 1 else results


def _leaves(x: Any) -> Iterator[Any]:
    """What a plan's input holds, Strided and Dense as they are."""
    if isinstance(x, tuple) and not isinstance(x, (Strided, Dense)):
        for part in x:
            yield from _leaves(part)
    else:
        yield x


def _like(plan: Plan) -> Tensor:
    return next(x.tensor for given in plan.inputs.values() for x in _leaves(given) if isinstance(x, (Strided, Dense)))


def argument(x: Any) -> Any:
    """What a kernel is given for a plan's input."""
    if isinstance(x, Strided):
        tensor = x.tensor if x.tensor.stride(-1) == 1 else x.tensor.contiguous()
        return Rows(tensor, tensor.stride()[:-1])
    if isinstance(x, Dense):
        return x.tensor.contiguous()
    if isinstance(x, tuple):
        return type(x)(*map(argument, x))
    return x


def sequences(q: Any, seq_len_k: Any, seqs: tuple[Any, ...]) -> Sequences:
    """The runs of a call: q ``[B, T, ...]`` and the four tensors of ``SEQUENCES`` or Nones.

    Without ``cu_seqlens_k`` packed keys lie as the queries do.
    """
    cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k = seqs
    if cu_seqlens_q is not None and cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
    num_seqs = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    tensors = (None if x is None else Dense(x) for x in (cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k))
    return Sequences(q.shape[1], seq_len_k, num_seqs, *tensors)


# What every internal operator takes to tell the runs of a call.
SEQUENCES = "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_k, Tensor? leftpad_k"
