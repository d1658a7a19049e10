"""NSA loop order, forward: one program per (query row, key/value head) walks the row's selected blocks."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ...tiling import Config, Device, next_power_of_2
from ..kernel import SEQUENCES, Kernel, Output, Plan, sequences
from ..sequences import Rows, Run, Sequences, run_of_row
from ..tiles import (
    columns,
    dense_strides,
    dot,
    exp_scaled,
    finite_max,
    is_visible,
    load_tile,
    log_or_none,
    store_output,
)
from .lists import load_rows
from .sizes import SelectedSizes, attention_inputs, spread, stages, warps


@triton.jit
def load_keys(x: Rows, b, hk, row, visible, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr):
    """BLOCK_N rows of k or v from key row ``row`` on, those that are visible."""  # [BLOCK_N, BLOCK_W]
    base = x.ptr + b.to(tl.int64) * x.strides[0] + hk.to(tl.int64) * x.strides[2] + row.to(tl.int64) * x.strides[1]
    return load_tile(base, tl.arange(0, BLOCK_N) * x.strides[1], visible, WIDTH, BLOCK_W)


@triton.jit
def key_tile(k: Rows, v: Rows, block_indices, slots, i, run: Run, hk, pos, SIZES: tl.constexpr):
    """The ``i``-th key tile of a row's blocks: which keys the row sees ``[BLOCK_N]``, and their rows of k and of v."""
    TILES: tl.constexpr = SIZES.BLOCK_SIZE // SIZES.BLOCK_N
    block = tl.load(block_indices + slots + i // TILES)
    seen = is_visible(block, pos, SIZES.BLOCK_SIZE)
    start = tl.where(seen, block, 0) * SIZES.BLOCK_SIZE + (i % TILES) * SIZES.BLOCK_N
    visible = start + tl.arange(0, SIZES.BLOCK_N) <= tl.where(seen, pos, -1)
    row = run.first_key + start
    k_tile = load_keys(k, run.b, hk, row, visible, SIZES.BLOCK_N, SIZES.HEAD_DIM, SIZES.BLOCK_D)
    return visible, k_tile, load_keys(v, run.b, hk, row, visible, SIZES.BLOCK_N, SIZES.HEAD_DIM_V, SIZES.BLOCK_DV)


@triton.jit
def selected_fwd_query_outer_tile(
    q: Rows, k: Rows, v: Rows, block_indices, n, hk, seqs: Sequences, scale, SIZES: tl.constexpr,
    BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Attention of the heads of one group at row ``n`` over its selected blocks.

    Returns ``(out, shift, log_sum, b, t)``: float32 ``[BLOCK_G, BLOCK_DV]``, ``[BLOCK_G]`` and ``[BLOCK_G]``, and where
    the row lies.
    """
    run, t = run_of_row(seqs, n)
    pos = tl.where(run.num_keys > 0, run.offset + t - run.first_row, -1)
    heads = tl.arange(0, BLOCK_G)
    rows = load_rows(q, run.b, hk, t, heads, heads < SIZES.GROUP, SIZES.GROUP, SIZES.HEAD_DIM, SIZES.BLOCK_D)
    slots = (n.to(tl.int64) * SIZES.NUM_KV_HEADS + hk) * SIZES.NUM_SELECTED

    row_max = tl.full([BLOCK_G], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_G], tl.float32)
    BLOCK_DV: tl.constexpr = SIZES.BLOCK_DV
    acc = tl.zeros([BLOCK_G, BLOCK_DV], tl.float32)
    # One flat loop over key tiles, masked rather than branched, so that Triton can pipeline the loads.
    for i in range(SIZES.NUM_SELECTED * (SIZES.BLOCK_SIZE // SIZES.BLOCK_N)):
        visible, k_tile, v_tile = key_tile(k, v, block_indices, slots, i, run, hk, pos, SIZES)
        scores = tl.where(visible[None, :], dot(rows, tl.trans(k_tile)), float("-inf"))  # [BLOCK_G, BLOCK_N]
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        shift = finite_max(new_max)
        p = exp_scaled(scores, shift[:, None], scale)
        decay = exp_scaled(row_max, shift, scale)
        row_sum = row_sum * decay + tl.sum(p, 1)
        acc = acc * decay[:, None] + dot(p.to(v_tile.dtype), v_tile)
        row_max = new_max
    out = acc / tl.where(row_sum > 0, row_sum, 1.0)[:, None]
    return out, finite_max(row_max), log_or_none(row_sum), run.b, t


@triton.jit
def selected_fwd_query_outer_kernel(
    q: Rows, k: Rows, v: Rows, block_indices, out, shift, log_sum, seqs: Sequences, scale,
    SIZES: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    hk = tl.program_id(1)
    value, row_shift, row_log_sum, b, t = selected_fwd_query_outer_tile(
        q, k, v, block_indices, n, hk, seqs, scale, SIZES, BLOCK_G
    )
    heads = tl.arange(0, BLOCK_G)
    first = (n.to(tl.int64) * SIZES.NUM_KV_HEADS + hk) * SIZES.GROUP
    tl.store(shift + first + heads, row_shift, mask=heads < SIZES.GROUP)
    tl.store(log_sum + first + heads, row_log_sum, mask=heads < SIZES.GROUP)
    BLOCK_DV: tl.constexpr = SIZES.BLOCK_DV
    cols, mask = columns(heads < SIZES.GROUP, SIZES.HEAD_DIM_V, BLOCK_DV)
    h = (hk * SIZES.GROUP + heads)[:, None]
    strides = dense_strides(seqs.seq_len, SIZES.NUM_KV_HEADS * SIZES.GROUP, SIZES.HEAD_DIM_V)
    store_output(out, (b, t, h, cols), strides, value, mask, (BLOCK_G, BLOCK_DV))


def plan(q: Any, k: Any, v: Any, block_indices: Any, *seqs: Any, block_size: int, scale: float) -> Plan:
    """out ``[B, T, HQ, DV]`` and the softmax statistics shift and log_sum ``[B, T, HQ]``."""
    sizes = SelectedSizes.of_call(q, k, v, block_indices, block_size)
    rows = (q.shape[0], q.shape[1], sizes.NUM_KV_HEADS * sizes.GROUP)
    statistics = Output(rows, torch.float32)
    return Plan(
        attention_inputs(q, k, v, block_indices) | {"seqs": sequences(q, k.shape[1], seqs), "scale": scale},
        {"out": Output((*rows, sizes.HEAD_DIM_V), q.dtype), "shift": statistics, "log_sum": statistics},
        sizes,
        (q.shape[0] * q.shape[1], sizes.NUM_KV_HEADS),
    )


def grid(extent: tuple[Any, ...], tiles: dict[str, Any], cdiv: Any) -> tuple[Any, Any, Any]:
    """Rows run fastest, so that one head's keys and values stay in L2."""
    return extent[0], extent[1], 1


def heuristic(sizes: SelectedSizes, device: Device) -> Config:
    """As measured on an H200; on an H100 fewer registers make room for one program more, 3 to 6 % (G = 16)."""
    num_warps = warps(sizes, 4 if sizes.GROUP > 16 or sizes.widest > 128 else 2, device)
    limit = 168 if device.arch == "sm_90" and num_warps == 2 and sizes.row_bytes == 256 else None
    return Config({"BLOCK_G": max(16, next_power_of_2(sizes.GROUP))}, num_warps, stages(2, device), limit)


def candidates(sizes: SelectedSizes, device: Device) -> list[Config]:
    """What is worth measuring."""
    return spread(heuristic(sizes, device), {}, (1, 2, 4), (1, 2, 3))


FWD_QUERY_OUTER = Kernel(
    selected_fwd_query_outer_kernel,
    f"_selected_fwd_query_outer(Tensor q, Tensor k, Tensor v, Tensor block_indices, {SEQUENCES}, *, int block_size, "
    "float scale) -> (Tensor out, Tensor shift, Tensor log_sum)",
    plan, grid, heuristic, candidates,
    # The gates took up to 11 % longer fused here than apart (benchmarks/results/selected_h200.csv).
    fuses_epilogue=False,
)  # fmt: skip
