"""The selected branch by group, block size, selection and length: every loop order, dense attention, other people's.

    python -m benchmarks.selected --out benchmarks/results/selected_h100.csv --peers peers

Providers: a loop order ("auto" too) is the eager operator, lists and all; with "-compiled" it is Inductor's template.
"gated" is the end of nsa_attention, three gated branches of which the selected one is computed: fused into the
template's epilogue where it can be, or "-separate". Dense attention is given the same lengths. A result is first held
against float64 on sampled rows. All take turns in one run. `chosen` is the order that the cost model takes, of a step
the forward's and the backward's where they differ, `predicted` its milliseconds for each. Selections: "random" and
"local" (`fsa_compile.testing.inputs`), and "trace", a trained model's, in packed sequences of 16,384 tokens.
"""

from __future__ import annotations

import argparse
import itertools
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fsa_compile
from benchmarks import exact
from benchmarks.cases import DENSE, Case, add_options, dense, measure, offered, sampled_rows, written
from benchmarks.common import RESULTS
from benchmarks.peers import PEERS
from fsa_compile import cost
from fsa_compile.ops.problem import device_of, problem_of
from fsa_compile.templates.selected import KERNELS
from fsa_compile.testing.inputs import causal_block_indices

ORDERS = ("auto", *cost.LOOP_ORDERS)
PROVIDERS = (
    *(f"{order}{variant}" for order in ORDERS for variant in ("", "-compiled")),
    *(f"dense-{name}" for name in DENSE),
    *(peer.name for peer in PEERS),
)
DEFAULT = (*ORDERS, "auto-compiled", "dense-cudnn", "dense-flash", *(peer.name for peer in PEERS))
TRACE_TOKENS = 16384
_PASSES = ("forward", "backward", "step")


