"""Making the lists: the list of every entry, and, of entries sorted by it, where lists and their tiles begin.

The sort is stable, which keeps the entries of a list in row order (docs/decisions/lists-by-stable-sort.md).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ...tiling import ENTRIES_PER_TILE, Config, Device, next_power_of_2
from ..kernel import SEQUENCES, Dense, Kernel, Output, Plan, sequences
from ..sequences import Sequences, num_tiles, run_of_row, run_start
from ..tiles import is_visible, store_output


class KeySizes(NamedTuple):
    """Static sizes. WIDTH: entries of a row, as a power of two."""

    NUM_KV_HEADS: int
    NUM_SELECTED: int
    BLOCK_SIZE: int
    WIDTH: int


class OffsetSizes(NamedTuple):
    """Static sizes."""

    ENTRIES_PER_TILE: int


@triton.jit
def list_keys_kernel(
    block_indices, keys, num_rows, num_blocks, seqs: Sequences, SIZES: tl.constexpr, BLOCK_R: tl.constexpr
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    exists = n < num_rows
    run, t = run_of_row(seqs, tl.where(exists, n, 0))
    pos = tl.where(run.num_keys > 0, run.offset + t - run.first_row, -1)
    if seqs.cu_seqlens_k is not None:  # as `run_of_block` numbers them
        r = run.seq + 1
        first = run_start(seqs.cu_seqlens_k, seqs.num_seqs, seqs.seq_len_k, r) // SIZES.BLOCK_SIZE + r
    else:
        first = run.b * tl.cdiv(seqs.seq_len_k, SIZES.BLOCK_SIZE)
    # In a tuple only a name is a constant.
    ENTRIES: tl.constexpr = SIZES.NUM_KV_HEADS * SIZES.NUM_SELECTED
    WIDTH: tl.constexpr = SIZES.WIDTH
    i = tl.arange(0, WIDTH)[None, :]
    mask = exists[:, None] & (i < ENTRIES)
    ids = tl.load(block_indices + (n.to(tl.int64)[:, None] * ENTRIES + i), mask=mask, other=-1)
    key = i // SIZES.NUM_SELECTED * num_blocks + first[:, None] + ids
    key = tl.where(is_visible(ids, pos[:, None], SIZES.BLOCK_SIZE), key, SIZES.NUM_KV_HEADS * num_blocks)
    store_output(keys, (n[:, None], i), (ENTRIES,), key, mask, (BLOCK_R, WIDTH))


@triton.jit
def smaller(sorted_values, count, value):
    """How many of ``count`` ascending values are smaller than ``value``."""
    low = value * 0
    high = low + count
    width = count
    while width > 0:
        middle = low + (high - low) // 2
        found = tl.load(sorted_values + middle, mask=low < high, other=0).to(tl.int32) < value
        low, high = tl.where((low < high) & found, middle + 1, low), tl.where(found, high, middle)
        width = width // 2
    return low


@triton.jit
def list_offsets_kernel(
    keys, places, list_offsets, tiles, entries, num_entries, num_lists, SIZES: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_L: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    if tl.program_id(0) * BLOCK_L <= num_lists:
        here = smaller(keys, num_entries, i)
        before = smaller(keys, num_entries, i - 1)
        store_output(list_offsets, (i,), (), here, i <= num_lists, (BLOCK_L,))
        # Of the list before it, so that sums up to a list are where its tiles begin.
        tl.store(tiles + i, tl.where(i > 0, tl.cdiv(here - before, SIZES.ENTRIES_PER_TILE), 0), mask=i <= num_lists)
    e = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    mask = e < num_entries
    tl.store(entries + e, tl.load(places + e, mask=mask).to(tl.int32), mask=mask)


@triton.jit
def list_tiles_kernel(tile_offsets, tile_list, num_tiles, num_lists, SIZES: tl.constexpr, BLOCK_L: tl.constexpr):
    w = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    found = smaller(tile_offsets + 1, num_lists, w + 1)
    value = tl.where(found < num_lists, found, -1)
    store_output(tile_list, (w,), (), value, w < num_tiles, (BLOCK_L,))


def blocks_of_call(batch: Any, seq_len_k: Any, num_seqs: Any, packed: bool, block_size: int) -> Any:
    """Blocks of all runs, as ``sequences.run_of_block`` numbers them."""
    return num_tiles(batch, seq_len_k, num_seqs, packed, block_size, lambda a, b: -(-a // b))


def keys_plan(block_indices: Any, *seqs: Any, seq_len_k: Any, block_size: int) -> Plan:
    """Lists of the entries ``[B, T, HK, S]``, the number of lists for those that select nothing; int16 if that fits."""
    batch, seq_len, num_kv_heads, num_selected = block_indices.shape
    runs = sequences(block_indices, seq_len_k, seqs)
    num_blocks = blocks_of_call(batch, seq_len_k, runs.num_seqs, runs.cu_seqlens_q is not None, block_size)
    # A radix sort's time goes with the width of its keys.
    dtype = torch.int16 if num_kv_heads * num_blocks < 2**15 else torch.int32
    width = next_power_of_2(int(num_kv_heads * num_selected))
    return Plan(
        {
            "block_indices": Dense(block_indices),
            "num_rows": batch * seq_len,
            "num_blocks": num_blocks,
            "seqs": runs,
        },
        {"keys": Output(tuple(block_indices.shape), dtype)},
        KeySizes(int(num_kv_heads), int(num_selected), block_size, width),
        (batch * seq_len,),
    )


def offsets_plan(keys: Any, places: Any, *, num_lists: Any) -> Plan:
    """``Lists.list_offsets``; tiles ``[num_lists + 1]``, of each list but for the first number, 0; and ``entries``.

    keys, places: of the sort, ``[num_entries]``.
    """
    count = keys.shape[0]
    lists = Output((num_lists + 1,), torch.int32)
    return Plan(
        {"keys": Dense(keys), "places": Dense(places), "num_entries": count, "num_lists": num_lists},
        {"list_offsets": lists, "tiles": lists, "entries": Output((count,), torch.int32)},
        OffsetSizes(ENTRIES_PER_TILE),
        (count, num_lists + 1),
    )


def tiles_plan(tile_offsets: Any, *, num_tiles: Any) -> Plan:
    """``Lists.tile_list``, of ``num_tiles`` tiles at most."""
    num_lists = tile_offsets.shape[0] - 1
    return Plan(
        {"tile_offsets": Dense(tile_offsets), "num_tiles": num_tiles, "num_lists": num_lists},
        {"tile_list": Output((num_tiles,), torch.int32)},
        OffsetSizes(ENTRIES_PER_TILE),
        (num_tiles,),
    )


def _keys_config(sizes: KeySizes, device: Device) -> Config:
    return Config({"BLOCK_R": max(1, 1024 // sizes.WIDTH)}, 4, 1)


def _offsets_config(sizes: OffsetSizes, device: Device) -> Config:
    return Config({"BLOCK_E": 1024, "BLOCK_L": 128}, 4, 1)


def _tiles_config(sizes: OffsetSizes, device: Device) -> Config:
    return Config({"BLOCK_L": 128}, 4, 1)


LIST_KEYS = Kernel(
    list_keys_kernel,
    f"_list_keys(Tensor block_indices, {SEQUENCES}, *, SymInt seq_len_k, int block_size) -> Tensor",
    keys_plan,
    lambda extent, tiles, cdiv: (cdiv(extent[0], tiles["BLOCK_R"]), 1, 1),
    _keys_config, lambda sizes, device: [_keys_config(sizes, device)], fuses_epilogue=False,
)  # fmt: skip
LIST_OFFSETS = Kernel(
    list_offsets_kernel,
    "_list_offsets(Tensor keys, Tensor places, *, SymInt num_lists) "
    "-> (Tensor list_offsets, Tensor tiles, Tensor entries)",
    offsets_plan,
    lambda extent, tiles, cdiv: (max(cdiv(extent[0], tiles["BLOCK_E"]), cdiv(extent[1], tiles["BLOCK_L"])), 1, 1),
    _offsets_config, lambda sizes, device: [_offsets_config(sizes, device)], fuses_epilogue=False,
)  # fmt: skip
LIST_TILES = Kernel(
    list_tiles_kernel,
    "_list_tiles(Tensor tile_offsets, *, SymInt num_tiles) -> Tensor",
    tiles_plan,
    lambda extent, tiles, cdiv: (cdiv(extent[0], tiles["BLOCK_L"]), 1, 1),
    _tiles_config, lambda sizes, device: [_tiles_config(sizes, device)], fuses_epilogue=False,
)  # fmt: skip
