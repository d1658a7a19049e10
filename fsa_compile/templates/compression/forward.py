"""Means of windows of tokens: every token is read once, and a window is the sum of its chunks' sums."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ...tiling import Config, Device, next_power_of_2
from ..kernel import Kernel, Output, Plan, Strided
from ..sequences import Rows, Sequences, run_of_compressed
from ..tiles import dense_strides, store_output
from .sizes import MAX_UNROLLED, CompressionSizes, columns, one_of_each, runs


@triton.jit
def windows_of_program(pid, num_rows, SIZES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr):
    """Batch row, compressed rows and columns of a program, and which of the rows it stores: those whose chunks it has.

    Programs of the same rows are neighbours, so that they read whole lines of memory together.
    """
    WIDTH: tl.constexpr = SIZES.NUM_HEADS * SIZES.HEAD_DIM
    TILES_W: tl.constexpr = (WIDTH + BLOCK_W - 1) // BLOCK_W
    STEP: tl.constexpr = BLOCK_M - SIZES.OVERLAP + 1
    tiles = tl.cdiv(num_rows, STEP)
    tile = pid // TILES_W
    b = tile // tiles
    i = tl.arange(0, BLOCK_M)
    rows = (tile - b * tiles) * STEP + i
    cols = (pid % TILES_W) * BLOCK_W + tl.arange(0, BLOCK_W)
    return b, rows, cols, (i < STEP) & (rows < num_rows)


@triton.jit
def chunk_sums(x: Rows, b, first, whole, cols, SIZES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr):
    """Sums of the KERNEL_STRIDE tokens from row ``first`` on; 0 where they are not all of the run."""
    h = cols // SIZES.HEAD_DIM
    inner = h.to(tl.int64) * x.strides[2] + cols % SIZES.HEAD_DIM
    base = x.ptr + (b.to(tl.int64) * x.strides[0] + first.to(tl.int64) * x.strides[1])
    base = base[:, None] + inner[None, :]  # [BLOCK_M, BLOCK_W]
    mask = whole[:, None] & (cols < SIZES.NUM_HEADS * SIZES.HEAD_DIM)[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_W], tl.float32)
    STRIDE: tl.constexpr = SIZES.KERNEL_STRIDE
    if STRIDE <= MAX_UNROLLED:
        for r in tl.static_range(STRIDE):
            total += tl.load(base + r * x.strides[1], mask=mask, other=0.0).to(tl.float32)
    else:
        for r in range(STRIDE):
            total += tl.load(base + r * x.strides[1], mask=mask, other=0.0).to(tl.float32)
    return total


@triton.jit
def mean_compress_tile(
    x: Rows, b, rows, cols, seqs: Sequences, SIZES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr
):
    """Means of the windows that compressed rows ``rows`` stand for, 0 for rows that are none.

    The last OVERLAP - 1 rows lack chunks and are wrong.
    """  # [BLOCK_M, BLOCK_W]
    run, window = run_of_compressed(seqs, b, rows, SIZES.KERNEL_STRIDE)
    start = window * SIZES.KERNEL_STRIDE
    whole = start + SIZES.KERNEL_STRIDE <= run.num_keys
    chunk = chunk_sums(x, run.b, run.first_key + start, whole, cols, SIZES, BLOCK_M, BLOCK_W)
    total = chunk
    next_chunk = tl.broadcast_to(tl.arange(0, BLOCK_M)[:, None], [BLOCK_M, BLOCK_W])
    for n in range(1, SIZES.OVERLAP):
        total += tl.gather(chunk, (next_chunk + n) % BLOCK_M, 0)
    exists = start + SIZES.KERNEL_SIZE <= run.num_keys
    return tl.where(exists[:, None], total / SIZES.KERNEL_SIZE, 0.0)


@triton.jit
def mean_compress_fwd_kernel(
    x: Rows, x_cmp, num_rows, seqs: Sequences, SIZES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr
):
    b, rows, cols, stored = windows_of_program(tl.program_id(0), num_rows, SIZES, BLOCK_M, BLOCK_W)
    value = mean_compress_tile(x, b, rows, cols, seqs, SIZES, BLOCK_M, BLOCK_W)
    t = rows[:, None]
    h = (cols // SIZES.HEAD_DIM)[None, :]
    d = (cols % SIZES.HEAD_DIM)[None, :]
    mask = stored[:, None] & (cols < SIZES.NUM_HEADS * SIZES.HEAD_DIM)[None, :]
    strides = dense_strides(num_rows, SIZES.NUM_HEADS, SIZES.HEAD_DIM)
    store_output(x_cmp, (b, t, h, d), strides, value, mask, (BLOCK_M, BLOCK_W))


def plan(x: Any, cu_seqlens: Any, seqused: Any, leftpad: Any, *, kernel_size: int, kernel_stride: int) -> Plan:
    """x_cmp ``[B, NC, HK, D]``, from a length that is a capacity where ``seqused`` says so; packed ``[1, T //
    kernel_stride, HK, D]``.

    With ``kernel_size = kernel_stride = 1`` and neither of the three tensors this is a copy of x: the operator need not
    come here.
    """
    sizes = CompressionSizes.of(x, kernel_size, kernel_stride)
    batch, seq_len = x.shape[:2]
    if cu_seqlens is None:
        num_rows = torch.sym_max(0, (seq_len - kernel_size) // kernel_stride + 1)
    else:
        num_rows = seq_len // kernel_stride
    return Plan(
        {"x": Strided(x), "num_rows": num_rows, "seqs": runs(batch, seq_len, cu_seqlens, seqused, leftpad)},
        {"x_cmp": Output((batch, num_rows, *x.shape[2:]), x.dtype)},
        sizes,
        (batch, num_rows, sizes.OVERLAP - 1, sizes.width),
    )


def grid(extent: tuple[Any, ...], tiles: dict[str, Any], cdiv: Any) -> tuple[Any, Any, Any]:
    """A program stores as many rows as it has whole windows."""
    batch, num_rows, lacking, width = extent
    return batch * cdiv(num_rows, tiles["BLOCK_M"] - lacking) * cdiv(width, tiles["BLOCK_W"]), 1, 1


def heuristic(sizes: CompressionSizes, device: Device) -> Config:
    """As measured on an H100, at 128 columns; a quarter of the chunks at most are read twice."""
    rows = max(16, 4 * next_power_of_2(sizes.OVERLAP - 1))
    return Config({"BLOCK_M": rows, "BLOCK_W": columns(sizes, max(16, min(128, 4096 // rows)))}, 4, 1)


def candidates(sizes: CompressionSizes, device: Device) -> list[Config]:
    """What is worth measuring: at most 64 sums a thread, which fit its registers."""
    least = 4 * next_power_of_2(sizes.OVERLAP - 1)
    return one_of_each(
        [
            Config({"BLOCK_M": max(m, least), "BLOCK_W": columns(sizes, w)}, num_warps, 1)
            for m in (16, 32, 64)
            for w in (64, 128, 256)
            for num_warps in (2, 4, 8)
            if max(m, least) * columns(sizes, w) <= 64 * 32 * num_warps or num_warps == 8
        ]
    )


MEAN_COMPRESS_FWD = Kernel(
    mean_compress_fwd_kernel,
    "_mean_compress_fwd(Tensor x, Tensor? cu_seqlens, Tensor? seqused, Tensor? leftpad, *, int kernel_size, "
    "int kernel_stride) -> Tensor x_cmp",
    plan, grid, heuristic, candidates,
)  # fmt: skip
