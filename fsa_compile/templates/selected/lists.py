"""Device functions of the KV-outer kernels: walking the per-block lists of the rows that chose a block."""

import triton
import triton.language as tl

from ..sequences import Rows, Run, Sequences, run_of_row
from ..tiles import load_tile, load_whole_tile
from .sizes import Lists, Part

# Partials of a row up to which their loop is unrolled.
MAX_UNROLLED = tl.constexpr(64)


@triton.jit
def list_tile(w, block_indices, lists: Lists, part: Part, seqs: Sequences, SIZES: tl.constexpr):
    """Which entries the ``w``-th tile of a part holds and which block they chose; the first tells everything else.

    Returns ``(first, last, block, hk, run)``. ``first == last`` for the unused tiles at the end, whose other values
    are harmless to compute with.
    """
    used = w >= 0
    if part is not None:
        w += tl.load(lists.tile_offsets + part.first_list)
        used = w < tl.load(lists.tile_offsets + part.end_list)
    block_list = tl.load(lists.tile_list + w, mask=used, other=-1)
    used = block_list >= 0
    block_list = tl.where(used, block_list, 0)
    first = tl.load(lists.list_offsets + block_list)
    last = tl.load(lists.list_offsets + block_list + 1)
    first += (w - tl.load(lists.tile_offsets + block_list)) * SIZES.ENTRIES_PER_TILE
    last = tl.minimum(last, first + SIZES.ENTRIES_PER_TILE)
    first = tl.where(used, first, 0)
    last = tl.where(used, last, 0)
    entry = tl.load(lists.entries + first, mask=used, other=0)
    block = tl.load(block_indices + entry, mask=used, other=0)
    hk = ((entry // SIZES.NUM_SELECTED) % SIZES.LISTED_HEADS).to(tl.int32)
    if part is not None:
        hk = tl.where(used, hk - part.first_head, 0)
    n = (entry // (SIZES.NUM_SELECTED * SIZES.LISTED_HEADS)).to(tl.int32)
    run, _ = run_of_row(seqs, n)
    return first, last, block, hk, run


@triton.jit
def rows_of_tile(first, m, SIZES: tl.constexpr, BLOCK_M: tl.constexpr):
    """Of the ``m``-th BLOCK_M rows of the tile that starts at entry ``first``: their entries, and heads in the group.

    A row is one query head of one entry, so that a group's heads go together.
    """
    row = tl.arange(0, BLOCK_M)
    if BLOCK_M % SIZES.GROUP == 0:  # heads that do not depend on m
        return first + m * (BLOCK_M // SIZES.GROUP) + row // SIZES.GROUP, row % SIZES.GROUP
    else:
        row += m * BLOCK_M
        return first + row // SIZES.GROUP, row % SIZES.GROUP


@triton.jit
def load_entries(entries, first, last, m, SIZES: tl.constexpr, BLOCK_M: tl.constexpr):
    """The entries of the rows of ``rows_of_tile``; past the end the last one again, whose rows exist."""
    place, _ = rows_of_tile(first, m, SIZES, BLOCK_M)
    return tl.load(entries + tl.maximum(tl.minimum(place, last - 1), 0))


@triton.jit
def list_rows(
    entry, first, last, m, chunk, part: Part, run: Run, seqs: Sequences, SIZES: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """The rows of ``rows_of_tile`` that entries ``entry`` are.

    Returns ``(valid, n, t, pos, g, partial)``: whether the row exists, its query row, its place on the time axis, its
    position, its head within the group, its partial's row (in 32 bits: that many partials fit no memory).
    """
    place, g = rows_of_tile(first, m, SIZES, BLOCK_M)
    entry = entry.to(tl.uint32)
    n = (entry // (SIZES.NUM_SELECTED * SIZES.LISTED_HEADS)).to(tl.int32)
    if part is not None:
        OTHERS: tl.constexpr = SIZES.LISTED_HEADS - SIZES.NUM_KV_HEADS
        entry -= ((n * OTHERS + part.first_head) * SIZES.NUM_SELECTED).to(tl.uint32)
    t = n
    if seqs.cu_seqlens_q is None:
        t -= run.b * seqs.seq_len
    partial = (entry * SIZES.NUM_CHUNKS + chunk.to(tl.uint32)) * SIZES.GROUP + g.to(tl.uint32)
    return place < last, n, t, run.offset + t - run.first_row, g, partial


@triton.jit
def tiles_that_hide(
    entries, first, last, block, chunk, run: Run, seqs: Sequences, SIZES: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """How many of a tile's first BLOCK_M rows at a time have one that does not see all keys of the chunk.

    Entries are in row order, and those in the chunk itself come first.
    """
    ENTRIES: tl.constexpr = SIZES.ENTRIES_PER_TILE
    place = first + tl.arange(0, ENTRIES)
    entry = tl.load(entries + place, mask=place < last, other=2147483647)
    n = entry // (SIZES.NUM_SELECTED * SIZES.LISTED_HEADS)
    if seqs.cu_seqlens_q is None:
        n -= run.b * seqs.seq_len
    sees = block * SIZES.BLOCK_SIZE + (chunk + 1) * SIZES.CHUNK_N - 1 - run.offset + run.first_row
    return tl.cdiv(tl.sum((n < sees).to(tl.int32), 0) * SIZES.GROUP, BLOCK_M)


@triton.jit
def chunk_keys(block, chunk, num_keys, used, SIZES: tl.constexpr):
    """Positions of a chunk's keys and which of them exist."""  # [CHUNK_N]
    keys = block * SIZES.BLOCK_SIZE + chunk * SIZES.CHUNK_N + tl.arange(0, SIZES.CHUNK_N)
    return keys, keys < tl.where(used, num_keys, 0)


@triton.jit
def load_chunk(x: Rows, run: Run, hk, keys, exists, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr):
    """A chunk's rows of k or v."""  # [CHUNK_N, BLOCK_W]
    base = x.ptr + run.b.to(tl.int64) * x.strides[0] + hk.to(tl.int64) * x.strides[2]
    return load_tile(base, (run.first_key + keys).to(tl.int64) * x.strides[1], exists, WIDTH, BLOCK_W)


@triton.jit
def load_rows(x: Rows, b, hk, t, g, valid, GROUP: tl.constexpr, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr):
    """Query rows ``t`` and heads ``g`` of a group, of a ``[B, T, HQ, W]`` tensor; valid None: there are all of them."""
    base = x.ptr + b.to(tl.int64) * x.strides[0] + hk.to(tl.int64) * (GROUP * x.strides[2])
    rows = t.to(tl.int64) * x.strides[1] + g * x.strides[2]
    if valid is not None:
        return load_tile(base, rows, valid, WIDTH, BLOCK_W)
    else:
        return load_whole_tile(base, rows, WIDTH, BLOCK_W)


@triton.jit
def partial_slots(rows, num_rows, first_head, seqs: Sequences, SIZES: tl.constexpr):
    """Where the slots of output rows (one query head each, int32) lie.

    Returns ``(exists, pos, ids, slots, g, b, t, h)``: whether a row exists, its position, its first entry (int64) in
    block_indices and that of its partials, its head within the group; and its place in the output. Rows are int32, as a
    64-bit division takes as long as a row's loads.
    """
    exists = rows < num_rows
    rows = tl.where(exists, rows, 0)
    n = rows // (SIZES.NUM_KV_HEADS * SIZES.GROUP)
    h = rows - n * (SIZES.NUM_KV_HEADS * SIZES.GROUP)
    run, t = run_of_row(seqs, n)
    pos = tl.where(run.num_keys > 0, run.offset + t - run.first_row, -1)
    head = (rows // SIZES.GROUP).to(tl.int64)
    slots = head * SIZES.NUM_SELECTED
    ids = slots
    if first_head is not None:
        OTHERS: tl.constexpr = SIZES.LISTED_HEADS - SIZES.NUM_KV_HEADS
        ids = (head + (n.to(tl.int64) * OTHERS + first_head)) * SIZES.NUM_SELECTED
    return exists, pos, ids, slots, h % SIZES.GROUP, run.b, t, h
