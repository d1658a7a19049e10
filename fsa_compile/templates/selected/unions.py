"""Query-tile and mixed order, first step: the union of the blocks that the tokens of a query tile selected.

Neighbouring tokens select much the same blocks. A tile attends once to each block of their union, and a bit of its
``members`` says of each token whether the block is one of its own. In the mixed order only the blocks that enough of
the tokens selected are in the union, and the others remain in a copy of ``block_indices``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ...tiling import Config, Device, next_power_of_2
from ..kernel import SEQUENCES, Dense, Kernel, Output, Plan, sequences
from ..sequences import Sequences, num_tiles, run_of_tile
from ..tiles import is_visible, store_output

UNIONS = "Tensor blocks, Tensor members, Tensor counts"

# Past every id: where entries go that select nothing.
NO_BLOCK = tl.constexpr(2147483647)


class Unions(NamedTuple):
    """The unions of query tiles ``w``, ascending.

    blocks, members: (num_tiles, num_kv_heads, places), int32 and int64, of which the first ``counts`` are written. Bit
        ``i`` of ``members`` is set if token ``i`` of the tile selected the block and may read it.
    counts: (num_tiles, num_kv_heads), int32.
    """

    blocks: Any
    members: Any
    counts: Any


class UnionSizes(NamedTuple):
    """Static sizes. MOST: selections of a tile, TOKENS times SLOTS, which is NUM_SELECTED as a power of two.

    LEAST: tokens that have to select a block for it to be in the union. PLACES: of a tile's union.
    """

    NUM_KV_HEADS: int
    NUM_SELECTED: int
    SLOTS: int
    BLOCK_SIZE: int
    TOKENS: int
    MOST: int
    LEAST: int
    PLACES: int


@triton.jit
def _merge(a_block, a_rows, b_block, b_rows):
    """The members of sorted entries up to and including ``b``, as far as they are of its block."""
    return b_block, b_rows | tl.where(a_block == b_block, a_rows, 0)


@triton.jit
def _count(a_block, a_count, b_block, b_count):
    """How many entries there are up to and including ``b``, of its block."""
    return b_block, b_count + tl.where(a_block == b_block, a_count, 0)


@triton.jit
def tile_unions_kernel(block_indices, blocks, members, counts, rest, seqs: Sequences, SIZES: tl.constexpr):
    w = tl.program_id(0)
    hk = tl.program_id(1)
    run, first = run_of_tile(seqs, w, SIZES.TOKENS)
    MOST: tl.constexpr = SIZES.MOST
    SLOTS: tl.constexpr = SIZES.SLOTS
    TOKENS: tl.constexpr = SIZES.TOKENS
    i = tl.arange(0, MOST)
    token = i // SLOTS
    slot = i % SLOTS
    pos = tl.where(run.num_keys > 0, run.offset + first + token, -1)
    exists = (first + token < run.num_rows) & (slot < SIZES.NUM_SELECTED)
    head = (run.b.to(tl.int64) * seqs.seq_len + run.first_row + first) * SIZES.NUM_KV_HEADS + hk
    place = (head + token * SIZES.NUM_KV_HEADS) * SIZES.NUM_SELECTED + slot
    ids = tl.load(block_indices + place, mask=exists & (pos >= 0), other=-1)
    visible = exists & is_visible(ids, pos, SIZES.BLOCK_SIZE)
    # The token, and where it counts the slot, go along in the low bits, so that one sort orders all.
    EACH: tl.constexpr = TOKENS if SIZES.LEAST == 1 else MOST
    chosen = visible & (ids < NO_BLOCK // EACH)
    key = tl.sort(tl.where(chosen, ids * EACH + (token if SIZES.LEAST == 1 else i), NO_BLOCK))
    block = key // EACH
    used = key < NO_BLOCK
    token = key % EACH // (EACH // TOKENS)
    one = tl.full([MOST], 1, tl.int64) << token.to(tl.int64)
    _, rows = tl.associative_scan((block, tl.where(used, one, 0)), 0, _merge)
    following = tl.gather(block, tl.minimum(i + 1, MOST - 1), 0)
    last = used & ((i == MOST - 1) | (following != block))
    if SIZES.LEAST > 1:
        ones = used.to(tl.int32)
        _, before = tl.associative_scan((block, ones), 0, _count)
        _, after = tl.associative_scan((block, ones), 0, _count, reverse=True)
        agreed = before + after - 1 >= SIZES.LEAST
        last = last & agreed
        slot = key % SLOTS
        place = (head + token * SIZES.NUM_KV_HEADS) * SIZES.NUM_SELECTED + slot
        tl.store(rest + place, tl.where(agreed, -1, block), mask=used)
        # Of what is not among the keys they do not tell where it was.
        place = (head + i // SLOTS * SIZES.NUM_KV_HEADS) * SIZES.NUM_SELECTED + i % SLOTS
        tl.store(rest + place, tl.where(visible, ids, -1), mask=exists & ~chosen)
    PLACES: tl.constexpr = SIZES.PLACES
    place = tl.cumsum(last.to(tl.int32), 0) - 1
    at = (w.to(tl.int64) * SIZES.NUM_KV_HEADS + hk) * PLACES + place
    tl.store(members + at, rows, mask=last)
    tl.store(counts + w * SIZES.NUM_KV_HEADS + hk, tl.sum(last.to(tl.int32), 0))
    strides = (SIZES.NUM_KV_HEADS * PLACES, PLACES)
    store_output(blocks, (w, hk, place), strides, block, last, (MOST,))


def plan(block_indices: Any, *seqs: Any, seq_len_k: Any, block_size: int, tokens: int, least: int = 1) -> Plan:
    """The unions of tiles of ``tokens`` tokens (``Unions``), of blocks that ``least`` of them selected.

    rest: block_indices without those, -1 in their place, for ``least`` over 1. Rows of no sequence are not written.
    """
    batch, seq_len, num_kv_heads, num_selected = block_indices.shape
    runs = sequences(block_indices, seq_len_k, seqs)
    slots = next_power_of_2(int(num_selected))
    most = tokens * slots
    places = max(1, most // least)
    sizes = UnionSizes(int(num_kv_heads), int(num_selected), slots, block_size, tokens, most, least, places)
    tiles = num_tiles(batch, seq_len, runs.num_seqs, runs.cu_seqlens_q is not None, tokens, lambda a, b: -(-a // b))
    shape = (tiles, num_kv_heads, places)
    return Plan(
        {"block_indices": Dense(block_indices), "seqs": runs},
        {
            "blocks": Output(shape, torch.int32),
            "members": Output(shape, torch.int64),
            "counts": Output((tiles, num_kv_heads), torch.int32),
            "rest": Output(block_indices.shape if least > 1 else None, torch.int32),
        },
        sizes,
        (tiles, num_kv_heads),
    )


def grid(extent: tuple[Any, ...], tiles: dict[str, Any], cdiv: Any) -> tuple[Any, Any, Any]:
    """One program per query tile and key/value head."""
    return extent[0], extent[1], 1


def heuristic(sizes: UnionSizes, device: Device) -> Config:
    """Eight entries a thread."""
    return Config({}, max(1, min(8, sizes.MOST // 256)), 1)


def candidates(sizes: UnionSizes, device: Device) -> list[Config]:
    """What is worth measuring."""
    return [Config({}, num_warps, 1) for num_warps in (1, 2, 4, 8) if num_warps * 32 <= sizes.MOST]


TILE_UNIONS = Kernel(
    tile_unions_kernel,
    f"_tile_unions(Tensor block_indices, {SEQUENCES}, *, SymInt seq_len_k, int block_size, int tokens, int least=1) "
    "-> (Tensor blocks, Tensor members, Tensor counts, Tensor rest)",
    plan, grid, heuristic, candidates, fuses_epilogue=False,
)  # fmt: skip
