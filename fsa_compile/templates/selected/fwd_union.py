"""Query-tile order, forward: one program per query tile and key/value head walks the union of its tokens' blocks.

A row's weights are taken relative to the largest score of the first of its blocks, as in ``banded/forward.py``. One
that did not select a block gets a shift of infinity there: a number a row where a mask would be one an element.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from ...tiling import Config, Device
from ..kernel import SEQUENCES, Kernel, Output, Plan
from ..query_tiles import (
    LOWEST,
    Keys,
    exponent_shift,
    keys_and_values,
    load_k,
    load_rows,
    load_v,
    output_of_tile,
    place_of_tile,
    softmax_end,
    softmax_step,
    store_statistics,
    tile_of_program,
)
from ..sequences import Rows, Sequences, run_of_tile
from ..tiles import LOG2E, dot, finite_part, rows_finite, store_output
from . import walks
from .unions import UNIONS, Unions
from .walks import (
    Walk,
    WalkSizes,
    candidates,
    grid,
    hides_keys,
    inputs,
    is_past,
    key_tile,
    nan_of_walk,
    walk_of_tile,
)

# Where a sum of weights is more, one of them may have been too large.
MUCH = tl.constexpr(65536.0)


@triton.jit
def _fwd_loop(
    q, keys: Keys, walk: Walk, factor, absent, acc, row_max, row_sum, SIZES: tl.constexpr, CAREFUL: tl.constexpr,
    FIXED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """FIXED: a row's ``row_max`` is that of the first tile in which it sees a key, and stays."""
    minus = -exponent_shift(row_max, factor)
    # One bit a token, as in ``members``; a block that a token selected has a key that it sees.
    seen = absent
    for i in tl.range(0, walk.tiles, num_stages=STAGES):
        start, left, chosen, members = key_tile(walk, i, SIZES)
        k = load_k(keys, start, left, SIZES, SIZES.BLOCK_N, True)
        scores = dot(q, tl.trans(k))  # [BLOCK_M, BLOCK_N]
        if CAREFUL:
            scores = tl.where(chosen[:, None], scores, float("-inf"))
        if CAREFUL | hides_keys(walk, start, SIZES):
            scores = tl.where(is_past(walk, start, SIZES), scores, float("-inf"))
        if FIXED:
            if seen != -1:
                first = chosen & (row_max == LOWEST)
                row_max = tl.where(first, tl.maximum(tl.max(scores, 1), LOWEST), row_max)
                minus = -exponent_shift(row_max, factor)
                seen |= members
            p = tl.exp2(tl.fma(scores, factor, tl.where(chosen, minus, float("-inf"))[:, None]))
            row_sum += tl.sum(p, 1)
        else:
            if not CAREFUL:
                scores = tl.where(chosen[:, None], scores, float("-inf"))
            p, decay, row_max, row_sum = softmax_step(scores, row_max, row_sum, factor)
            acc = acc * decay[:, None]
        v = load_v(keys, start, left, SIZES, SIZES.BLOCK_N, True)
        if CAREFUL:
            v = finite_part(v)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    return acc, row_max, row_sum


