"""Measure the configurations of the kernels and keep the best, in a table per GPU that launches and templates read.

    python -m benchmarks.tune --out tune.csv --write

Every kernel that a forward and backward of the given shapes launches is timed by itself with each of its record's
candidates. A configuration goes into the table where it is at least 2 % faster than the heuristic's.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import torch

import fsa_compile
from benchmarks.common import measure, write_csv
from fsa_compile import cost
from fsa_compile.templates.kernel import Kernel, Plan, device_of
from fsa_compile.testing.launches import Launches
from fsa_compile.tiling import Config, key, tuned_file

GAIN = 1.02


def launches(seq_len: int, num_kv_heads: int, group: int, head_dim: int, order: str) -> Launches:
    """What one training step of the whole launches, on random inputs."""
    torch.manual_seed(0)
    like: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
    q = torch.randn(1, seq_len, num_kv_heads * group, head_dim, **like).requires_grad_()
    k, v = (torch.randn(1, seq_len, num_kv_heads, head_dim, **like).requires_grad_() for _ in range(2))
    gates = [torch.rand(1, seq_len, num_kv_heads * group, **like) for _ in range(3)]
    with Launches() as found:
        out = fsa_compile.nsa_attention(q, k, v, *gates, loop_order=order)
        torch.autograd.grad(out.float().square().sum(), (q, k, v))
    return found


def tune(kernel: Kernel, plan: Plan, rounds: int) -> list[tuple[float, Config]]:
    """Milliseconds of every candidate that runs, the heuristic's first."""
    device = device_of(torch.device("cuda", torch.cuda.current_device()))
    outputs = kernel.allocate(plan)
    heuristic = kernel.heuristic(plan.sizes, device)
    found = []
    for config in [heuristic, *(c for c in kernel.candidates(plan.sizes, device) if c != heuristic)]:
        try:
            ms = measure({"": lambda c=config: kernel.launch(plan, outputs, c)}, rounds=rounds, warmup=1)[""]
        except Exception as error:  # what does not fit the chip
            print(f"    {config}: {type(error).__name__}")
            continue
        found.append((ms, config))
    return found


def main() -> None:
    """Tune, print the best three of each kernel, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--orders", nargs="+", default=list(cost.LOOP_ORDERS))
    parser.add_argument("--kernels", nargs="+", help="names, all by default")
    parser.add_argument("--seq-len", type=int, default=65536)
    parser.add_argument("--num-kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True, help="CSV of everything measured")
    parser.add_argument("--write", action="store_true", help="put the winners into the GPU's table")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    table: dict[str, dict[str, Any]] = {}
    done: set[tuple[str, Any]] = set()
    for group, order in itertools.product(args.groups, args.orders):
        found = launches(args.seq_len, args.num_kv_heads, group, args.head_dim, order)
        for name, (kernel, plan) in found.plans.items():
            if name in done or (args.kernels and kernel.name not in args.kernels):
                continue
            done.add(name)
            times = tune(kernel, plan, args.rounds)
            for ms, config in times:
                options = {"tiles": str(config.tiles), **config.options}
                rows.append({"group": group, "kernel": kernel.name, **options, "ms": ms})
            best = sorted(times, key=lambda item: item[0])
            for ms, config in best[:3]:
                print(f"{kernel.name} G={group} {ms:.3f} ms (heuristic {times[0][0]:.3f}) {config}", flush=True)
            if best[0][0] * GAIN < times[0][0]:
                winner = best[0][1]
                entry = [winner.tiles, winner.num_warps, winner.num_stages, winner.max_registers]
                table.setdefault(kernel.name, {})[key(plan.sizes)] = entry
        del found
        torch.cuda.empty_cache()
    write_csv(args.out, rows, torch.device("cuda"))
    if args.write:
        file = tuned_file(torch.cuda.get_device_name())
        known = json.loads(file.read_text()) if file.exists() else {}
        for kernel_name, entries in table.items():
            known.setdefault(kernel_name, {}).update(entries)
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
