"""Query-tile order, backward: dq, one program per query tile and key/value head, over the union as in the forward.

dk and dv are ``bwd_kv_outer``'s.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..kernel import SEQUENCES, Kernel, Output, Plan
from ..query_tiles import keys_base, load_keys, load_rows, load_weights, place_of_tile, what_was_lost
from ..sequences import Rows, Sequences, run_of_tile
from ..tiles import LOG2E, Statistics, all_finite, columns, dense_strides, dot, finite_part, rows_apart, store_output
from . import walks
from .sizes import backward_inputs
from .unions import UNIONS, Unions
from .walks import Walk, WalkSizes, hides_keys, inputs, is_past, key_tile, nan_of_walk, walk_of_tile


@triton.jit
def _dq_loop(
    q, grad_out, k_base, k_stride, v_base, v_stride, walk: Walk, factor, minus, delta, dq, SIZES: tl.constexpr,
    CAREFUL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # A mask an element takes fewer registers than a number a row, which wide rows do not have.
    WIDE: tl.constexpr = SIZES.BLOCK_D + SIZES.BLOCK_DV > 256
    for i in tl.range(0, walk.tiles, num_stages=STAGES):
        start, left, chosen, _ = key_tile(walk, i, SIZES)
        k_here = k_base + rows_apart(start, k_stride)
        v_here = v_base + rows_apart(start, v_stride)
        k = load_keys(k_here, k_stride, left, SIZES.HEAD_DIM, SIZES.BLOCK_D, SIZES.BLOCK_N, True)
        v = load_keys(v_here, v_stride, left, SIZES.HEAD_DIM_V, SIZES.BLOCK_DV, SIZES.BLOCK_N, True)
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
    k_base = keys_base(k, run.b, run.first_key, hk)
    v_base = keys_base(v, run.b, run.first_key, hk)
    queries = load_rows(q, place, SIZES.HEAD_DIM, SIZES.BLOCK_D)
    grads = load_rows(grad_out, place, SIZES.HEAD_DIM_V, SIZES.BLOCK_DV)
    factor = scale * LOG2E
    minus, delta, shift, log_sum = load_weights(rows, place, factor)
    BLOCK_D: tl.constexpr = SIZES.BLOCK_D
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dq = _dq_loop(
        queries, grads, k_base, k.strides[1], v_base, v.strides[1], walk, factor, minus, delta, dq, SIZES, False, None
    )
    if not all_finite(dq):  # a key that some row does not see can only do harm if it is not finite
        dq = nan_of_walk(k_base, k.strides[1], walk, SIZES, SIZES.HEAD_DIM, BLOCK_D, BLOCK_M)
        dq = _dq_loop(
            queries, grads, k_base, k.strides[1], v_base, v.strides[1], walk, factor, minus, delta, dq, SIZES, True, 1
        )
    return dq * (what_was_lost(minus, shift, log_sum, factor) * scale)[:, None], place


@triton.jit
def selected_bwd_union_kernel(
    grad_out: Rows, q: Rows, k: Rows, v: Rows, rows: Statistics, unions: Unions, dq, seqs: Sequences, scale,
    SIZES: tl.constexpr, BLOCK_M: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    w = tl.num_programs(0) - 1 - tl.program_id(0)
    parts = tl.cdiv(SIZES.GROUP, HEADS)
    value, place = selected_bwd_union_tile(
        grad_out, q, k, v, rows, unions, seqs, scale, w, tl.program_id(1) // parts, tl.program_id(1) % parts, SIZES,
        BLOCK_M, HEADS,
    )  # fmt: skip
    BLOCK_D: tl.constexpr = SIZES.BLOCK_D
    cols, mask = columns(place.exists, SIZES.HEAD_DIM, BLOCK_D)
    strides = dense_strides(seqs.seq_len, SIZES.NUM_KV_HEADS * SIZES.GROUP, SIZES.HEAD_DIM)
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
