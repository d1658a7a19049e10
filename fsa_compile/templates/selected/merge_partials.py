"""FSA loop order, forward, second step: merge a row's partials by their softmax statistics.

In the mixed order there is one more part of a row, the attention to what its query tile agreed on.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ...tiling import Config, Device, next_power_of_2
from ..kernel import SEQUENCES, Dense, Kernel, Output, Plan, Strided, sequences
from ..sequences import Sequences
from ..tiles import columns, dense_strides, exp_scaled, finite_max, is_visible, load_tile, log_or_none, store_output
from .lists import MAX_UNROLLED, partial_slots
from .sizes import SelectedSizes, spread


@triton.jit
def weighted_partial(
    partial_out, partial_stats, block_indices, exists, pos, ids, slots, g, i, shift, total, scale, SIZES: tl.constexpr
):
    """What each row's ``i``-th partial adds to its output."""  # [BLOCK_R, BLOCK_DV]
    block = tl.load(block_indices + ids + i // SIZES.NUM_CHUNKS)
    seen = exists & is_visible(block, pos, SIZES.BLOCK_SIZE)
    partial = (slots * SIZES.NUM_CHUNKS + i) * SIZES.GROUP + g
    part_max = tl.load(partial_stats + partial * 2, mask=seen, other=float("-inf"))
    part_sum = tl.load(partial_stats + partial * 2 + 1, mask=seen, other=0.0)
    out = load_tile(partial_out, partial * SIZES.HEAD_DIM_V, seen, SIZES.HEAD_DIM_V, SIZES.BLOCK_DV)
    return (part_sum * exp_scaled(part_max, shift, scale) / total)[:, None] * out.to(tl.float32)


class Agreed(NamedTuple):
    """The attention of rows to the blocks that their query tiles agreed on, or Nones.

    out: ``[B, T, HQ, DV]``. shift, log_sum: ``[B, T, HQ]``; of a row that has none of the blocks finite and -inf.
    """

    out: Any
    shift: Any
    log_sum: Any


@triton.jit
def merge_partials_tile(
    partial_out, partial_stats, block_indices, agreed: Agreed, exists, pos, ids, slots, g, b, t, h, scale,
    SIZES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Merged attention of BLOCK_R output rows: float32 ``(out [BLOCK_R, BLOCK_DV], shift, log_sum)``.

    A slot whose block is not visible was never written, so its partial is not read.
    """
    NUM_PARTIALS: tl.constexpr = SIZES.NUM_SELECTED * SIZES.NUM_CHUNKS
    slot = tl.arange(0, BLOCK_S)[None, :]
    block = tl.load(block_indices + ids[:, None] + slot // SIZES.NUM_CHUNKS, mask=slot < NUM_PARTIALS, other=-1)
    seen = exists[:, None] & is_visible(block, pos[:, None], SIZES.BLOCK_SIZE)  # [BLOCK_R, BLOCK_S]
    stats = partial_stats + ((slots[:, None] * SIZES.NUM_CHUNKS + slot) * SIZES.GROUP + g[:, None]) * 2
    part_max = tl.load(stats, mask=seen, other=float("-inf"))
    part_sum = tl.load(stats + 1, mask=seen, other=0.0)
    row_max = tl.max(part_max, 1)
    BLOCK_DV: tl.constexpr = SIZES.BLOCK_DV
    if agreed.out is not None:
        sums, tops = agreed.log_sum, agreed.shift
        place = b.to(tl.int64) * sums.strides[0] + t.to(tl.int64) * sums.strides[1] + h
        more_sum = tl.load(sums.ptr + place, mask=exists, other=float("-inf"))
        place = b.to(tl.int64) * tops.strides[0] + t.to(tl.int64) * tops.strides[1] + h
        more_max = tl.load(tops.ptr + place, mask=exists, other=0.0)
        more_max = tl.where(more_sum == float("-inf"), float("-inf"), more_max)
        row_max = tl.maximum(row_max, more_max)
    shift = finite_max(row_max)
    row_sum = tl.sum(part_sum * exp_scaled(part_max, shift[:, None], scale), 1)
    if agreed.out is not None:
        more_sum = tl.exp(more_sum) * exp_scaled(more_max, shift, scale)
        row_sum += more_sum
        total = tl.where(row_sum > 0, row_sum, 1.0)
        seen = exists & (more_sum > 0)
        rows = agreed.out
        place = b.to(tl.int64) * rows.strides[0] + t.to(tl.int64) * rows.strides[1] + h * rows.strides[2]
        more = load_tile(rows.ptr, place, seen, SIZES.HEAD_DIM_V, BLOCK_DV)
        acc = (more_sum / total)[:, None] * more.to(tl.float32)
    else:
        total = tl.where(row_sum > 0, row_sum, 1.0)
        acc = tl.zeros([BLOCK_R, BLOCK_DV], tl.float32)
    if NUM_PARTIALS <= MAX_UNROLLED:  # so that the loads of all slots are in flight together
        for i in tl.static_range(NUM_PARTIALS):
            acc += weighted_partial(
                partial_out, partial_stats, block_indices, exists, pos, ids, slots, g, i, shift, total, scale, SIZES
            )
    else:
        for i in range(NUM_PARTIALS):
            acc += weighted_partial(
                partial_out, partial_stats, block_indices, exists, pos, ids, slots, g, i, shift, total, scale, SIZES
            )
    return acc, shift, log_or_none(row_sum)


@triton.jit
def merge_partials_kernel(
    partial_out, partial_stats, block_indices, agreed: Agreed, first_head, row_heads, out, shift, log_sum, num_rows,
    seqs: Sequences, scale, SIZES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    exists, pos, ids, slots, g, b, t, h = partial_slots(rows, num_rows, first_head, seqs, SIZES)
    value, row_shift, row_log_sum = merge_partials_tile(
        partial_out, partial_stats, block_indices, agreed, exists, pos, ids, slots, g, b, t, h, scale, SIZES,
        BLOCK_R, BLOCK_S,
    )  # fmt: skip
    place = (b.to(tl.int64) * seqs.seq_len + t) * row_heads + h
    tl.store(shift + place, row_shift, mask=rows < num_rows)
    tl.store(log_sum + place, row_log_sum, mask=rows < num_rows)
    BLOCK_DV: tl.constexpr = SIZES.BLOCK_DV
    cols, mask = columns(rows < num_rows, SIZES.HEAD_DIM_V, BLOCK_DV)
    strides = dense_strides(seqs.seq_len, row_heads, SIZES.HEAD_DIM_V)
    store_output(out, (b[:, None], t[:, None], h[:, None], cols), strides, value, mask, (BLOCK_R, BLOCK_DV))


def plan(
    partial_out: Any, partial_stats: Any, block_indices: Any, more_out: Any, more_shift: Any, more_log_sum: Any,
    *seqs: Any, seq_len_k: Any, block_size: int, scale: float, first_head: int = 0, row_heads: int = 0,
) -> Plan:  # fmt: skip
    """out ``[B, T, HQ, DV]``, shift and log_sum ``[B, T, HQ]`` from what ``fwd_kv_outer`` left, and ``Agreed``.

    row_heads: of the tensors that they are views of some heads of, or 0.
    """
    sizes = SelectedSizes.of_partials(partial_out, block_size)._replace(LISTED_HEADS=int(block_indices.shape[2]))
    batch, seq_len = block_indices.shape[:2]
    rows = (batch, seq_len, sizes.NUM_KV_HEADS * sizes.GROUP)
    num_rows = batch * seq_len * rows[2]
    statistics = Output(rows, torch.float32)
    agreed = (None if x is None else Strided(x) for x in (more_out, more_shift, more_log_sum))
    return Plan(
        {
            "partial_out": Dense(partial_out),
            "partial_stats": Dense(partial_stats),
            "block_indices": Dense(block_indices),
            "agreed": Agreed(*agreed),
            "first_head": None if sizes.NUM_KV_HEADS == sizes.LISTED_HEADS else first_head,
            "row_heads": row_heads or rows[2],
            "num_rows": num_rows,
            "seqs": sequences(block_indices, seq_len_k, seqs),
            "scale": scale,
        },
        {"out": Output((*rows, sizes.HEAD_DIM_V), partial_out.dtype), "shift": statistics, "log_sum": statistics},
        sizes,
        (num_rows,),
    )


def grid(extent: tuple[Any, ...], tiles: dict[str, Any], cdiv: Any) -> tuple[Any, Any, Any]:
    """BLOCK_R output rows a program."""
    return cdiv(extent[0], tiles["BLOCK_R"]), 1, 1


def heuristic(sizes: SelectedSizes, device: Device) -> Config:
    """As measured on an H200: two rows a warp at 128 columns."""
    slots = next_power_of_2(sizes.NUM_SELECTED * sizes.NUM_CHUNKS)
    return Config({"BLOCK_R": max(1, 256 // sizes.BLOCK_DV), "BLOCK_S": slots}, 1, 2)


def candidates(sizes: SelectedSizes, device: Device) -> list[Config]:
    """What is worth measuring."""
    return spread(heuristic(sizes, device), {"BLOCK_R": [1, 2, 4, 8]}, (1, 2, 4), (2,))


MERGE_PARTIALS = Kernel(
    merge_partials_kernel,
    "_merge_partials(Tensor partial_out, Tensor partial_stats, Tensor block_indices, Tensor? more_out, "
    f"Tensor? more_shift, Tensor? more_log_sum, {SEQUENCES}, *, "
    "SymInt seq_len_k, int block_size, float scale, int first_head=0) -> (Tensor out, Tensor shift, Tensor log_sum)",
    plan, grid, heuristic, candidates,
)  # fmt: skip
