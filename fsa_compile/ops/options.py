"""What an implementation gets besides its tensors: its options as one tuple, and where the sequences lie as another.

`scale` and `seq_len_k` are filled in where the caller left them out. While a graph is traced, lengths are symbolic.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Compressed", "Compression", "CompressionBackward", "Layout", "Nsa", "Selected", "Selection", "Sliding"]


class Layout(NamedTuple):
    """Where the sequences lie: packed, padded, or neither (all None: each batch row is a sequence).

    `mean_compress` has that of its keys only: `cu_seqlens_k`, `seqused_k`, `leftpad_k`.
    """

    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None  # None when packed: as the queries lie
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None
    seqused_k: Tensor | None = None
    leftpad_k: Tensor | None = None

    @property
    def packed_keys(self) -> Tensor | None:
        return self.cu_seqlens_q if self.cu_seqlens_k is None else self.cu_seqlens_k

    @property
    def is_padded(self) -> bool:
        return self.seqused_k is not None or self.leftpad_k is not None


class Selected(NamedTuple):
    block_size: int
    scale: float
    loop_order: str


class Compressed(NamedTuple):
    kernel_size: int
    kernel_stride: int
    seq_len_k: int
    scale: float


class Sliding(NamedTuple):
    window_size: int
    scale: float


class Selection(NamedTuple):
    block_size: int
    num_selected: int
    kernel_size: int
    kernel_stride: int
    init_blocks: int
    local_blocks: int
    seq_len_k: int
    scale: float
    pool: str


class Compression(NamedTuple):
    kernel_size: int
    kernel_stride: int


class CompressionBackward(NamedTuple):
    seq_len: int
    kernel_size: int
    kernel_stride: int


class Nsa(NamedTuple):
    """`scale` is the caller's, None included: it is handed on."""

    k_cmp: Tensor | None
    v_cmp: Tensor | None
    block_indices: Tensor | None
    block_size: int
    num_selected: int
    kernel_size: int
    kernel_stride: int
    init_blocks: int
    local_blocks: int
    window_size: int
    scale: float | None
    loop_order: str
