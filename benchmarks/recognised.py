"""Plain PyTorch that is recognised, against the same program with recognition off: compiled, trained, timed.

    python -m benchmarks.recognised --out benchmarks/results/recognised_h100.csv

The models are a layer (projections of q, k and v, an attention of `fsa_compile.testing.handwritten`, a projection of
its result) and one sparse layer of transformers' MiniMax-M3 as it is, of its own heads. Each is compiled twice by
`torch.compile` with static shapes: "recognised", with the pass, and "original", with
`fsa_compile.enable(recognise=False)`. Caches are new ones of this run, in which what recognition changes is part of the
keys; a model whose attention is not all replaced, or an original in which anything is, fails.

"check" rows: ten steps of AdamW. At every step the output and all gradients of "recognised" are held, by the error
budget of the tests, against the same model uncompiled in float64 (but for what it computes in float32 by itself), with
the uncompiled model in `--dtype` for a measure.
`error` is the worst of them and `eager_error` that of the uncompiled model. Where the model selects blocks itself,
rounding in 16 bits selects differently, in both alike; `rows_off` is the share of tokens whose output in float32 is
another than the uncompiled model's in float32, which are those that selected differently. `loss` is that of the last
step, `eager_loss` that of the uncompiled model, trained by itself. (FlexAttention, uncompiled, is SDPA with its mask.)

"step" rows: forward and backward in turns, `peak_mib` beyond inputs and results. What ran out of memory has a row that
says so, and both are timed at half of the length too, and at half of that, until it fits.

On a GPU set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True: providers of different needs take turns in one pool.
"""

from __future__ import annotations

import argparse
import copy
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fsa_compile
from benchmarks.attentions import attempt, compiled
from benchmarks.cases import WRONG_BLOCKS, peak_mib
from benchmarks.common import RESULTS, Times, add_turns, timings, write_csv
from benchmarks.models import ALONE, caches_in, seconds_of
from benchmarks.recognised_models import LAYER, MODELS, Model, Sizes
from fsa_compile import lowering
from fsa_compile.testing.budget import Budget
from fsa_compile.testing.inputs import causal_block_indices

PROVIDERS = ("recognised", "original")
STEPS = 10
GOALS = {"speedup": 5.0, "less_memory": 10.0}  # at 32K tokens
_SAME_ROW = 1e-3
_SAME_LOSS = 0.02


class Problem:
    """A model of one dtype with inputs of one length."""

    def __init__(self, model: Model, seq_len: int, device: torch.device, dtype: torch.dtype) -> None:
        self.model, self.device = model, device
        self.module = self._made(model.make, dtype)
        self.plain = self._made(model.uncompiled, dtype) if model.uncompiled else copy.deepcopy(self.module)
        generator = torch.Generator(device).manual_seed(1)
        shape = 1, seq_len, model.sizes.hidden
        x, self.target, grad = (torch.randn(shape, device=device, generator=generator) for _ in range(3))
        self.x, self.grad = x.to(dtype), grad.to(dtype)
        ids = causal_block_indices(
            seq_len, model.sizes.num_kv_heads, model.sizes.num_selected, model.sizes.block_size, device=device
        )
        self.ids = ids.long()

    def _made(self, make: Callable[[Sizes], nn.Module], dtype: torch.dtype) -> nn.Module:
        torch.manual_seed(0)
        with self.device:
            module = make(self.model.sizes)
        for weight in module.parameters():  # not the buffers, of which a rotary embedding's are float32 in any case
            weight.data = weight.data.to(self.device, dtype)
        return module.to(self.device).train()

    def step(self, fn: Callable[..., Tensor], module: nn.Module | None = None) -> tuple[Tensor, ...]:
        """The output and the gradients for a given upstream gradient, x's first."""
        leaves = [self.x.detach().requires_grad_(), *_trained(module or self.module)]
        return _gradients(fn(leaves[0], self.ids), leaves, self.grad)

    def loss(self, out: Tensor) -> Tensor:
        """Mean squared difference to the target."""
        return (out.float() - self.target).square().mean()


def _trained(module: nn.Module) -> list[Tensor]:
    """Without what has no gradients: an indexer, embeddings that are not looked up."""
    return [p for name, p in module.named_parameters() if "indexer" not in name and "embed_tokens" not in name]


def _gradients(out: Tensor, leaves: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    return out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))


