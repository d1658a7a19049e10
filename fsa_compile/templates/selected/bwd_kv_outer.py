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
from ..kernel import SEQUENCES, Kernel, Output, Plan, sequences
from ..sequences import Rows, Sequences
from ..tiles import (
    LOG2E,
    Statistics,
    accumulate,
    dot,
    finite_part,
    load_statistics,
    store_output,
    store_tile,
)  # fmt: skip
from .fwd_kv_outer import grid
from .lists import chunk_keys, hides_keys, list_rows, list_tile, load_chunk, load_rows
from .sizes import (
    BACKWARD,
    LISTS,
    Lists,
    SelectedSizes,
    attention_inputs,
    backward_inputs,
    list_inputs,
    spread,
    stages,
    warps,
)  # fmt: skip


@triton.jit
def chunk_gradients(q, grad_out, k, v, keys, pos, some_hidden, shift, log_sum, delta, scale):
    """What BLOCK_M rows add to a chunk's gradients.

    Returns ``(dk, dv, ds_t)``: float32 ``[CHUNK_N, BLOCK_D]``, ``[CHUNK_N, BLOCK_DV]`` and the gradient of the scores
    before scaling, ``[CHUNK_N, BLOCK_M]`` (keys first, so that both products take it as it lies in registers).

    Masks are left out where no row needs them; a row that sees nothing gets an infinite sum, so that its weights are 0.
    """
    scores = dot(k, tl.trans(q))  # [CHUNK_N, BLOCK_M]
    if some_hidden:
        scores = tl.where(keys[:, None] <= pos[None, :], scores, float("-inf"))
    log_sum = tl.where(log_sum > float("-inf"), log_sum, float("inf")) * LOG2E
    p = tl.exp2((scores - shift[None, :]) * (scale * LOG2E) - log_sum[None, :])
    dv = dot(p.to(grad_out.dtype), grad_out)
    ds = p * tl.fma(dot(v, tl.trans(grad_out)), scale, -(delta * scale)[None, :])
    if some_hidden:  # a weight of 0 does not keep out what is not finite
        ds = tl.where(keys[:, None] <= pos[None, :], ds, 0.0)
    ds = ds.to(q.dtype)
    return dot(ds, q), dv, ds


