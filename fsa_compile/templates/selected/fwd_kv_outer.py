"""FSA loop order, forward: one program per tile of a block's list and chunk of the block serves the rows listed.

Every partial carries its own softmax statistics, so no statistics pass has to run first and the merge is exact for
every row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ...tiling import Config, Device
from ..kernel import SEQUENCES, Kernel, Output, Plan, sequences
from ..query_tiles import exponent_shift
from ..sequences import Rows, Sequences
from ..tiles import LOG2E, dot, finite_part, store_output
from .lists import chunk_keys, list_rows, list_tile, load_chunk, load_entries, load_rows, tiles_that_hide
from .sizes import LISTS, Lists, Part, SelectedSizes, attention_inputs, list_inputs, spread, warps


@triton.jit
def first_spoiled(v, keys):
    """The position of the first key whose value is not finite; past all positions if they all are."""
    finite = tl.abs(v.to(tl.float32)) < float("inf")
    return tl.min(tl.where(finite, 2147483647, keys[:, None]))


@triton.jit
def attend_chunk(q, k, v, keys, pos, spoiled_from, factor, HIDDEN: tl.constexpr):
    """Attention of BLOCK_M rows over the keys of one chunk, with a softmax of its own.

    Returns float32 ``(out [BLOCK_M, BLOCK_DV], row_max [BLOCK_M], row_sum [BLOCK_M])``: the normalised output, the
    largest score before scaling and the sum of ``exp(scale * (score - row_max))``, with ``factor`` the scale times
    ``log2(e)``; a row that sees no key of the chunk has 0, ``-inf`` and 0. Values are finite; a row that sees one that
    was not, at ``spoiled_from``, is NaN: throughout, as one number a row costs nothing, where only some columns need
    be.

    HIDDEN: a row may not see all keys. The exponent is one fused product, as in ``softmax_step``, and the
    division one by row; what takes the time is memory (docs/decisions/partials.md).
    """
    scores = dot(q, tl.trans(k))  # [BLOCK_M, CHUNK_N]
    if HIDDEN:
        scores = tl.where(keys[None, :] <= pos[:, None], scores, float("-inf"))
    row_max = tl.max(scores, 1)
    shift = exponent_shift(row_max, factor)
    p = tl.exp2(tl.fma(scores, factor, -shift[:, None]))
    row_sum = tl.sum(p, 1)
    inverse = tl.where(pos >= spoiled_from, float("nan"), 1 / tl.where(row_sum > 0, row_sum, 1.0))
    lost = tl.where(row_sum > 0, tl.fma(row_max, -factor, shift), 0.0)
    return dot(p.to(v.dtype), v) * inverse[:, None], row_max, row_sum * tl.exp2(lost)


@triton.jit
def store_stats(partial_stats, partial, valid, row_max, row_sum):
    """Keep maximum and sum apart: one log-sum-exp, rounded at 1e4, would lose the weights between partials."""
    stats = partial_stats + partial.to(tl.int64) * 2
    tl.store(stats, row_max, mask=valid)
    tl.store(stats + 1, row_sum, mask=valid)


@triton.jit
def selected_fwd_kv_outer_kernel(
    q: Rows, k: Rows, v: Rows, block_indices, lists: Lists, part: Part, partial_out, partial_stats,
    seqs: Sequences, scale, SIZES: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(1)
    first, last, block, hk, run = list_tile(tl.program_id(0), block_indices, lists, part, seqs, SIZES)
    keys, exists = chunk_keys(block, chunk, run.num_keys, first < last, SIZES)
    k_chunk = load_chunk(k, run, hk, keys, exists, SIZES.HEAD_DIM, SIZES.BLOCK_D)
    v_chunk = load_chunk(v, run, hk, keys, exists, SIZES.HEAD_DIM_V, SIZES.BLOCK_DV)
    hidden = tiles_that_hide(lists.entries, first, last, block, chunk, run, seqs, SIZES, BLOCK_M)
    # A weight of 0 does not keep out what is not finite, and rows that do not see it must not notice.
    spoiled_from = first_spoiled(v_chunk, keys)
    v_chunk = finite_part(v_chunk)
    end = hidden
    # In a tuple only a name is a constant.
    HEAD_DIM_V: tl.constexpr = SIZES.HEAD_DIM_V
    BLOCK_DV: tl.constexpr = SIZES.BLOCK_DV
    cols = tl.arange(0, BLOCK_DV)[None, :]
    start = hidden * 0
    for step in tl.static_range(2):  # rows that may not see all keys, and those that do
        for m in range(start, end):
            entry = load_entries(lists.entries, first, last, m, SIZES, BLOCK_M)
            valid, _, t, pos, g, partial = list_rows(entry, first, last, m, chunk, part, run, seqs, SIZES, BLOCK_M)
            rows = load_rows(q, run.b, hk, t, g, None, SIZES.GROUP, SIZES.HEAD_DIM, SIZES.BLOCK_D)
            out, row_max, row_sum = attend_chunk(
                rows, k_chunk, v_chunk, keys, pos, spoiled_from, scale * LOG2E, step == 0
            )
            store_stats(partial_stats, partial, valid, row_max, row_sum)
            mask = valid[:, None] & (cols < SIZES.HEAD_DIM_V)
            store_output(partial_out, (partial[:, None], cols), (HEAD_DIM_V,), out, mask, (BLOCK_M, BLOCK_DV))
        start = end
        end = tl.cdiv((last - first) * SIZES.GROUP, BLOCK_M)


def plan(
    q: Any, k: Any, v: Any, block_indices: Any, *lists_and_seqs: Any, block_size: int, scale: float, first_head: int = 0
) -> Plan:
    """Partials ``[B, T, HK, S, C, G, DV]`` and their statistics ``[..., 2]``, where a slot's block is visible.

    block_indices and the lists may be of more heads than ``k``, whose first is then their ``first_head``.
    """
    sizes = SelectedSizes.of_call(q, k, v, block_indices, block_size)
    shape = sizes.partials(*block_indices.shape[:2])
    lists, num_tiles = list_inputs(lists_and_seqs[:4], block_indices, sizes.NUM_KV_HEADS, first_head)
    return Plan(
        attention_inputs(q, k, v, block_indices)
        | lists
        | {"seqs": sequences(q, k.shape[1], lists_and_seqs[4:]), "scale": scale},
        {
            "partial_out": Output((*shape, sizes.HEAD_DIM_V), q.dtype),
            "partial_stats": Output((*shape, 2), torch.float32),
        },
        sizes,
        (num_tiles, sizes.NUM_CHUNKS),
    )


def grid(extent: tuple[Any, ...], tiles: dict[str, Any], cdiv: Any) -> tuple[Any, Any, Any]:
    """One program per tile of a list and chunk of its block."""
    return extent[0], extent[1], 1


def heuristic(sizes: SelectedSizes, device: Device) -> Config:
    """As measured on an H200, and on an H100: entries and rows pipelined, 6 % (32 / 8 heads)."""
    block_m = 16 if sizes.row_bytes > 512 else 32 if sizes.row_bytes > 256 or sizes.ITEMSIZE == 4 else 64
    pipelined = device.arch == "sm_90" and sizes.row_bytes == 256 and sizes.CHUNK_N <= 64
    return Config({"BLOCK_M": block_m}, warps(sizes, 4, device), 3 if pipelined else 1)


def candidates(sizes: SelectedSizes, device: Device) -> list[Config]:
    """What is worth measuring."""
    return spread(heuristic(sizes, device), {"BLOCK_M": [64, 128]}, (4, 8), (1, 2, 3, 5))


FWD_KV_OUTER = Kernel(
    selected_fwd_kv_outer_kernel,
    f"_selected_fwd_kv_outer(Tensor q, Tensor k, Tensor v, Tensor block_indices, {LISTS}, {SEQUENCES}, *, "
    "int block_size, float scale, int first_head=0) -> (Tensor partial_out, Tensor partial_stats)",
    plan, grid, heuristic, candidates,
)  # fmt: skip
