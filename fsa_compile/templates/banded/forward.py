"""Banded attention, forward: one program per (query tile, key/value head) walks the keys that the tile sees.

Nearly all tiles of keys are seen by every row, and their loop has no masks. A value that some row does not see can
only do harm if it is not finite; then the result is not either, and the program starts again, carefully.

A row's weights are taken relative to the largest score of the first tile in which it sees a key, not to the largest of
all: any number does, so long as no weight overflows, and then nothing has to be scaled again. Exponents of float32 and
bfloat16 leave room for 88 (natural units). Where that is not enough the result is not finite, and the program starts
again with an online softmax.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ...tiling import Config, Device
from ..kernel import Kernel, Output, Plan
from ..opaque import at_run_time
from ..query_tiles import (
    LOWEST,
    Keys,
    exponent_shift,
    load_k,
    load_rows,
    load_v,
    output_of_tile,
    query_grid,
    softmax_end,
    softmax_step,
    store_statistics,
    tile_of_program,
)
from ..sequences import Rows, Sequences
from ..tiles import LOG2E, all_finite, dot, finite_part, rows_finite, store_output
from .bands import Band, in_band, nan_of_keys, query_tile, whole_tiles
from .sizes import ARGUMENTS, BandedSizes, extent, inputs, query_config


@triton.jit
def _fwd_loop(
    q, keys: Keys, start, end, band: Band, factor, acc, row_max, row_sum, SIZES: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK: tl.constexpr, MASKED: tl.constexpr, CAREFUL: tl.constexpr, FIXED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attend to keys ``start`` to ``end``; not MASKED: whole tiles, all of whose keys every row sees.

    FIXED: a row's ``row_max`` is that of the first tile with a key that it sees, and stays.
    """
    shift = exponent_shift(row_max, factor)
    lead = band.some_from + (TOKENS if SIZES.WINDOW > 0 else 1)
    for i in tl.range(start, end, BLOCK, num_stages=STAGES):
        here = at_run_time(i)
        k = load_k(keys, here, end - i, SIZES, BLOCK, MASKED)
        scores = dot(q, tl.trans(k))  # [BLOCK_M, BLOCK]
        if MASKED:
            if CAREFUL | (i < band.all_from) | (i + BLOCK > band.all_to):
                scores = tl.where(in_band(i, band, SIZES, BLOCK), scores, float("-inf"))
        if FIXED:
            if i < lead:
                row_max = tl.where(row_max == LOWEST, tl.maximum(tl.max(scores, 1), LOWEST), row_max)
                shift = exponent_shift(row_max, factor)
            p = tl.exp2(tl.fma(scores, factor, -shift[:, None]))
            row_sum += tl.sum(p, 1)
        else:
            p, decay, row_max, row_sum = softmax_step(scores, row_max, row_sum, factor)
            acc = acc * decay[:, None]
        v = load_v(keys, here, end - i, SIZES, BLOCK, MASKED)
        if CAREFUL:
            v = finite_part(v)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    return acc, row_max, row_sum


