"""Banded attention, backward: dq, one program per (query tile, key/value head), over the keys as in the forward.

dk and dv are ``backward_dkv``'s.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ...tiling import Config, Device
from ..kernel import Dense, Kernel, Output, Plan, Strided
from ..opaque import at_run_time
from ..query_tiles import (
    Keys,
    load_k,
    load_rows,
    load_v,
    load_weights,
    output_of_tile,
    query_grid,
    tile_of_program,
    what_was_lost,
)
from ..sequences import Rows, Sequences
from ..tiles import LOG2E, Statistics, all_finite, dot, finite_part, store_output
from .bands import Band, in_band, nan_of_keys, query_tile, whole_tiles
from .sizes import ARGUMENTS, BandedSizes, extent, inputs, query_config


@triton.jit
def _dq_loop(
    q, grad_out, keys: Keys, start, end, band: Band, factor, minus, delta, dq, SIZES: tl.constexpr, BLOCK: tl.constexpr,
    MASKED: tl.constexpr, CAREFUL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Add what keys ``start`` to ``end`` give; not MASKED: whole tiles, all of whose keys every row sees."""
    for i in tl.range(start, end, BLOCK, num_stages=STAGES):
        here = at_run_time(i)
        k = load_k(keys, here, end - i, SIZES, BLOCK, MASKED)
        v = load_v(keys, here, end - i, SIZES, BLOCK, MASKED)
        scores = dot(q, tl.trans(k))  # [BLOCK_M, BLOCK]
        dp = dot(grad_out, tl.trans(v))
        ds = tl.exp2(tl.fma(scores, factor, minus[:, None])) * (dp - delta[:, None])
        if MASKED:
            if CAREFUL | (i < band.all_from) | (i + BLOCK > band.all_to):
                ds = tl.where(in_band(i, band, SIZES, BLOCK), ds, 0.0)
        if CAREFUL:
            k = finite_part(k)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit
def banded_bwd_dq_tile(
    grad_out: Rows, q: Rows, k: Rows, v: Rows, rows: Statistics, seqs: Sequences, num_key_rows, scale,
    w, hk, head_tile, SIZES: tl.constexpr, BLOCK_M: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, EDGE_STAGES: tl.constexpr,
):  # fmt: skip
    """dq of query tile ``w``, float32 ``[BLOCK_M, BLOCK_D]``, and where the rows lie."""
    place, keys, band = query_tile(k, v, seqs, num_key_rows, w, hk, head_tile, SIZES, BLOCK_M, TOKENS, HEADS)
    queries = load_rows(q, place, SIZES.HEAD_DIM, SIZES.BLOCK_D)
    grads = load_rows(grad_out, place, SIZES.HEAD_DIM_V, SIZES.BLOCK_DV)
    factor = scale * LOG2E
    minus, row_delta, row_shift, row_log_sum = load_weights(rows, place, factor)
    BLOCK_D: tl.constexpr = SIZES.BLOCK_D
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    start = band.some_from
    end = band.some_to
    if BLOCK_E > 0:
        hot, cold = whole_tiles(band, SIZES, BLOCK_N, BLOCK_E)
        if SIZES.WINDOW > 0:
            dq = _dq_loop(
                queries, grads, keys, start, tl.minimum(hot, end), band, factor, minus, row_delta, dq, SIZES, BLOCK_E,
                True, False, EDGE_STAGES,
            )  # fmt: skip
        dq = _dq_loop(
            queries, grads, keys, hot, cold, band, factor, minus, row_delta, dq, SIZES, BLOCK_N, False, False, None
        )
        dq = _dq_loop(
            queries, grads, keys, cold, end, band, factor, minus, row_delta, dq, SIZES, BLOCK_E, True, False,
            EDGE_STAGES,
        )  # fmt: skip
    else:
        dq = _dq_loop(
            queries, grads, keys, start, end, band, factor, minus, row_delta, dq, SIZES, BLOCK_N, True, False, None
        )
    if not all_finite(dq):
        dq = nan_of_keys(keys.k, keys.k_stride, band, SIZES, SIZES.HEAD_DIM, BLOCK_D, BLOCK_M)
        queries = load_rows(q, place, SIZES.HEAD_DIM, SIZES.BLOCK_D)
        grads = load_rows(grad_out, place, SIZES.HEAD_DIM_V, SIZES.BLOCK_DV)
        dq = _dq_loop(queries, grads, keys, start, end, band, factor, minus, row_delta, dq, SIZES, 16, True, True, 1)
    return dq * (what_was_lost(minus, row_shift, row_log_sum, factor) * scale)[:, None], place


