"""The selected branch on a GPU, index build included.

    python -m benchmarks.selected --out benchmarks/results/selected_h200.csv

Both loop orders, eager and as Inductor templates, forward and backward; and the gates and the sum of the three
branches after the forward, fused into the template's epilogue or left to a kernel of their own. All variants of one
row group take turns in one run.
"""

from __future__ import annotations

import argparse
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fsa_compile
from benchmarks.common import timings, write_csv
from fsa_compile import cost
from fsa_compile.ops.problem import device_of, problem_of
from fsa_compile.templates.selected import KERNELS
from fsa_compile.testing.inputs import causal_block_indices

ORDERS = ("fsa", "nsa")
# Milliseconds that may not be exceeded at seq_len 65536, 4 key/value heads, head_dim 128, on an H200.
TARGETS = {(1, "fsa"): 2.5, (4, "fsa"): 6.0, (16, "nsa"): 18.0}


def gated(order: str) -> Callable[..., Tensor]:
    """The end of nsa_attention: three gated branches, the selected one computed here."""

    def run(
        q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, o_cmp: Tensor, o_swa: Tensor, gates: Tensor
    ) -> Tensor:
        o_slc, _ = torch.ops.fsa.selected_attention(q, k, v, block_indices, loop_order=order)
        g_cmp, g_slc, g_swa = gates.unsqueeze(-1).unbind(0)
        return g_cmp * o_cmp + g_slc * o_slc + g_swa * o_swa

    return run


def compiled(fn: Callable[..., Any], *args: Any, fuse: bool = True) -> Callable[[], Any]:
    """`fn(*args)` compiled now, with or without fusing into the templates' epilogues."""
    # Dynamo keeps what it compiled by code object: the same source in another object is compiled anew.
    fn = types.FunctionType(fn.__code__.replace(), fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    recorded = {kernel: kernel.fuses_epilogue for kernel in KERNELS}
    try:
        for kernel in recorded:
            object.__setattr__(kernel, "fuses_epilogue", fuse)
        result = torch.compile(fn, fullgraph=True, dynamic=False)
        with torch.no_grad():
            result(*args)
    finally:
        for kernel, fuses in recorded.items():
            object.__setattr__(kernel, "fuses_epilogue", fuses)
    return lambda: result(*args)


def forward(order: str) -> Callable[..., Any]:
    """A function of its own for each order, as dynamo compiles functions."""
    return lambda *args: torch.ops.fsa.selected_attention_forward(*args, loop_order=order)


def backward(order: str) -> Callable[..., Any]:
    return lambda grad_out, *args: torch.ops.fsa.selected_attention_backward(grad_out, None, *args, loop_order=order)


def main() -> None:
    """Measure, print a table, write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--seq-len", type=int, default=65536)
    parser.add_argument("--num-kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--localities", nargs="+", default=["random", "local"], help="of random, local, trace (16384)")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--eager-only", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for locality in options.localities:
        block_indices = causal_block_indices(options.seq_len, options.num_kv_heads, locality=locality)
        for group in options.groups:
            torch._dynamo.reset()
            rows += one(options, group, locality, block_indices)
            write_csv(options.out, rows, torch.device("cuda"))
            torch.cuda.empty_cache()
    for row in rows:
        print(
            " ".join(
                f"{row[key]!s:>9}"
                for key in ("locality", "group", "what", "order", "variant", "ms", "chosen", "target")
            )
        )


def one(options: argparse.Namespace, group: int, locality: str, block_indices: Tensor) -> list[dict[str, Any]]:
    """All variants of one problem."""
    torch.manual_seed(0)
    like: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    q = torch.randn(1, options.seq_len, options.num_kv_heads * group, options.head_dim, **like)
    k, v = (torch.randn(1, options.seq_len, options.num_kv_heads, options.head_dim, **like) for _ in range(2))
    args = (q, k, v, block_indices)
    out, shift, log_sum = torch.ops.fsa.selected_attention_forward(*args)
    grad_out = torch.randn_like(out)
    branches = (torch.randn_like(out), torch.randn_like(out), torch.rand(3, *q.shape[:3], **like))
    problem = problem_of(q, k, v, block_indices, 64)
    runs: dict[tuple[str, str, str], Callable[[], Any]] = {}
    for order in ORDERS:
        back = (grad_out, *args, out, shift, log_sum)
        runs["forward", order, "eager"] = lambda order=order: forward(order)(*args)
        runs["backward", order, "eager"] = lambda order=order, back=back: backward(order)(*back)
        if options.eager_only:
            continue
        runs["forward", order, "template"] = compiled(forward(order), *args)
        runs["backward", order, "template"] = compiled(backward(order), *back)
        runs["gated", order, "fused"] = compiled(gated(order), *args, *branches)
        runs["gated", order, "separate"] = compiled(gated(order), *args, *branches, fuse=False)
    with torch.no_grad():
        times = timings(runs, rounds=options.rounds)
    chosen = {
        "forward": cost.choose(problem, device_of(q)),
        "backward": cost.choose(problem, device_of(q), backward=True),
    }
    return [
        {
            "locality": locality,
            "group": group,
            "seq_len": options.seq_len,
            "num_kv_heads": options.num_kv_heads,
            "head_dim": options.head_dim,
            "what": what,
            "order": order,
            "variant": variant,
            "ms": round(ms.p50, 3),
            **ms.columns(),
            "predicted_ms": round(chosen[what].costs[order] * 1e3, 3) if what in chosen else "",
            "chosen": chosen[what].order if what in chosen else "",
            "target": TARGETS.get((group, order), "") if (what, variant) == ("forward", "eager") else "",
        }
        for (what, order, variant), ms in times.items()
    ]


if __name__ == "__main__":
    assert fsa_compile.is_enabled()
    torch._inductor.config.force_disable_caches = True  # type: ignore[attr-defined]
    main()
