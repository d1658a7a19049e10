"""Device functions of the KV-outer kernels: walking the per-block lists of the rows that chose a block."""

import triton
import triton.language as tl

from .tiles import load_tile, sequence_of

# Partials of a row up to which their loop is unrolled.
MAX_UNROLLED = tl.constexpr(64)


@triton.jit
def list_tile(
    w,
    block_indices_ptr,
    entries_ptr,
    tile_list_ptr,
    tile_offsets_ptr,
    list_offsets_ptr,
    seq_len,
    seq_len_k,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    seq_ids_ptr,
    PACKED: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    NUM_SELECTED: tl.constexpr,
    ENTRIES_PER_TILE: tl.constexpr,
):
    """Which entries tile ``w`` holds and which block they chose; the tile's first entry tells everything else.

    Returns ``(first, last, block, hk, b, first_row, first_pos, first_key, len_k)``, the last five as
    ``tiles.sequence_of``. ``first == last`` for the unused tiles at the end, whose other values are harmless to
    compute with.
    """
    block_list = tl.load(tile_list_ptr + w)
    used = block_list >= 0
    block_list = tl.where(used, block_list, 0)
    first = tl.load(list_offsets_ptr + block_list)
    last = tl.load(list_offsets_ptr + block_list + 1)
    first += (w - tl.load(tile_offsets_ptr + block_list)) * ENTRIES_PER_TILE
    last = tl.minimum(last, first + ENTRIES_PER_TILE)
    first = tl.where(used, first, 0)
    last = tl.where(used, last, 0)
    entry = tl.load(entries_ptr + first, mask=used, other=0)
    block = tl.load(block_indices_ptr + entry, mask=used, other=0)
    hk = ((entry // NUM_SELECTED) % NUM_KV_HEADS).to(tl.int32)
    n = (entry // (NUM_SELECTED * NUM_KV_HEADS)).to(tl.int32)
    b, first_row, first_pos, first_key, len_k = sequence_of(
        n, seq_len, seq_len_k, cu_seqlens_q_ptr, cu_seqlens_k_ptr, seq_ids_ptr, PACKED
    )
    return first, last, block, hk, b, first_row, first_pos, first_key, len_k


@triton.jit
def list_rows(
    entries_ptr,
    first,
    last,
    m,
    chunk,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_SELECTED: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The ``m``-th BLOCK_M rows of a tile. A row is one query head of one entry, so that a group's heads go together.

    Returns ``(valid, n, g, partial)``: whether the row exists, its query row, its head within the group, its
    partial's row.
    """
    row = m * BLOCK_M + tl.arange(0, BLOCK_M)
    position = first + row // GROUP
    valid = position < last
    g = row % GROUP
    entry = tl.load(entries_ptr + position, mask=valid, other=0)
    n = (entry // (NUM_SELECTED * NUM_KV_HEADS)).to(tl.int32)
    partial = (entry.to(tl.int64) * NUM_CHUNKS + chunk) * GROUP + g
    return valid, n, g, partial


@triton.jit
def chunk_keys(block, chunk, len_k, used, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Positions of a chunk's keys and which of them exist."""  # [BLOCK_N]
    keys = block * BLOCK_SIZE + chunk * BLOCK_N + tl.arange(0, BLOCK_N)
    return keys, keys < tl.where(used, len_k, 0)


@triton.jit
def load_chunk(
    ptr, stride_b, stride_t, stride_h, b, hk, first_key, keys, exists, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr
):
    """A chunk's rows of k or v."""  # [BLOCK_N, BLOCK_W]
    base = ptr + b.to(tl.int64) * stride_b + hk.to(tl.int64) * stride_h
    return load_tile(base, (first_key + keys).to(tl.int64) * stride_t, exists, WIDTH, BLOCK_W)


@triton.jit
def head_base(ptr, stride_b, stride_h, b, hk, GROUP: tl.constexpr):
    """Where the query heads of a group start in a ``[B, T, HQ, D]`` tensor."""
    return ptr + b.to(tl.int64) * stride_b + hk.to(tl.int64) * (GROUP * stride_h)


@triton.jit
def partial_slots(
    rows, num_rows, seq_len, seq_len_k, cu_seqlens_q_ptr, cu_seqlens_k_ptr, seq_ids_ptr,
    PACKED: tl.constexpr, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, NUM_SELECTED: tl.constexpr,
):  # fmt: skip
    """Where the slots of output rows (one query head each, int32) lie.

    Returns ``(exists, pos, slots, g, b, t, h)``: whether a row exists, its position, its first entry (int64), its
    head within the group; and its place in the output. Rows are int32, as a 64-bit division takes as long as a row's
    loads.
    """
    exists = rows < num_rows
    rows = tl.where(exists, rows, 0)
    n = rows // (NUM_KV_HEADS * GROUP)
    h = rows - n * (NUM_KV_HEADS * GROUP)
    b, first_row, first_pos, _, _ = sequence_of(
        n, seq_len, seq_len_k, cu_seqlens_q_ptr, cu_seqlens_k_ptr, seq_ids_ptr, PACKED
    )
    return exists, n - first_pos, (rows // GROUP).to(tl.int64) * NUM_SELECTED, h % GROUP, b, n - first_row, h
