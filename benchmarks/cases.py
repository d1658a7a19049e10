"""Functions of several providers, held against float64 and then timed, all taking turns."""

from __future__ import annotations

import argparse
import gc
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import exact
from benchmarks.common import add_turns, timings, write_csv

DENSE = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 1e-2}
WRONG_BLOCKS = 0.02  # share of blocks; scores of 16-bit products nearly tie now and then


@dataclass(eq=False)
class Case:
    """One function of one provider: `fn(*args)`, differentiated by the first `leaves` arguments."""

    what: str
    provider: str
    fn: Callable[..., Tensor]
    args: tuple[Tensor, ...]
    exact: Callable[..., Tensor]  # of the arguments in float64 and the rows
    leaves: int = 0
    passes: tuple[str, ...] = ("forward", "backward")
    commit: str = ""  # of a peer
    columns: dict[str, Any] = field(default_factory=dict)  # what a row says of the problem
    every_row: bool = False  # the result has rows of its own, all of which are checked
    errors: dict[str, float] = field(default_factory=dict)

    def forward(self) -> Tensor:
        """As in inference."""
        with torch.no_grad():
            return self.fn(*self.args)

    def trained(self) -> tuple[Tensor, list[Tensor]]:
        """As in training: the result and what it is differentiated by."""
        leaves = [x.detach().requires_grad_() for x in self.args[: self.leaves]]
        return self.fn(*leaves, *self.args[self.leaves :]), leaves

    def backward(self, state: tuple[Tensor, list[Tensor]], grad: Tensor) -> tuple[Tensor, ...]:
        """Gradients."""
        return torch.autograd.grad(*state, grad)

    def step(self, grad: Tensor) -> tuple[Tensor, ...]:
        """Forward and backward."""
        out, leaves = self.trained()
        return out, *torch.autograd.grad(out, leaves, grad)


