"""The gradient of mean compression: all tokens of a chunk share one, the sum over the windows that cover the chunk."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ...tiling import Config, Device
from ..kernel import Kernel, Output, Plan, Strided
from ..sequences import Rows, Sequences, num_tiles, run_of_block
from ..tiles import dense_strides, store_output
from .sizes import CompressionSizes, columns, one_of_each, runs


@triton.jit
def chunks_of_program(
    pid, num_chunks, seqs: Sequences, SIZES: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr
):
    """Runs of a program's chunks, which chunk of its run each is, how many rows of it lie in the run, and columns."""
    WIDTH: tl.constexpr = SIZES.NUM_HEADS * SIZES.HEAD_DIM
    TILES_W: tl.constexpr = (WIDTH + BLOCK_W - 1) // BLOCK_W
    w = (pid // TILES_W) * BLOCK_C + tl.arange(0, BLOCK_C)
    run, chunk, num_rows = run_of_block(seqs, tl.minimum(w, num_chunks - 1), SIZES.KERNEL_STRIDE)
    rest = tl.where(w < num_chunks, num_rows - chunk * SIZES.KERNEL_STRIDE, 0)
    return run, chunk, rest, (pid % TILES_W) * BLOCK_W + tl.arange(0, BLOCK_W)


@triton.jit
def mean_compress_bwd_tile(
    grad_out: Rows, run, chunk, cols, seqs: Sequences, SIZES: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_W: tl.constexpr,
):  # fmt: skip
    """A chunk's gradient: those of the run's windows that cover it, over their size."""  # [BLOCK_C, BLOCK_W]
    h = cols // SIZES.HEAD_DIM
    inner = h.to(tl.int64) * grad_out.strides[2] + cols % SIZES.HEAD_DIM
    inside = cols < SIZES.NUM_HEADS * SIZES.HEAD_DIM
    base = grad_out.ptr + run.b.to(tl.int64) * grad_out.strides[0]
    first = chunk * 0
    if seqs.cu_seqlens_k is not None:
        first = run.first_key // SIZES.KERNEL_STRIDE
    total = tl.zeros([BLOCK_C, BLOCK_W], tl.float32)
    for n in range(SIZES.OVERLAP):
        window = chunk - (SIZES.OVERLAP - 1) + n
        exists = (window >= 0) & (window * SIZES.KERNEL_STRIDE + SIZES.KERNEL_SIZE <= run.num_keys)
        row = base + (first + window).to(tl.int64) * grad_out.strides[1]
        mask = exists[:, None] & inside[None, :]
        total += tl.load(row[:, None] + inner[None, :], mask=mask, other=0.0).to(tl.float32)
    return total / SIZES.KERNEL_SIZE


@triton.jit
def token_of_chunk(run, chunk, rest, r, seqs: Sequences, SIZES: tl.constexpr):
    """Where the chunks' ``r``-th tokens lie, and whether there is one: rows before a run's first key come last."""
    t = run.first_key + chunk * SIZES.KERNEL_STRIDE + r
    return tl.where(t >= seqs.seq_len_k, t - seqs.seq_len_k, t), r < rest


@triton.jit
def mean_compress_bwd_kernel(
    grad_out: Rows, dx, num_chunks, seqs: Sequences, SIZES: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr
):
    run, chunk, rest, cols = chunks_of_program(tl.program_id(0), num_chunks, seqs, SIZES, BLOCK_C, BLOCK_W)
    value = mean_compress_bwd_tile(grad_out, run, chunk, cols, seqs, SIZES, BLOCK_C, BLOCK_W)
    b = run.b[:, None]
    h = (cols // SIZES.HEAD_DIM)[None, :]
    d = (cols % SIZES.HEAD_DIM)[None, :]
    strides = dense_strides(seqs.seq_len_k, SIZES.NUM_HEADS, SIZES.HEAD_DIM)
    for r in range(SIZES.KERNEL_STRIDE):
        row, stored = token_of_chunk(run, chunk, rest, r, seqs, SIZES)
        t = row[:, None]
        mask = stored[:, None] & (cols < SIZES.NUM_HEADS * SIZES.HEAD_DIM)[None, :]
        store_output(dx, (b, t, h, d), strides, value, mask, (BLOCK_C, BLOCK_W))


def plan(
    grad_out: Any, cu_seqlens: Any, seqused: Any, leftpad: Any, *, seq_len: Any, kernel_size: int, kernel_stride: int
) -> Plan:
    """dx ``[B, T, HK, D]``, every row of it: 0 where no window reaches."""
    sizes = CompressionSizes.of(grad_out, kernel_size, kernel_stride)
    batch = grad_out.shape[0]
    seqs = runs(batch, seq_len, cu_seqlens, seqused, leftpad)

    def cdiv(n: Any, block: int) -> Any:
        return (n + block - 1) // block

    num_chunks = num_tiles(batch, seq_len, seqs.num_seqs, cu_seqlens is not None, kernel_stride, cdiv)
    return Plan(
        {"grad_out": Strided(grad_out), "num_chunks": num_chunks, "seqs": seqs},
        {"dx": Output((batch, seq_len, *grad_out.shape[2:]), grad_out.dtype)},
        sizes,
        (num_chunks, sizes.width),
    )


def grid(extent: tuple[Any, ...], tiles: dict[str, Any], cdiv: Any) -> tuple[Any, Any, Any]:
    """Columns of the same chunks are neighbours."""
    num_chunks, width = extent
    return cdiv(num_chunks, tiles["BLOCK_C"]) * cdiv(width, tiles["BLOCK_W"]), 1, 1


def heuristic(sizes: CompressionSizes, device: Device) -> Config:
    """As measured on an H100, at 256 columns and more."""
    return Config({"BLOCK_C": 16, "BLOCK_W": columns(sizes, 256)}, 4, 1)


def candidates(sizes: CompressionSizes, device: Device) -> list[Config]:
    """What is worth measuring."""
    return one_of_each(
        [
            Config({"BLOCK_C": c, "BLOCK_W": columns(sizes, w)}, num_warps, 1)
            for c in (8, 16, 32)
            for w in (128, 256)
            for num_warps in (2, 4, 8)
        ]
    )


MEAN_COMPRESS_BWD = Kernel(
    mean_compress_bwd_kernel,
    "_mean_compress_bwd(Tensor grad_out, Tensor? cu_seqlens, Tensor? seqused, Tensor? leftpad, *, SymInt seq_len, "
    "int kernel_size, int kernel_stride) -> Tensor dx",
    plan, grid, heuristic, candidates,
)  # fmt: skip
