"""Selection of blocks: one launch of as many programs as the workspace has room for, each tile by tile of query rows.

A program writes the scores of its rows' blocks into its slice of a workspace (as integers that order alike), then finds
the best ones while they are still in cache. The search goes down a tree of maxima: of ``n`` nodes the winners lie under
the ``n`` best nodes of the level above (ties to the lower id included), so that each step looks at ``FANOUT * n``
candidates and never at a whole row. Forced blocks take no part: which they are is arithmetic.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ...tiling import Config, Device, next_power_of_2
from ..kernel import SEQUENCES, Dense, Kernel, Output, Plan, Strided, sequences
from ..sequences import Rows, Run, Sequences, run_of_tile
from ..tiles import dense_strides, store_output
from .scores import EXCLUDED, has_nodes, leaves_of, store_block_scores
from .sizes import ROWS_IN_FLIGHT, SelectionSizes, workspace_width

# The axis along which a warp's threads lie in a tile of candidates, and the one that a thread holds: the first and the
# last, or the reverse, as the compiler hands out threads where no axis is contiguous. Then every tile of the search has
# one layout, a row of it within a warp.
LANES = tl.constexpr(0 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7) else 2)
REST = tl.constexpr(2 - LANES.value)


@triton.jit
def tile_of(seqs: Sequences, item, SIZES: tl.constexpr, BLOCK_M: tl.constexpr):
    """The ``item``-th piece of work: tile and key/value head, the longest rows first."""
    if seqs.cu_seqlens_q is not None:
        w = seqs.seq_len // BLOCK_M + seqs.num_seqs + 1 - item // SIZES.NUM_KV_HEADS
        hk = item % SIZES.NUM_KV_HEADS
    else:
        tiles = tl.cdiv(seqs.seq_len, BLOCK_M)
        each = seqs.num_seqs * SIZES.NUM_KV_HEADS
        rest = item % each
        w = rest // SIZES.NUM_KV_HEADS * tiles + (tiles - 1 - item // each)
        hk = rest % SIZES.NUM_KV_HEADS
    run, first = run_of_tile(seqs, w, BLOCK_M)
    return run, first, hk


@triton.jit
def items_of(seqs: Sequences, SIZES: tl.constexpr, BLOCK_M: tl.constexpr):
    """How many pieces of work there are."""
    if seqs.cu_seqlens_q is not None:
        tiles = seqs.seq_len // BLOCK_M + seqs.num_seqs + 2
    else:
        tiles = seqs.num_seqs * tl.cdiv(seqs.seq_len, BLOCK_M)
    return tiles * SIZES.NUM_KV_HEADS


@triton.jit
def my_item(turn):
    """A program's piece of work in a turn: to and fro over the programs, so that costs that fall even out."""
    p = tl.program_id(0)
    return turn * tl.num_programs(0) + tl.where(turn % 2 == 0, p, tl.num_programs(0) - 1 - p)


