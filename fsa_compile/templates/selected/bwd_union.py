"""Query-tile order, backward: dq, one program per query tile and key/value head, over the union as in the forward.

dk and dv are ``bwd_kv_outer``'s.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..kernel import SEQUENCES, Kernel, Output, Plan
from ..query_tiles import (
    Keys,
    keys_and_values,
    load_k,
    load_rows,
    load_v,
    load_weights,
    output_of_tile,
    place_of_tile,
    tile_of_program,
    what_was_lost,
)
from ..sequences import Rows, Sequences, run_of_tile
from ..tiles import LOG2E, Statistics, all_finite, dot, finite_part, store_output
from . import walks
from .sizes import backward_inputs
from .unions import UNIONS, Unions
from .walks import Walk, WalkSizes, hides_keys, inputs, is_past, key_tile, nan_of_walk, walk_of_tile


@triton.jit
def _dq_loop(
    q, grad_out, keys: Keys, walk: Walk, factor, minus, delta, dq, SIZES: tl.constexpr, CAREFUL: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    # A mask an element takes fewer registers than a number a row, which wide rows do not have.
    WIDE: tl.constexpr = SIZES.BLOCK_D + SIZES.BLOCK_DV > 256
    for i in tl.range(0, walk.tiles, num_stages=STAGES):
        start, left, chosen, _ = key_tile(walk, i, SIZES)
        k = load_k(keys, start, left, SIZES, SIZES.BLOCK_N, True)
        v = load_v(keys, start, left, SIZES, SIZES.BLOCK_N, True)
        scores = dot(q, tl.trans(k))  # [BLOCK_M, BLOCK_N]
        if WIDE:
            weights = tl.exp2(tl.fma(scores, factor, minus[:, None]))
        else:
            weights = tl.exp2(tl.fma(scores, factor, tl.where(chosen, minus, float("-inf"))[:, None]))
        ds = weights * (dot(grad_out, tl.trans(v)) - delta[:, None])
        if WIDE | CAREFUL | hides_keys(walk, start, SIZES):
            ds = tl.where(is_past(walk, start, SIZES), ds, 0.0)
        if WIDE | CAREFUL:
            ds = tl.where(chosen[:, None], ds, 0.0)
        if CAREFUL:
            k = finite_part(k)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit
def selected_bwd_union_tile(
    grad_out: Rows, q: Rows, k: Rows, v: Rows, rows: Statistics, unions: Unions, seqs: Sequences, scale, w, hk,
    head_tile, SIZES: tl.constexpr, BLOCK_M: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """dq of query tile ``w``, float32 ``[BLOCK_M, BLOCK_D]``, and where the rows lie."""
    run, first = run_of_tile(seqs, w, SIZES.TOKENS)
    place = place_of_tile(run, first, hk, head_tile, seqs.seq_len, SIZES, BLOCK_M, SIZES.TOKENS, HEADS)
    walk = walk_of_tile(unions, w, hk, run, first, place, SIZES, BLOCK_M, HEADS)
    keys = keys_and_values(k, v, run.b, run.first_key, hk)
    queries = load_rows(q, place, SIZES.HEAD_DIM, SIZES.BLOCK_D)
    grads = load_rows(grad_out, place, SIZES.HEAD_DIM_V, SIZES.BLOCK_DV)
    factor = scale * LOG2E
    minus, delta, shift, log_sum = load_weights(rows, place, factor)
    BLOCK_D: tl.constexpr = SIZES.BLOCK_D
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dq = _dq_loop(queries, grads, keys, walk, factor, minus, delta, dq, SIZES, False, None)
    if not all_finite(dq):  # a key that some row does not see can only do harm if it is not finite
        dq = nan_of_walk(keys.k, keys.k_stride, walk, SIZES, SIZES.HEAD_DIM, BLOCK_D, BLOCK_M)
        dq = _dq_loop(queries, grads, keys, walk, factor, minus, delta, dq, SIZES, True, 1)
    return dq * (what_was_lost(minus, shift, log_sum, factor) * scale)[:, None], place


@triton.jit
def selected_bwd_union_kernel(
    grad_out: Rows, q: Rows, k: Rows, v: Rows, rows: Statistics, unions: Unions, dq, seqs: Sequences, scale,
    SIZES: tl.constexpr, BLOCK_M: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    w, hk, head_tile = tile_of_program(SIZES, HEADS)
    value, place = selected_bwd_union_tile(
        grad_out, q, k, v, rows, unions, seqs, scale, w, hk, head_tile, SIZES, BLOCK_M, HEADS
    )
    BLOCK_D: tl.constexpr = SIZES.BLOCK_D
    cols, mask, strides = output_of_tile(place, seqs.seq_len, SIZES, SIZES.HEAD_DIM, BLOCK_D)
    store_output(dq, (place.b, place.t[:, None], place.h[:, None], cols), strides, value, mask, (BLOCK_M, BLOCK_D))


def plan(
    grad_out: Any, q: Any, k: Any, v: Any, shift: Any, log_sum: Any, delta: Any, blocks: Any, members: Any,
    counts: Any, *seqs: Any, block_size: int, tokens: int, scale: float,
) -> Plan:  # fmt: skip
    """dq ``[B, T, HQ, D]``."""
    sizes = WalkSizes.of_call(q, k, v, blocks, block_size, tokens)
    return Plan(
        backward_inputs(grad_out, shift, log_sum, delta) | inputs(q, k, v, (blocks, members, counts), seqs, scale),
        {"dq": Output(tuple(q.shape), q.dtype)},
        sizes,
        (blocks.shape[0], sizes.NUM_KV_HEADS, sizes.GROUP),
    )


BWD_UNION = Kernel(
    selected_bwd_union_kernel,
    "_selected_bwd_union(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor shift, Tensor log_sum, Tensor delta, "
    f"{UNIONS}, {SEQUENCES}, *, int block_size, int tokens, float scale) -> Tensor",
    plan, walks.grid, walks.heuristic, walks.candidates,
)  # fmt: skip
