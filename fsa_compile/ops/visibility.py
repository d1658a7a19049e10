"""Which keys a query sees, batched or packed, told from positions; all on the device, nothing read back."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

__all__ = ["Visibility", "compressed_visibility", "packed_windows", "sliding_visibility", "token_sequences"]


@dataclasses.dataclass(frozen=True)
class Visibility:
    """Query `t` sees key `i` iff both are of one sequence and `t - window < last position of i <= t`, positions within
    the sequence.
    """

    q_position: Tensor  # [T] int
    k_position: Tensor  # [N] int: the last position that the key covers
    num_keys: int
    offset: int  # position of query 0 where the queries are aligned with the keys by their index
    first_end: int  # last position that key 0 covers
    stride: int  # positions between keys
    window: int | None  # None: no limit
    aligned: bool = True  # False: packed with other lengths for the keys, so an index says nothing of the position
    max_seqlen: int | None = None  # packed: no sequence is longer
    q_sequence: Tensor | None = None  # [T] int; None: one sequence per batch row
    k_sequence: Tensor | None = None  # [N] int, -1 of none

    def keys(self, start: int, stop: int) -> tuple[int, int]:
        """A range of key indices that holds every key that the queries `start ... stop - 1` see."""
        if not self.aligned:
            return 0, self.num_keys
        hi = (self.offset + stop - 1 - self.first_end) // self.stride + 1
        hi = min(max(hi, 0), self.num_keys)
        reach = self.max_seqlen if self.window is None else self.window
        if reach is None:
            return 0, hi
        lo = (self.offset + start - reach + 1) // self.stride
        return min(max(lo, 0), hi), hi

    def hide_(self, scores: Tensor, rows: slice, lo: int, hi: int, fill: float) -> None:
        """Write `fill` over the scores [B, HK, rows, G, hi - lo] of the keys that are not seen."""
        if self.window is None and self.q_sequence is None:  # only the last columns differ among the rows
            seen = self.keys(rows.start, rows.start + 1)[1]
            scores, lo = scores[..., max(0, seen - lo) :], max(lo, seen)
        if lo >= hi:
            return
        query, key = self.q_position[rows, None], self.k_position[lo:hi]
        hidden = key > query
        if self.window is not None:
            hidden |= key <= query - self.window
        if self.q_sequence is not None and self.k_sequence is not None:
            hidden |= self.k_sequence[lo:hi] != self.q_sequence[rows, None]
        scores.masked_fill_(hidden[:, None], fill)


def compressed_visibility(
    q: Tensor, num_compressed: int, kernel_size: int, kernel_stride: int, seq_len_k: int | None, cu_seqlens_q: Tensor
    | None, cu_seqlens_k: Tensor | None, max_seqlen_k: int | None,
) -> Visibility:  # fmt: skip
    """Compressed tokens are seen when their whole window is in the past."""
    seq_len = q.shape[1]
    if cu_seqlens_q is None:
        offset = 0 if seq_len_k is None else seq_len_k - seq_len
        return Visibility(
            torch.arange(offset, offset + seq_len, device=q.device),
            torch.arange(num_compressed, device=q.device) * kernel_stride + kernel_size - 1,
            num_compressed, offset, kernel_size - 1, kernel_stride, None,
        )  # fmt: skip
    sequence, position = _packed_queries(cu_seqlens_q, cu_seqlens_k, seq_len)
    cu_seqlens = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    k_sequence, window, inside = packed_windows(cu_seqlens, num_compressed, kernel_size, kernel_stride)
    return Visibility(
        position, window * kernel_stride + kernel_size - 1, num_compressed, 0, kernel_size - 1, kernel_stride, None,
        cu_seqlens_k is None, max_seqlen_k, sequence, k_sequence.masked_fill(~inside, -1),
    )  # fmt: skip


def sliding_visibility(
    q: Tensor, seq_len_k: int, window_size: int, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None
) -> Visibility:
    """A query sees its own key and the `window_size - 1` before it."""
    seq_len = q.shape[1]
    if cu_seqlens_q is None:
        offset = seq_len_k - seq_len
        position = torch.arange(seq_len_k, device=q.device)
        return Visibility(position[offset:], position, seq_len_k, offset, 0, 1, window_size)
    sequence, q_position = _packed_queries(cu_seqlens_q, cu_seqlens_k, seq_len)
    k_sequence, k_position = token_sequences(cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k, seq_len_k)
    return Visibility(
        q_position, k_position, seq_len_k, 0, 0, 1, window_size, cu_seqlens_k is None, None, sequence, k_sequence
    )  # fmt: skip


def token_sequences(cu_seqlens: Tensor, total_len: int) -> tuple[Tensor, Tensor]:
    """The sequence of each packed token and its position there, [total_len] each."""
    index = torch.arange(total_len, device=cu_seqlens.device, dtype=torch.int32)
    sequence = torch.searchsorted(cu_seqlens, index, right=True).sub_(1).clamp_(0, cu_seqlens.shape[0] - 2)
    return sequence, index - cu_seqlens[sequence]


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
    sequence = torch.searchsorted(starts, index, right=True).sub_(1).clamp_(min=0)
    window = index - starts[sequence]
    length = (cu_seqlens[1:] - cu_seqlens[:-1])[sequence]
    return sequence, window, window * kernel_stride + kernel_size <= length


def _packed_queries(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None, total_len: int) -> tuple[Tensor, Tensor]:
    """Sequence and position of each packed query: the queries are the last positions of their sequence."""
    sequence, position = token_sequences(cu_seqlens_q, total_len)
    if cu_seqlens_k is not None:
        ahead = (cu_seqlens_k[1:] - cu_seqlens_k[:-1]) - (cu_seqlens_q[1:] - cu_seqlens_q[:-1])
        position = position + ahead[sequence]
    return sequence, position