@dataclass(eq=False)
class Run:
    """A provider's compiled model of one length."""

    provider: str
    status: str = "ok"
    call: Callable[..., Tensor] | None = None
    compile_s: float | None = None
    peak: float | None = None
    times: Times | None = None


def compile_run(run: Run, problem: Problem, training: bool = True) -> None:
    """Compile forward and, in training, backward, and look at what became of the attention."""
    module = problem.module

    def forward(x: Tensor, ids: Tensor) -> Tensor:
        out: Tensor = module(x, ids)
        return out

    inputs = problem.x, problem.ids
    fsa_compile.enable(recognise=run.provider == "recognised")
    try:
        call = compiled(forward)
        with lowering.collect_sites() as sites, torch.set_grad_enabled(training):
            run.compile_s = seconds_of(lambda: problem.step(call) if training else call(*inputs), problem.device)
    finally:
        fsa_compile.enable()
    expected = problem.model.operators if run.provider == "recognised" else ()
    found = {site.op.removesuffix("_forward").removesuffix("_backward") for site in sites if "fsa::" in site.op}
    if found != set(expected):
        raise RuntimeError(f"became {sorted(found)}, not {sorted(expected)}: {_left(sites)}")
    if left := _left(site for site in sites if problem.device.type == "cuda" or "fsa::" not in site.op):
        raise RuntimeError(f"left alone: {left}")
    run.call = call


def _left(sites: Iterable[lowering.Site]) -> str:
    return "; ".join(f"{site.op}: {site.reason}" for site in sites if not site.matched)


def check(problem: Problem, run: Run, row: dict[str, Any]) -> None:
    """Train ten steps; fill in the errors."""
    call, module, plain = run.call, problem.module, problem.plain
    assert call is not None
    exact = copy.deepcopy(plain).double()
    optimizer = torch.optim.AdamW(_trained(module), lr=1e-3)
    names = ["out", "x", *(name for name, p in module.named_parameters() if any(p is t for t in _trained(module)))]
    budgets = [Budget(name, problem.x.dtype) for name in names]
    wide = copy.copy(problem)
    wide.x = problem.x.double()

    def results(of: Problem, fn: Callable[..., Tensor], module: nn.Module) -> tuple[Tensor, ...]:
        leaves = [of.x.detach().requires_grad_(), *_trained(module)]
        out = fn(leaves[0], of.ids)
        grad = 2 * (out.detach().double() - of.target) / math.sqrt(out.numel())
        return _gradients(out, leaves, grad)

    start = {name: value.clone() for name, value in module.state_dict().items()}
    losses = []
    for _ in range(STEPS):
        for other in (plain, exact):
            other.load_state_dict(module.state_dict())
        have, eager, want = results(problem, call, module), results(problem, plain, plain), results(wide, exact, exact)
        for budget, *values in zip(budgets, have, want, eager, strict=True):
            budget.add(*values)
        losses.append(float(problem.loss(have[0])))
        for weight, grad in zip(_trained(module), have[2:], strict=True):
            weight.grad = grad
        optimizer.step()
        del have, eager, want
    plain.load_state_dict(start)
    optimizer = torch.optim.AdamW(_trained(plain), lr=1e-3)
    for _ in range(STEPS):
        out, _x, *grads = results(problem, plain, plain)
        eager_loss = float(problem.loss(out))
        for weight, grad in zip(_trained(plain), grads, strict=True):
            weight.grad = grad
        optimizer.step()
    module.load_state_dict(start)
    worst = max(budgets, key=lambda b: b.error / max(b.eager_error, 1e-300))
    row |= {
        "error": f"{math.sqrt(worst.error / worst.size):.2e}", "worst": worst.what,
        "eager_error": f"{math.sqrt(worst.eager_error / worst.size):.2e}",
        "first_loss": f"{losses[0]:.5f}", "loss": f"{losses[-1]:.5f}", "eager_loss": f"{eager_loss:.5f}",
    }  # fmt: skip
    for budget in budgets:
        budget.check()
    assert abs(losses[-1] - eager_loss) <= _SAME_LOSS * losses[0], f"loss {losses[-1]}, uncompiled {eager_loss}"


