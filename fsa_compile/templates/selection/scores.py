"""Scores of blocks: the group's probabilities (or logits) of compressed tokens, pooled to the blocks that they touch.

Everything is summed in an order that no tile changes, so that every configuration gives the same bits: over the heads
one after the other, over a block's own compressed tokens pairwise, over the blocks before it from the farthest on.

A tile's compressed tokens are permuted so that a thread holds whole runs of them: of the columns of a matrix product a
thread has two neighbours in every eight (bits 1 and 2 of the column tell threads apart). Then pooling, and taking over
what the tokens of one block add to the next, move no data between threads but once per run.
"""

# Tuples that grow as a loop unrolls are beyond mypy.
# mypy: disable-error-code="assignment, var-annotated, misc"

from __future__ import annotations

import triton
import triton.language as tl

from ..sequences import Rows, Run
from ..tiles import LOG2E, dot

# What is no candidate: forced blocks, which have their places already, and those of the future.
EXCLUDED = tl.constexpr(-(2**31))


@triton.constexpr_function
def run_count(BLOCK_N, STEPS):
    """Runs of consecutive compressed tokens that a tile is cut into: one for each of the four threads of a row."""
    return 1 if STEPS >= BLOCK_N else min(4, BLOCK_N // STEPS)


@triton.constexpr_function
def has_nodes(BLOCK_N, STEPS, FANOUT):
    """Whether a tile holds whole nodes of the level above the blocks."""
    return BLOCK_N // STEPS >= FANOUT


@triton.jit
def tokens_of_columns(BLOCK_N: tl.constexpr, STEPS: tl.constexpr):
    """Which compressed token of a tile each column of the product is."""  # [BLOCK_N]
    col = tl.arange(0, BLOCK_N)
    if run_count(BLOCK_N, STEPS) == 4:
        col = (col // 2 % 4) * (BLOCK_N // 4) + col // 8 * 2 + col % 2
    return col


@triton.jit
def runs_of_tokens(x, STEPS: tl.constexpr):
    """Bring a product's columns into the order of tokens, by run, block and token: register moves at most."""
    M: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    RUNS: tl.constexpr = run_count(N, STEPS)
    OWN: tl.constexpr = min(STEPS, N)
    if RUNS == 4:
        x = tl.permute(tl.reshape(x, [M, N // 8, 4, 2]), [0, 2, 1, 3])
    return tl.reshape(x, [M, RUNS, N // RUNS // OWN, OWN])  # [M, RUNS, BLOCKS, OWN]


@triton.jit
def pair_sum(x):
    """Sum over the last axis, neighbours first."""
    if x.shape[3] == 1:
        return tl.sum(x, 3)
    else:
        HALF: tl.constexpr = x.shape[3] // 2
        return pair_sum(tl.sum(tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2], HALF, 2]), 4))


@triton.jit
def pooled(x, chunk, shift: tl.constexpr, SIZES: tl.constexpr):
    """What the tokens of each block add to the block ``shift`` after it.  [M, RUNS, BLOCKS, OWN] -> [M, RUNS, BLOCKS]

    Token ``r`` of a block is in as many of the windows as there are ``(m, n)`` with ``m + n = r - STEPS * shift +
    OVERLAP - 1``, ``m < STEPS``, ``n < OVERLAP``. ``chunk``: which tile of a block that is wider than tiles.
    """
    d = chunk * x.shape[3] + tl.arange(0, x.shape[3]) - SIZES.STEPS * shift
    weight = tl.minimum(SIZES.STEPS - 1, d + SIZES.OVERLAP - 1) - tl.maximum(d, 0) + 1
    weight = weight[None, None, None, :]
    if SIZES.MAX_POOL:
        return tl.max(tl.where(weight > 0, x, neutral(SIZES)), 3)
    elif min(SIZES.STEPS, SIZES.OVERLAP) <= 2:
        return pair_sum(tl.where(weight > 0, x * weight.to(tl.float32), 0.0))
    else:
        # Powers of two are exact, so that it does not matter which products the compiler contracts with a sum.
        total = tl.zeros_like(x)
        for bit in tl.static_range(10):
            if (1 << bit) <= min(SIZES.STEPS, SIZES.OVERLAP):
                total += tl.where((weight > 0) & ((weight >> bit) % 2 == 1), x * (1 << bit), 0.0)
        return pair_sum(total)


@triton.jit
def neutral(SIZES: tl.constexpr):
    """The score of nothing."""
    return float("-inf") if SIZES.LOGITS else 0.0


@triton.jit
def pooled_with(a, b, SIZES: tl.constexpr):
    """Two parts of a score."""
    return tl.maximum(a, b) if SIZES.MAX_POOL else a + b


@triton.jit
def last_of_run(x):
    """``x[:, :, -1]``."""
    N: tl.constexpr = x.shape[2]
    if N == 1:
        return tl.reshape(x, [x.shape[0], x.shape[1]])
    else:
        _, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1], N // 2, 2]))
        return last_of_run(odd)


@triton.jit
def moved_up(x, first):
    """``x`` one place further along its last axis, behind ``first``."""  # [M, RUNS, BLOCKS], [M, RUNS]
    N: tl.constexpr = x.shape[2]
    if N == 1:
        return tl.reshape(first, [x.shape[0], x.shape[1], 1])
    else:
        even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1], N // 2, 2]))
        return tl.reshape(tl.join(moved_up(odd, first), even), [x.shape[0], x.shape[1], N])


@triton.jit
def swapped(x, axis: tl.constexpr):
    """``x`` with the two places along an axis exchanged."""
    return x ^ tl.xor_sum(x, axis, keep_dims=True)


@triton.jit
def turned(x):
    """``x[:, (i - 1) % RUNS]``: what a run takes over, the first one for the next tile. Bits, so that it is exact."""
    M: tl.constexpr = x.shape[0]
    if x.shape[1] == 1:
        return x
    elif x.shape[1] == 2:
        return swapped(x.to(tl.int32, bitcast=True), 1).to(tl.float32, bitcast=True)
    else:
        x = swapped(tl.reshape(x.to(tl.int32, bitcast=True), [M, 2, 2]), 2)
        x = tl.where(tl.arange(0, 2)[None, None, :] == 1, x, swapped(x, 1))
        return tl.reshape(x.to(tl.float32, bitcast=True), [M, 4])


@triton.jit
def from_block_before(x, before):
    """``x`` one block later; ``before``: what the last call, for the tile before, returned beside it."""
    last = turned(last_of_run(x))  # [M, RUNS]
    first = tl.where(tl.arange(0, x.shape[1])[None, :] == 0, before, last)
    return moved_up(x, first), last


@triton.jit
def ranked(score, SIZES: tl.constexpr):
    """An int32 that orders as the score does, 0 and -0 alike, above ``EXCLUDED`` and not the largest there is."""
    if SIZES.LOGITS:
        bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
        key = tl.maximum(bits ^ ((bits >> 31) & 0x7FFFFFFF), EXCLUDED + 1)
    else:
        key = tl.maximum(score.to(tl.int32, bitcast=True), 0)
    return tl.minimum(key, 0x7FFFFFFE)


@triton.jit
def load_head(q: Rows, run: Run, rows, exists, head, sign, SIZES: tl.constexpr):
    """Queries of one head."""  # [BLOCK_M, BLOCK_D]
    cols = tl.arange(0, SIZES.BLOCK_D)
    base = q.ptr + run.b.to(tl.int64) * q.strides[0] + head.to(tl.int64) * q.strides[2]
    offsets = (run.first_row + rows).to(tl.int64) * q.strides[1]
    tile = tl.load(
        base + (offsets[:, None] + cols[None, :]), mask=exists[:, None] & (cols < SIZES.HEAD_DIM)[None, :], other=0.0
    )
    if SIZES.LOGITS:
        tile = tile * sign.to(tile.dtype)
    return tile


@triton.jit
def load_lse(lse, run: Run, rows, exists, head, seq_len, SIZES: tl.constexpr):
    """Log-sum-exp of one head, in powers of two; +inf for a row that sees nothing, whose probabilities are 0."""
    heads: tl.constexpr = SIZES.NUM_KV_HEADS * SIZES.GROUP
    n = run.b.to(tl.int64) * seq_len + run.first_row + rows
    x = tl.load(lse + n * heads + head, mask=exists, other=float("inf"))
    return tl.where(x == float("-inf"), float("inf"), x * LOG2E)


@triton.jit
def head_term(tile, statistic, k_tile, scale, SIZES: tl.constexpr):
    """One head's part of the group's sum: its probabilities, or its products."""
    scores = dot(tile, k_tile)
    if SIZES.LOGITS:
        return scores
    else:
        return tl.exp2(scores * (scale * LOG2E) - statistic[:, None])


@triton.jit
def store_block_scores(
    workspace, width, q: Rows, k_cmp: Rows, lse, run: Run, seq_len, hk, first, first_token, num_blocks, scale,
    SIZES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RESIDENT: tl.constexpr,
    WARPS: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Write the ranks of blocks ``0 … num_blocks - 1`` (or a few more) for BLOCK_M rows, and, where a thread has whole
    nodes of it, the level of maxima above.
    """
    STEPS: tl.constexpr = SIZES.STEPS
    GROUP: tl.constexpr = SIZES.GROUP
    SHIFTS: tl.constexpr = SIZES.SHIFTS
    RUNS: tl.constexpr = run_count(BLOCK_N, STEPS)
    BLOCKS: tl.constexpr = max(1, BLOCK_N // STEPS)
    CHUNKS: tl.constexpr = max(1, STEPS // BLOCK_N)

    rows = first + tl.arange(0, BLOCK_M)
    exists = rows < run.num_rows
    pos = run.offset + rows
    limit = tl.where(pos >= SIZES.KERNEL_SIZE - 1, (pos - (SIZES.KERNEL_SIZE - 1)) // SIZES.KERNEL_STRIDE, -1)
    newest = tl.where(pos >= 0, pos // SIZES.BLOCK_SIZE, -1) - SIZES.LOCAL_BLOCKS
    all_visible = tl.min(limit, 0)
    num_tokens = tl.max(limit, 0) + 1
    sign = tl.where(scale < 0, -1.0, 1.0)
    heads = hk * SIZES.GROUP

    tiles = ()
    statistics = ()
    if RESIDENT:
        for g in tl.static_range(GROUP):
            tiles = tiles + (load_head(q, run, rows, exists, heads + g, sign, SIZES),)
            if SIZES.LOGITS:
                statistics = statistics + (0.0,)
            else:
                statistics = statistics + (load_lse(lse, run, rows, exists, heads + g, seq_len, SIZES),)

    tokens = tokens_of_columns(BLOCK_N, STEPS)
    cols = tl.arange(0, SIZES.BLOCK_D)
    k_base = k_cmp.ptr + run.b.to(tl.int64) * k_cmp.strides[0] + hk.to(tl.int64) * k_cmp.strides[2]
    k_base += first_token.to(tl.int64) * k_cmp.strides[1]
    in_dim = (cols < SIZES.HEAD_DIM)[:, None]

    befores = ()
    parts = ()
    for _ in tl.static_range(SHIFTS):
        befores = befores + (tl.full([BLOCK_M, RUNS], neutral(SIZES), tl.float32),)
    if CHUNKS > 1:
        for _ in tl.static_range(SHIFTS + 1):
            parts = parts + (tl.full([BLOCK_M, 1, 1], neutral(SIZES), tl.float32),)

    for tile in range(tl.cdiv(num_blocks * STEPS, BLOCK_N)):
        token = tile * BLOCK_N + tokens
        k_tile = tl.load(
            k_base + (token[None, :].to(tl.int64) * k_cmp.strides[1] + cols[:, None]),
            mask=(token < num_tokens)[None, :] & in_dim, other=0.0,
        )  # fmt: skip
        if RESIDENT:
            x = head_term(tiles[0], statistics[0], k_tile, scale, SIZES)
            for g in tl.static_range(1, GROUP):
                x += head_term(tiles[g], statistics[g], k_tile, scale, SIZES)
        else:
            x = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for g in range(GROUP):
                rows_of_head = load_head(q, run, rows, exists, heads + g, sign, SIZES)
                statistic = 0.0
                if not SIZES.LOGITS:
                    statistic = load_lse(lse, run, rows, exists, heads + g, seq_len, SIZES)
                x += head_term(rows_of_head, statistic, k_tile, scale, SIZES)
        # After the sum over the heads: a hidden token's NaN stays in its column, and there are fewer of these.
        if tile * BLOCK_N + BLOCK_N - 1 > all_visible:
            x = tl.where(token[None, :] <= limit[:, None], x, neutral(SIZES))

        x = runs_of_tokens(x, STEPS)
        chunk = tile % CHUNKS
        now = ()
        for s in tl.static_range(SHIFTS + 1):
            part = pooled(x, chunk, s, SIZES)
            if CHUNKS > 1:
                part = pooled_with(parts[s], part, SIZES)
            now = now + (part,)
        if CHUNKS > 1:
            whole = chunk == CHUNKS - 1
            parts = ()
            for s in tl.static_range(SHIFTS + 1):
                parts = parts + (tl.where(whole, neutral(SIZES), now[s]),)
        score = now[SHIFTS]
        after = ()
        for s in tl.static_range(SHIFTS):
            moved, before = from_block_before(score, befores[s])
            if CHUNKS > 1:
                before = tl.where(whole, before, befores[s])
            after = after + (before,)
            score = pooled_with(now[SHIFTS - 1 - s], moved, SIZES)
        befores = after
        if SIZES.LOGITS:
            score = tl.where(score == float("-inf"), score, score * tl.abs(scale))

        # Of a block in chunks, every chunk writes what there is so far.
        first_block = tile // CHUNKS * BLOCKS
        run_of = tl.arange(0, RUNS)[:, None] * (BLOCKS // RUNS)
        block = first_block + run_of + tl.arange(0, BLOCKS // RUNS)[None, :]  # [RUNS, BLOCKS // RUNS]
        block = block[None, :, :]
        free = (block >= SIZES.INIT_BLOCKS) & (block <= newest[:, None, None])
        key = tl.where(free, ranked(score, SIZES), EXCLUDED)
        store_keys(workspace, width, first_block, key, num_blocks, BLOCKS // RUNS, WARPS, PIECES)
        if has_nodes(BLOCK_N, STEPS, SIZES.FANOUT):
            NODES: tl.constexpr = BLOCKS // SIZES.FANOUT
            nodes = tl.max(tl.reshape(key, [BLOCK_M, NODES, 1, SIZES.FANOUT]), 3)
            above = workspace + leaves_of(num_blocks, SIZES)
            first_node = first_block // SIZES.FANOUT
            store_keys(above, width, first_node, nodes, tl.cdiv(num_blocks, SIZES.FANOUT), 1, WARPS, 1)


@triton.jit
def store_keys(workspace, width, first, key, end, RUN: tl.constexpr, WARPS: tl.constexpr, PIECES: tl.constexpr):
    """Write keys [M, RUNS, N] of runs that are RUN blocks apart, in so many pieces, as far as there are blocks.

    A warp of the product has 16 consecutive rows, a warp of a store as many as its threads cover, then those of the
    next warp. Rows are renumbered so that these are the same and no key changes warps; small enough pieces change
    threads by shuffles, without shared memory.
    """
    M: tl.constexpr = key.shape[0]
    RUNS: tl.constexpr = key.shape[1]
    N: tl.constexpr = key.shape[2]
    if min(PIECES, N) > 1:
        low, high = tl.split(tl.permute(tl.reshape(key, [M, RUNS, 2, N // 2]), [0, 1, 3, 2]))
        store_keys(workspace, width, first, low, end, RUN, WARPS, PIECES // 2)
        store_keys(workspace, width, first + N // 2, high, end, RUN, WARPS, PIECES // 2)
    else:
        COLS: tl.constexpr = RUNS * N
        TOGETHER: tl.constexpr = max(1, min(16, 32 // COLS))  # rows that a store's warp covers at once
        TURNS: tl.constexpr = 16 // TOGETHER
        SPAN: tl.constexpr = min(M, 16 * WARPS)
        key = tl.reshape(key, [M // SPAN, SPAN // 16, TURNS, TOGETHER, COLS])
        key = tl.reshape(tl.permute(key, [0, 2, 1, 3, 4]), [M, COLS])
        i = tl.arange(0, M)
        turn = i % SPAN // TOGETHER
        row = i // SPAN * SPAN + turn % (SPAN // 16) * 16 + turn // (SPAN // 16) * TOGETHER + i % TOGETHER
        col = tl.arange(0, COLS)
        block = (first + col // N * RUN + col % N)[None, :]
        tl.store(workspace + ((row * width)[:, None] + block), key, mask=block < end)


@triton.jit
def leaves_of(num_blocks, SIZES: tl.constexpr):
    """Where the level above the blocks begins in a row of the workspace."""
    return tl.cdiv(num_blocks, SIZES.FANOUT) * SIZES.FANOUT
