"""Whole NSA attention and its stages, against dense attention and other people's NSA, all taking turns in one run.

    python -m benchmarks.whole --out benchmarks/results/whole_h100.csv --peers peers --graph

Every stage forward and backward, whole forward, whole training step (forward and backward) and peak memory, of random
normal inputs of one sequence. A result is first held against float64 on sampled rows: an output on those rows, the
gradients for an upstream gradient that is zero elsewhere, whole. `error` is its relative error; for selected blocks,
the share that differs. `peak_mib` is what is allocated beyond the inputs and the results. "backward" is the time of the
backward alone, its forward done before. Peers are without a window branch; what they call "whole" leaves it out.
"""

from __future__ import annotations

import argparse
import gc
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fsa_compile
from benchmarks import exact
from benchmarks.common import RESULTS, timings, write_csv
from benchmarks.peers import PEERS

WINDOWS = {"kernel_size": 32, "kernel_stride": 16}
SELECTION = {"block_size": 64, "num_selected": 16, "init_blocks": 1, "local_blocks": 2}
WINDOW = {"window_size": 512}
STAGES = ("mean", "compressed", "select", "selected", "window", "whole")
PROVIDERS = ("eager", "compiled", "dense-cudnn", "dense-flash", *(peer.name for peer in PEERS))
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