def rows_off(problem: Problem, run: Run) -> float:
    """The share of tokens whose output in float32 is another than without a compiler."""
    if problem.x.dtype != torch.float32:
        problem = Problem(problem.model, problem.x.shape[1], problem.device, torch.float32)
        run = Run("recognised")
        compile_run(run, problem, training=False)
    assert run.call is not None
    with torch.no_grad():
        have, want = (fn(problem.x, problem.ids).double() for fn in (run.call, problem.plain))
    return float(((have - want).norm(dim=-1) > _SAME_ROW * want.norm(dim=-1)).double().mean())


class Cell:
    """One model and length: its runs, checked or timed or both."""

    def __init__(self, name: str, seq_len: int, options: argparse.Namespace) -> None:
        self.name, self.seq_len, self.options = name, seq_len, options
        self.device, self.dtype = torch.device(options.device), getattr(torch, options.dtype)
        self.failed = False

    def columns(self, what: str, provider: str) -> dict[str, Any]:
        sizes = MODELS[self.name].sizes
        return {
            "model": self.name, "what": what, "provider": provider, "seq_len": self.seq_len,
            "num_q_heads": sizes.num_q_heads, "num_kv_heads": sizes.num_kv_heads, "head_dim": sizes.head_dim,
            "block_size": sizes.block_size, "num_selected": sizes.num_selected, "dtype": self.options.dtype,
        }  # fmt: skip

    def _note(self, what: str, run: Run) -> None:
        print(f"{self.name} {self.seq_len} {what} {run.provider}: {run.status}", flush=True)
        excused = ("ok", ALONE, "out of memory")
        self.failed |= run.status not in excused or (run.provider == "recognised" and run.status == "out of memory")

    def rows(self, *, timed: bool, checked: bool) -> Iterator[dict[str, Any]]:
        """Rows of the CSV."""
        torch._dynamo.reset()
        model = MODELS[self.name]
        problem: Problem | None = None
        with attempt(made := Run("inputs")):
            problem = Problem(model, self.seq_len, self.device, self.dtype)
        if problem is None:
            self._note("inputs", made)
            return
        providers = self.options.providers if timed else ["recognised"]
        runs = [Run(provider) for provider in providers]
        for run in runs:
            with attempt(run):
                compile_run(run, problem)
        if checked and runs[0].provider == "recognised":
            yield self._checked(problem, runs[0])
        if timed:
            yield from self._timed(problem, runs)

    def _checked(self, problem: Problem, run: Run) -> dict[str, Any]:
        row, note = self.columns("check", run.provider), Run(run.provider, run.status)
        row["rows_off"] = ""
        if run.status == "ok":
            with attempt(note):
                check(problem, run, row)
        if note.status == "ok" and "fsa::select_blocks" in problem.model.operators:
            with attempt(note):
                row["rows_off"] = f"{(share := rows_off(problem, run)):.2e}"
                assert share <= WRONG_BLOCKS, f"another output than without a compiler in {share:.2%} of the rows"
        self._note("check", note)
        return row | {"steps": STEPS, "status": note.status}

    def _timed(self, problem: Problem, runs: list[Run]) -> Iterator[dict[str, Any]]:
        def stepping(run: Run) -> Callable[[], tuple[Tensor, ...]]:
            assert run.call is not None
            return partial(problem.step, run.call)

        for run in (run for run in runs if run.status == "ok"):
            with attempt(run):
                run.peak = peak_mib(stepping(run), self.device)
        steps = {run: stepping(run) for run in runs if run.status == "ok"}
        limits = {"rounds": self.options.rounds, "warmup": 1, "seconds": self.options.seconds, "device": self.device}
        together = Run("all")
        with attempt(together):
            for run, times in timings(steps, **limits).items():
                run.times = times
        if together.status != "ok":  # each has run before, but what one frees may not fit the next
            for run, step in steps.items():
                run.status = ALONE
                with attempt(run):
                    run.times = timings({run: step}, **limits)[run]
        base = next((run for run in runs if run.provider == "original"), Run("original"))
        for run in runs:
            self._note("step", run)
            ratios = {}
            if run.times and base.times and run is not base:
                ratios["speedup"] = f"{base.times.p50 / run.times.p50:.2f}"
            if run.peak and base.peak and not math.isnan(run.peak) and run is not base:
                ratios["less_memory"] = f"{base.peak / run.peak:.2f}"
            yield {
                **self.columns("step", run.provider),
                **(run.times.columns() if run.times else {f"{p}_ms": "" for p in Times._fields}),
                "peak_mib": "" if run.peak is None or math.isnan(run.peak) else f"{run.peak:.0f}",
                "speedup": "", "less_memory": "", **ratios,
                "compile_s": "" if run.compile_s is None else f"{run.compile_s:.2f}", "status": run.status,
            }  # fmt: skip