class Problem:
    """Inputs of one cell, and the cases of every provider."""

    def __init__(
        self, options: argparse.Namespace, seq_len: int, pattern: str, group: int, block_size: int, num_selected: int
    ) -> None:
        self.options, self.pattern, self.block_size, self.num_selected = options, pattern, block_size, num_selected
        device, dtype = torch.device(options.device), getattr(torch, options.dtype)
        generator = torch.Generator(device).manual_seed(0)
        heads = options.num_kv_heads
        self.lengths = [seq_len]
        if pattern == "trace" and seq_len > TRACE_TOKENS:
            self.lengths = [TRACE_TOKENS] * (seq_len // TRACE_TOKENS)
            if sum(self.lengths) != seq_len:
                raise ValueError(f"seq_len is {seq_len}; a trace of {TRACE_TOKENS} tokens does not fill it")
        sizes = {"num_selected": num_selected, "block_size": block_size}
        made = causal_block_indices(self.lengths[0], heads, locality=pattern, device=device, **sizes)
        self.blocks = made.repeat(1, len(self.lengths), 1, 1)
        bounds = torch.tensor([0, *itertools.accumulate(self.lengths)], dtype=torch.int32, device=device)
        self.packed = {"cu_seqlens_q": bounds} if len(self.lengths) > 1 else {}

        def normal(heads: int) -> Tensor:
            return torch.randn(1, seq_len, heads, options.head_dim, device=device, generator=generator).to(dtype)

        self.q, self.k, self.v = normal(heads * group), normal(heads), normal(heads)
        self.rows = sampled_rows(seq_len, options.rows, generator)
        self.starts = bounds[torch.searchsorted(bounds, self.rows, right=True) - 1]
        problem = problem_of(self.q, self.k, self.v, self.blocks, block_size)
        self.columns = {
            "pattern": pattern, "seq_len": seq_len, "num_sequences": len(self.lengths), "group": group,
            "num_kv_heads": heads, "head_dim": options.head_dim, "block_size": block_size,
            "num_selected": num_selected, "dtype": options.dtype,
        }  # fmt: skip
        self.problem, self.device = problem, device_of(self.q)

    def choices(self, what: str, order: str, *, compiled: bool) -> list[cost.Choice]:
        """Of a pass: those of a step's two directions, which have the lists in common where they are compiled."""
        forward, backward = {"training": compiled and what == "step"}, {"backward": True}
        flags = {"forward": [forward], "backward": [backward], "step": [forward, backward]}[what]
        return [cost.choose(self.problem, self.device, order, eager=not compiled, **one) for one in flags]

    def exact(self, q: Tensor, k: Tensor, v: Tensor, _: Any, rows: Tensor) -> Tensor:
        """Of the rows that are checked."""
        return exact.selected(q, k, v, rows, self.blocks, self.block_size, self.starts)

    def ours(self, order: str) -> Iterator[Case]:
        """The operator in one loop order."""
        options = {"block_size": self.block_size, "loop_order": order, **self.packed}

        def selected(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor) -> Tensor:
            return fsa_compile.selected_attention(q, k, v, blocks, **options)[0]

        args = (self.q, self.k, self.v, self.blocks)
        yield Case("selected", order, selected, args, self.exact, 3, _PASSES)
        yield Case("selected", f"{order}-compiled", _compiled(selected), args, self.exact, 3, _PASSES)

    def gated(self, order: str) -> Iterator[Case]:
        """The end of nsa_attention."""
        options = {"block_size": self.block_size, "loop_order": order, **self.packed}
        others = [torch.randn_like(self.q) for _ in range(2)]
        gates = [torch.rand_like(self.q[..., 0]) for _ in range(3)]

        def gated(
            q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, o_cmp: Tensor, o_swa: Tensor, *gates: Tensor
        ) -> Tensor:
            o_slc = fsa_compile.selected_attention(q, k, v, blocks, **options)[0]
            g_cmp, g_slc, g_swa = (g.unsqueeze(-1) for g in gates)
            return g_cmp * o_cmp + g_slc * o_slc + g_swa * o_swa

        def exactly(q: Tensor, k: Tensor, v: Tensor, _: Any, o_cmp: Tensor, o_swa: Tensor, *rest: Any) -> Tensor:
            *gates, rows = rest
            o_slc = self.exact(q, k, v, None, rows)
            g_cmp, g_slc, g_swa = (g[:, rows, :, None] for g in gates)
            return g_cmp * o_cmp[:, rows] + g_slc * o_slc + g_swa * o_swa[:, rows]

        args = (self.q, self.k, self.v, self.blocks, *others, *gates)
        for suffix, fuse in (("compiled", True), ("separate", False)):
            yield Case("gated", f"{order}-{suffix}", _compiled(gated, fuse=fuse), args, exactly, 3, ("forward",))

    def peer(self, make: Any) -> Iterator[Case]:
        """Another implementation, on the same selection."""
        names = {"kernel_size": 32, "kernel_stride": 16, "window_size": 512, "init_blocks": 1, "local_blocks": 2}
        sizes = {"block_size": self.block_size, "num_selected": self.num_selected}
        peer = make(self.options.peers, self.lengths, {**names, **sizes})
        found = peer.found(self.blocks, -(-self.q.shape[1] // self.block_size))
        args = (self.q, self.k, self.v, found)
        yield Case("selected", peer.name, peer.selected, args, self.exact, 3, _PASSES, commit=peer.commit)

    def dense(self, name: str) -> Iterator[Case]:
        """Causal attention over one sequence; packed ones are left out."""
        if not self.packed:
            case = dense(name, self.q, self.k, self.v)
            case.what = "selected"
            yield case

    def cases(self) -> Iterator[Case]:
        """Those that were asked for and that there are."""
        asked, whats = self.options.providers, self.options.what
        sources: list[Callable[[], Iterator[Case]]] = []
        for order in ORDERS:
            sources += [lambda order=order: self.ours(order), lambda order=order: self.gated(order)]
        sources += [lambda name=name: self.dense(name) for name in DENSE if f"dense-{name}" in asked]
        sources += [lambda make=make: self.peer(make) for make in PEERS if make.name in asked]
        wanted = {*asked, *(name.replace("-compiled", "-separate") for name in asked)}
        for case in offered(sources, lambda case: case.what in whats and case.provider in wanted):
            case.columns = self.columns
            yield case


def _compiled(fn: Callable[..., Tensor], fuse: bool | None = None) -> Callable[..., Tensor]:
    """`fn` compiled; ``fuse``: with all or none of the templates' epilogues, rather than as recorded."""
    # Dynamo keeps what it compiled by code object: the same source in another object is compiled anew.
    fn = types.FunctionType(fn.__code__.replace(), fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    result = torch.compile(fn, fullgraph=True, dynamic=False)
    if fuse is None:
        return result

    def run(*args: Tensor) -> Tensor:
        recorded = {kernel: kernel.fuses_epilogue for kernel in KERNELS}
        try:  # compiled at a call, which may be the first of its kind
            for kernel in recorded:
                object.__setattr__(kernel, "fuses_epilogue", fuse)
            return result(*args)
        finally:
            for kernel, fuses in recorded.items():
                object.__setattr__(kernel, "fuses_epilogue", fuses)

    return run


def table(rows: list[dict[str, Any]]) -> str:
    """Medians by provider, a line for each cell and pass; last, how many times "auto" the best peer takes."""
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    names = ("pattern", "seq_len", "block_size", "num_selected", "group", "what", "pass")
    cells = {(tuple(row[n] for n in names), row["provider"]): row["p50_ms"] for row in rows}
    chosen = {tuple(row[n] for n in names): row["chosen"] for row in rows}
    lines = [f"{'ms':<50} {'chosen':>6} " + " ".join(f"{p[:14]:>14}" for p in (*providers, "peer/auto"))]
    for key in dict.fromkeys(key for key, _ in cells):
        values = [cells.get((key, p), "-") for p in providers]
        peers = [float(cells[key, peer.name]) for peer in PEERS if (key, peer.name) in cells]
        ratio = min(peers) / float(cells[key, "auto"]) if peers and (key, "auto") in cells else None
        values.append("-" if ratio is None else f"{ratio:.2f}")
        lines.append(f"{' '.join(map(str, key)):<50} {chosen[key]:>6} " + " ".join(f"{x:>14}" for x in values))
    return "\n".join(lines)


def _blocks(text: str) -> tuple[int, int]:
    block_size, num_selected = map(int, text.split("x"))
    return block_size, num_selected


def measured(options: argparse.Namespace) -> Iterator[tuple[list[dict[str, Any]], bool]]:
    """Rows of one cell after the other, and whether anything of ours was wrong."""
    cells = itertools.product(options.lengths, options.patterns, options.blocks, options.groups)
    for seq_len, pattern, (block_size, num_selected), group in cells:
        if pattern == "trace" and (block_size, num_selected) != (64, 16):
            continue  # nobody recorded one
        torch._dynamo.reset()
        problem = Problem(options, seq_len, pattern, group, block_size, num_selected)
        label = f"{seq_len} {pattern} {block_size}x{num_selected} G={group}"
        found, bad = measure(problem.cases(), problem.rows, options, label)
        for row in found:
            order, _, variant = row["provider"].partition("-")
            chosen = problem.choices(row["pass"], "auto", compiled=bool(variant))
            row["chosen"] = "+".join(dict.fromkeys(choice.order for choice in chosen))
            row["predicted_ms"] = ""
            if order in ORDERS and row["what"] == "selected":
                choices = problem.choices(row["pass"], order, compiled=bool(variant))
                row["predicted_ms"] = f"{sum(c.costs[c.order] for c in choices) * 1e3:.4f}"
        yield found, bad


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the CSV, print a table; 1 if something of this package failed or was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--lengths", type=int, nargs="+", default=[65536])
    parser.add_argument("--blocks", type=_blocks, nargs="+", default=[(64, 16)], metavar="SIZExSELECTED")
    parser.add_argument("--patterns", nargs="+", choices=("random", "local", "trace"), default=("random", "trace"))
    parser.add_argument("--num-kv-heads", type=int, default=4)
    parser.add_argument("--what", nargs="+", choices=("selected", "gated"), default=("selected",))
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=DEFAULT)
    parser.add_argument("--out", type=Path, default=RESULTS / "selected.csv")
    add_options(parser)
    options = parser.parse_args(arguments)
    return written(measured(options), options, table)


if __name__ == "__main__":
    raise SystemExit(main())
