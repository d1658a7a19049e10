"""The Triton kernels of mean compression: on a GPU (`-m gpu`), in the interpreter, and compiled for GPUs not here."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from kernel_runs import DEVICE, DTYPES, INTERPRETED, kernels
from torch import Tensor

from fsa_compile.ops import reference
from fsa_compile.templates.compression import KERNELS, MEAN_COMPRESS_BWD, MEAN_COMPRESS_FWD
from fsa_compile.testing.budget import Budget
from fsa_compile.testing.compile_only import TARGETS, compile_record, device_of
from fsa_compile.testing.inputs import cumulative
from fsa_compile.tiling import Config, Device

# Shrinking takes minutes in the interpreter.
PHASES = (Phase.explicit, Phase.generate) if INTERPRETED else tuple(Phase)
EXAMPLES = settings(max_examples=12 if INTERPRETED else 60, phases=PHASES)
STACK = 32  # a few bytes of stack are not spills
Bounds = tuple[tuple[int, int], ...]  # first and last + 1 row of each sequence


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def expected(x: Tensor, bounds: list[tuple[int, int, int, int]], rows: int, **windows: int) -> Tensor:
    """Means by the reference of each (batch row, first token, end, first compressed row)."""
    out = x.new_zeros(x.shape[0], rows, *x.shape[2:])
    for b, start, stop, first in bounds:
        part = reference.mean_compress(x[b : b + 1, start:stop], **windows)
        pad = (0, 0, 0, 0, first, rows - first - part.shape[1], b, x.shape[0] - b - 1)
        out = out + torch.nn.functional.pad(part, pad)
    return out


def normal(shape: tuple[int, ...], dtype: torch.dtype, strides: str, seed: int) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
    if strides == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if strides == "sliced":
        return torch.stack([x, x], -1).flatten(-2)[..., ::2]
    return x


def check(
    shape: tuple[int, ...], kernel_size: int, kernel_stride: int, bounds: list[tuple[int, int, int, int]], rows: int,
    where: tuple[Tensor | None, ...], dtype: torch.dtype, strides: str = "contiguous", config: Any = None,
) -> None:  # fmt: skip
    """Forward and backward within the budget, with NaN wherever no sequence is."""
    windows = {"kernel_size": kernel_size, "kernel_stride": kernel_stride}
    x, grad = normal(shape, dtype, strides, 0), normal((shape[0], rows, *shape[2:]), dtype, strides, 1)
    inside, used = torch.zeros(x.shape[:2], dtype=torch.bool), torch.zeros(grad.shape[:2], dtype=torch.bool)
    for b, start, stop, first in bounds:
        inside[b, start:stop] = True
        used[b, first : first + max(0, (stop - start - kernel_size) // kernel_stride + 1)] = True
    inside, used = inside.to(DEVICE), used.to(DEVICE)

    def results(x: Tensor) -> list[Tensor]:
        x = x.detach().masked_fill(~inside[..., None, None], 0).requires_grad_()
        out = expected(x, bounds, rows, **windows)
        masked = grad.masked_fill(~used[..., None, None], 0).to(out.dtype)
        (dx,) = torch.autograd.grad(out, x, masked, allow_unused=True, materialize_grads=True)
        return [out.detach(), dx]

    nan = float("nan")
    x, grad = x.masked_fill(~inside[..., None, None], nan), grad.masked_fill(~used[..., None, None], nan)
    if strides == "transposed":
        x, grad = (y.transpose(1, 2).contiguous().transpose(1, 2) for y in (x, grad))
    have = [
        launch(MEAN_COMPRESS_FWD, config, x, *where, **windows),
        launch(MEAN_COMPRESS_BWD, config, grad, *where, seq_len=shape[1], **windows),
    ]
    for name, ours, want, eager in zip(("x_cmp", "dx"), have, results(x.double()), results(x), strict=True):
        assert ours.is_contiguous()
        assert ours.dtype == dtype
        budget = Budget(name, dtype)
        budget.add(ours, want, eager)
        budget.check()
        unreached = ours[~(used if name == "x_cmp" else inside)]
        assert not unreached.any()


def launch(kernel: Any, config: Any, *args: Any, **options: Any) -> Tensor:
    """With poisoned results; `config` None: as the record does it."""
    plan = kernel.plan(*args, **options)
    (name,) = plan.outputs
    out = torch.full(tuple(plan.outputs[name].shape), float("nan"), device=DEVICE, dtype=plan.outputs[name].dtype)
    if out.numel():
        chosen = kernel.heuristic(plan.sizes, Device("generic", "")) if config is None else config(kernel, plan.sizes)
        kernel.launch(plan, {name: out}, chosen)
    again = kernel(*args, **options)
    assert again.shape == out.shape
    if config is None:
        assert torch.equal(again, out)
    return out


def batched(lengths: Bounds, capacity: int, kernel_size: int, kernel_stride: int) -> tuple[Any, int, Any]:
    """Sequences as rows of a batch: what `check` wants of them."""
    rows = max(0, (capacity - kernel_size) // kernel_stride + 1)
    where = (None, ints(*(stop for _, stop in lengths)), ints(*(start for start, _ in lengths)))
    return [(b, start, max(start, stop), 0) for b, (start, stop) in enumerate(lengths)], rows, where


def packed(cu_seqlens: Tensor, total: int, kernel_stride: int) -> tuple[Any, int, Any]:
    bounds = [(0, start, stop, start // kernel_stride) for start, stop in pairwise(cu_seqlens.tolist())]
    return bounds, total // kernel_stride, (cu_seqlens, None, None)


WINDOWS = ((8, 4), (32, 16), (4, 4), (12, 3), (20, 4), (1, 1), (5, 1), (96, 48))


@kernels
@EXAMPLES
@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=5), before=st.integers(0, 40), after=st.integers(0, 40),
    windows=st.sampled_from(WINDOWS), heads=st.integers(1, 3), head_dim=st.sampled_from((1, 7, 16, 24, 64)),
    strides=st.sampled_from(("contiguous", "transposed", "sliced")), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
@example([0, 20, 0, 0, 33, 0], 5, 30, (8, 4), 2, 16, "contiguous", torch.float32)
@example([10, 11, 5, 90], 3, 0, (32, 16), 1, 16, "contiguous", torch.float16)
@example([300], 0, 0, (8, 4), 1, 256, "sliced", torch.float32)
def test_packed(
    lengths: list[int], before: int, after: int, windows: tuple[int, int], heads: int, head_dim: int, strides: str,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    cu_seqlens = cumulative(lengths, DEVICE) + before
    total = int(cu_seqlens[-1]) + after
    check((1, total, heads, head_dim), *windows, *packed(cu_seqlens, total, windows[1]), dtype, strides)


@kernels
@EXAMPLES
@given(
    lengths=st.lists(st.tuples(st.integers(0, 90), st.integers(0, 90)), min_size=1, max_size=4),
    extra=st.integers(0, 30), windows=st.sampled_from(WINDOWS), heads=st.integers(1, 3),
    head_dim=st.sampled_from((1, 7, 16, 24, 64)), strides=st.sampled_from(("contiguous", "transposed", "sliced")),
    dtype=st.sampled_from(DTYPES),
)  # fmt: skip
@example(((0, 3),), 0, (8, 4), 1, 16, "contiguous", torch.float32)
@example(((0, 90), (17, 81), (60, 20), (33, 90)), 0, (32, 16), 2, 16, "contiguous", torch.float32)
@example(((0, 300),), 0, (8, 4), 1, 256, "transposed", torch.float16)
def test_batched_and_padded(
    lengths: Bounds, extra: int, windows: tuple[int, int], heads: int, head_dim: int, strides: str, dtype: torch.dtype
) -> None:
    capacity = max(max(start, stop) for start, stop in lengths) + extra
    bounds, rows, where = batched(lengths, capacity, *windows)
    check((len(lengths), capacity, heads, head_dim), *windows, bounds, rows, where, dtype, strides)


@kernels
@pytest.mark.parametrize("index", range(4))
def test_every_candidate_gives_the_same_bits(index: int) -> None:
    """Sums are in one order, whatever the tiles."""

    def pick(kernel: Any, sizes: Any) -> Config:
        found = kernel.candidates(sizes, Device("generic", ""))
        return found[index * len(found) // 4]

    cu_seqlens = cumulative((37, 1, 64, 15, 70), DEVICE)
    x = normal((1, 200, 2, 24), torch.float32, "contiguous", 0)
    for kernel, options in ((MEAN_COMPRESS_FWD, {}), (MEAN_COMPRESS_BWD, {"seq_len": 802})):
        options |= {"kernel_size": 12, "kernel_stride": 4}
        args = (x, cu_seqlens, None, None)
        assert torch.equal(launch(kernel, pick, *args, **options), launch(kernel, None, *args, **options))


@kernels
def test_a_sequence_gives_the_same_bits_wherever_it_lies() -> None:
    windows = {"kernel_size": 32, "kernel_stride": 16}
    x = normal((1, 200, 2, 16), torch.float32, "contiguous", 0)
    alone = MEAN_COMPRESS_FWD(x, None, None, None, **windows)
    buffer = torch.cat([x[:, :23], x, x[:, :40]], 1)
    assert torch.equal(MEAN_COMPRESS_FWD(buffer, None, ints(223), ints(23), **windows)[:, : alone.shape[1]], alone)
    among = MEAN_COMPRESS_FWD(buffer, ints(0, 23, 223, 263), None, None, **windows)
    assert torch.equal(among[:, 1 : 1 + alone.shape[1]], alone)


@kernels
def test_empty() -> None:
    windows = {"kernel_size": 32, "kernel_stride": 16}
    for shape, rows in (((0, 50, 1, 16), 2), ((2, 0, 1, 16), 0), ((2, 31, 1, 16), 0)):
        x = torch.randn(shape, device=DEVICE)
        out = MEAN_COMPRESS_FWD(x, None, None, None, **windows)
        assert out.shape == (shape[0], rows, 1, 16)
        dx = MEAN_COMPRESS_BWD(torch.randn_like(out), None, None, None, seq_len=shape[1], **windows)
        assert dx.shape == shape
        assert not dx.any()
    x = torch.randn(1, 0, 1, 16, device=DEVICE)
    assert MEAN_COMPRESS_FWD(x, ints(0, 0), None, None, **windows).shape == (1, 0, 1, 16)


@kernels
def test_bounds_outside_the_tensors_read_nothing_there() -> None:
    windows = {"kernel_size": 8, "kernel_stride": 4}
    x = normal((1, 64, 1, 16), torch.float32, "contiguous", 0)
    for bounds in ((0, 20, 80), (-9, 30, 64), (50, 20, 64), (70, 90, 2**31 - 1)):
        out = MEAN_COMPRESS_FWD(x, ints(*bounds), None, None, **windows)
        assert out.isfinite().all()
        assert MEAN_COMPRESS_BWD(out, ints(*bounds), None, None, seq_len=64, **windows).isfinite().all()
    for used, pad in ((99, 0), (64, -5), (64, 99), (-1, 3)):
        out = MEAN_COMPRESS_FWD(x, None, ints(used), ints(pad), **windows)
        assert out.isfinite().all()
        assert MEAN_COMPRESS_BWD(out, None, ints(used), ints(pad), seq_len=64, **windows).isfinite().all()


# ---- without a GPU ----


def _plan(kernel: Any, dtype: torch.dtype, kernel_size: int, kernel_stride: int, kind: str) -> Any:
    x = torch.empty(2 if kind == "padded" else 1, 4096, 8, 128, dtype=dtype)
    bounds = torch.tensor([0, 4096], dtype=torch.int32)
    where = {"batched": (None, None, None), "packed": (bounds, None, None), "padded": (None, bounds, bounds)}[kind]
    options = {"kernel_size": kernel_size, "kernel_stride": kernel_stride}
    if kernel is MEAN_COMPRESS_BWD:
        options["seq_len"] = 4096
        x = x[:, : 4096 // kernel_stride]
    return kernel.plan(x, *where, **options)


@pytest.mark.skipif(INTERPRETED, reason="compiles nothing")
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_default_options_fit(kernel: Any, target: str) -> None:
    for dtype, windows, kind in (
        (torch.bfloat16, (32, 16), "batched"), (torch.bfloat16, (32, 16), "packed"),
        (torch.float32, (128, 64), "padded"), (torch.float16, (16, 1), "batched"),
    ):  # fmt: skip
        plan = _plan(kernel, dtype, *windows, kind)
        config = kernel.heuristic(plan.sizes, device_of(target))
        usage = compile_record(kernel, plan, config, target)
        assert usage.spilled <= STACK, (dtype, windows, kind, usage)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="compiles nothing")
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_candidates_fit(kernel: Any) -> None:
    plan = _plan(kernel, torch.bfloat16, 32, 16, "batched")
    for config in kernel.candidates(plan.sizes, Device("sm_90", "")):
        assert compile_record(kernel, plan, config, "sm_90").spilled <= STACK, config


@pytest.mark.skipif(INTERPRETED, reason="compiles nothing")
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_memory_is_read_and_written_in_words_of_16_bytes(kernel: Any) -> None:
    plan = _plan(kernel, torch.bfloat16, 32, 16, "batched")
    text = compile_record(kernel, plan, kernel.heuristic(plan.sizes, Device("sm_90", "")), "sm_90").assembly
    assert "ld.global.v4.b32" in text
    assert "st.global.v4.b32" in text