@triton.jit
def selected_fwd_union_tile(
    q: Rows, k: Rows, v: Rows, unions: Unions, seqs: Sequences, scale, w, hk, head_tile, SIZES: tl.constexpr,
    BLOCK_M: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Attention of query tile ``w``.

    Returns ``(out, shift, log_sum, place)``: float32 ``[BLOCK_M, BLOCK_DV]``, ``[BLOCK_M]``, ``[BLOCK_M]``, and where
    the rows lie.
    """
    run, first = run_of_tile(seqs, w, SIZES.TOKENS)
    place = place_of_tile(run, first, hk, head_tile, seqs.seq_len, SIZES, BLOCK_M, SIZES.TOKENS, HEADS)
    walk = walk_of_tile(unions, w, hk, run, first, place, SIZES, BLOCK_M, HEADS)
    keys = keys_and_values(k, v, run.b, run.first_key, hk)
    queries = load_rows(q, place, SIZES.HEAD_DIM, SIZES.BLOCK_D)
    factor = scale * LOG2E
    BLOCK_DV: tl.constexpr = SIZES.BLOCK_DV
    FIXED: tl.constexpr = q.ptr.dtype.element_ty != tl.float16  # whose exponents leave too little room
    # Tokens that are not there wait for no block.
    count = tl.maximum(tl.minimum(run.num_rows - first, SIZES.TOKENS), 0)
    absent = tl.where(count < 64, tl.full([], -1, tl.int64) << tl.minimum(count, 63), 0)
    unseen = tl.full([BLOCK_M], LOWEST, tl.float32)
    nothing = tl.zeros([BLOCK_M], tl.float32)
    acc, row_max, row_sum = _fwd_loop(
        queries, keys, walk, factor, absent,
        tl.zeros([BLOCK_M, BLOCK_DV], tl.float32), unseen, nothing, SIZES, False, FIXED, None,
    )  # fmt: skip
    if not rows_finite(acc, row_sum):
        # What is not finite may come of a key or value that a row does not see, which must not notice.
        lost = nan_of_walk(keys.v, keys.v_stride, walk, SIZES, SIZES.HEAD_DIM_V, BLOCK_DV, BLOCK_M)
        acc, row_max, row_sum = _fwd_loop(
            queries, keys, walk, factor, absent, lost, unseen, nothing, SIZES,
            True, FIXED, 1,
        )  # fmt: skip
        if FIXED:
            # Or of an exponent that found no room. The other rows keep every bit.
            over = row_sum > MUCH
            if tl.max(over.to(tl.int32)) > 0:
                lost = nan_of_walk(keys.v, keys.v_stride, walk, SIZES, SIZES.HEAD_DIM_V, BLOCK_DV, BLOCK_M)
                all_acc, all_max, all_sum = _fwd_loop(
                    queries, keys, walk, factor, absent, lost, unseen, nothing,
                    SIZES, True, False, 1,
                )  # fmt: skip
                acc = tl.where(over[:, None], all_acc, acc)
                row_max = tl.where(over, all_max, row_max)
                row_sum = tl.where(over, all_sum, row_sum)
    out, row_shift, log_sum = softmax_end(acc, row_max, row_sum, factor)
    return out, row_shift, log_sum, place


@triton.jit
def selected_fwd_union_kernel(
    q: Rows, k: Rows, v: Rows, unions: Unions, out, shift, log_sum, seqs: Sequences, scale, SIZES: tl.constexpr,
    BLOCK_M: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    w, hk, head_tile = tile_of_program(SIZES, HEADS)
    value, row_shift, row_log_sum, place = selected_fwd_union_tile(
        q, k, v, unions, seqs, scale, w, hk, head_tile, SIZES, BLOCK_M, HEADS
    )
    store_statistics(shift, log_sum, place, row_shift, row_log_sum)
    BLOCK_DV: tl.constexpr = SIZES.BLOCK_DV
    cols, mask, strides = output_of_tile(place, seqs.seq_len, SIZES, SIZES.HEAD_DIM_V, BLOCK_DV)
    store_output(out, (place.b, place.t[:, None], place.h[:, None], cols), strides, value, mask, (BLOCK_M, BLOCK_DV))


def plan(
    q: Any, k: Any, v: Any, blocks: Any, members: Any, counts: Any, *seqs: Any, block_size: int, tokens: int,
    scale: float,
) -> Plan:  # fmt: skip
    """out ``[B, T, HQ, DV]`` and the softmax statistics shift and log_sum ``[B, T, HQ]``."""
    sizes = WalkSizes.of_call(q, k, v, blocks, block_size, tokens)
    statistics = Output(tuple(q.shape[:3]), torch.float32)
    return Plan(
        inputs(q, k, v, (blocks, members, counts), seqs, scale),
        {"out": Output((*q.shape[:3], sizes.HEAD_DIM_V), q.dtype), "shift": statistics, "log_sum": statistics},
        sizes,
        (blocks.shape[0], sizes.NUM_KV_HEADS, sizes.GROUP),
    )


def heuristic(sizes: WalkSizes, device: Device) -> Config:
    """The backward's; on an H100 with a deeper pipeline, and more warps where rows are wide (33 % at D = 192)."""
    config = walks.heuristic(sizes, device)
    if device.arch != "sm_90" or sizes.ITEMSIZE == 4:
        return config
    wide = max(sizes.BLOCK_D, sizes.BLOCK_DV) > 128
    return replace(config, num_warps=8) if wide else replace(config, num_stages=3)


FWD_UNION = Kernel(
    selected_fwd_union_kernel,
    f"_selected_fwd_union(Tensor q, Tensor k, Tensor v, {UNIONS}, {SEQUENCES}, *, int block_size, int tokens, "
    "float scale) -> (Tensor out, Tensor shift, Tensor log_sum)",
    plan, grid, heuristic, candidates,
)  # fmt: skip
