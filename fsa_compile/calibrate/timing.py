"""Times of the selected branch in every loop order, forward and backward, and of the lists alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import cost
from ..api import selected_attention
from ..testing.inputs import causal_block_indices
from ..testing.timing import seconds_of
from .grid import Cell, Measurement

__all__ = ["agreement", "measure", "variants"]

_ROUNDS = (3, 25)  # at least, and at most if there is time
_MEMORY_SHARE = 0.6  # of what is free, that the temporaries of an order may take

_Run = Callable[[], Any]


def agreement(block_indices: Tensor, problem: cost.Problem) -> float:
    """How far the tokens of a query tile agree, ``Problem.agreement``; block_indices: (1, T, HK, S), int32."""
    tokens = problem.union_tokens
    rows = block_indices[0, : block_indices.shape[1] // tokens * tokens].transpose(0, 1)  # [HK, T, S]
    tiles = rows.reshape(rows.shape[0], -1, tokens * rows.shape[-1]).sort(-1).values
    first = torch.ones_like(tiles, dtype=torch.bool)
    first[..., 1:] = tiles[..., 1:] != tiles[..., :-1]
    return cost.agreement_of(problem, float((first & (tiles >= 0)).sum(-1).double().mean()))


def variants(problem: cost.Problem, device: torch.device) -> tuple[cost.Problem, dict[tuple[str, str], _Run]]:
    """The problem with its agreement, and by order and stage what is timed. All values are drawn, also of blocks: a GPU
    is faster on zeros.
    """
    sizes = (problem.seq_len, problem.num_kv_heads, problem.num_selected, problem.block_size)
    block_indices = causal_block_indices(*sizes, device=device)
    generator = torch.Generator(device).manual_seed(0)
    heads, dtype = problem.num_kv_heads, torch.bfloat16 if problem.itemsize == 2 else torch.float32

    def normal(num_heads: int, dim: int) -> Tensor:
        drawn = torch.randn(1, problem.seq_len, num_heads, dim, device=device, generator=generator)
        return drawn.to(dtype).requires_grad_()

    q = normal(heads * problem.gqa_group_size, problem.head_dim)
    k, v = normal(heads, problem.head_dim), normal(heads, problem.head_dim_v)
    grad = normal(heads * problem.gqa_group_size, problem.head_dim_v).detach()
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else float("inf")
    runs: dict[tuple[str, str], _Run] = {}

    def add(order: str) -> None:
        def attend() -> Tensor:
            return selected_attention(q, k, v, block_indices, block_size=problem.block_size, loop_order=order)[0]

        @torch.no_grad()
        def forward() -> Tensor:
            return attend()

        out: list[Tensor] = []

        def backward() -> tuple[Tensor, ...]:
            if not out:
                out.append(attend())
            return torch.autograd.grad(out[0], (q, k, v), grad, retain_graph=True)

        for stage, run in (("forward", forward), ("backward", backward)):
            if (cost.first_like(order, stage), stage) not in runs:
                runs[order, stage] = run

    for order in cost.LOOP_ORDERS:
        if cost.scratch_bytes(problem, order, training=True) <= _MEMORY_SHARE * free:
            add(order)
    blocks = {"seq_len_k": problem.seq_len_k, "block_size": problem.block_size}
    if device.type == "cuda":
        runs["", "lists"] = lambda: torch.ops.fsa._block_lists(block_indices, None, None, None, None, **blocks)
    return replace(problem, agreement=agreement(block_indices, problem)), runs


def measure(cell: Cell, device: torch.device, seconds: float = 0.7) -> tuple[list[Measurement], list[str]]:
    """Medians of one cell, all variants taking turns, and what could not be run.

    Args:
        cell: the shape.
        device: where to run; times on a CPU are of its one path, whatever the order.
        seconds: for measuring, once everything is compiled; three rounds are made in any case.
    """
    p, failed = cell.problem, []
    shape = f"T={p.seq_len} G={p.gqa_group_size} block_size={p.block_size}"
    try:
        problem, runs = variants(p, device)
    except torch.OutOfMemoryError:
        return [], [f"{shape}: its inputs do not fit into memory"]
    for key, run in list(runs.items()):
        try:
            for _ in range(2):  # the first compiles
                run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except Exception as error:  # out of memory, or a tile that does not fit the chip
            del runs[key]
            why = f"{type(error).__name__}: {str(error)[:120]}".splitlines()[0]
            failed.append(f"{' '.join(filter(None, key))}, {shape}: {why}")
    times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    start, (least, most) = time.perf_counter(), _ROUNDS
    for i in range(most if runs else 0):
        if i >= least and time.perf_counter() - start > seconds:
            break
        for key, run in runs.items():
            times[key].append(seconds_of(run, device))
    return [Measurement(problem, cell.held_out, *key, statistics.median(t)) for key, t in times.items()], failed
