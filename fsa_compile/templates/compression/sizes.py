"""What the kernels of mean compression are compiled for."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton.language as tl

from ...tiling import Config, next_power_of_2
from ..kernel import Dense
from ..sequences import Sequences

# Unrolled up to here, so that the loads of a window are in flight together.
MAX_UNROLLED = tl.constexpr(32)


class CompressionSizes(NamedTuple):
    """Static sizes. A *chunk* is KERNEL_STRIDE tokens, counted from its run's first; a window is OVERLAP chunks."""

    NUM_HEADS: int
    HEAD_DIM: int
    KERNEL_SIZE: int
    KERNEL_STRIDE: int
    OVERLAP: int
    ITEMSIZE: int

    @classmethod
    def of(cls, x: Any, kernel_size: int, kernel_stride: int) -> CompressionSizes:
        """Read the sizes off x ``[B, T, HK, D]``, or what is like it but for the length."""
        overlap = kernel_size // kernel_stride
        return cls(int(x.shape[2]), int(x.shape[3]), kernel_size, kernel_stride, overlap, x.dtype.itemsize)

    @property
    def width(self) -> int:
        """Columns: all heads of a token, side by side."""
        return self.NUM_HEADS * self.HEAD_DIM


def columns(sizes: CompressionSizes, most: int) -> int:
    """A program's columns."""
    return min(most, next_power_of_2(sizes.width))


def one_of_each(configs: list[Config]) -> list[Config]:
    """Without repetitions, in order."""
    return [c for i, c in enumerate(configs) if c not in configs[:i]]


def runs(batch: Any, seq_len: Any, cu_seqlens: Any, seqused: Any, leftpad: Any) -> Sequences:
    """The runs of what is compressed, which has no queries: they are said to be as many as its tokens."""
    num_seqs = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    bounds, used, pad = (None if x is None else Dense(x) for x in (cu_seqlens, seqused, leftpad))
    return Sequences(seq_len, seq_len, num_seqs, bounds, bounds, used, pad)
