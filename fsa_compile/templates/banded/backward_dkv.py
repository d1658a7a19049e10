"""Banded attention, backward: dk and dv, one program per (key tile, key/value head, split), over the queries.

Early compressed tokens are seen by nearly all queries and late ones by few. Each key tile's queries are cut in
``splits`` equal parts, so that no program is long; each part has float32 results of its own, which ``BANDED_SUM`` adds
up in order. With one split the results are final.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ...tiling import Config, Device
from ..kernel import Dense, Kernel, Output, Plan, Strided
from ..opaque import at_run_time
from ..query_tiles import keys_base, query_tiles
from ..row_weights import gradient_of_scores, load_row_weights, weights_of
from ..sequences import Rows, Sequences, num_tiles
from ..tiles import accumulate, add_met, all_finite, columns, dense_strides, dot, finite_part, rows_apart, store_output
from .bands import KeyTile, key_tile, rows_of_keys
from .sizes import ARGUMENTS, BandedSizes, extent, inputs


@triton.jit
def _load_queries(here, stride_t, stride_h, left, heads_left, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr,
                  BLOCK_M: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    """TOKENS tokens from ``here`` on, HEADS heads each; 0 past ``left``. WHOLE: there are no rows without a query."""
    row = tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_W)
    # Heads may lie far apart, which takes 64 bits, but with few of them it is one number a thread.
    heads = here + rows_apart(row % HEADS, stride_h)[:, None]
    pointers = heads + ((row // HEADS * stride_t)[:, None] + cols[None, :])  # [BLOCK_M, BLOCK_W]
    if WHOLE:
        if BLOCK_W == WIDTH:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=(cols < WIDTH)[None, :], other=0.0)
    else:
        exists = (row // HEADS < tl.minimum(left, TOKENS)) & (row % HEADS < heads_left)
        return tl.load(pointers, mask=exists[:, None] & (cols < WIDTH)[None, :], other=0.0)


@triton.jit
def _load_weights(here, left, heads_left, NUM_HEADS: tl.constexpr, BLOCK_M: tl.constexpr, TOKENS: tl.constexpr,
                  HEADS: tl.constexpr, WHOLE: tl.constexpr, COMPENSATED: tl.constexpr):  # fmt: skip
    """What ``load_row_weights`` has of the same rows."""
    row = tl.arange(0, BLOCK_M)
    places = row // HEADS * NUM_HEADS + row % HEADS
    exists = None
    if not WHOLE:
        exists = (row // HEADS < tl.minimum(left, TOKENS)) & (row % HEADS < heads_left)
    return load_row_weights(here, places, exists, COMPENSATED)


@triton.jit
def _seen_by(tile: KeyTile, i, SIZES: tl.constexpr, BLOCK_M: tl.constexpr, HEADS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which of the tile's keys the rows from token ``i`` on see."""  # [BLOCK_N, BLOCK_M]
    token = (tl.arange(0, BLOCK_M) // HEADS)[None, :]
    last = (tile.first + tl.arange(0, BLOCK_N)) * SIZES.STRIDE + SIZES.FIRST_END
    since = (last - tile.run.offset - i)[:, None]
    visible = token >= since
    if SIZES.WINDOW > 0:
        visible = visible & (token < since + SIZES.WINDOW)
    return visible


@triton.jit
def _nan_of_queries(
    x: Rows, base, start, end, tile: KeyTile, heads_left, SIZES: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_M: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """NaN where a key is seen by a row of ``x`` that is not finite in that column, else 0: a careful sum's start."""
    met = tl.zeros([BLOCK_N, BLOCK_W], tl.float32)
    here = base + rows_apart(start, x.strides[1])
    for i in tl.range(start, end, TOKENS, num_stages=1):
        rows = _load_queries(
            here, x.strides[1], x.strides[2], end - i, heads_left, WIDTH, BLOCK_W, BLOCK_M, TOKENS, HEADS, False
        )
        met = add_met(met, _seen_by(tile, i, SIZES, BLOCK_M, HEADS, BLOCK_N), rows)
        here += rows_apart(TOKENS, x.strides[1])
    return tl.where(met > 0, float("nan"), 0.0)


@triton.jit
def _dkv_loop(
    keys, values, q: Rows, q_base, grad_out: Rows, grad_base, weights, start, end, tile: KeyTile, heads_left, scale, dk,
    dk_lost, dv, dv_lost, SIZES: tl.constexpr, BLOCK_M: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr, CAREFUL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Add what tokens ``start`` to ``end`` give; not MASKED: whole tiles, all of whose tokens see every key."""
    NUM_HEADS: tl.constexpr = SIZES.NUM_KV_HEADS * SIZES.GROUP
    EVEN: tl.constexpr = TOKENS * HEADS == BLOCK_M and SIZES.GROUP % HEADS == 0
    WHOLE: tl.constexpr = EVEN and not MASKED
    COMPENSATED: tl.constexpr = SIZES.ITEMSIZE == 4
    PER_TOKEN: tl.constexpr = NUM_HEADS * (3 if COMPENSATED else 2)
    for i in tl.range(start, end, TOKENS, num_stages=STAGES):
        left = end - i
        token = at_run_time(i)
        q_here = q_base + rows_apart(token, q.strides[1])
        grad_here = grad_base + rows_apart(token, grad_out.strides[1])
        queries = _load_queries(q_here, q.strides[1], q.strides[2], left, heads_left, SIZES.HEAD_DIM, SIZES.BLOCK_D,
                                BLOCK_M, TOKENS, HEADS, WHOLE)  # fmt: skip
        grads = _load_queries(grad_here, grad_out.strides[1], grad_out.strides[2], left, heads_left,
                              SIZES.HEAD_DIM_V, SIZES.BLOCK_DV, BLOCK_M, TOKENS, HEADS, WHOLE)  # fmt: skip
        here = weights + rows_apart(token, PER_TOKEN)
        known = _load_weights(here, left, heads_left, NUM_HEADS, BLOCK_M, TOKENS, HEADS, WHOLE, COMPENSATED)
        scores = dot(keys, tl.trans(queries))  # [BLOCK_N, BLOCK_M]
        p = weights_of(scores, known, scale, COMPENSATED)
        ds = gradient_of_scores(p, dot(values, tl.trans(grads)), known, scale, COMPENSATED)
        if MASKED:
            if (CAREFUL > 0) | (i < tile.all_from) | (i + TOKENS > tile.all_to):
                visible = _seen_by(tile, i, SIZES, BLOCK_M, HEADS, BLOCK_N)
                p = tl.where(visible, p, 0.0)
                ds = tl.where(visible, ds, 0.0)
        if CAREFUL == 1:
            dk = tl.dot(ds.to(queries.dtype), finite_part(queries), dk, input_precision="ieee")
        elif CAREFUL == 2:
            dv = tl.dot(p.to(grads.dtype), finite_part(grads), dv, input_precision="ieee")
        elif COMPENSATED:
            dv, dv_lost = accumulate(dv, dv_lost, dot(p, grads), True)
            dk, dk_lost = accumulate(dk, dk_lost, dot(ds, queries), True)
        else:
            dv = tl.dot(p.to(grads.dtype), grads, dv)
            dk = tl.dot(ds.to(queries.dtype), queries, dk)
    return dk, dk_lost, dv, dv_lost


@triton.jit
def _dkv_run(
    grad_out: Rows, q: Rows, keys, values, weights, start, end, seqs: Sequences, hk, tile: KeyTile, scale,
    SIZES: tl.constexpr, BLOCK_M: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_N: tl.constexpr, FLAT: tl.constexpr, CAREFUL: tl.constexpr, EDGE_STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dv that tokens ``start`` to ``end`` give, in one loop if FLAT, else masked and unmasked tiles apart."""
    BLOCK_D: tl.constexpr = SIZES.BLOCK_D
    BLOCK_DV: tl.constexpr = SIZES.BLOCK_DV
    NUM_HEADS: tl.constexpr = SIZES.NUM_KV_HEADS * SIZES.GROUP
    PARTS: tl.constexpr = (SIZES.GROUP + HEADS - 1) // HEADS
    PER_ROW: tl.constexpr = 3 if SIZES.ITEMSIZE == 4 else 2
    run = tile.run
    hot = start + tl.cdiv(tl.maximum(tl.minimum(tile.all_from, end) - start, 0), TOKENS) * TOKENS
    cold = hot + tl.maximum(tl.minimum(tile.all_to, end) - hot, 0) // TOKENS * TOKENS
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    dk_lost = 0.0
    dv_lost = 0.0
    if SIZES.ITEMSIZE == 4:
        dk_lost = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dv_lost = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for part in tl.static_range(PARTS):
        h = hk * SIZES.GROUP + part * HEADS
        left = SIZES.GROUP - part * HEADS
        here = (
            weights + rows_apart(run.b.to(tl.int64) * seqs.seq_len + run.first_row, NUM_HEADS * PER_ROW) + h * PER_ROW
        )
        qb = keys_base(q, run.b, run.first_row, h)
        gb = keys_base(grad_out, run.b, run.first_row, h)
        if CAREFUL == 1:
            dk += _nan_of_queries(
                q, qb, start, end, tile, left, SIZES, SIZES.HEAD_DIM, BLOCK_D, BLOCK_M, TOKENS, HEADS, BLOCK_N
            )
        elif CAREFUL == 2:
            dv += _nan_of_queries(
                grad_out, gb, start, end, tile, left, SIZES, SIZES.HEAD_DIM_V, BLOCK_DV, BLOCK_M, TOKENS, HEADS, BLOCK_N
            )
        if FLAT or CAREFUL > 0:
            dk, dk_lost, dv, dv_lost = _dkv_loop(
                keys, values, q, qb, grad_out, gb, here, start, end, tile, left, scale,
                dk, dk_lost, dv, dv_lost, SIZES, BLOCK_M, TOKENS, HEADS, BLOCK_N, True, CAREFUL, EDGE_STAGES,
            )  # fmt: skip
        else:
            dk, dk_lost, dv, dv_lost = _dkv_loop(
                keys, values, q, qb, grad_out, gb, here, start, tl.minimum(hot, end), tile,
                left, scale, dk, dk_lost, dv, dv_lost, SIZES, BLOCK_M, TOKENS, HEADS, BLOCK_N, True, 0,
                EDGE_STAGES,
            )  # fmt: skip
            dk, dk_lost, dv, dv_lost = _dkv_loop(
                keys, values, q, qb, grad_out, gb, here, hot, cold, tile, left, scale,
                dk, dk_lost, dv, dv_lost, SIZES, BLOCK_M, TOKENS, HEADS, BLOCK_N, False, 0, None,
            )  # fmt: skip
            dk, dk_lost, dv, dv_lost = _dkv_loop(
                keys, values, q, qb, grad_out, gb, here, cold, end, tile, left, scale,
                dk, dk_lost, dv, dv_lost, SIZES, BLOCK_M, TOKENS, HEADS, BLOCK_N, True, 0, EDGE_STAGES,
            )  # fmt: skip
    # A key that does not exist leaves nothing, and what it made of the other factor is not looked at.
    j = tile.first + tl.arange(0, BLOCK_N)
    valid = ((j >= 0) & (j < tile.count))[:, None]
    return tl.where(valid, dk, 0.0), tl.where(valid, dv, 0.0)


@triton.jit
def _load_tile_keys(base, stride, first, count, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_N: tl.constexpr):
    """The keys of a tile; 0 where there are none."""
    cols = tl.arange(0, BLOCK_W)
    j = first + tl.arange(0, BLOCK_N)
    rows = j.to(tl.int64) * stride
    mask = (j < count)[:, None] & (cols < WIDTH)[None, :]
    return tl.load(base + (rows[:, None] + cols[None, :]), mask=mask, other=0.0)


@triton.jit
def banded_bwd_dkv_tile(
    grad_out: Rows, q: Rows, k: Rows, v: Rows, weights, seqs: Sequences, num_key_rows, scale,
    w, hk, split, SIZES: tl.constexpr, BLOCK_M: tl.constexpr, TOKENS: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_N: tl.constexpr, FLAT: tl.constexpr, EDGE_STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dv of key tile ``w``, float32 ``[BLOCK_N, BLOCK_D]`` and ``[BLOCK_N, BLOCK_DV]``.

    Returns ``(dk, dv, b, row, exists)``: also the tile's rows of ``k`` and which of them there are, all ``[BLOCK_N]``.
    """
    tile = key_tile(seqs, num_key_rows, w, SIZES, BLOCK_N)
    run = tile.run
    k_base = keys_base(k, run.b, tile.first_key, hk)
    v_base = keys_base(v, run.b, tile.first_key, hk)
    keys = _load_tile_keys(k_base, k.strides[1], tile.first, tile.count, SIZES.HEAD_DIM, SIZES.BLOCK_D, BLOCK_N)
    values = _load_tile_keys(v_base, v.strides[1], tile.first, tile.count, SIZES.HEAD_DIM_V, SIZES.BLOCK_DV, BLOCK_N)

    tokens = tl.cdiv(tl.cdiv(tile.some_to - tile.some_from, TOKENS), SIZES.SPLITS) * TOKENS
    start = tl.minimum(tile.some_from + split * tokens, tile.some_to)
    end = tl.minimum(start + tokens, tile.some_to)
    dk, dv = _dkv_run(
        grad_out, q, keys, values, weights, start, end, seqs, hk, tile, scale, SIZES, BLOCK_M, TOKENS,
        HEADS, BLOCK_N, FLAT, 0, EDGE_STAGES,
    )  # fmt: skip
    # As in the forward: a query that only some of the keys are seen by can do harm only if it is not finite.
    if not (all_finite(dk) & all_finite(dv)):
        keys = _load_tile_keys(k_base, k.strides[1], tile.first, tile.count, SIZES.HEAD_DIM, SIZES.BLOCK_D, BLOCK_N)
        values = _load_tile_keys(
            v_base, v.strides[1], tile.first, tile.count, SIZES.HEAD_DIM_V, SIZES.BLOCK_DV, BLOCK_N
        )
        FEW_HEADS: tl.constexpr = min(HEADS, 16)
        # One result at a time: both would not fit in registers, which slows the other loops as well.
        dk, _ = _dkv_run(
            grad_out, q, keys, values, weights, start, end, seqs, hk, tile, scale, SIZES, 16,
            16 // FEW_HEADS, FEW_HEADS, BLOCK_N, True, 1, 1,
        )  # fmt: skip
        _, dv = _dkv_run(
            grad_out, q, keys, values, weights, start, end, seqs, hk, tile, scale, SIZES, 16,
            16 // FEW_HEADS, FEW_HEADS, BLOCK_N, True, 2, 1,
        )  # fmt: skip
    row, exists = rows_of_keys(tile, seqs, num_key_rows, BLOCK_N)
    return dk, dv, run.b, row, exists


@triton.jit
def banded_bwd_dkv_kernel(
    grad_out: Rows, q: Rows, k: Rows, v: Rows, weights, dk, dv, seqs: Sequences, num_key_rows, scale,
    SIZES: tl.constexpr, BLOCK_M: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_N: tl.constexpr, FLAT: tl.constexpr, EDGE_STAGES: tl.constexpr,
):  # fmt: skip
    # Early keys are seen by more queries (if no window cuts them) and go first.
    w = tl.program_id(0)
    hk = tl.program_id(1)
    split = tl.program_id(2)
    value, value_v, run_b, row, exists = banded_bwd_dkv_tile(
        grad_out, q, k, v, weights, seqs, num_key_rows, scale, w, hk, split, SIZES, BLOCK_M, TOKENS,
        HEADS, BLOCK_N, FLAT, EDGE_STAGES,
    )  # fmt: skip
    BLOCK_D: tl.constexpr = SIZES.BLOCK_D
    BLOCK_DV: tl.constexpr = SIZES.BLOCK_DV
    b = run_b
    if seqs.cu_seqlens_k is not None:
        b += split
    else:
        b += split * seqs.num_seqs
    t = row[:, None]
    rows = (b.to(tl.int64) * num_key_rows + row) * SIZES.NUM_KV_HEADS + hk
    cols_v, mask_v = columns(exists, SIZES.HEAD_DIM_V, BLOCK_DV)
    tl.store(dv + (rows[:, None] * SIZES.HEAD_DIM_V + cols_v), value_v.to(dv.dtype.element_ty), mask=mask_v)
    cols, mask = columns(exists, SIZES.HEAD_DIM, BLOCK_D)
    strides = dense_strides(num_key_rows, SIZES.NUM_KV_HEADS, SIZES.HEAD_DIM)
    store_output(dk, (b, t, hk, cols), strides, value, mask, (BLOCK_N, BLOCK_D))


def plan(
    grad_out: Any, q: Any, k: Any, v: Any, weights: Any, *seqs: Any, seq_len_k: Any, key_stride: int, first_end: int,
    window: int, scale: float, splits: int,
) -> Plan:  # fmt: skip
    """Of ``splits`` > 1 the results are float32 and ``[splits * batch, key rows, num_kv_heads, width]``."""
    found = inputs(q, k, v, seqs, seq_len_k, scale)
    dtype = k.dtype if splits == 1 else torch.float32
    return Plan(
        inputs={"grad_out": Strided(grad_out), **found, "weights": Dense(weights)},
        outputs={name: Output((splits * x.shape[0], *x.shape[1:]), dtype) for name, x in (("dk", k), ("dv", v))},
        sizes=BandedSizes.of_call(q, k, v, key_stride, first_end, window)._replace(SPLITS=splits),
        extent=(*extent(q, k, found["seqs"]), splits),
    )


def grid(extent: tuple[Any, ...], tiles: dict[str, Any], cdiv: Any) -> tuple[Any, Any, Any]:
    """One program per key tile, key/value head and split."""
    batch, _, key_rows, num_seqs, packed, num_kv_heads, _, splits = extent
    return num_tiles(batch, key_rows, num_seqs, packed, tiles["BLOCK_N"], cdiv), num_kv_heads, splits


def _config(
    sizes: BandedSizes, block_m: int, block_n: int, flat: bool, warps: int, stages: int, edge_stages: int = 1
) -> Config:
    """``flat``: one loop over the queries, masks where needed; else masked tiles have loops of their own."""
    tiles = query_tiles(sizes, block_m)
    tiles |= {"BLOCK_N": block_n, "FLAT": flat, "EDGE_STAGES": None if flat else edge_stages}
    return Config(tiles, warps, stages)


def heuristic(sizes: BandedSizes, device: Device) -> Config:
    """The configuration that measured best on an H100, or is known to fit.

    Two accumulators leave registers for 32 rows: at 64 they spill, and then ptxas takes the matrix products one by one.
    """
    pipelined = 1 if device.arch == "hip" else 2
    if sizes.ITEMSIZE == 4:
        return _config(sizes, 16, 32 if sizes.widest <= 128 else 16, True, 8, 1)
    if sizes.widest > 128:
        return _config(sizes, 32, 64, True, 8, pipelined)
    if device.arch != "sm_90":
        return _config(sizes, 32, 64, True, 4, pipelined)
    # A window is few tiles of queries, so that one loop and small programs do best.
    return _config(sizes, 32, 64, True, 4, 3) if sizes.WINDOW > 0 else _config(sizes, 32, 128, False, 8, 3, 2)


def candidates(sizes: BandedSizes, device: Device) -> list[Config]:
    """Those worth measuring."""
    found = [heuristic(sizes, device)]
    if sizes.ITEMSIZE < 4:
        for block_n, warps in ((64, 4), (128, 8)):
            for stages in (2, 3, 4):
                found += [_config(sizes, 32, block_n, flat, warps, stages, 2) for flat in (True, False)]
    return found


BANDED_BWD_DKV = Kernel(
    fn=banded_bwd_dkv_kernel,
    schema=(
        "_banded_bwd_dkv(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor weights, "
        f"{ARGUMENTS}, int splits) -> (Tensor dk, Tensor dv)"
    ),
    plan=plan,
    grid=grid,
    heuristic=heuristic,
    candidates=candidates,
    hides_lengths=True,
)
