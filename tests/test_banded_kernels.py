"""The Triton kernels of compressed and sliding-window attention: on a GPU (`-m gpu`), in the interpreter, and compiled
for GPUs that are not here.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from kernel_runs import DEVICE, DTYPES, INTERPRETED, kernels, round_sums_once
from torch import Tensor

from fsa_compile.ops import reference
from fsa_compile.templates.banded import BANDED_BWD_DKV, BANDED_BWD_DQ, BANDED_FWD, BANDED_SUM, KERNELS
from fsa_compile.templates.row_weights import ROW_WEIGHTS
from fsa_compile.testing.budget import Budget
from fsa_compile.testing.compile_only import SHARED_MEMORY, compile_record, device_of

NAN = float("nan")


@pytest.fixture(autouse=True, scope="module")
def rounded_once() -> Iterator[None]:
    """Products as a GPU makes them: sums that do not depend on an order, and multiplications fused with additions."""
    if not INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        exact = x.data.astype(numpy.float64) * y.data.astype(numpy.float64) + z.data.astype(numpy.float64)
        return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        round_sums_once(patch)
        patch.setattr(interpreter.InterpreterBuilder, "create_fma", create_fma)
        yield


class Kind(NamedTuple):
    """Compressed attention over windows of keys, or, with a window, sliding-window attention."""

    window: int = 0
    kernel_size: int = 8
    kernel_stride: int = 4

    def arguments(self, seq_len_k: int, scale: float) -> dict[str, Any]:
        step, end = (1, 0) if self.window else (self.kernel_stride, self.kernel_size - 1)
        return {
            "seq_len_k": seq_len_k, "key_stride": step, "first_end": end, "window": self.window, "scale": scale
        }  # fmt: skip

    def num_keys(self, length: int) -> int:
        return length if self.window else max(0, (length - self.kernel_size) // self.kernel_stride + 1)

    def reference(self, q: Tensor, k: Tensor, v: Tensor, length: int, scale: float) -> tuple[Tensor, Tensor]:
        if self.window:
            return reference.sliding_window_attention(q, k, v, window_size=self.window, scale=scale)
        windows = {"kernel_size": self.kernel_size, "kernel_stride": self.kernel_stride}
        return reference.compressed_attention(q, k, v, seq_len_k=length, scale=scale, **windows)


class Run(NamedTuple):
    """A batch row, its query rows, its first row of k and its number of key tokens."""

    b: int
    start: int
    stop: int
    first_key: int
    length: int


class Problem(NamedTuple):
    kind: Kind
    batch: int
    seq_len: int
    seq_len_k: int
    runs: list[Run]
    where: tuple[Tensor | None, ...] = (None, None, None, None)
    heads: int = 2
    group: int = 2
    head_dim: int = 16
    head_dim_v: int = 16
    logits: float = 1.0
    later: float = 1.0  # times the keys after the first tile
    splits: int = 1

    @property
    def key_rows(self) -> int:
        if self.kind.window:
            return self.seq_len_k
        packed = self.where[0] is not None
        return self.seq_len_k // self.kind.kernel_stride if packed else self.kind.num_keys(self.seq_len_k)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def batched(kind: Kind, batch: int, seq_len: int, seq_len_k: int, **rest: Any) -> Problem:
    return Problem(kind, batch, seq_len, seq_len_k, [Run(b, 0, seq_len, 0, seq_len_k) for b in range(batch)], **rest)


def packed(kind: Kind, lengths: tuple[int, ...], keys: tuple[int, ...] | None = None, before: int = 0, after: int = 0,
           **rest: Any) -> Problem:  # fmt: skip
    cu = torch.tensor([before, *lengths]).cumsum(0).tolist()
    cu_k = cu if keys is None else torch.tensor([before, *keys]).cumsum(0).tolist()
    where = (ints(*cu), None if keys is None else ints(*cu_k), None, None)
    step = 1 if kind.window else kind.kernel_stride
    runs = [Run(0, *q, k[0] // step, k[1] - k[0]) for q, k in zip(pairwise(cu), pairwise(cu_k), strict=True)]
    return Problem(kind, 1, cu[-1] + after, cu_k[-1] + after, runs, where, **rest)


def padded(kind: Kind, seq_len: int, capacity: int, spans: tuple[tuple[int, int], ...], **rest: Any) -> Problem:
    where = (None, None, ints(*(stop for _, stop in spans)), ints(*(start for start, _ in spans)))
    runs = [
        Run(b, 0, seq_len, start if kind.window else 0, max(0, stop - start)) for b, (start, stop) in enumerate(spans)
    ]
    return Problem(kind, len(spans), seq_len, capacity, runs, where, **rest)


def draw(problem: Problem, dtype: torch.dtype, strides: str = "contiguous") -> list[Tensor]:
    """q, k, v, grad_out and grad_log_sum."""
    g = torch.Generator().manual_seed(0)
    heads_q = problem.heads * problem.group

    def normal(t: int, h: int, *width: int) -> Tensor:
        x = torch.randn(problem.batch, t, h, *width, generator=g)
        return x.to(DEVICE, torch.float32)

    q, k = normal(problem.seq_len, heads_q, problem.head_dim), normal(problem.key_rows, problem.heads, problem.head_dim)
    v = normal(problem.key_rows, problem.heads, problem.head_dim_v)
    k[:, 64 if problem.kind.window else 32 :] *= problem.later
    grads = normal(problem.seq_len, heads_q, problem.head_dim_v), normal(problem.seq_len, heads_q)
    made = [x.to(dtype) for x in (q * problem.logits, k, v, grads[0])]
    if strides == "transposed":
        made = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in made]
    return [*made, grads[1]]


def scale_of(problem: Problem) -> float:
    return problem.head_dim**-0.5


def ours(problem: Problem, q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, grad_lse: Tensor) -> list[Tensor]:
    """out, lse, dq, dk, dv. What comes back for a row that sees nothing is NaN and has to be ignored."""
    arguments = problem.kind.arguments(problem.seq_len_k, scale_of(problem))
    out, shift, log_sum = BANDED_FWD(q, k, v, *problem.where, **arguments)
    upstream = torch.where(log_sum == -torch.inf, NAN, grad_lse)
    delta = (grad_out.double() * out.double()).sum(-1).float() - upstream
    dq = BANDED_BWD_DQ(grad_out, q, k, v, shift, log_sum, delta, *problem.where, **arguments)
    compensated = q.dtype == torch.float32
    weights = ROW_WEIGHTS(shift, log_sum, delta, scale=scale_of(problem), compensated=compensated)
    dk, dv = BANDED_BWD_DKV(grad_out, q, k, v, weights, *problem.where, **arguments, splits=problem.splits)
    if problem.splits > 1:
        dk, dv = (BANDED_SUM(parts, x, splits=problem.splits) for parts, x in ((dk, k), (dv, v)))
    return [out, log_sum + scale_of(problem) * shift, dq, dk, dv]


def theirs(problem: Problem, *inputs: Tensor) -> list[Tensor]:
    """The same by the reference, run by run; zero, or -inf, where no run is."""
    *rows, grad_out, grad_lse = inputs
    q, k, v = (x.detach().clone().requires_grad_() for x in rows)
    soft = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros_like(grad_out)
    lse = torch.full(grad_lse.shape, -torch.inf, dtype=soft, device=DEVICE)
    grads = [torch.zeros_like(x) for x in rows]
    for run in problem.runs:
        row = (slice(run.b, run.b + 1), slice(run.start, run.stop))
        key = (slice(run.b, run.b + 1), slice(run.first_key, run.first_key + problem.kind.num_keys(run.length)))
        part, part_lse = problem.kind.reference(q[row], k[key], v[key], run.length, scale_of(problem))
        out[row], lse[row] = part.detach(), part_lse.detach()
        finite = torch.where(part_lse == -torch.inf, 0, part_lse)
        upstream = [grad_out[row].to(part.dtype), grad_lse[row].to(finite.dtype)]
        for total, grad in zip(grads, torch.autograd.grad([part, finite], [q, k, v], upstream), strict=True):
            total += grad
    return [out, lse, *grads]


def check(problem: Problem, dtype: torch.dtype, strides: str = "contiguous") -> None:
    inputs = draw(problem, dtype, strides)
    have = ours(problem, *inputs)
    want, eager = theirs(problem, *(x.double() for x in inputs)), theirs(problem, *inputs)
    for name, *triple in zip(("out", "lse", "dq", "dk", "dv"), have, want, eager, strict=True):
        assert triple[0].is_contiguous()
        assert triple[0].dtype == (torch.float32 if name == "lse" else dtype)
        budget = Budget(f"{name} of {problem}, {dtype}", dtype)
        budget.add(*triple)
        budget.check()


COMPRESSED, SLIDING = Kind(), Kind(window=5)
LONG = 1 if INTERPRETED else 9


@kernels
@pytest.mark.parametrize("kind", [COMPRESSED, Kind(window=1), SLIDING, Kind(window=64)], ids=str)
@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        ((70, 70, 1, 16, 16), torch.float32),
        ((50, 90, 3, 24, 16), DTYPES[-1]),
        ((60, 33, 4, 64, 24), DTYPES[-1]),
        ((1, 64, 2, 16, 16), torch.float32),
        ((20, 20, 17, 16, 20), torch.float16),
    ],
    ids=str,
)
def test_batched(kind: Kind, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    seq_len, seq_len_k, group, head_dim, head_dim_v = sizes
    problem = batched(
        kind, 2, seq_len * LONG if seq_len > 1 else 1, seq_len_k * LONG, group=group, head_dim=head_dim,
        head_dim_v=head_dim_v, splits=1 if kind.window else 3,
    )  # fmt: skip
    check(problem, dtype, "transposed" if group == 3 else "contiguous")


@kernels
@pytest.mark.parametrize("kind", [COMPRESSED, SLIDING, Kind(window=64)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed(kind: Kind, dtype: torch.dtype) -> None:
    check(packed(kind, (17, 0, 1, 40, 3), before=6, after=9, splits=1 if kind.window else 2), dtype)
    check(packed(kind, (17, 9, 30), keys=(50, 4, 30), group=1), dtype)
    if not INTERPRETED:
        check(packed(kind, (70, 900), before=1, after=1, group=4, head_dim=64), dtype)


@kernels
@pytest.mark.parametrize("kind", [COMPRESSED, SLIDING, Kind(0, 1, 1), Kind(window=64)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_padded(kind: Kind, dtype: torch.dtype) -> None:
    check(padded(kind, 23, 50, ((0, 50), (11, 45), (30, 20)), heads=1), dtype)
    check(padded(kind, 45, 43, ((3, 40), (30, 43)), group=1), dtype)


@kernels
@pytest.mark.parametrize("kind", [COMPRESSED, SLIDING, Kind(window=64)], ids=str)
def test_padded_is_each_sequence_alone(kind: Kind) -> None:
    """Bit for bit: where a buffer's keys begin does not decide how sums are cut."""
    problem = padded(kind, 90, 200, ((0, 200), (11, 145), (77, 120)), heads=1)
    inputs = draw(problem, torch.float32)
    have = ours(problem, *inputs)
    for run in problem.runs:
        keys = slice(run.first_key, run.first_key + kind.num_keys(run.length))
        q, k, v, *grads = (x[run.b : run.b + 1] for x in inputs)
        alone = ours(batched(kind, 1, 90, run.length, heads=1), q, k[:, keys], v[:, keys], *grads)
        parts = [x[run.b : run.b + 1] for x in have]
        for whole, want in zip([*parts[:3], *(x[:, keys] for x in parts[3:])], alone, strict=True):
            assert torch.equal(whole, want)


