"""Backward with key blocks outside: dk and dv of a block and, in FSA order, partials of dq of the rows that chose it.

A block's list may be cut into several tiles, so each tile writes float32 sums of its own, which ``reduce_tiles`` adds
in order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ...tiling import Config, Device
from ..kernel import SEQUENCES, Dense, Kernel, Output, Plan, Strided, sequences
from ..row_weights import gradient_of_scores, load_row_weights, weights_of, without_rows
from ..sequences import Rows, Run, Sequences
from ..tiles import accumulate, all_finite, dot, finite_part, store_output, store_tile
from .fwd_kv_outer import grid
from .lists import chunk_keys, list_rows, list_tile, load_chunk, load_entries, load_rows, tiles_that_hide
from .sizes import LISTS, Lists, SelectedSizes, attention_inputs, spread, stages, warps


@triton.jit
def _rows_loop(
    grad_out: Rows, q: Rows, k, v, weights, lists: Lists, dq_partial, first, last, start, end, chunk, hk, keys,
    run: Run, seqs: Sequences, scale, dk, dk_lost, dv, dv_lost, SIZES: tl.constexpr, BLOCK_M: tl.constexpr,
    CAREFUL: tl.constexpr,
):  # fmt: skip
    """Add what the rows of tiles ``start`` to ``end`` of a list give.

    keys: None if all rows see all keys. CAREFUL: rows that are not finite leave keys that they do not see alone.

    Products have keys first, so that they take their operands as they lie; dq's too, as tensor cores take 64 rows.
    """
    COMPENSATED: tl.constexpr = SIZES.ITEMSIZE == 4
    HIDDEN: tl.constexpr = keys is not None
    STAGES: tl.constexpr = 1 if CAREFUL else None
    for m in tl.range(start, end, num_stages=STAGES):
        entry = load_entries(lists.entries, first, last, m, SIZES, BLOCK_M)
        valid, n, t, pos, g, partial = list_rows(entry, first, last, m, chunk, None, run, seqs, SIZES, BLOCK_M)
        q_rows = load_rows(q, run.b, hk, t, g, None, SIZES.GROUP, SIZES.HEAD_DIM, SIZES.BLOCK_D)
        grad_rows = load_rows(grad_out, run.b, hk, t, g, None, SIZES.GROUP, SIZES.HEAD_DIM_V, SIZES.BLOCK_DV)
        row = ((n * SIZES.NUM_KV_HEADS + hk) * SIZES.GROUP + g).to(tl.uint32)
        scores = dot(k, tl.trans(q_rows))  # [CHUNK_N, BLOCK_M]
        known = without_rows(load_row_weights(weights, row, None, COMPENSATED), valid, COMPENSATED)
        p = weights_of(scores, known, scale, COMPENSATED)
        ds = gradient_of_scores(p, dot(v, tl.trans(grad_rows)), known, scale, COMPENSATED)
        if HIDDEN:
            visible = keys[:, None] <= pos[None, :]
            if CAREFUL:
                # NaN with the row's gradient, throughout. A product with 0 takes no registers from the other loops.
                CHUNK_N: tl.constexpr = SIZES.CHUNK_N
                BLOCK_DV: tl.constexpr = SIZES.BLOCK_DV
                p += dot(tl.zeros([CHUNK_N, BLOCK_DV], grad_rows.dtype), tl.trans(grad_rows))
                q_rows = finite_part(q_rows)
                grad_rows = finite_part(grad_rows)
            p = tl.where(visible, p, 0.0)
            ds = tl.where(visible, ds, 0.0)
        p = p.to(grad_rows.dtype)
        ds = ds.to(q_rows.dtype)
        if COMPENSATED:
            dv, dv_lost = accumulate(dv, dv_lost, dot(p, grad_rows), True)
            dk, dk_lost = accumulate(dk, dk_lost, dot(ds, q_rows), True)
        else:
            dv = tl.dot(p, grad_rows, dv)
            dk = tl.dot(ds, q_rows, dk)
        if dq_partial is not None:
            if HIDDEN:  # what is not finite must not reach the rows that do not see it, and 0 times it is NaN
                dq = tl.trans(dot(tl.trans(finite_part(k)), ds))  # [BLOCK_M, BLOCK_D]
            else:
                dq = tl.trans(dot(tl.trans(k), ds))
            store_tile(dq_partial, partial.to(tl.int64) * SIZES.HEAD_DIM, valid, dq, SIZES.HEAD_DIM, SIZES.BLOCK_D)
    return dk, dk_lost, dv, dv_lost


@triton.jit
def selected_bwd_kv_outer_kernel(
    grad_out: Rows, q: Rows, k: Rows, v: Rows, block_indices, weights, lists: Lists, dk_tiles, dv_tiles, dq_partial,
    seqs: Sequences, scale, SIZES: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    w = tl.program_id(0)
    chunk = tl.program_id(1)
    first, last, block, hk, run = list_tile(w, block_indices, lists, None, seqs, SIZES)
    keys, exists = chunk_keys(block, chunk, run.num_keys, first < last, SIZES)
    k_chunk = load_chunk(k, run, hk, keys, exists, SIZES.HEAD_DIM, SIZES.BLOCK_D)
    v_chunk = load_chunk(v, run, hk, keys, exists, SIZES.HEAD_DIM_V, SIZES.BLOCK_DV)
    hidden = tiles_that_hide(lists.entries, first, last, block, chunk, run, seqs, SIZES, BLOCK_M)
    HEAD_DIM: tl.constexpr = SIZES.HEAD_DIM
    CHUNK_N: tl.constexpr = SIZES.CHUNK_N
    BLOCK_D: tl.constexpr = SIZES.BLOCK_D
    BLOCK_DV: tl.constexpr = SIZES.BLOCK_DV
    dk = tl.zeros([CHUNK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([CHUNK_N, BLOCK_DV], tl.float32)
    dk_lost = tl.zeros([CHUNK_N, BLOCK_D], tl.float32)
    dv_lost = tl.zeros([CHUNK_N, BLOCK_DV], tl.float32)
    dk, dk_lost, dv, dv_lost = _rows_loop(
        grad_out, q, k_chunk, v_chunk, weights, lists, dq_partial, first, last, 0, hidden, chunk, hk, keys, run, seqs,
        scale, dk, dk_lost, dv, dv_lost, SIZES, BLOCK_M, False,
    )  # fmt: skip
    if not (all_finite(dk) & all_finite(dv)):
        zero = tl.zeros([CHUNK_N, BLOCK_D], tl.float32)
        zero_v = tl.zeros([CHUNK_N, BLOCK_DV], tl.float32)
        dk, dk_lost, dv, dv_lost = _rows_loop(
            grad_out, q, k_chunk, v_chunk, weights, lists, None, first, last, 0, hidden, chunk, hk, keys, run, seqs,
            scale, zero, zero, zero_v, zero_v, SIZES, BLOCK_M, True,
        )  # fmt: skip
    dk, dk_lost, dv, dv_lost = _rows_loop(
        grad_out, q, k_chunk, v_chunk, weights, lists, dq_partial, first, last, hidden,
        tl.cdiv((last - first) * SIZES.GROUP, BLOCK_M), chunk, hk, None, run, seqs, scale, dk, dk_lost, dv, dv_lost,
        SIZES, BLOCK_M, False,
    )  # fmt: skip
    if first < last:
        tile_rows = (w.to(tl.int64) * SIZES.NUM_CHUNKS + chunk) * SIZES.CHUNK_N + tl.arange(0, SIZES.CHUNK_N)
        every = tile_rows >= 0
        store_tile(dv_tiles, tile_rows * SIZES.HEAD_DIM_V, every, dv, SIZES.HEAD_DIM_V, SIZES.BLOCK_DV)
        cols = tl.arange(0, BLOCK_D)[None, :]
        mask = every[:, None] & (cols < SIZES.HEAD_DIM)
        store_output(dk_tiles, (tile_rows[:, None], cols), (HEAD_DIM,), dk, mask, (CHUNK_N, BLOCK_D))


def plan(
    grad_out: Any, q: Any, k: Any, v: Any, block_indices: Any, weights: Any,
    *lists_and_seqs: Any, block_size: int, scale: float, with_dq: bool,
) -> Plan:  # fmt: skip
    """Float32 tiles ``[W, C, CHUNK_N, D or DV]`` of dk and dv; if wanted, dq's partials ``[B, T, HK, S, C, G, D]``."""
    sizes = SelectedSizes.of_call(q, k, v, block_indices, block_size)
    num_tiles = lists_and_seqs[1].shape[0]
    tile = (num_tiles, sizes.NUM_CHUNKS, sizes.CHUNK_N)
    partial = (*block_indices.shape, sizes.NUM_CHUNKS, sizes.GROUP, sizes.HEAD_DIM)
    return Plan(
        {"grad_out": Strided(grad_out)}
        | attention_inputs(q, k, v, block_indices)
        | {"weights": Dense(weights)}
        | {"lists": Lists(*map(Dense, lists_and_seqs[:4]))}
        | {"seqs": sequences(q, k.shape[1], lists_and_seqs[4:]), "scale": scale},
        {
            "dk_tiles": Output((*tile, sizes.HEAD_DIM), torch.float32),
            "dv_tiles": Output((*tile, sizes.HEAD_DIM_V), torch.float32),
            "dq_partial": Output(partial if with_dq else None, q.dtype),
        },
        sizes,
        (num_tiles, sizes.NUM_CHUNKS),
    )


def heuristic(sizes: SelectedSizes, device: Device) -> Config:
    """As measured on an H100. A row is two loads away, its entry's and its own; five stages are two iterations each."""
    pipelined = 5 if device.arch in ("sm_90", "sm_100") else 2
    return Config(
        {"BLOCK_M": 16 if sizes.row_bytes > 256 or sizes.ITEMSIZE == 4 else 32},
        warps(sizes, 4 if sizes.widest <= 128 and sizes.CHUNK_N <= 64 else 8, device),
        stages(pipelined, device) if sizes.row_bytes <= 256 else 1,
    )


def candidates(sizes: SelectedSizes, device: Device) -> list[Config]:
    """What is worth measuring."""
    return spread(heuristic(sizes, device), {"BLOCK_M": [16, 32, 64]}, (4, 8), (1, 2, 3, 5))


BWD_KV_OUTER = Kernel(
    selected_bwd_kv_outer_kernel,
    "_selected_bwd_kv_outer(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor block_indices, Tensor weights, "
    f"{LISTS}, {SEQUENCES}, *, int block_size, float scale, bool with_dq) "
    "-> (Tensor dk_tiles, Tensor dv_tiles, Tensor dq_partial)",
    plan, grid, heuristic, candidates,
)  # fmt: skip