def cells(name: str, options: argparse.Namespace) -> Iterator[tuple[Cell, list[dict[str, Any]]]]:
    """Cells of a model with their rows, the checked length among them, and shorter ones where memory ran out."""
    asked = sorted(set(options.lengths))
    checked = {options.check_length or MODELS[name].sizes.check_length} if options.check else set()
    waiting = sorted({*asked, *checked})
    begun = set()
    while waiting:
        seq_len = waiting.pop(0)
        begun.add(seq_len)
        cell = Cell(name, seq_len, options)
        rows = list(cell.rows(timed=seq_len not in checked or seq_len in asked, checked=seq_len in checked))
        yield cell, rows
        half = seq_len // 2
        if any(row["status"] == "out of memory" for row in rows) and half not in begun and half >= min(asked):
            waiting.append(half)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in short."""
    lines = [f"{'model':<12} {'tokens':>7} {'provider':<11} {'ms':>10} {'MiB':>8} {'faster':>7} {'less memory':>11}"]
    for row in (row for row in rows if row["what"] == "step"):
        names = ("p50_ms", "peak_mib", "speedup", "less_memory")
        ms, mib, faster, less = (row[name] or "-" for name in names)
        lines.append(
            f"{row['model']:<12} {row['seq_len']:>7} {row['provider']:<11} {ms:>10} {mib:>8} {faster:>7} {less:>11}  "
            f"{row['status']}"
        )
    lines.append(f"{'model':<12} {'tokens':>7} {'error':>9} {'uncompiled':>10} {'loss':>8} {'uncompiled':>10} rows off")
    for row in (row for row in rows if row["what"] == "check"):
        error, eager, loss, plain, off = (
            row.get(name, "-") for name in ("error", "eager_error", "loss", "eager_loss", "rows_off")
        )
        lines.append(
            f"{row['model']:<12} {row['seq_len']:>7} {error:>9} {eager:>10} {loss:>8} {plain:>10} {off:>8}  "
            f"{row['status']}"
        )
    return "\n".join(lines)


def missed_goals(rows: list[dict[str, Any]]) -> list[str]:
    """Where a goal for 32K tokens was measured and not reached."""
    return [
        f"{row['model']}: {name} {row[name]}, goal {goal:g}"
        for row in rows
        for name, goal in GOALS.items()
        if row["what"] == "step" and row["seq_len"] >= 32768 and row[name] and float(row[name]) < goal
    ]


def parser() -> argparse.ArgumentParser:
    """What can be asked."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    result.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768])
    result.add_argument("--providers", nargs="+", choices=PROVIDERS, default=PROVIDERS)
    result.add_argument("--heads", type=int, nargs=2, metavar=("QUERY", "KEY"), help="of all models but MiniMax-M3")
    result.add_argument("--no-check", dest="check", action="store_false", help="do not train and compare")
    result.add_argument("--check-length", type=int, help="instead of 8192, and 3072 for MiniMax-M3")
    add_turns(result, rounds=10, seconds=6, of="a cell's turns")
    result.add_argument("--minutes", type=float, default=float("inf"), help="after which no other model is begun")
    result.add_argument("--out", type=Path, default=RESULTS / "recognised.csv")
    return result


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the CSV after each cell, print a table; 1 if anything failed, was wrong or was not recognised."""
    options = parser().parse_args(arguments)
    device = torch.device(options.device)
    if options.heads:
        heads = dict(zip(("num_q_heads", "num_kv_heads"), options.heads, strict=True))
        for name, model in MODELS.items():
            if model.sizes is LAYER:
                MODELS[name] = replace(model, sizes=replace(model.sizes, **heads))
    start, rows, failed = time.perf_counter(), [], False
    with tempfile.TemporaryDirectory() as folder, caches_in(folder):
        for name in options.models:
            if time.perf_counter() - start > options.minutes * 60:
                print(f"left out, the time is over: {name}", flush=True)
                continue
            for cell, new in cells(name, options):
                rows, failed = rows + new, failed or cell.failed
                write_csv(options.out, rows, device)
    print(table(rows))
    for missed in missed_goals(rows):
        print(f"MISSED {missed}")
    print(f"written to {options.out} after {time.perf_counter() - start:.0f} s")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
