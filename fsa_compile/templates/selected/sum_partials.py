"""FSA loop order, backward, second step: a row's dq is the sum of its partials."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ...tiling import Config, Device
from ..kernel import SEQUENCES, Dense, Kernel, Output, Plan, sequences
from ..sequences import Sequences
from ..tiles import columns, dense_strides, is_visible, load_tile, store_output
from .lists import MAX_UNROLLED, partial_slots
from .merge_partials import grid
from .sizes import SelectedSizes, spread


@triton.jit
def one_partial(partial, block_indices, exists, pos, slots, g, i, SIZES: tl.constexpr):
    """Each row's ``i``-th partial, 0 where its slot's block is not visible."""  # [BLOCK_R, BLOCK_D]
    block = tl.load(block_indices + slots + i // SIZES.NUM_CHUNKS)
    seen = exists & is_visible(block, pos, SIZES.BLOCK_SIZE)
    row = (slots * SIZES.NUM_CHUNKS + i) * SIZES.GROUP + g
    return load_tile(partial, row * SIZES.HEAD_DIM, seen, SIZES.HEAD_DIM, SIZES.BLOCK_D).to(tl.float32)


@triton.jit
def sum_partials_tile(
    partial, block_indices, exists, pos, slots, g, SIZES: tl.constexpr, BLOCK_R: tl.constexpr
):  # fmt: skip
    """The sums of BLOCK_R rows' partials; slots that were never written are not read."""  # [BLOCK_R, BLOCK_D]
    BLOCK_D: tl.constexpr = SIZES.BLOCK_D
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    NUM_PARTIALS: tl.constexpr = SIZES.NUM_SELECTED * SIZES.NUM_CHUNKS
    if NUM_PARTIALS <= MAX_UNROLLED:  # so that the loads of all slots are in flight together
        for i in tl.static_range(NUM_PARTIALS):
            acc += one_partial(partial, block_indices, exists, pos, slots, g, i, SIZES)
    else:
        for i in range(NUM_PARTIALS):
            acc += one_partial(partial, block_indices, exists, pos, slots, g, i, SIZES)
    return acc


@triton.jit
def sum_partials_kernel(
    partial, block_indices, row_heads, out, num_rows, seqs: Sequences, SIZES: tl.constexpr, BLOCK_R: tl.constexpr
):
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    exists, pos, _, slots, g, b, t, h = partial_slots(rows, num_rows, None, seqs, SIZES)
    total = sum_partials_tile(partial, block_indices, exists, pos, slots, g, SIZES, BLOCK_R)
    BLOCK_D: tl.constexpr = SIZES.BLOCK_D
    cols, mask = columns(rows < num_rows, SIZES.HEAD_DIM, BLOCK_D)
    strides = dense_strides(seqs.seq_len, row_heads, SIZES.HEAD_DIM)
    store_output(out, (b[:, None], t[:, None], h[:, None], cols), strides, total, mask, (BLOCK_R, BLOCK_D))


def plan(
    partial: Any, block_indices: Any, *seqs: Any, seq_len_k: Any, block_size: int, row_heads: int = 0
) -> Plan:  # fmt: skip
    """out ``[B, T, HQ, D]`` from partials ``[B, T, HK, S, C, G, D]``.

    row_heads: of the tensor that it is a view of some heads of, or 0.
    """
    sizes = SelectedSizes.of_partials(partial, block_size)
    batch, seq_len = block_indices.shape[:2]
    num_q_heads = sizes.NUM_KV_HEADS * sizes.GROUP
    num_rows = batch * seq_len * num_q_heads
    return Plan(
        {
            "partial": Dense(partial),
            "block_indices": Dense(block_indices),
            "row_heads": row_heads or num_q_heads,
            "num_rows": num_rows,
            "seqs": sequences(block_indices, seq_len_k, seqs),
        },
        {"out": Output((batch, seq_len, num_q_heads, sizes.HEAD_DIM), partial.dtype)},
        sizes,
        (num_rows,),
    )


def heuristic(sizes: SelectedSizes, device: Device) -> Config:
    """As measured on an H200: two rows a warp at 128 columns."""
    return Config({"BLOCK_R": max(1, 256 // sizes.BLOCK_D)}, 1, 2)


def candidates(sizes: SelectedSizes, device: Device) -> list[Config]:
    """What is worth measuring."""
    return spread(heuristic(sizes, device), {"BLOCK_R": [1, 2, 4, 8]}, (1, 2, 4), (2,))


SUM_PARTIALS = Kernel(
    sum_partials_kernel,
    f"_sum_partials(Tensor partial, Tensor block_indices, {SEQUENCES}, *, SymInt seq_len_k, int block_size) -> Tensor",
    plan, grid, heuristic, candidates,
)  # fmt: skip