@kernels
@pytest.mark.parametrize("kind", [COMPRESSED, Kind(window=20)], ids=str)
def test_groups_wider_than_a_tile(kind: Kind) -> None:
    check(batched(kind, 1, 12, 30, heads=1, group=200), DTYPES[-1])
    check(batched(kind, 1, 12, 30, heads=1, group=35), torch.float32)


@kernels
@pytest.mark.parametrize("kind", [COMPRESSED, Kind(window=20)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_logits(kind: Kind, dtype: torch.dtype) -> None:
    check(batched(kind, 1, 64 * LONG, 64 * LONG, logits=3e3 if dtype == torch.float16 else 1e4), dtype)


@kernels
@pytest.mark.parametrize("kind", [COMPRESSED, Kind(window=64)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_far_from_those_of_the_first_keys(kind: Kind, dtype: torch.dtype) -> None:
    """Far above, so that weights in terms of the first do not fit the dtype, and far below."""
    for later in (1e3, 35.0, 12.0, 1e-3):
        check(batched(kind, 1, 190 * LONG, 190 * LONG, heads=1, later=later, logits=1 / min(1, later * 30)), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [Kind(0, 32, 16), Kind(window=512)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(1, 128, 128), (4, 128, 128), (16, 64, 64), (2, 256, 192), (3, 100, 72)], ids=str)
def test_real_sizes(kind: Kind, sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    group, head_dim, head_dim_v = sizes
    check(batched(kind, 1, 3000, 3000, group=group, head_dim=head_dim, head_dim_v=head_dim_v), dtype)


@kernels
@pytest.mark.parametrize("kind", [COMPRESSED, Kind(window=20)], ids=str)
@pytest.mark.parametrize("poison", [NAN, float("inf")])
def test_what_is_not_seen_does_no_harm(kind: Kind, poison: float) -> None:
    """Neither a value nor a key that a query does not see, nor a query or a gradient that does not see a key."""
    problem = batched(kind, 1, 60, 60, splits=1)
    inputs = draw(problem, DTYPES[1])
    clean = ours(problem, *inputs)
    step = 1 if kind.window else kind.kernel_stride
    end = 0 if kind.window else kind.kernel_size - 1
    positions = torch.arange(60, device=DEVICE)[:, None]
    last = torch.arange(problem.key_rows, device=DEVICE) * step + end
    sees = (last <= positions) & (last > positions - (kind.window or 1000))  # [T, NK]
    row, key = 33, 6

    def compare(names: str, met: Tensor, index: int, place: Any) -> None:
        spoilt = [x.clone() for x in inputs]
        spoilt[index][place] = poison
        for name, have, want in zip(("out", "lse", "dq", "dk", "dv"), ours(problem, *spoilt), clean, strict=True):
            if name in names.split():
                untouched = ~met.any(0 if name in ("dk", "dv") else 1)
                assert untouched.any()
                assert not untouched.all()
                torch.testing.assert_close(have[0, untouched], want[0, untouched], rtol=3e-3, atol=3e-3)

    of_key = sees & (torch.arange(problem.key_rows, device=DEVICE) == key)
    of_row = sees & (positions == row)
    for index in (1, 2):
        compare("out lse dq", of_key, index, (0, key, 0, 3))
    compare("dk dv", of_row, 0, (0, row, 1, 3))
    compare("dk dv", of_row, 3, (0, row, 1, 3))
    spoilt = [x.clone() for x in inputs]
    spoilt[2][0, key, 0, 3] = NAN
    out = ours(problem, *spoilt)[0]
    assert out[0, of_key.any(1)][:, : problem.group, 3].isnan().all()
    assert out[0][:, : problem.group, 4].isfinite().all()


@kernels
@pytest.mark.parametrize("kind", [COMPRESSED, SLIDING], ids=str)
def test_bounds_outside_the_tensors_read_nothing_there(kind: Kind) -> None:
    problem = packed(kind, (60,))
    inputs = draw(problem, torch.float32)
    for bounds in ((0, 20, 80), (-9, 30, 64), (70, 90, 2**31 - 1)):
        where = (ints(*bounds), None, None, None)
        assert all(not x.isnan().any() for x in ours(problem._replace(where=where), *inputs))
    ours(problem._replace(where=(ints(50, 20, 60), None, None, None)), *inputs)  # some rows are left as they were


@kernels
def test_empty() -> None:
    for batch, seq_len, seq_len_k in ((0, 5, 5), (2, 0, 40), (2, 9, 7), (1, 9, 0)):
        for kind in (COMPRESSED, SLIDING):
            problem = batched(kind, batch, seq_len, seq_len_k, splits=2)
            out, lse, *grads = ours(problem, *draw(problem, torch.float32))
            assert out.shape == (batch, seq_len, 4, 16)
            if kind is COMPRESSED:
                assert not out.any()
                assert (lse == -torch.inf).all()
                assert not any(x.any() for x in grads)


# ---- without a GPU ----


def plans(group: int, head_dim: int, dtype: torch.dtype, **arguments: Any) -> dict[str, Any]:
    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    rows = 8192 if arguments["window"] else 511
    q, k = empty(1, 8192, 4 * group, head_dim), empty(1, rows, 4, head_dim)
    row = empty(1, 8192, 4 * group, dtype=torch.float32)
    arguments |= {"seq_len_k": 8192, "scale": 0.1}
    weights = empty(1, 8192, 4 * group, 3 if dtype == torch.float32 else 2, dtype=torch.float32)
    splits, nowhere = 1 if arguments["window"] else 4, (None,) * 4
    parts = empty(splits, rows, 4, head_dim, dtype=torch.float32)
    return {
        "banded_fwd": BANDED_FWD.plan(q, k, k, *nowhere, **arguments),
        "banded_bwd_dq": BANDED_BWD_DQ.plan(q, q, k, k, row, row, row, *nowhere, **arguments),
        "banded_bwd_dkv": BANDED_BWD_DKV.plan(q, q, k, k, weights, *nowhere, **arguments, splits=splits),
        "banded_sum": BANDED_SUM.plan(parts, k, splits=splits),
    }


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.slow
@pytest.mark.parametrize("window", [0, 512])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_fits(target: str, kernel: Any, window: int) -> None:
    """What the heuristic chooses fits the multiprocessor, on Hopper with its matrix instructions."""
    key = {"key_stride": 1, "first_end": 0} if window else {"key_stride": 16, "first_end": 31}
    for group, head_dim, dtype in ((4, 128, torch.bfloat16), (1, 256, torch.float16), (3, 72, torch.float32)):
        plan = plans(group, head_dim, dtype, window=window, **key)[kernel.name]
        usage = compile_record(kernel, plan, kernel.heuristic(plan.sizes, device_of(target)), target)
        assert usage.shared <= SHARED_MEMORY[target]
        if target == "sm_90" and dtype != torch.float32 and kernel is not BANDED_SUM:
            assert "wgmma.mma_async" in usage.assembly
