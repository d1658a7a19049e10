"""What the benchmarks share: inputs, interleaved timing, and result files that carry their versions."""

from __future__ import annotations

import csv
import platform
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import triton

import fsa_compile

RESULTS = Path(__file__).parent / "results"


def versions(device: torch.device) -> dict[str, str]:
    """What a number was measured with."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "fsa_compile": fsa_compile.__version__,
    }


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]], device: torch.device) -> None:
    """Write rows, each followed by the versions, in the order of the first row's keys."""
    rows = [{**row, **versions(device)} for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def causal_block_indices(
    seq_len: int,
    num_kv_heads: int,
    num_selected: int = 16,
    block_size: int = 64,
    *,
    locality: str = "random",
    device: torch.device | str = "cuda",
    seed: int = 0,
) -> torch.Tensor:
    """Block indices as the selection makes them: the first, current and previous block always, the rest drawn.

    `locality="random"` draws for every token by itself; `"local"` lets 64 neighbours share most of their draw, as
    trained models do. Returns (1, seq_len, num_kv_heads, num_selected), int32, ascending, -1 at the end.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    num_blocks = -(-seq_len // block_size)
    blocks = torch.arange(num_blocks, device=device)
    chunk = max(64, min(seq_len, 2**28 // (num_blocks * num_kv_heads)) // 64 * 64)
    parts = []
    for start in range(0, seq_len, chunk):
        rows = torch.arange(start, min(seq_len, start + chunk), device=device)
        score = torch.rand(len(rows), num_kv_heads, num_blocks, device=device, generator=generator)
        if locality == "local":
            shared = torch.rand(-(-len(rows) // 64), num_kv_heads, num_blocks, device=device, generator=generator)
            score = score * 0.01 + shared.repeat_interleave(64, 0)[: len(rows)]
        current = (rows // block_size)[:, None, None]
        score = torch.where((blocks == 0) | (blocks == current) | (blocks == current - 1), 2.0, score)
        score = torch.where(blocks > current, -1.0, score)
        top = score.topk(min(num_selected, num_blocks), -1)
        picked = torch.where(top.values >= 0, top.indices, num_blocks).sort(-1).values
        parts.append(torch.where(picked == num_blocks, -1, picked).int())
    result = torch.cat(parts)[None]
    return torch.nn.functional.pad(result, (0, num_selected - result.shape[-1]), value=-1)


def measure(
    variants: Mapping[str, Callable[[], Any]], *, rounds: int = 10, warmup: int = 2, device: torch.device | str = "cuda"
) -> dict[str, float]:
    """Median milliseconds of each variant; they take turns, so that drift of a shared machine hits all alike."""
    for _ in range(warmup):
        for run in variants.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            times[name].append(_once(run, torch.device(device)))
    return {name: statistics.median(values) for name, values in times.items()}


def _once(run: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        import time

        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)
