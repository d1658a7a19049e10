"""End to end: layers of Llama-3-8B, Qwen3-14B and Qwen2.5-32B, compiled whole, by attention; prefill and training.

    python -m benchmarks.models --models llama-3-8b --lengths 65536 --out benchmarks/results/models_h100.csv

A pass is "prefill" (forward, no gradients), "train" (forward, backward, fused AdamW) or "train-checkpointed" (the same,
each layer recomputed in the backward). Weights, gradients and Adam's moments have the dtype of the activations; one
sequence of random normal inputs; no embedding, no head, no key/value cache. A row says how many `layers` were run, of
the `model_layers` there are: four, or those that fit by `decoder.bytes_needed`, or `--layers`.

Providers share the weights and take turns: "auto" and the loop orders are `nsa_attention`, dense attention is SDPA of
one backend ("dense": whichever it takes). Every model is one full graph, but for peers, which run between graphs, since
they cannot be compiled; they have the window branch of this package. The same model with q + k + v for its attention, a
pointwise kernel, takes turns too: `attention_share` is what that saves, so that the gates and all that attention moves
around count, and the projections do not. `compile_cold_s` is the first call less the second, of forward and backward,
with empty caches on disk and in memory; `compile_warm_s` is that of the same source compiled once more from the cache
on disk, in the same process. `peak_gib` is all that is allocated. What ran out of memory has a row that says so.

Before they are timed, the compiled attention alone (ours, of these heads and this length) is held against the eager one
in the "nsa" order, gradients too: `error`. `output_error` holds the last hidden states against those of the first
provider of ours with the same blocks. From the second layer on, blocks whose scores nearly tie are selected by
rounding, so that it is allowed to be larger.

On a GPU set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True: providers of different needs take turns in one pool.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._inductor.utils import clear_caches

from benchmarks import exact
from benchmarks.attentions import PROVIDERS, Variant, attempt, check, compiled, free, variants
from benchmarks.common import RESULTS, Times, add_turns, timings, write_csv
from benchmarks.decoder import GIB, SHAPES, Decoder, Shape, fitting_layers

PASSES = ("prefill", "train", "train-checkpointed")
DEFAULT = ("dense-cudnn", "nsa", "auto")
OUTPUT_TOLERANCE = 5e-2
SAMPLED = 4096  # rows of hidden states, of which `output_error` is
ALONE = "ok, not in turns"
MOST_LAYERS = 4
_USABLE = 0.92  # of the memory; the rest is fragments, and what CUDA itself and its libraries take


@contextlib.contextmanager
def caches_in(folder: str) -> Iterator[None]:
    """What is compiled comes from `folder` and goes there, nothing from memory."""
    names = {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": str(Path(folder) / "triton")}
    before = {name: os.environ.get(name) for name in names}
    clear_caches()
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """Of one call, to the end of its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@dataclass(eq=False)
class Run:
    """A variant's model in one pass."""

    variant: Variant
    status: str = "ok"
    call: Callable[[], tuple[Tensor, Tensor]] | None = None
    cold: float | None = None
    warm: float | None = None
    peak: float | None = None
    loss: float | None = None
    output: Tensor | None = None
    output_error: float | None = None
    times: Times | None = None


