"""Time the launch options of the kernels of the selected branch, one kernel at a time.

    python -m benchmarks.tune --out tune.csv

The defaults in `fsa_compile/templates/*.py` are the winners of such runs.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import measure, write_csv
from fsa_compile.ops import cuda, loop_order, loop_order_backward
from fsa_compile.templates import (
    config,
    merge_partials,
    selected_bwd_kv_outer,
    selected_bwd_query_outer,
    selected_fwd_kv_outer,
    selected_fwd_query_outer,
    sum_partials,
)
from fsa_compile.testing.inputs import causal_block_indices

SPACES: dict[str, dict[str, list[int]]] = {
    "selected_fwd_query_outer": {"num_warps": [1, 2, 4], "num_stages": [1, 2, 3]},
    "selected_fwd_kv_outer": {"BLOCK_M": [64, 128], "num_warps": [4, 8], "num_stages": [1, 2, 3]},
    "merge_partials": {"BLOCK_R": [1, 2, 4, 8], "num_warps": [1, 2, 4]},
    "selected_bwd_query_outer": {"num_warps": [1, 2, 4], "num_stages": [1, 2, 3]},
    "selected_bwd_kv_outer": {"BLOCK_M": [32, 64, 128], "num_warps": [4, 8], "num_stages": [1, 2, 3]},
    "selected_bwd_kv_outer_dq": {"BLOCK_M": [32, 64, 128], "num_warps": [4, 8], "num_stages": [1, 2, 3]},
    "sum_partials": {"BLOCK_R": [1, 2, 4, 8], "num_warps": [1, 2, 4]},
}
MODULES = {
    "selected_fwd_query_outer": selected_fwd_query_outer,
    "selected_fwd_kv_outer": selected_fwd_kv_outer,
    "merge_partials": merge_partials,
    "selected_bwd_query_outer": selected_bwd_query_outer,
    "selected_bwd_kv_outer": selected_bwd_kv_outer,
    "selected_bwd_kv_outer_dq": selected_bwd_kv_outer,
    "sum_partials": sum_partials,
}


@contextmanager
def overridden(module: Any, options: dict[str, int]) -> Iterator[None]:
    """Launch the module's kernel with other options."""
    meta = module.meta
    module.meta = lambda *args: meta(*args) | options
    try:
        yield
    finally:
        module.meta = meta


def calls(group: int, seq_len: int, num_kv_heads: int, head_dim: int, locality: str) -> dict[str, Callable[[], Any]]:
    """One launch of every kernel on the same random problem."""
    torch.manual_seed(0)
    options = {"dtype": torch.bfloat16, "device": "cuda"}
    q = torch.randn(1, seq_len, num_kv_heads * group, head_dim, **options)
    k, v = (torch.randn(1, seq_len, num_kv_heads, head_dim, **options) for _ in range(2))
    block_indices = causal_block_indices(seq_len, num_kv_heads, locality=locality)
    none = cuda.PackedTables(None, None, None, None, None)
    lists = loop_order._block_lists(block_indices, *none, seq_len_k=seq_len, block_size=64)
    sizes = {"block_size": 64, "scale": head_dim**-0.5}
    lengths = {"block_size": 64, "seq_len_k": seq_len}
    queries = none.queries
    out, shift, log_sum = loop_order._selected_fwd_query_outer(q, k, v, block_indices, *queries, **sizes)
    partials = loop_order._selected_fwd_kv_outer(q, k, v, block_indices, *lists, *queries, **sizes)
    grad_out = torch.randn_like(out)
    delta = loop_order_backward._attention_delta(grad_out, None, out)
    args = (grad_out, q, k, v, block_indices, shift, log_sum, delta)
    tiles = loop_order_backward._selected_bwd_kv_outer(*args, *lists, *queries, **sizes, with_dq=True)
    ops, back = loop_order, loop_order_backward
    return {
        "block_lists": lambda: ops._block_lists(block_indices, *none, seq_len_k=seq_len, block_size=64),
        "selected_fwd_query_outer": lambda: ops._selected_fwd_query_outer(q, k, v, block_indices, *queries, **sizes),
        "selected_fwd_kv_outer": lambda: ops._selected_fwd_kv_outer(q, k, v, block_indices, *lists, *queries, **sizes),
        "merge_partials": lambda: ops._merge_partials(
            *partials, block_indices, *queries, **lengths, scale=sizes["scale"]
        ),
        "attention_delta": lambda: back._attention_delta(grad_out, None, out),
        "selected_bwd_query_outer": lambda: back._selected_bwd_query_outer(*args, *queries, **sizes),
        "selected_bwd_kv_outer": lambda: back._selected_bwd_kv_outer(*args, *lists, *queries, **sizes, with_dq=False),
        "selected_bwd_kv_outer_dq": lambda: back._selected_bwd_kv_outer(*args, *lists, *queries, **sizes, with_dq=True),
        "sum_partials": lambda: back._sum_partials(tiles[2], block_indices, *queries, **lengths),
        "reduce_tiles": lambda: back._reduce_tiles(tiles[0], lists[2], k, None, None, None, block_size=64),
    }


def main() -> None:
    """Sweep and print the three best options of each kernel."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--kernels", nargs="+", default=list(SPACES))
    parser.add_argument("--entries-per-tile", type=int, nargs="+", default=[config.ENTRIES_PER_TILE])
    parser.add_argument("--seq-len", type=int, default=65536)
    parser.add_argument("--num-kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--locality", default="random")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for group, entries in itertools.product(args.groups, args.entries_per_tile):
        for module in (config, loop_order, selected_fwd_kv_outer, selected_bwd_kv_outer):
            module.ENTRIES_PER_TILE = entries  # type: ignore[attr-defined]
        runs = calls(group, args.seq_len, args.num_kv_heads, args.head_dim, args.locality)
        plain = measure(runs, rounds=args.rounds)
        for name, ms in plain.items():
            print(f"G={group} entries={entries} {name} default {ms:.3f} ms", flush=True)
            rows.append({"group": group, "entries_per_tile": entries, "kernel": name, "options": "default", "ms": ms})
        for name in args.kernels:
            found = []
            for values in itertools.product(*SPACES[name].values()):
                options = dict(zip(SPACES[name], values, strict=True))
                with overridden(MODULES[name], options):
                    try:
                        ms = measure({name: runs[name]}, rounds=args.rounds, warmup=1)[name]
                    except Exception as error:  # an option that does not fit the chip
                        print(f"{name} {options}: {type(error).__name__}")
                        continue
                found.append((ms, options))
                rows.append(
                    {"group": group, "entries_per_tile": entries, "kernel": name, "options": str(options), "ms": ms}
                )
            for ms, options in sorted(found, key=lambda item: item[0])[:3]:
                print(f"    {name} {ms:.3f} ms {options}", flush=True)
        write_csv(args.out, rows, torch.device("cuda"))
        del runs
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