@triton.jit
def banded_bwd_dq_kernel(
    grad_out: Rows, q: Rows, k: Rows, v: Rows, rows: Statistics, dq, seqs: Sequences, num_key_rows, scale,
    SIZES: tl.constexpr, BLOCK_M: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr, EDGE_STAGES: tl.constexpr,
):  # fmt: skip
    w, hk, head_tile = tile_of_program(SIZES, HEADS)
    value, place = banded_bwd_dq_tile(
        grad_out, q, k, v, rows, seqs, num_key_rows, scale, w, hk, head_tile, SIZES, BLOCK_M, TOKENS, HEADS, BLOCK_N,
        BLOCK_E, EDGE_STAGES,
    )  # fmt: skip
    BLOCK_D: tl.constexpr = SIZES.BLOCK_D
    cols, mask, strides = output_of_tile(place, seqs.seq_len, SIZES, SIZES.HEAD_DIM, BLOCK_D)
    store_output(dq, (place.b, place.t[:, None], place.h[:, None], cols), strides, value, mask, (BLOCK_M, BLOCK_D))


def plan(
    grad_out: Any, q: Any, k: Any, v: Any, shift: Any, log_sum: Any, delta: Any, *seqs: Any, seq_len_k: Any,
    key_stride: int, first_end: int, window: int, scale: float,
) -> Plan:  # fmt: skip
    """grad_out: (batch, seq_len, num_q_heads, head_dim_v). shift, log_sum, delta: (batch, seq_len, num_q_heads)."""
    found = inputs(q, k, v, seqs, seq_len_k, scale)
    rows = Statistics(Dense(shift), Dense(log_sum), Dense(delta))
    return Plan(
        inputs={"grad_out": Strided(grad_out), **found, "rows": rows},
        outputs={"dq": Output(tuple(q.shape), q.dtype)},
        sizes=BandedSizes.of_call(q, k, v, key_stride, first_end, window),
        extent=extent(q, k, found["seqs"]),
    )


def heuristic(sizes: BandedSizes, device: Device) -> Config:
    """The configuration that measured best on an H100, or is known to fit."""
    pipelined = 1 if device.arch == "hip" else 2
    if sizes.ITEMSIZE == 4:
        return query_config(sizes, 32, 32, 0, 8, 1)
    if sizes.widest > 128:
        return query_config(sizes, 64, 32, 0, 8, pipelined)
    if sizes.WINDOW == 0 and device.arch == "sm_90":
        return query_config(sizes, 128, 32, 0, 8, 3, 1, 128)
    return query_config(sizes, 64, 64, 0, 4, pipelined)


def candidates(sizes: BandedSizes, device: Device) -> list[Config]:
    """Those worth measuring."""
    found = [heuristic(sizes, device)]
    if sizes.ITEMSIZE < 4:
        for block_m, warps in ((64, 4), (128, 8)):
            for block_n, stages in ((64, 2), (32, 3)):
                found += [query_config(sizes, block_m, block_n, block_e, warps, stages, 2) for block_e in (0, 32)]
        found += [] if device.arch == "hip" else [query_config(sizes, 128, 32, 0, 8, 3, 1, 128)]
    return [config for i, config in enumerate(found) if config not in found[:i]]


BANDED_BWD_DQ = Kernel(
    fn=banded_bwd_dq_kernel,
    schema=(
        "_banded_bwd_dq(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor shift, Tensor log_sum, Tensor delta, "
        f"{ARGUMENTS}) -> Tensor dq"
    ),
    plan=plan,
    grid=query_grid,
    heuristic=heuristic,
    candidates=candidates,
)