class Problem:
    """Inputs of one length, what lies between the stages, and the cases of every provider."""

    def __init__(self, options: argparse.Namespace, seq_len: int, graph: bool = False) -> None:
        self.options, self.seq_len, self.graph = options, seq_len, graph
        self.device, self.dtype = torch.device(options.device), getattr(torch, options.dtype)
        generator = torch.Generator(self.device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device=self.device, generator=generator).to(self.dtype)

        heads, kv_heads = options.heads
        self.q = normal(1, seq_len, heads, options.head_dim)
        self.k, self.v = (normal(1, seq_len, kv_heads, options.head_dim) for _ in range(2))
        self.logits = normal(1, seq_len, heads, 3)
        self.gates = [x.contiguous() for x in self.logits.sigmoid().unbind(-1)]
        self.grad = normal(*self.q.shape)
        count = min(options.rows, seq_len)
        rows = torch.randperm(seq_len, device=self.device, generator=generator)[:count]
        rows[0] = seq_len - 1
        self.rows = rows.unique()
        with torch.no_grad():
            self.k_cmp, self.v_cmp = (fsa_compile.mean_compress(x, **WINDOWS) for x in (self.k, self.v))
            length = {"seq_len_k": seq_len}
            _, self.lse = fsa_compile.compressed_attention(self.q, self.k_cmp, self.v_cmp, **WINDOWS, **length)
            self.blocks = fsa_compile.select_blocks(self.q, self.k_cmp, self.lse, **WINDOWS, **SELECTION, **length)

    def shape(self, case: Case) -> dict[str, Any]:
        """Columns of a row: dense attention may have been given repeated key heads."""
        heads, kv_heads = self.options.heads
        kv_heads = case.args[1].shape[2] if "dense" in case.provider else kv_heads
        names = {"num_q_heads": heads, "num_kv_heads": kv_heads, "head_dim": self.options.head_dim}
        return {**names, "dtype": self.options.dtype}

    def exact_whole(self, blocks: Tensor, window: bool = True) -> Callable[..., Tensor]:
        """Of q, k, v and the gates."""

        def whole(q: Tensor, k: Tensor, v: Tensor, g_cmp: Tensor, g_slc: Tensor, g_swa: Tensor, rows: Tensor) -> Tensor:
            k_cmp, v_cmp = (exact.means(x, **WINDOWS) for x in (k, v))
            out = g_cmp[:, rows, :, None] * exact.compressed(q, k_cmp, v_cmp, rows, **WINDOWS)
            out = out + g_slc[:, rows, :, None] * exact.selected(q, k, v, rows, blocks, SELECTION["block_size"])
            return out + g_swa[:, rows, :, None] * exact.window(q, k, v, rows, **WINDOW) if window else out

        return whole

    def exact_blocks(self, q: Tensor, k_cmp: Tensor, _lse: Tensor, rows: Tensor) -> Tensor:
        """Of the given compressed keys."""
        return exact.blocks(q, k_cmp, rows, **WINDOWS, **SELECTION, seq_len=self.seq_len)

    def ours(self) -> Iterator[Case]:
        """Through the public functions, as the user calls them."""
        q, k, v, seq_len = self.q, self.k, self.v, self.seq_len
        size = SELECTION["block_size"]

        def mean(x: Tensor) -> Tensor:
            return fsa_compile.mean_compress(x, **WINDOWS)

        def compressed(q: Tensor, k_cmp: Tensor, v_cmp: Tensor) -> Tensor:
            return fsa_compile.compressed_attention(q, k_cmp, v_cmp, **WINDOWS, seq_len_k=seq_len)[0]

        def select(q: Tensor, k_cmp: Tensor, lse: Tensor) -> Tensor:
            return fsa_compile.select_blocks(q, k_cmp, lse, **WINDOWS, **SELECTION, seq_len_k=seq_len)

        def selected(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor) -> Tensor:
            return fsa_compile.selected_attention(q, k, v, blocks, block_size=size)[0]

        def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return fsa_compile.sliding_window_attention(q, k, v, **WINDOW)[0]

        def whole(q: Tensor, k: Tensor, v: Tensor, *gates: Tensor) -> Tensor:
            return fsa_compile.nsa_attention(q, k, v, *gates, **WINDOWS, **SELECTION, **WINDOW)

        for provider, wrap in (("eager", lambda fn: fn), ("compiled", _compiled)):
            yield Case("mean", provider, wrap(mean), (k,), lambda k, rows: exact.means(k, **WINDOWS), 1)
            yield Case("compressed", provider, wrap(compressed), (q, self.k_cmp, self.v_cmp),
                       lambda *args: exact.compressed(*args, **WINDOWS), 3)  # fmt: skip
            yield Case("select", provider, wrap(select), (q, self.k_cmp, self.lse), self.exact_blocks, 0, ("forward",))
            yield Case("selected", provider, wrap(selected), (q, k, v, self.blocks),
                       lambda q, k, v, blocks, rows: exact.selected(q, k, v, rows, blocks, size), 3)  # fmt: skip
            yield Case("window", provider, wrap(window), (q, k, v), lambda *args: exact.window(*args, **WINDOW), 3)
            yield Case("whole", provider, wrap(whole), (q, k, v, *self.gates), self.exact_whole(self.blocks), 6,
                       ("forward", "backward", "step"))  # fmt: skip

    def dense(self, name: str) -> Iterator[Case]:
        """Causal `scaled_dot_product_attention` of one backend."""

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            with sdpa_kernel(DENSE[name]):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

        args = [self.q, self.k, self.v]
        try:
            attention(*(x[:, :64] for x in args))
        except RuntimeError:  # no groups: their heads are repeated beforehand, outside of the time
            args[1:] = (x.repeat_interleave(self.q.shape[2] // x.shape[2], 2) for x in args[1:])
        yield Case("whole", f"dense-{name}", attention, tuple(args), exact.dense, 3, ("forward", "backward", "step"))

    def peer(self, make: Any) -> Iterator[Case]:
        """Another implementation, on its own selection."""
        peer = make(self.options.peers, self.seq_len, {**WINDOWS, **SELECTION, **WINDOW})
        q, k, v = self.q, self.k, self.v
        with torch.no_grad():
            lse = peer.lse(q, self.k_cmp, self.v_cmp)
            found = peer.select(q, self.k_cmp, lse)
            blocks = peer.ids(found, -(-self.seq_len // SELECTION["block_size"]))
        logits = self.logits[0].clone()
        logits[..., 2] = -1e4
        whole, size = self.exact_whole(blocks, window=False), SELECTION["block_size"]

        def exact_whole(q: Tensor, k: Tensor, v: Tensor, logits: Tensor, rows: Tensor) -> Tensor:
            return whole(q, k, v, *logits[None].sigmoid().unbind(-1), rows)

        def select(q: Tensor, k_cmp: Tensor, lse: Tensor) -> Tensor:
            return peer.select(q, k_cmp, lse)

        name, commit, windows = peer.name, peer.commit, WINDOWS
        yield Case("mean", name, peer.mean, (k,), lambda k, rows: exact.means(k, **windows), 1, commit=commit)
        yield Case("compressed", name, peer.compressed, (q, self.k_cmp, self.v_cmp),
                   lambda *args: exact.compressed(*args, **windows), 3, commit=commit)  # fmt: skip
        case = Case("select", name, select, (q, self.k_cmp, lse), self.exact_blocks, 0, ("forward",), commit=commit)
        case.errors["forward"] = exact.missing(blocks[0, self.rows], _rows_of(case, self.rows)[0])
        yield case
        yield Case("selected", name, peer.selected, (q, k, v, found),
                   lambda q, k, v, _, rows: exact.selected(q, k, v, rows, blocks, size), 3, commit=commit)  # fmt: skip
        yield Case("whole", name, peer.whole, (q, k, v, logits), exact_whole, 4, ("forward", "backward", "step"),
                   commit=commit)  # fmt: skip

    def cases(self) -> Iterator[Case]:
        """Those that were asked for and that there are."""
        asked = self.options.providers
        sources: list[Callable[[], Iterator[Case]]] = [self.ours]
        sources += [lambda name=name: self.dense(name) for name in DENSE if f"dense-{name}" in asked]
        sources += [lambda make=make: self.peer(make) for make in PEERS if make.name in asked and not self.graph]
        for source in sources:
            try:
                for case in source():
                    if case.what in (("whole",) if self.graph else self.options.stages) and case.provider in asked:
                        yield case
            except Exception as error:  # one that is not there, or does not fit
                print(f"left out: {type(error).__name__}: {str(error).splitlines()[0][:200]}", flush=True)


def _compiled(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(fn, fullgraph=True, dynamic=False)


def _rows_of(case: Case, rows: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The exact results of `rows`, and the arguments they are differentiated by."""
    wide = [x.detach().double() if x.is_floating_point() else x for x in case.args]
    leaves = [x.requires_grad_() for x in wide[: case.leaves]]
    return case.exact(*wide, rows), leaves


def check(case: Case, problem: Problem) -> None:
    """Fill in the errors."""
    if case.what == "select":
        if not case.errors:
            ids = case.forward()[0, problem.rows]
            case.errors["forward"] = exact.missing(ids, _rows_of(case, problem.rows)[0])
        return
    out, leaves = case.trained()
    rows = torch.arange(out.shape[1], device=out.device) if case.what == "mean" else problem.rows
    want, wide = _rows_of(case, rows)
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
    allowed = WRONG_BLOCKS if case.what == "select" else TOLERANCE[dtype]
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


def measure_length(options: argparse.Namespace, seq_len: int, graph: bool = False) -> tuple[list[dict[str, Any]], bool]:
    """Rows of one length, and whether anything of ours was wrong."""
    torch._dynamo.reset()
    problem = Problem(options, seq_len, graph)
    runs: dict[tuple[Case, str], Callable[..., Any]] = {}
    prepare: dict[tuple[Case, str], Callable[[], Any]] = {}
    peaks: dict[tuple[Case, str], float] = {}
    failed = False
    for case in problem.cases():
        label = f"{seq_len} {case.provider} {case.what}"
        try:
            check(case, problem)
            if bad := wrong(case, problem.dtype):
                print(f"{label}: WRONG {case.errors}", flush=True)
                failed = failed or not case.commit
            grad = problem.grad if case.what != "mean" else torch.randn_like(case.forward())
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
                    peaks[key] = peak_mib(lambda run=mine[name], state=state: run(state), problem.device)
                    prepare[key] = case.trained
                    del state
                else:
                    peaks[key] = peak_mib(mine[name], problem.device)
                runs[key] = mine[name]
        except Exception as error:  # out of memory, or not made for this device
            print(f"{label}: {type(error).__name__}: {str(error).splitlines()[0][:200]}", flush=True)
            failed = failed or case.provider in ("eager", "compiled")
    runs = {key: runs[key] for key in peaks if key in runs}
    found = timings(
        runs, prepare=prepare, rounds=options.rounds, seconds=options.seconds, device=problem.device
    )  # fmt: skip
    rows = [
        {
            "what": case.what, "pass": name, "provider": case.provider, "seq_len": seq_len, **problem.shape(case),
            **times.columns(), "peak_mib": "" if math.isnan(peaks[case, name]) else f"{peaks[case, name]:.0f}",
            "error": f"{case.errors[name]:.2e}", "peer_commit": case.commit,
        }
        for (case, name), times in found.items()
    ]  # fmt: skip
    return rows, failed


def table(rows: list[dict[str, Any]]) -> str:
    """Medians by provider."""
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    cells = {(row["seq_len"], row["what"], row["pass"], row["provider"]): row["p50_ms"] for row in rows}
    lines = [f"{'ms':>8} {'':<20} " + " ".join(f"{p:>18}" for p in providers)]
    for seq_len, what, name in dict.fromkeys(key[:3] for key in cells):
        values = (cells.get((seq_len, what, name, p), "-") for p in providers)
        lines.append(f"{seq_len:>8} {what + ' ' + name:<20} " + " ".join(f"{x:>18}" for x in values))
    return "\n".join(lines)


def _heads(text: str) -> tuple[int, int]:
    heads, kv_heads = map(int, text.split("/"))
    return heads, kv_heads


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the CSV, print a table; 1 if something of this package failed or was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="*", default=[16384, 65536])
    parser.add_argument("--heads", type=_heads, default=(32, 8), metavar="QUERY/KEY", help="such as 32/8")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--providers", nargs="+", help=f"of {', '.join(PROVIDERS)}, dense-math; all but the last")
    parser.add_argument("--peers", type=Path, default=Path("peers"), help="folder with other people's checkouts")
    parser.add_argument("--graph", type=int, nargs="?", const=4096, help="a length at which to time CUDA graphs too")
    parser.add_argument("--rows", type=int, default=16, help="rows that are checked")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=120, help="a length, after which three rounds are enough")
    parser.add_argument("--out", type=Path, default=RESULTS / "whole.csv")
    options = parser.parse_args(arguments)
    options.providers = options.providers or PROVIDERS
    lengths = [(seq_len, False) for seq_len in options.lengths] + ([(options.graph, True)] if options.graph else [])
    rows: list[dict[str, Any]] = []
    failed = False
    for seq_len, graph in lengths:
        found, bad = measure_length(options, seq_len, graph)
        rows, failed = rows + found, failed or bad
        if rows:
            write_csv(options.out, rows, torch.device(options.device))
        if options.device == "cuda":
            torch.cuda.empty_cache()
    print(table(rows))
    print(f"written to {options.out}")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