class Cell:
    """One model, length and pass: weights, inputs, and a run for each variant."""

    def __init__(self, shape: Shape, seq_len: int, name: str, num_layers: int, like: Tensor) -> None:
        self.name, self.device = name, like.device
        self.train = name != "prefill"
        generator = torch.Generator(like.device).manual_seed(0)
        sizes = (1, seq_len, shape.hidden)
        self.x, self.target = (
            torch.randn(sizes, device=like.device, generator=generator).to(like.dtype) for _ in range(2)
        )
        self.x.requires_grad_(self.train)  # an embedding would want it
        self.weights = Decoder.random(shape, num_layers, seq_len, free, like)
        self.optimizer = torch.optim.AdamW(self.weights.parameters(), lr=1e-5, fused=True)

    def compiled(self, variant: Variant) -> Callable[[], tuple[Tensor, Tensor]]:
        """Loss and last hidden states, compiled; in training, the gradients too."""
        model = self.weights.sharing(variant.attention, self.name == "train-checkpointed")

        def forward(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
            out = model(x)
            return (out.float() - target.float()).square().sum(-1).mean(), out.detach()

        run = compiled(forward, variant.fullgraph)

        def call() -> tuple[Tensor, Tensor]:
            self.clear()
            with torch.set_grad_enabled(self.train):
                loss, out = run(self.x, self.target)
            if self.train:
                loss.backward()
            return loss.detach(), out

        return call

    def clear(self) -> None:
        """No gradients."""
        self.optimizer.zero_grad(set_to_none=True)
        self.x.grad = None

    def step(self, run: Run) -> None:
        """What is timed."""
        assert run.call is not None
        run.call()
        if self.train:
            self.optimizer.step()

    def compile(self, run: Run, warm: bool) -> None:
        """Compile, measure how long that takes, and keep what comes of the weights as they are in the beginning."""
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, caches_in(folder):
            run.call, run.cold = self._timed_compile(run.variant)
            if warm:
                clear_caches()
                run.call, run.warm = self._timed_compile(run.variant)
            loss, out = run.call()
        run.loss = loss.item()
        if run.variant.blocks:
            run.output = out[:, :: max(1, out.shape[1] // SAMPLED)].clone()

    def _timed_compile(self, variant: Variant) -> tuple[Callable[[], tuple[Tensor, Tensor]], float]:
        call = self.compiled(variant)
        first, second = (seconds_of(call, self.device) for _ in range(2))
        return call, first - second

    def peak(self, run: Run) -> None:
        """Measure the memory of a step that finds Adam's moments there."""
        self.step(run)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.step(run)
            torch.cuda.synchronize()
            run.peak = torch.cuda.max_memory_allocated() / GIB

    def measure(self, found: list[Variant], options: argparse.Namespace) -> list[Run]:
        """A run of each variant; those that work have times."""
        runs = [Run(variant, variant.status) for variant in found]
        for action in (lambda run: self.compile(run, options.warm), self.compare(runs), self.peak):
            for run in (run for run in runs if run.status == "ok"):
                with attempt(run, self.clear):
                    action(run)
        steps = {run: lambda run=run: self.step(run) for run in runs if run.status == "ok"}
        limits = {"rounds": options.rounds, "warmup": 1, "seconds": options.seconds, "device": self.device}
        together = Run(Variant("all", free))
        with attempt(together, self.clear):
            for run, times in timings(steps, **limits).items():
                run.times = times
        if together.status != "ok":  # each has run before, but what one frees may not fit the next
            for run, step in steps.items():
                run.status = ALONE
                with attempt(run, self.clear):
                    run.times = timings({run: step}, **limits)[run]
        return runs

    def compare(self, runs: list[Run]) -> Callable[[Run], None]:
        """Hold the outputs of ours against those of the first with the same blocks."""

        def against_the_first(run: Run) -> None:
            alike = (r for r in runs if r.variant.ours and r.variant.blocks == run.variant.blocks)
            first = next((r for r in alike if r.output is not None), run)
            if run.output is None or first.output is None or first is run:
                return
            run.output_error = exact.relative_error(run.output, first.output)
            if run.variant.ours and not run.output_error <= OUTPUT_TOLERANCE:
                run.status = "wrong"

        return against_the_first


def columns(run: Run, shape: Shape, seq_len: int, name: str, num_layers: int, dtype: str, base: Run) -> dict[str, Any]:
    """A row of the CSV."""

    def shown(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    variant, times = run.variant, run.times
    milliseconds = times.columns() if times else {f"{p}_ms": "" for p in Times._fields}
    share = 1 - base.times.p50 / times.p50 if times and base.times and run is not base else None
    block_size, num_selected = variant.blocks or ("", "")
    return {
        "model": shape.name, "pass": name, "provider": variant.provider, "block_size": block_size,
        "num_selected": num_selected, "seq_len": seq_len, "layers": num_layers, "model_layers": shape.num_layers,
        "num_q_heads": shape.num_q_heads, "num_kv_heads": shape.num_kv_heads, "head_dim": shape.head_dim,
        "dtype": dtype, **milliseconds, "tokens_per_s": shown(seq_len / times.p50 * 1e3 if times else None, 0),
        "attention_share": shown(share, 3), "peak_gib": shown(run.peak, 2), "compile_cold_s": shown(run.cold, 2),
        "compile_warm_s": shown(run.warm, 2), "loss": shown(run.loss, 4),
        "error": "" if variant.error is None else f"{variant.error:.2e}",
        "output_error": "" if run.output_error is None else f"{run.output_error:.2e}",
        "fullgraph": variant.fullgraph, "status": run.status, "peer_commit": variant.commit,
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in short, and how much faster than the first dense provider each is."""
    lines = [
        f"{'model':<12} {'pass':<18} {'tokens':>7} {'layers':>6} {'provider':<22} {'ms':>9} {'tokens/s':>9} "
        f"{'x dense':>7} {'share':>6} {'GiB':>6} {'cold s':>6} {'warm s':>6}  status"
    ]
    for row in rows:
        cell = [r for r in rows if all(r[n] == row[n] for n in ("model", "pass", "seq_len"))]
        dense_ms = next((float(r["p50_ms"]) for r in cell if r["provider"].startswith("dense") and r["p50_ms"]), None)
        ratio = f"{dense_ms / float(row['p50_ms']):.2f}" if dense_ms and row["p50_ms"] else ""
        blocks = f" {row['block_size']}x{row['num_selected']}" if row["block_size"] else ""
        lines.append(
            f"{row['model']:<12} {row['pass']:<18} {row['seq_len']:>7} {row['layers']:>6} "
            f"{row['provider'] + blocks:<22} {row['p50_ms']:>9} {row['tokens_per_s']:>9} {ratio:>7} "
            f"{row['attention_share']:>6} {row['peak_gib']:>6} {row['compile_cold_s']:>6} {row['compile_warm_s']:>6}  "
            f"{row['status']}"
        )
    return "\n".join(lines)


def _blocks(text: str) -> tuple[int, int]:
    block_size, num_selected = map(int, text.split("x"))
    return block_size, num_selected


def parser() -> argparse.ArgumentParser:
    """What can be asked."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    result.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 65536, 131072])
    result.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES)
    result.add_argument("--providers", nargs="+", choices=PROVIDERS, default=DEFAULT)
    result.add_argument("--blocks", type=_blocks, nargs="+", default=[(64, 16), (128, 8)], metavar="SIZExSELECTED")
    result.add_argument("--layers", type=int, help=f"instead of those that fit, {MOST_LAYERS} at most")
    result.add_argument("--no-check", dest="check", action="store_false", help="do not hold attention alone to account")
    result.add_argument("--no-warm", dest="warm", action="store_false", help="do not compile a second time")
    result.add_argument("--peers", type=Path, default=Path("peers"), help="folder with other people's checkouts")
    add_turns(result, rounds=10, seconds=20, of="a cell's turns")
    result.add_argument("--minutes", type=float, default=float("inf"), help="after which no other cell is begun")
    result.add_argument("--out", type=Path, default=RESULTS / "models.csv")
    return result


def measure_cell(
    found: list[Variant], shape: Shape, seq_len: int, name: str, options: argparse.Namespace, like: Tensor, memory: int
) -> tuple[list[dict[str, Any]], bool]:
    """Rows of one cell, and whether anything of this package failed or was wrong."""
    layers = options.layers or fitting_layers(shape, seq_len, name, memory, MOST_LAYERS)
    cell = Run(Variant("all", free))
    runs: list[Run] = []
    with attempt(cell):
        runs = Cell(shape, seq_len, name, layers, like).measure(found, options)
    runs = runs or [Run(variant, cell.status) for variant in found]  # not even the weights
    for run in runs:
        print(f"{shape.name} {seq_len} {name} {run.variant.label}: {run.status}", flush=True)
    failed = any(run.variant.ours and run.status not in ("ok", ALONE, "out of memory") for run in runs)
    return [columns(run, shape, seq_len, name, layers, options.dtype, runs[0]) for run in runs], failed


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the CSV after each cell, print a table; 1 if something of this package failed or was wrong."""
    options = parser().parse_args(arguments)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    memory = int(_USABLE * torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else 8 * GIB
    like = torch.empty(0, device=device, dtype=dtype)
    start, rows, failed = time.perf_counter(), [], False
    seconds_of(lambda: compiled(lambda x: x * 2)(like.new_ones(8)), device)  # Inductor's own start is nobody's
    for model, seq_len in itertools.product(options.models, options.lengths):
        shape = SHAPES[model]
        found: list[Variant] = []
        for name in options.passes:
            if time.perf_counter() - start > options.minutes * 60:
                print(f"left out, the time is over: {model} {seq_len} {name}", flush=True)
                continue
            torch._dynamo.reset()
            if not found:
                found = variants(options, shape, seq_len, device, dtype)
                for variant in found if options.check else ():
                    if variant.blocks:
                        with attempt(variant):
                            check(variant, shape, seq_len, like, train=any(p != "prefill" for p in options.passes))
            new, bad = measure_cell(found, shape, seq_len, name, options, like, memory)
            rows, failed = rows + new, failed or bad
            write_csv(options.out, rows, device)
    print(table(rows))
    print(f"written to {options.out}")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