def exact_rows(case: Case, rows: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The exact results of `rows`, and the arguments they are differentiated by."""
    wide = [x.detach().double() if x.is_floating_point() else x for x in case.args]
    leaves = [x.requires_grad_() for x in wide[: case.leaves]]
    return case.exact(*wide, rows), leaves


def check(case: Case, rows: Tensor) -> None:
    """Fill in the errors. Results that have no gradients are block ids."""
    if not case.leaves:
        if not case.errors:
            ids = case.forward()[0, rows]
            case.errors["forward"] = exact.missing(ids, exact_rows(case, rows)[0])
        return
    out, leaves = case.trained()
    if case.every_row:
        rows = torch.arange(out.shape[1], device=out.device)
    want, wide = exact_rows(case, rows)
    grad = torch.zeros_like(out)
    grad[:, rows] = torch.randn_like(grad[:, rows])
    grads = torch.autograd.grad(out, leaves, grad)
    want_grads = torch.autograd.grad(want, wide, grad[:, rows].double())
    case.errors["forward"] = exact.relative_error(case.forward()[:, rows], want)
    pairs = zip(grads, want_grads, strict=True)
    case.errors["backward"] = max(exact.relative_error(have, g) for have, g in pairs)
    case.errors["step"] = max(case.errors.values())


def wrong(case: Case, dtype: torch.dtype) -> bool:
    """Whether an error is more than rounding."""
    allowed = TOLERANCE[dtype] if case.leaves else WRONG_BLOCKS
    return not all(error <= allowed for error in case.errors.values())


def peak_mib(run: Callable[[], Any], device: torch.device) -> float:
    """Mebibytes allocated at most while `run()` runs, beyond what was there and what it returns."""
    if device.type != "cuda":
        return math.nan
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = run()
    torch.cuda.synchronize()
    results = results if isinstance(results, tuple) else (results,)
    return (torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in results)) / 2**20


def captured(case: Case) -> Callable[[], Any]:
    """The forward as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            case.forward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = case.forward()
    return lambda: (graph.replay(), out)[1]


def measure(
    cases: Iterable[Case], rows: Tensor, options: argparse.Namespace, label: str, graph: bool = False
) -> tuple[list[dict[str, Any]], bool]:
    """Check and time the cases; their columns, and whether anything of this package failed or was wrong."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    runs: dict[tuple[Case, str], Callable[..., Any]] = {}
    prepare: dict[tuple[Case, str], Callable[[], Any]] = {}
    peaks: dict[tuple[Case, str], float] = {}
    failed = False
    for case in cases:
        named = f"{label} {case.provider} {case.what}"
        try:
            check(case, rows)
            if bad := wrong(case, dtype):
                print(f"{named}: WRONG {case.errors}", flush=True)
                failed = failed or not case.commit
            grad = torch.randn_like(case.forward()) if case.leaves else None
            mine: dict[str, Callable[..., Any]] = {
                "forward": case.forward,
                "backward": lambda state, case=case, grad=grad: case.backward(state, grad),
                "step": lambda case=case, grad=grad: case.step(grad),
            }
            if graph:
                mine = {"graph": captured(case)}
                case.errors["graph"] = case.errors["forward"]
            for name in ("graph",) if graph else () if bad and not case.commit else case.passes:
                key = case, name
                if name == "backward":
                    state = case.trained()
                    peaks[key] = peak_mib(lambda run=mine[name], state=state: run(state), device)
                    prepare[key] = case.trained
                    del state
                else:
                    peaks[key] = peak_mib(mine[name], device)
                runs[key] = mine[name]
        except Exception as error:  # out of memory, or not made for this device
            print(f"{named}: {type(error).__name__}: {str(error).splitlines()[0][:200]}", flush=True)
            failed = failed or not (case.commit or case.provider.startswith("dense"))
    runs = {key: runs[key] for key in peaks if key in runs}
    found = timings(runs, prepare=prepare, rounds=options.rounds, seconds=options.seconds, device=device)
    return [
        {
            "what": case.what, "pass": name, "provider": case.provider, **case.columns, **times.columns(),
            "peak_mib": "" if math.isnan(peaks[case, name]) else f"{peaks[case, name]:.0f}",
            "error": f"{case.errors[name]:.2e}", "peer_commit": case.commit,
        }
        for (case, name), times in found.items()
    ], failed  # fmt: skip


def dense(name: str, q: Tensor, k: Tensor, v: Tensor) -> Case:
    """Causal `scaled_dot_product_attention` of one backend, as if it were the whole."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(DENSE[name]):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    args = [q, k, v]
    try:
        attention(*(x[:, :64] for x in args))
    except RuntimeError:  # no groups: their heads are repeated beforehand, outside of the time
        args[1:] = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in args[1:])
    return Case("whole", f"dense-{name}", attention, tuple(args), exact.dense, 3, ("forward", "backward", "step"))


def sampled_rows(seq_len: int, count: int, generator: torch.Generator) -> Tensor:
    """Rows to check, the last among them."""
    rows = torch.randperm(seq_len, device=generator.device, generator=generator)[: min(count, seq_len)]
    rows[0] = seq_len - 1
    return rows.unique()


def add_options(parser: argparse.ArgumentParser) -> None:
    """What every benchmark of cases is asked."""
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--peers", type=Path, default=Path("peers"), help="folder with other people's checkouts")
    parser.add_argument("--rows", type=int, default=16, help="rows that are checked")
    add_turns(parser, rounds=20, seconds=120, of="a problem")


def written(
    measured: Iterable[tuple[list[dict[str, Any]], bool]],
    options: argparse.Namespace,
    table: Callable[[list[dict[str, Any]]], str],
) -> int:
    """Writes the rows of `measure` as they come, then prints their table; 1 if anything of this package was wrong."""
    rows: list[dict[str, Any]] = []
    failed = False
    for found, bad in measured:
        rows, failed = rows + found, failed or bad
        if rows:
            write_csv(options.out, rows, torch.device(options.device))
        if options.device == "cuda":
            torch.cuda.empty_cache()
    print(table(rows))
    print(f"written to {options.out}")
    return int(failed)


def offered(sources: Iterable[Callable[[], Iterator[Case]]], wanted: Callable[[Case], bool]) -> Iterator[Case]:
    """The cases that are wanted, of the sources that work."""
    for source in sources:
        try:
            yield from filter(wanted, source())
        except Exception as error:  # one that is not there, or does not fit
            print(f"left out: {type(error).__name__}: {str(error).splitlines()[0][:200]}", flush=True)
