"""Whole NSA attention against dense causal attention on a CPU, forward and forward with backward, over the length.

    OMP_NUM_THREADS=2 python -m benchmarks.cpu

Both run in float32 on the same random inputs, in turns, so that what else the machine does hits both. A row of the
result is one length and pass: seconds of each (the least of the rounds, and their percentiles), the ratio of the least
(below 1: NSA is faster) and the versions. The crossover printed at the end is where the ratio would be 1, interpolated
between the measured lengths in log-log. NSA selects its blocks itself. Other work on the same cores makes the numbers
worthless, those of NSA more than the others: it is many short parallel steps, each of which waits for the slowest
thread.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import fsa_compile
from benchmarks.common import RESULTS, Times, write_csv
from fsa_compile.testing.timing import seconds_of

CPU = torch.device("cpu")
LENGTHS = (4096, 16384, 65536)
SETTING = {"num_q_heads": 8, "num_kv_heads": 2, "head_dim": 64, "dtype": "float32"}


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention over every key. Repeats the key heads, as `enable_gqa` does inside."""
    group_size = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group_size, 2).transpose(1, 2) for x in (k, v))
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=True).transpose(1, 2)


def measure(seq_len: int, backward: bool, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of dense and of NSA attention in each of `rounds`, in turns; of several the first does not count."""
    generator = torch.Generator().manual_seed(0)
    heads, kv_heads, head_dim = SETTING["num_q_heads"], SETTING["num_kv_heads"], SETTING["head_dim"]
    q, k, v = (torch.randn(1, seq_len, h, head_dim, generator=generator) for h in (heads, kv_heads, kv_heads))  # type: ignore[arg-type]
    gates = [torch.rand(1, seq_len, heads, generator=generator) for _ in range(3)]  # type: ignore[arg-type]
    grad = torch.randn(q.shape, generator=generator)
    leaves = [x.requires_grad_(backward) for x in (q, k, v)]

    def once(fn: Callable[..., Tensor], *args: Tensor) -> Callable[[], object]:
        return lambda: torch.autograd.grad(fn(*args), leaves, grad) if backward else fn(*args)

    variants = once(dense, q, k, v), once(fsa_compile.nsa_attention, q, k, v, *gates)
    times = [[seconds_of(fn, CPU) for fn in variants] for _ in range(rounds)]
    of_dense, of_nsa = map(list, zip(*times[rounds > 1 :], strict=True))
    return of_dense, of_nsa


def crossover(ratios: dict[int, float]) -> str:
    """From which length on the ratio is below 1."""
    lengths = sorted(ratios)
    if ratios[lengths[0]] < 1:
        return f"below {lengths[0]}"
    for short, long in itertools.pairwise(lengths):
        if ratios[long] < 1:
            share = math.log(ratios[short]) / (math.log(ratios[short]) - math.log(ratios[long]))
            return f"about {round(math.exp(math.log(short) + share * (math.log(long) - math.log(short))))}"
    return f"above {lengths[-1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--rounds", type=int, default=4, help="at 16384 and below; one above")
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu.csv")
    args = parser.parse_args()
    rows = []
    for name, backward in (("forward", False), ("forward+backward", True)):
        ratios = {}
        for seq_len in args.lengths:
            times = measure(seq_len, backward, args.rounds if seq_len <= 16384 else 1)
            base, ours = map(min, times)
            percentiles = {
                f"{name}_{column}_s": f"{value:.4f}"
                for name, seconds_of in zip(("dense", "nsa"), times, strict=True)
                for column, value in Times.of(seconds_of)._asdict().items()
            }
            ratios[seq_len] = ours / base
            rows.append({
                "pass": name, "seq_len": seq_len, **SETTING, "threads": torch.get_num_threads(),
                "dense_s": f"{base:.4f}", "nsa_s": f"{ours:.4f}", "nsa_over_dense": f"{ours / base:.3f}", **percentiles,
            })  # fmt: skip
            print(f"{name} T={seq_len}: dense {base:8.3f} s, NSA {ours:8.3f} s: {ours / base:.3f}", flush=True)
        print(f"{name}: NSA is the faster one from T {crossover(ratios)}")
    write_csv(args.out, rows, torch.device("cpu"))
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
