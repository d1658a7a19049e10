"""NSA loop order, backward: dq, one program per (query row, key/value head).

dk and dv are ``bwd_kv_outer``'s.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import triton
import triton.language as tl

from ...tiling import Config, Device
from ..kernel import SEQUENCES, Kernel, Output, Plan, sequences
from ..sequences import Rows, Sequences, run_of_row
from ..tiles import Statistics, columns, dense_strides, dot, load_statistics, probabilities, store_output
from . import fwd_query_outer
from .fwd_query_outer import candidates, grid, key_tile
from .lists import load_rows
from .sizes import BACKWARD, SelectedSizes, attention_inputs, backward_inputs


@triton.jit
def selected_bwd_query_outer_tile(
    grad_out: Rows, q: Rows, k: Rows, v: Rows, block_indices, rows: Statistics, n, hk, seqs: Sequences, scale,
    SIZES: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """dq of the heads of one group at row ``n``.

    Returns ``(dq, b, t)``: float32 ``[BLOCK_G, BLOCK_D]`` and where the row lies.
    """
    run, t = run_of_row(seqs, n)
    pos = tl.where(run.num_keys > 0, run.offset + t - run.first_row, -1)
    heads = tl.arange(0, BLOCK_G)
    real = heads < SIZES.GROUP
    q_rows = load_rows(q, run.b, hk, t, heads, real, SIZES.GROUP, SIZES.HEAD_DIM, SIZES.BLOCK_D)
    grad_rows = load_rows(grad_out, run.b, hk, t, heads, real, SIZES.GROUP, SIZES.HEAD_DIM_V, SIZES.BLOCK_DV)
    row = (n.to(tl.int64) * SIZES.NUM_KV_HEADS + hk) * SIZES.GROUP + heads
    shift, log_sum, delta = load_statistics(rows, row, real)
    delta = tl.where(log_sum > float("-inf"), delta, 0.0)  # without a key log_sum is a constant, whatever came back
    slots = (n.to(tl.int64) * SIZES.NUM_KV_HEADS + hk) * SIZES.NUM_SELECTED

    BLOCK_D: tl.constexpr = SIZES.BLOCK_D
    dq = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for i in range(SIZES.NUM_SELECTED * (SIZES.BLOCK_SIZE // SIZES.BLOCK_N)):
        visible, k_tile, v_tile = key_tile(k, v, block_indices, slots, i, run, hk, pos, SIZES)
        scores = dot(q_rows, tl.trans(k_tile))
        p = probabilities(scores, visible[None, :], shift[:, None], log_sum[:, None], scale)  # [BLOCK_G, BLOCK_N]
        ds = p * (dot(grad_rows, tl.trans(v_tile)) - delta[:, None])
        dq += dot(ds.to(k_tile.dtype), k_tile)
    return dq * scale, run.b, t


@triton.jit
def selected_bwd_query_outer_kernel(
    grad_out: Rows, q: Rows, k: Rows, v: Rows, block_indices, rows: Statistics, dq, seqs: Sequences, scale,
    SIZES: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    hk = tl.program_id(1)
    value, b, t = selected_bwd_query_outer_tile(
        grad_out, q, k, v, block_indices, rows, n, hk, seqs, scale, SIZES, BLOCK_G
    )
    heads = tl.arange(0, BLOCK_G)
    BLOCK_D: tl.constexpr = SIZES.BLOCK_D
    cols, mask = columns(heads < SIZES.GROUP, SIZES.HEAD_DIM, BLOCK_D)
    h = (hk * SIZES.GROUP + heads)[:, None]
    strides = dense_strides(seqs.seq_len, SIZES.NUM_KV_HEADS * SIZES.GROUP, SIZES.HEAD_DIM)
    store_output(dq, (b, t, h, cols), strides, value, mask, (BLOCK_G, BLOCK_D))


def plan(
    grad_out: Any, q: Any, k: Any, v: Any, block_indices: Any, shift: Any, log_sum: Any, delta: Any, *seqs: Any,
    block_size: int, scale: float,
) -> Plan:  # fmt: skip
    """dq ``[B, T, HQ, D]``."""
    sizes = SelectedSizes.of_call(q, k, v, block_indices, block_size)
    return Plan(
        backward_inputs(grad_out, shift, log_sum, delta)
        | attention_inputs(q, k, v, block_indices)
        | {"seqs": sequences(q, k.shape[1], seqs), "scale": scale},
        {"dq": Output((*q.shape[:2], sizes.NUM_KV_HEADS * sizes.GROUP, sizes.HEAD_DIM), q.dtype)},
        sizes,
        (q.shape[0] * q.shape[1], sizes.NUM_KV_HEADS),
    )


def heuristic(sizes: SelectedSizes, device: Device) -> Config:
    """The forward's; on an H100 a deeper pipeline instead of fewer registers, 4 % (G = 16)."""
    config = fwd_query_outer.heuristic(sizes, device)
    deeper = device.arch == "sm_90" and config.num_warps == 2 and sizes.row_bytes == 256
    return replace(config, num_stages=3, max_registers=None) if deeper else config


BWD_QUERY_OUTER = Kernel(
    selected_bwd_query_outer_kernel,
    f"_selected_bwd_query_outer({BACKWARD}, {SEQUENCES}, *, int block_size, float scale) -> Tensor",
    plan, grid, heuristic, candidates, fuses_epilogue=False,
)  # fmt: skip
