"""Which keys a query sees, told from positions; all on the device, nothing read back.

A query at position `t` of its sequence sees a key iff the last position that the key covers is one of the `window`
positions up to `t`. The queries are the last positions of their sequence's keys: with more queries than keys the first
ones stand before position 0 and see nothing.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .options import Layout

__all__ = ["Visibility", "compressed_visibility", "packed_windows", "selected_visibility", "sliding_visibility"]

_NOWHERE = 2**31 - 1  # position of a key that is in no sequence


@dataclasses.dataclass(frozen=True)
class Visibility:
    """`b` is 1 where all batch rows are alike."""

    q_position: Tensor  # [b, T] int; negative: sees nothing
    k_position: Tensor  # [b, N] int: the last position that the key covers
    num_keys: int
    offset: int | None  # position of query 0 where the rows' positions follow from their index; None: they do not
    first_end: int  # last position that key 0 covers
    stride: int  # positions between keys
    window: int | None = None  # None: no limit
    max_seqlen: int | None = None  # packed: no sequence is longer
    q_sequence: Tensor | None = None  # [T] int; None: one sequence per batch row
    k_sequence: Tensor | None = None  # [N] int
    block_indices: Tensor | None = None  # [B, T, HK, S]: only keys of these blocks are seen
    block_size: int = 1

    def keys(self, start: int, stop: int) -> tuple[int, int]:
        """A range of key indices that holds every key that the queries `start ... stop - 1` see."""
        if self.offset is None:
            return 0, self.num_keys
        hi = (self.offset + stop - 1 - self.first_end) // self.stride + 1
        hi = min(max(hi, 0), self.num_keys)
        reach = self.max_seqlen if self.window is None else self.window
        if reach is None:
            return 0, hi
        lo = (self.offset + start - reach + 1) // self.stride
        return min(max(lo, 0), hi), hi

    @property
    def _triangular(self) -> bool:
        """Whether only the last keys of a chunk differ among its rows."""
        return self.window is None and self.offset is not None and self.q_sequence is None and not self._selects

    @property
    def _selects(self) -> bool:
        return self.block_indices is not None

    def hide_(self, scores: Tensor, rows: slice, lo: int, hi: int, fill: float) -> None:
        """Write `fill` over the scores [B, HK, rows, G, hi - lo] of the keys that are not seen."""
        if self._triangular:
            seen = self.keys(rows.start, rows.start + 1)[1]
            scores, lo = scores[..., max(0, seen - lo) :], max(lo, seen)
        if lo >= hi:
            return
        query, key = self.q_position[:, rows, None], self.k_position[:, None, lo:hi]
        hidden = key > query  # [b, rows, keys]
        if self.window is not None:
            hidden |= key <= query - self.window
        if self.q_sequence is not None and self.k_sequence is not None:
            hidden |= self.k_sequence[lo:hi] != self.q_sequence[rows, None]
        hidden = hidden[:, None]
        if self.block_indices is not None:
            hidden = hidden | ~self._selected(self.block_indices[:, rows], key)
        scores.masked_fill_(hidden[:, :, :, None], fill)

    def _selected(self, ids: Tensor, key: Tensor) -> Tensor:
        """[B, HK, rows, keys]: whether the key's block is one of the ids [B, rows, HK, S]."""
        num_blocks = -(-self.num_keys // self.block_size)
        ids = torch.where((ids < 0) | (ids >= num_blocks), num_blocks, ids).long()
        chosen = torch.zeros(*ids.shape[:-1], num_blocks + 1, dtype=torch.bool, device=ids.device)
        chosen = chosen.scatter_(-1, ids, True)
        chosen[..., num_blocks] = False
        block = (key // self.block_size).clamp(0, num_blocks).long()[:, :, None]  # [b, 1, 1, keys]
        return chosen.gather(-1, block.expand(*ids.shape[:-1], -1)).transpose(1, 2)


def compressed_visibility(
    q: Tensor, num_compressed: int, kernel_size: int, kernel_stride: int, seq_len_k: int, layout: Layout
) -> Visibility:
    """Compressed tokens are seen when their whole window is in the past."""
    position, sequence = _queries(q, seq_len_k, layout)
    shape = num_compressed, _offset(q, seq_len_k, layout), kernel_size - 1, kernel_stride
    index = torch.arange(num_compressed, device=q.device, dtype=torch.int32)
    if layout.packed_keys is None:
        return Visibility(position, (index * kernel_stride + kernel_size - 1)[None], *shape)
    cu_seqlens = layout.packed_keys.clamp(0, seq_len_k)
    k_sequence, window, inside = packed_windows(cu_seqlens, num_compressed, kernel_size, kernel_stride)
    end = (window * kernel_stride + kernel_size - 1).masked_fill(~inside, _NOWHERE)
    return Visibility(
        position, end[None], *shape, max_seqlen=layout.max_seqlen_k, q_sequence=sequence, k_sequence=k_sequence
    )


def sliding_visibility(q: Tensor, seq_len_k: int, window_size: int, layout: Layout) -> Visibility:
    """A query sees its own key and the `window_size - 1` before it."""
    return _over_tokens(q, seq_len_k, layout, window=window_size)


def selected_visibility(
    q: Tensor, seq_len_k: int, block_indices: Tensor, block_size: int, layout: Layout
) -> Visibility:
    """A query sees the keys of its blocks, up to its own."""
    return _over_tokens(q, seq_len_k, layout, block_indices=block_indices, block_size=block_size)


def _over_tokens(q: Tensor, seq_len_k: int, layout: Layout, **options: object) -> Visibility:
    position, sequence = _queries(q, seq_len_k, layout)
    index = torch.arange(seq_len_k, device=q.device, dtype=torch.int32)
    k_sequence = None
    if layout.packed_keys is not None:
        k_sequence, k_position, inside = packed_tokens(layout.packed_keys, seq_len_k)
        k_position = k_position.masked_fill(~inside, _NOWHERE)[None]
    elif layout.is_padded:
        first, length = padded_keys(layout, q.shape[0], seq_len_k, q.device)
        k_position = index - first[:, None]
        k_position = k_position.masked_fill((k_position < 0) | (k_position >= length[:, None]), _NOWHERE)
    else:
        k_position = index[None]
    return Visibility(
        position, k_position, seq_len_k, _offset(q, seq_len_k, layout), 0, 1, q_sequence=sequence,
        k_sequence=k_sequence, **options,  # type: ignore[arg-type]
    )  # fmt: skip


def _offset(q: Tensor, seq_len_k: int, layout: Layout) -> int | None:
    if layout.cu_seqlens_q is not None:
        return 0 if layout.cu_seqlens_k is None else None
    return None if layout.is_padded else seq_len_k - q.shape[1]


def _queries(q: Tensor, seq_len_k: int, layout: Layout) -> tuple[Tensor, Tensor | None]:
    """Position [b, T] and, if packed, sequence [T] of each query."""
    seq_len = q.shape[1]
    index = torch.arange(seq_len, device=q.device, dtype=torch.int32)
    if layout.cu_seqlens_q is not None and layout.packed_keys is not None:
        sequence, position, inside = packed_tokens(layout.cu_seqlens_q, seq_len)
        if layout.cu_seqlens_k is not None:
            length = layout.cu_seqlens_q.clamp(0, seq_len).diff()
            length_k = layout.cu_seqlens_k.clamp(0, seq_len_k).diff()
            position = position + (length_k - length)[sequence]
        return position.masked_fill(~inside, -1)[None], sequence
    if layout.is_padded:
        _, length = padded_keys(layout, q.shape[0], seq_len_k, q.device)
        return index + (length - seq_len)[:, None], None
    return (index + (seq_len_k - seq_len))[None], None


def padded_keys(layout: Layout, batch: int, seq_len_k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """First row and number of each batch row's keys, [B] each; never outside the tensors."""
    first = torch.zeros(batch, dtype=torch.int32, device=device)
    if layout.leftpad_k is not None:
        first = layout.leftpad_k.clamp(0, seq_len_k)
    end = first.new_full((batch,), seq_len_k) if layout.seqused_k is None else layout.seqused_k.clamp(0, seq_len_k)
    return first, (end - first).clamp(min=0)


def packed_tokens(cu_seqlens: Tensor, total_len: int) -> tuple[Tensor, Tensor, Tensor]:
    """The sequence of each packed row, its position there, and whether it is of any, [total_len] each."""
    cu_seqlens = cu_seqlens.clamp(0, total_len)
    num_seqs = cu_seqlens.shape[0] - 1
    index = torch.arange(total_len, device=cu_seqlens.device, dtype=torch.int32)
    sequence = torch.searchsorted(cu_seqlens, index, right=True).sub_(1)
    inside = (sequence >= 0) & (sequence < num_seqs)
    sequence = sequence.clamp_(0, num_seqs - 1)
    return sequence, index - cu_seqlens[sequence], inside


def packed_windows(
    cu_seqlens: Tensor, rows: int, kernel_size: int, kernel_stride: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What each row of the packed compressed tokens is: its sequence, which window of it, and whether there is such a
    window.

    The last sequence that starts at or before a row owns it: windows fill at most `len // kernel_stride` rows, so an
    earlier sequence's rows end before a later one starts, and one with the same start has no windows.
    """
    starts = cu_seqlens[:-1] // kernel_stride
    index = torch.arange(rows, device=cu_seqlens.device, dtype=torch.int32)
    sequence = torch.searchsorted(starts, index, right=True).sub_(1)
    before = sequence < 0
    sequence = sequence.clamp_(min=0)
    window = index - starts[sequence]
    length = cu_seqlens.diff()[sequence]
    return sequence, window, (window * kernel_stride + kernel_size <= length) & ~before