@triton.jit
def banded_fwd_tile(
    q: Rows, k: Rows, v: Rows, seqs: Sequences, num_key_rows, scale, w, hk, head_tile, SIZES: tl.constexpr,
    BLOCK_M: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
    EDGE_STAGES: tl.constexpr,
):  # fmt: skip
    """Attention of query tile ``w``.

    Returns ``(out, shift, log_sum, place)``: float32 ``[BLOCK_M, BLOCK_DV]``, ``[BLOCK_M]``, ``[BLOCK_M]``, and where
    the rows lie.
    """
    place, keys, band = query_tile(k, v, seqs, num_key_rows, w, hk, head_tile, SIZES, BLOCK_M, TOKENS, HEADS)
    queries = load_rows(q, place, SIZES.HEAD_DIM, SIZES.BLOCK_D)
    factor = scale * LOG2E

    BLOCK_DV: tl.constexpr = SIZES.BLOCK_DV
    row_max = tl.full([BLOCK_M], LOWEST, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    # float16 leaves room for 11 only.
    FIXED: tl.constexpr = q.ptr.dtype.element_ty != tl.float16
    start = band.some_from
    end = band.some_to
    if BLOCK_E > 0:
        hot, cold = whole_tiles(band, SIZES, BLOCK_N, BLOCK_E)
        if SIZES.WINDOW > 0:
            acc, row_max, row_sum = _fwd_loop(
                queries, keys, start, tl.minimum(hot, end), band, factor, acc, row_max, row_sum, SIZES, TOKENS, BLOCK_E,
                True, False, FIXED, EDGE_STAGES,
            )  # fmt: skip
        acc, row_max, row_sum = _fwd_loop(
            queries, keys, hot, cold, band, factor, acc, row_max, row_sum, SIZES, TOKENS, BLOCK_N, False, False, FIXED,
            None,
        )  # fmt: skip
        acc, row_max, row_sum = _fwd_loop(
            queries, keys, cold, end, band, factor, acc, row_max, row_sum, SIZES, TOKENS, BLOCK_E, True, False, FIXED,
            EDGE_STAGES,
        )  # fmt: skip
    else:
        acc, row_max, row_sum = _fwd_loop(
            queries, keys, start, end, band, factor, acc, row_max, row_sum, SIZES, TOKENS, BLOCK_N, True, False, FIXED,
            None,
        )  # fmt: skip
    if not rows_finite(acc, row_sum):
        if FIXED:
            acc, row_max, row_sum = _fwd_loop(
                queries, keys, start, end, band, factor, tl.zeros([BLOCK_M, BLOCK_DV], tl.float32),
                tl.full([BLOCK_M], LOWEST, tl.float32), tl.zeros([BLOCK_M], tl.float32), SIZES, TOKENS, BLOCK_N, True,
                False, False, EDGE_STAGES,
            )  # fmt: skip
        if not all_finite(acc):
            row_max = tl.full([BLOCK_M], LOWEST, tl.float32)
            row_sum = tl.zeros([BLOCK_M], tl.float32)
            acc = nan_of_keys(keys.v, keys.v_stride, band, SIZES, SIZES.HEAD_DIM_V, BLOCK_DV, BLOCK_M)
            queries = load_rows(q, place, SIZES.HEAD_DIM, SIZES.BLOCK_D)
            acc, row_max, row_sum = _fwd_loop(
                queries, keys, start, end, band, factor, acc, row_max, row_sum, SIZES, TOKENS, 16, True, True, False, 1
            )
    out, row_shift, log_sum = softmax_end(acc, row_max, row_sum, factor)
    return out, row_shift, log_sum, place


@triton.jit
def banded_fwd_kernel(
    q: Rows, k: Rows, v: Rows, out, shift, log_sum, seqs: Sequences, num_key_rows, scale, SIZES: tl.constexpr,
    BLOCK_M: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
    EDGE_STAGES: tl.constexpr,
):  # fmt: skip
    w, hk, head_tile = tile_of_program(SIZES, HEADS)
    value, row_shift, row_log_sum, place = banded_fwd_tile(
        q, k, v, seqs, num_key_rows, scale, w, hk, head_tile, SIZES, BLOCK_M, TOKENS, HEADS, BLOCK_N, BLOCK_E,
        EDGE_STAGES,
    )  # fmt: skip
    store_statistics(shift, log_sum, place, row_shift, row_log_sum)
    BLOCK_DV: tl.constexpr = SIZES.BLOCK_DV
    cols, mask, strides = output_of_tile(place, seqs.seq_len, SIZES, SIZES.HEAD_DIM_V, BLOCK_DV)
    store_output(out, (place.b, place.t[:, None], place.h[:, None], cols), strides, value, mask, (BLOCK_M, BLOCK_DV))


def plan(
    q: Any, k: Any, v: Any, *seqs: Any, seq_len_k: Any, key_stride: int, first_end: int, window: int, scale: float
) -> Plan:
    """q: (batch, seq_len, num_q_heads, head_dim). k, v: (batch, key rows, num_kv_heads, head_dim and head_dim_v)."""
    batch, seq_len, num_q_heads, _ = q.shape
    found = inputs(q, k, v, seqs, seq_len_k, scale)
    statistics = Output((batch, seq_len, num_q_heads), torch.float32)
    return Plan(
        inputs=found,
        outputs={
            "out": Output((batch, seq_len, num_q_heads, v.shape[3]), q.dtype),
            "shift": statistics,
            "log_sum": statistics,
        },
        sizes=BandedSizes.of_call(q, k, v, key_stride, first_end, window),
        extent=extent(q, k, found["seqs"]),
    )


def heuristic(sizes: BandedSizes, device: Device) -> Config:
    """The configuration that measured best on an H100, or is known to fit."""
    hip = device.arch == "hip"
    pipelined = 1 if hip else 2
    if sizes.ITEMSIZE == 4:
        return query_config(sizes, 32, 32, 0, 8, 1)
    if sizes.widest > 128:
        return query_config(sizes, 128, 32, 0, 8, pipelined)
    if sizes.WINDOW > 0:
        # A window is few tiles, so that filling the pipeline shows: one loop, and small programs, three at a time, to
        # hide it.
        return query_config(sizes, 64, 32, 0, 4, 1) if hip else query_config(sizes, 64, 32, 0, 4, 3, 1, 168)
    if device.arch == "sm_90":
        return query_config(sizes, 256, 64, 32, 16, 3, 2)
    return query_config(sizes, 128, 64, 0, 8, pipelined)


def candidates(sizes: BandedSizes, device: Device) -> list[Config]:
    """Those worth measuring."""
    found = [heuristic(sizes, device)]
    if sizes.ITEMSIZE < 4:
        for block_m, warps, most in ((64, 4, 3), (128, 8, 4), (256, 16, 3)):
            if block_m < 256 or sizes.widest <= 128:
                for block_e in (0, 32):
                    tiles = (block_m, 64, block_e, warps)
                    found += [query_config(sizes, *tiles, stages, 2) for stages in range(2, most + 1)]
    if sizes.ITEMSIZE < 4 and sizes.widest <= 128 and device.arch != "hip":
        found += [query_config(sizes, 64, 32, 0, 4, 3, 1, 168), query_config(sizes, 128, 64, 32, 8, 2, 2, 128)]
    return [config for i, config in enumerate(found) if config not in found[:i]]


BANDED_FWD = Kernel(
    fn=banded_fwd_kernel,
    schema=f"_banded_fwd(Tensor q, Tensor k, Tensor v, {ARGUMENTS}) -> (Tensor out, Tensor shift, Tensor log_sum)",
    plan=plan,
    grid=query_grid,
    heuristic=heuristic,
    candidates=candidates,
    fuses_epilogue=False,
)