@triton.jit
def scored_blocks(run, first, SIZES: tl.constexpr, BLOCK_M: tl.constexpr):
    """How many blocks the rows of a tile choose from; 0 where every row takes all that it has."""
    last = run.offset + tl.minimum(first + BLOCK_M, run.num_rows) - 1
    current = tl.where((last >= 0) & (first < run.num_rows), last // SIZES.BLOCK_SIZE, -1)
    some = (current >= SIZES.NUM_SELECTED) & (SIZES.NEED > 0)
    # The second program id is 0, which the compiler cannot know: where it can prove that a loop never runs, Triton
    # 3.6's analysis of addresses has nothing to say of the loads inside, and fails.
    return tl.where(some, tl.maximum(current + 1 - SIZES.LOCAL_BLOCKS, 0), 0) + tl.program_id(1)


@triton.jit
def build_level(base, width, below, size_below, above, size_above, SIZES: tl.constexpr, BLOCK_M: tl.constexpr):
    """Maxima of a level's nodes, ``FANOUT`` at a time, for BLOCK_M rows."""
    NODES: tl.constexpr = 4
    CHILDREN: tl.constexpr = NODES * SIZES.FANOUT
    rows = base + (tl.arange(0, BLOCK_M) * width)[:, None]
    for start in range(0, size_above, NODES):
        child = (start * SIZES.FANOUT + tl.arange(0, CHILDREN))[None, :]
        keys = tl.load(rows + (below + child), mask=child < size_below, other=EXCLUDED)
        node = (start + tl.arange(0, NODES))[None, :]
        nodes = tl.max(tl.reshape(keys, [BLOCK_M, NODES, SIZES.FANOUT]), 2)
        tl.store(rows + (above + node), nodes, mask=node < size_above)


@triton.jit
def build_tree(base, width, num_blocks, SIZES: tl.constexpr, BLOCK_M: tl.constexpr, FUSED: tl.constexpr):
    """Build levels until one fits a step of the search. ``FUSED``: the first is there.

    Returns how many there are above the blocks, where the top one begins and its size.
    """
    offset = num_blocks * 0
    size = num_blocks
    depth = num_blocks * 0
    while size > SIZES.PICKS * SIZES.FANOUT:
        above = offset + tl.cdiv(size, SIZES.FANOUT) * SIZES.FANOUT if depth == 0 else offset + size
        size_above = tl.cdiv(size, SIZES.FANOUT)
        if not FUSED or depth > 0:
            build_level(base, width, offset, size, above, size_above, SIZES, BLOCK_M)
            tl.debug_barrier()
        offset = above
        size = size_above
        depth += 1
    return depth, offset, size


@triton.jit
def candidates_of(C: tl.constexpr):
    """The numbers of a row's ``32 * C`` candidates; rows are to be the middle axis."""
    if LANES == 0:
        return tl.arange(0, 32)[:, None, None] + 32 * tl.arange(0, C)[None, None, :]
    else:
        return tl.arange(0, 32)[None, None, :] + 32 * tl.arange(0, C)[:, None, None]


@triton.jit
def in_row(marks):
    """Marks in each row, [1, R, 1]."""
    return tl.sum(tl.sum(marks.to(tl.int32), REST, keep_dims=True), LANES, keep_dims=True)


@triton.jit
def between(low, high):
    """Their mean, rounded down; their sum need not be an int32."""
    return (low >> 1) + (high >> 1) + (low & high & 1)


@triton.jit
def lowest_taken(keys, SIZES: tl.constexpr):
    """The smallest key among the ``NEED`` largest of each row, or of all there are, or a bound between it and the next.

    A bisection, over as many keys as differ; it ends when every row knows, which is looked at now and then.
    """
    exist = keys != EXCLUDED
    low = tl.min(tl.min(tl.where(exist, keys, 0x7FFFFFFF), REST, keep_dims=True), LANES, keep_dims=True)
    high = tl.max(tl.max(keys, REST, keep_dims=True), LANES, keep_dims=True) + 1
    high = tl.where(in_row(exist) > SIZES.NEED, high, low)
    while tl.max((between(low, high) > low).to(tl.int32)) > 0:
        for _ in range(4):
            middle = between(low, high)
            reached = in_row(keys >= middle)
            undecided = middle > low
            low = tl.where(undecided & (reached >= SIZES.NEED), middle, low)
            high = tl.where(undecided & (reached <= SIZES.NEED), middle, high)
    return low


@triton.jit
def best(keys, SIZES: tl.constexpr):
    """Mark the ``NEED`` largest keys of each row, of equal ones the first; all there are, if fewer.

    keys: R rows of candidates ``32 * c + lane``, as ``candidates_of`` lays them out. Also returns how many marks come
    before each candidate, and how many there are, ``[1, R, 1]``.
    """
    low = lowest_taken(keys, SIZES)
    above = keys > low
    equal = (keys == low) & (keys != EXCLUDED)
    marks = above.to(tl.int32) + (equal.to(tl.int32) << 16)  # both counted at once
    each = tl.sum(marks, LANES, keep_dims=True)
    before = tl.cumsum(marks, LANES) - marks + (tl.cumsum(each, REST) - each)
    total = tl.sum(each, REST, keep_dims=True)
    room = SIZES.NEED - (total & 0xFFFF)
    taken = above | (equal & ((before >> 16) < room))
    rank = (before & 0xFFFF) + tl.minimum(before >> 16, room)
    return taken, rank, (total & 0xFFFF) + tl.minimum(total >> 16, room)


@triton.jit
def search(base, width, picks, depth, offset, size, num_blocks, SIZES: tl.constexpr, ROWS: tl.constexpr):
    """Write the ids of the best blocks of ROWS rows, ascending, to ``picks`` of each row's workspace."""
    C: tl.constexpr = SIZES.PICKS * SIZES.FANOUT // 32
    candidate = candidates_of(C)
    row = (tl.arange(0, ROWS) * width)[None, :, None]
    parent = candidate // SIZES.FANOUT + tl.zeros([1, ROWS, 1], tl.int32)
    found = tl.full([1, ROWS, 1], SIZES.PICKS, tl.int32)
    for step in range(depth + 1):
        child = parent * SIZES.FANOUT + candidate % SIZES.FANOUT
        exists = (candidate // SIZES.FANOUT < found) & (child < size)
        keys = tl.load(base + (row + offset + child), mask=exists, other=EXCLUDED)
        taken, rank, found = best(keys, SIZES)
        tl.store(base + (row + picks + rank), child, mask=taken)
        tl.debug_barrier()
        if step < depth:
            parent = tl.load(base + (row + picks + candidate // SIZES.FANOUT))
            tl.debug_barrier()
            level = depth - step - 1
            size = level_size(num_blocks, level, SIZES)
            offset = level_offset(num_blocks, level, SIZES)


@triton.jit
def level_size(num_blocks, level, SIZES: tl.constexpr):
    """Nodes of a level of the tree; level 0 is the blocks."""
    size = num_blocks
    for _ in range(level):
        size = tl.cdiv(size, SIZES.FANOUT)
    return size


@triton.jit
def level_offset(num_blocks, level, SIZES: tl.constexpr):
    """Where a level begins in a row of the workspace."""
    offset = num_blocks * 0
    size = leaves_of(num_blocks, SIZES)
    for _ in range(level):
        offset += size
        size = tl.cdiv(size, SIZES.FANOUT)
    return offset


@triton.jit
def chosen_blocks(base, width, picks, pos, SIZES: tl.constexpr, ROWS: tl.constexpr, BLOCK_S: tl.constexpr):
    """A row's blocks in order: the first ones, those found, the newest ones; or all that there are."""
    col = tl.arange(0, BLOCK_S)[None, :]
    current = tl.where(pos >= 0, pos // SIZES.BLOCK_SIZE, -1)[:, None]
    all_of_them = current < SIZES.NUM_SELECTED
    rows = base + tl.arange(0, ROWS).to(tl.int64) * width
    found = col - SIZES.INIT_BLOCKS
    is_found = (found >= 0) & (found < SIZES.NEED)
    ids = tl.load(rows[:, None] + (picks + found), mask=is_found & (current >= SIZES.NUM_SELECTED), other=0)
    newest = current - (SIZES.NUM_SELECTED - 1) + col
    ids = tl.where(col < SIZES.INIT_BLOCKS, col, tl.where(is_found, ids, newest))
    return tl.where(all_of_them, tl.where(col <= current, col, -1), ids)


@triton.jit
def first_token(run: Run, seqs: Sequences, SIZES: tl.constexpr):
    """The row of ``k_cmp`` where a run's compressed tokens begin."""
    return run.first_key // SIZES.KERNEL_STRIDE if seqs.cu_seqlens_q is not None else run.first_key * 0


@triton.jit
def prepare(
    slot, width, q: Rows, k_cmp: Rows, lse, run: Run, seqs: Sequences, hk, first, scale, SIZES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RESIDENT: tl.constexpr, WARPS: tl.constexpr,
    PIECES: tl.constexpr,
):  # fmt: skip
    """Score what there is to choose from and build the tree over it; how many blocks that is, and ``build_tree``'s."""
    scale = tl.full([], scale, tl.float32)  # a number in the source has more digits than one that is passed
    num_blocks = scored_blocks(run, first, SIZES, BLOCK_M)
    depth = num_blocks * 0
    offset = num_blocks * 0
    size = num_blocks
    if num_blocks > 0:
        start = first_token(run, seqs, SIZES)
        store_block_scores(
            slot, width, q, k_cmp, lse, run, seqs.seq_len, hk, first, start, num_blocks, scale, SIZES, BLOCK_M,
            BLOCK_N, RESIDENT, WARPS, PIECES,
        )  # fmt: skip
        tl.debug_barrier()
        depth, offset, size = build_tree(
            slot, width, num_blocks, SIZES, BLOCK_M, has_nodes(BLOCK_N, SIZES.STEPS, SIZES.FANOUT)
        )
    return num_blocks, depth, offset, size


@triton.jit
def select_blocks_kernel(
    q: Rows, k_cmp: Rows, lse, block_indices, workspace, seqs: Sequences, width, scale, SIZES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RESIDENT: tl.constexpr, WARPS: tl.constexpr, PIECES: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    items = items_of(seqs, SIZES, BLOCK_M)
    picks = width - SIZES.PICKS
    slot = workspace + tl.program_id(0).to(tl.int64) * BLOCK_M * width
    col = tl.arange(0, BLOCK_S)[None, :]
    for turn in range(tl.cdiv(items, tl.num_programs(0))):
        item = my_item(turn)
        if item < items:
            run, first, hk = tile_of(seqs, item, SIZES, BLOCK_M)
            num_blocks, depth, offset, size = prepare(
                slot,
                width,
                q,
                k_cmp,
                lse,
                run,
                seqs,
                hk,
                first,
                scale,
                SIZES,
                BLOCK_M,
                BLOCK_N,
                RESIDENT,
                WARPS,
                PIECES,
            )
            for part in range(BLOCK_M // ROWS):
                base = slot + part * ROWS * width
                if num_blocks > 0:
                    search(base, width, picks, depth, offset, size, num_blocks, SIZES, ROWS)
                row = first + part * ROWS + tl.arange(0, ROWS)
                ids = chosen_blocks(base, width, picks, run.offset + row, SIZES, ROWS, BLOCK_S)
                mask = (row < run.num_rows)[:, None] & (col < SIZES.NUM_SELECTED)
                t = (run.first_row + row)[:, None]
                strides = dense_strides(seqs.seq_len, SIZES.NUM_KV_HEADS, SIZES.NUM_SELECTED)
                store_output(block_indices, (run.b, t, hk, col), strides, ids, mask, (ROWS, BLOCK_S))
            tl.debug_barrier()


def plan(
    q: Any, k_cmp: Any, lse: Any, *seqs: Any, seq_len_k: Any, block_size: int, num_selected: int, kernel_size: int,
    kernel_stride: int, init_blocks: int, local_blocks: int, pool: str, scale: float,
) -> Plan:  # fmt: skip
    """Ids ``[B, T, HK, S]``, and the workspace."""
    sizes = SelectionSizes.of_call(
        q, k_cmp, lse, block_size, num_selected, kernel_size, kernel_stride, init_blocks, local_blocks, pool
    )
    width = workspace_width(seq_len_k, sizes)
    return Plan(
        {
            "q": Strided(q),
            "k_cmp": Strided(k_cmp),
            "lse": None if lse is None else Dense(lse),
            "seqs": sequences(q, seq_len_k, seqs),
            "width": width,
            "scale": scale,
        },
        {
            "block_indices": Output((*q.shape[:2], sizes.NUM_KV_HEADS, num_selected), torch.int32),
            "workspace": Output((ROWS_IN_FLIGHT, width), torch.int32),
        },
        sizes,
        (),
    )


def grid(extent: tuple[Any, ...], tiles: dict[str, Any], cdiv: Any) -> tuple[Any, Any, Any]:
    """As many programs as the workspace has room for."""
    return ROWS_IN_FLIGHT // tiles["BLOCK_M"], 1, 1


def _config(
    sizes: SelectionSizes, block_m: int, block_n: int, num_warps: int, num_stages: int, resident: bool, pieces: int
) -> Config:
    # A block's tokens in one tile, or 128 of them: then no sum depends on the tile.
    block_n = max(block_n, min(sizes.STEPS, 128))
    # 16 candidates a thread; a row is a warp's.
    rows = max(num_warps, min(block_m, 512 * num_warps // (sizes.PICKS * sizes.FANOUT)))
    return Config(
        {
            "BLOCK_M": block_m, "BLOCK_N": block_n, "RESIDENT": resident, "WARPS": num_warps, "PIECES": pieces,
            "ROWS": rows, "BLOCK_S": next_power_of_2(sizes.NUM_SELECTED),
        },
        num_warps,
        num_stages,
    )  # fmt: skip


def heuristic(sizes: SelectionSizes, device: Device) -> Config:
    """As measured on an H100: the group's queries stay on chip where two programs fit a multiprocessor with them."""
    if device.arch == "hip":
        return _config(sizes, 64, 64, 4, 1, False, 1)
    if sizes.ITEMSIZE == 4:  # multiplied from registers, which do not hold a group
        return _config(sizes, 64, 64 if sizes.BLOCK_D <= 128 else 32, 8, 1, False, 1)
    resident = sizes.GROUP * sizes.row_bytes <= 1024
    if sizes.GROUP > 1 and resident:
        # A third stage fits to the byte in an eager launch, and not in a template, which holds 2 KiB more.
        return _config(sizes, 64, 64, 4, 2, True, 2)
    return _config(sizes, 64, 128 if sizes.BLOCK_D <= 128 else 64, 4, 3, resident, 2)


def candidates(sizes: SelectionSizes, device: Device) -> list[Config]:
    """What is worth measuring."""
    found = [heuristic(sizes, device)]
    resident = bool(found[0].tiles["RESIDENT"])
    for block_m, block_n, num_warps in ((64, 64, 4), (64, 128, 4), (64, 128, 8), (128, 128, 8)):
        for num_stages in (2, 3):
            one = _config(sizes, block_m, block_n, num_warps, num_stages, resident, 2)
            if one not in found:
                found.append(one)
    return found


SELECT_BLOCKS = Kernel(
    select_blocks_kernel,
    f"_select_blocks(Tensor q, Tensor k_cmp, Tensor? lse, {SEQUENCES}, *, SymInt seq_len_k, int block_size, "
    "int num_selected, int kernel_size, int kernel_stride, int init_blocks, int local_blocks, str pool, float scale) "
    "-> (Tensor block_indices, Tensor workspace)",
    plan, grid, heuristic, candidates, fuses_epilogue=False,
)  # fmt: skip
