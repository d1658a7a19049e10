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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fsa_compile
from benchmarks import exact
from benchmarks.cases import DENSE, Case, add_options, dense, exact_rows, measure, offered, sampled_rows, written
from benchmarks.common import RESULTS
from benchmarks.peers import STAGED

WINDOWS = {"kernel_size": 32, "kernel_stride": 16}
SELECTION = {"block_size": 64, "num_selected": 16, "init_blocks": 1, "local_blocks": 2}
WINDOW = {"window_size": 512}
STAGES = ("mean", "compressed", "select", "selected", "window", "whole")
PROVIDERS = ("eager", "compiled", "dense-cudnn", "dense-flash", *(peer.name for peer in STAGED))


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
        self.rows = sampled_rows(seq_len, options.rows, generator)
        with torch.no_grad():
            self.k_cmp, self.v_cmp = (fsa_compile.mean_compress(x, **WINDOWS) for x in (self.k, self.v))
            length = {"seq_len_k": seq_len}
            _, self.lse = fsa_compile.compressed_attention(self.q, self.k_cmp, self.v_cmp, **WINDOWS, **length)
            self.blocks = fsa_compile.select_blocks(self.q, self.k_cmp, self.lse, **WINDOWS, **SELECTION, **length)

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
            yield Case("mean", provider, wrap(mean), (k,), lambda k, rows: exact.means(k, **WINDOWS), 1,
                       every_row=True)  # fmt: skip
            yield Case("compressed", provider, wrap(compressed), (q, self.k_cmp, self.v_cmp),
                       lambda *args: exact.compressed(*args, **WINDOWS), 3)  # fmt: skip
            yield Case("select", provider, wrap(select), (q, self.k_cmp, self.lse), self.exact_blocks, 0, ("forward",))
            yield Case("selected", provider, wrap(selected), (q, k, v, self.blocks),
                       lambda q, k, v, blocks, rows: exact.selected(q, k, v, rows, blocks, size), 3)  # fmt: skip
            yield Case("window", provider, wrap(window), (q, k, v), lambda *args: exact.window(*args, **WINDOW), 3)
            yield Case("whole", provider, wrap(whole), (q, k, v, *self.gates), self.exact_whole(self.blocks), 6,
                       ("forward", "backward", "step"))  # fmt: skip

    def peer(self, make: Any) -> Iterator[Case]:
        """Another implementation, on its own selection."""
        peer = make(self.options.peers, [self.seq_len], {**WINDOWS, **SELECTION, **WINDOW})
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
        yield Case("mean", name, peer.mean, (k,), lambda k, rows: exact.means(k, **windows), 1, commit=commit,
                   every_row=True)  # fmt: skip
        yield Case("compressed", name, peer.compressed, (q, self.k_cmp, self.v_cmp),
                   lambda *args: exact.compressed(*args, **windows), 3, commit=commit)  # fmt: skip
        case = Case("select", name, select, (q, self.k_cmp, lse), self.exact_blocks, 0, ("forward",), commit=commit)
        case.errors["forward"] = exact.missing(blocks[0, self.rows], exact_rows(case, self.rows)[0])
        yield case
        yield Case("selected", name, peer.selected, (q, k, v, found),
                   lambda q, k, v, _, rows: exact.selected(q, k, v, rows, blocks, size), 3, commit=commit)  # fmt: skip
        yield Case("whole", name, peer.whole, (q, k, v, logits), exact_whole, 4, ("forward", "backward", "step"),
                   commit=commit)  # fmt: skip

    def cases(self) -> Iterator[Case]:
        """Those that were asked for and that there are."""
        asked = self.options.providers
        stages = ("whole",) if self.graph else self.options.stages
        sources: list[Callable[[], Iterator[Case]]] = [self.ours]
        sources += [
            lambda name=name: iter([dense(name, self.q, self.k, self.v)]) for name in DENSE if f"dense-{name}" in asked
        ]
        sources += [lambda make=make: self.peer(make) for make in STAGED if make.name in asked and not self.graph]
        heads, kv_heads = self.options.heads
        for case in offered(sources, lambda case: case.what in stages and case.provider in asked):
            # dense attention may have been given repeated key heads
            kv = case.args[1].shape[2] if "dense" in case.provider else kv_heads
            case.columns = {"seq_len": self.seq_len, "num_q_heads": heads, "num_kv_heads": kv}
            case.columns |= {"head_dim": self.options.head_dim, "dtype": self.options.dtype}
            yield case


def _compiled(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(fn, fullgraph=True, dynamic=False)


def measure_length(options: argparse.Namespace, seq_len: int, graph: bool = False) -> tuple[list[dict[str, Any]], bool]:
    """Rows of one length, and whether anything of ours was wrong."""
    torch._dynamo.reset()
    problem = Problem(options, seq_len, graph)
    return measure(problem.cases(), problem.rows, options, str(seq_len), graph)


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
    add_options(parser)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--providers", nargs="+", help=f"of {', '.join(PROVIDERS)}, dense-math; all but the last")
    parser.add_argument("--graph", type=int, nargs="?", const=4096, help="a length at which to time CUDA graphs too")
    parser.add_argument("--out", type=Path, default=RESULTS / "whole.csv")
    options = parser.parse_args(arguments)
    options.providers = options.providers or PROVIDERS
    lengths = [(seq_len, False) for seq_len in options.lengths] + ([(options.graph, True)] if options.graph else [])
    return written((measure_length(options, *length) for length in lengths), options, table)


if __name__ == "__main__":
    raise SystemExit(main())