@triton.jit
def selected_bwd_kv_outer_kernel(
    grad_out: Rows, q: Rows, k: Rows, v: Rows, block_indices, rows: Statistics, lists: Lists,
    dk_tiles, dv_tiles, dq_partial, seqs: Sequences, scale, SIZES: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    w = tl.program_id(0)
    chunk = tl.program_id(1)
    first, last, block, hk, run = list_tile(w, block_indices, lists, seqs, SIZES)
    keys, exists = chunk_keys(block, chunk, run.num_keys, first < last, SIZES)
    k_chunk = load_chunk(k, run, hk, keys, exists, SIZES.HEAD_DIM, SIZES.BLOCK_D)
    v_chunk = load_chunk(v, run, hk, keys, exists, SIZES.HEAD_DIM_V, SIZES.BLOCK_DV)
    # A key that is not finite spoils the ds of the rows that see it, and must not reach the others: 0 times it is NaN.
    k_finite = finite_part(k_chunk)
    keys_end = block * SIZES.BLOCK_SIZE + (chunk + 1) * SIZES.CHUNK_N
    HEAD_DIM: tl.constexpr = SIZES.HEAD_DIM
    CHUNK_N: tl.constexpr = SIZES.CHUNK_N
    BLOCK_D: tl.constexpr = SIZES.BLOCK_D
    BLOCK_DV: tl.constexpr = SIZES.BLOCK_DV
    dk = tl.zeros([CHUNK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([CHUNK_N, BLOCK_DV], tl.float32)
    dk_lost = tl.zeros([CHUNK_N, BLOCK_D], tl.float32)
    dv_lost = tl.zeros([CHUNK_N, BLOCK_DV], tl.float32)
    for m in range(tl.cdiv((last - first) * SIZES.GROUP, BLOCK_M)):
        valid, n, t, pos, g, partial = list_rows(lists.entries, first, last, m, chunk, run, seqs, SIZES, BLOCK_M)
        q_rows = load_rows(q, run.b, hk, t, g, valid, SIZES.GROUP, SIZES.HEAD_DIM, SIZES.BLOCK_D)
        grad_rows = load_rows(grad_out, run.b, hk, t, g, valid, SIZES.GROUP, SIZES.HEAD_DIM_V, SIZES.BLOCK_DV)
        some_hidden = hides_keys(lists.entries, first, m, keys_end, run, seqs, SIZES, BLOCK_M)
        row = ((n * SIZES.NUM_KV_HEADS + hk) * SIZES.GROUP + g).to(tl.uint32)
        shift, log_sum, delta = load_statistics(rows, row, valid)
        dk_part, dv_part, ds = chunk_gradients(
            q_rows, grad_rows, k_chunk, v_chunk, keys, pos, some_hidden, shift, log_sum, delta, scale
        )
        dk, dk_lost = accumulate(dk, dk_lost, dk_part, SIZES.ITEMSIZE == 4)
        dv, dv_lost = accumulate(dv, dv_lost, dv_part, SIZES.ITEMSIZE == 4)
        if dq_partial is not None:
            dq = dot(tl.trans(ds), k_finite)  # [BLOCK_M, BLOCK_D]
            store_tile(dq_partial, partial.to(tl.int64) * SIZES.HEAD_DIM, valid, dq, SIZES.HEAD_DIM, SIZES.BLOCK_D)
    if first < last:
        tile_rows = (w.to(tl.int64) * SIZES.NUM_CHUNKS + chunk) * SIZES.CHUNK_N + tl.arange(0, SIZES.CHUNK_N)
        every = tile_rows >= 0
        store_tile(dv_tiles, tile_rows * SIZES.HEAD_DIM_V, every, dv, SIZES.HEAD_DIM_V, SIZES.BLOCK_DV)
        cols = tl.arange(0, BLOCK_D)[None, :]
        mask = every[:, None] & (cols < SIZES.HEAD_DIM)
        store_output(dk_tiles, (tile_rows[:, None], cols), (HEAD_DIM,), dk, mask, (CHUNK_N, BLOCK_D))


def plan(
    grad_out: Any, q: Any, k: Any, v: Any, block_indices: Any, shift: Any, log_sum: Any, delta: Any,
    *lists_and_seqs: Any, block_size: int, scale: float, with_dq: bool,
) -> Plan:  # fmt: skip
    """Float32 tiles ``[W, C, CHUNK_N, D or DV]`` of dk and dv; if wanted, dq's partials ``[B, T, HK, S, C, G, D]``."""
    sizes = SelectedSizes.of_call(q, k, v, block_indices, block_size)
    num_tiles = lists_and_seqs[1].shape[0]
    tile = (num_tiles, sizes.NUM_CHUNKS, sizes.CHUNK_N)
    partial = (*block_indices.shape, sizes.NUM_CHUNKS, sizes.GROUP, sizes.HEAD_DIM)
    return Plan(
        backward_inputs(grad_out, shift, log_sum, delta)
        | attention_inputs(q, k, v, block_indices)
        | list_inputs(lists_and_seqs[:4])
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
    """As measured on an H200."""
    return Config(
        {"BLOCK_M": 16 if sizes.row_bytes > 256 or sizes.ITEMSIZE == 4 else 32},
        warps(sizes, 4 if sizes.widest <= 128 and sizes.CHUNK_N <= 64 else 8, device),
        stages(2, device) if sizes.row_bytes <= 256 else 1,
    )


def candidates(sizes: SelectedSizes, device: Device) -> list[Config]:
    """What is worth measuring."""
    return spread(heuristic(sizes, device), {"BLOCK_M": [32, 64, 128]}, (4, 8), (1, 2, 3))


BWD_KV_OUTER = Kernel(
    selected_bwd_kv_outer_kernel,
    f"_selected_bwd_kv_outer({BACKWARD}, {LISTS}, {SEQUENCES}, *, int block_size, float scale, bool with_dq) "
    "-> (Tensor dk_tiles, Tensor dv_tiles, Tensor dq_partial)",
    plan, grid, heuristic, candidates,
)  # fmt: skip
