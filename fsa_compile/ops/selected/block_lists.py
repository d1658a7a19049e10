"""`fsa::_block_lists`: the queries of each selected block, listed on the device and without waiting for it.

Stable sorting keeps the entries of a list in row order, so that sums over a list have one order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...templates.kernel import SEQUENCES
from ...templates.sequences import num_tiles
from ...tiling import ENTRIES_PER_TILE
from ..schema import LIB, define, impl


def _sizes(block_indices: Tensor, cu_seqlens_k: Tensor | None, seq_len_k: int, block_size: int) -> tuple[int, int]:
    """How many lists and tiles there are at most; lengths on the device do not enter."""
    batch, _, num_kv_heads, _ = block_indices.shape
    packed = cu_seqlens_k is not None
    num_seqs = cu_seqlens_k.shape[0] - 1 if cu_seqlens_k is not None else batch
    if packed:
        num_blocks = num_tiles(batch, seq_len_k, num_seqs, True, block_size, lambda a, b: -(-a // b))
    else:
        num_blocks = batch * (-(-seq_len_k // block_size))
    return num_kv_heads * num_blocks, block_indices.numel() // ENTRIES_PER_TILE + num_kv_heads * num_blocks


def _fake(
    block_indices: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, seqused_k: Tensor | None,
    leftpad_k: Tensor | None, *, seq_len_k: int, block_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    num_lists, most = _sizes(block_indices, cu_seqlens_k, seq_len_k, block_size)
    return (
        block_indices.new_empty(block_indices.numel(), dtype=torch.int32),
        block_indices.new_empty(most, dtype=torch.int32),
        block_indices.new_empty(num_lists + 1, dtype=torch.int32),
        block_indices.new_empty(num_lists + 1, dtype=torch.int32),
    )


def _packed_rows(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, rows: Tensor, seq_len_k: int, block_size: int
) -> tuple[Tensor, Tensor]:
    """Position of each row, negative in no sequence, and the number of its run's block 0 (`sequences.run_of_block`)."""
    num_seqs = cu_seqlens_q.shape[0] - 1
    cu_seqlens_q = cu_seqlens_q.clamp(0, rows.shape[0])  # as the kernels see it
    run = torch.searchsorted(cu_seqlens_q, rows, right=True, out_int32=True)  # 0 is what lies before the first
    seq = (run - 1).clamp_(0, num_seqs - 1)
    starts = cu_seqlens_k.clamp(0, seq_len_k)
    length = starts.diff()[seq]
    position = rows - cu_seqlens_q[seq] + length - cu_seqlens_q.diff()[seq]
    inside = (run >= 1) & (run <= num_seqs) & (length > 0)
    return position.masked_fill_(~inside, -1), starts[seq] // block_size + run


def _padded_rows(seqused_k: Tensor | None, leftpad_k: Tensor | None, rows: Tensor, seq_len_k: int) -> Tensor:
    """Position of each row of a batch, [B or 1, T]."""
    if seqused_k is None and leftpad_k is None:
        return (rows + (seq_len_k - rows.shape[0]))[None]
    first = rows.new_zeros(1) if leftpad_k is None else leftpad_k.clamp(0, seq_len_k)
    end = first.new_full((1,), seq_len_k) if seqused_k is None else seqused_k.clamp(0, seq_len_k)
    length = (end - first).clamp_(min=0)[:, None]
    return (rows + (length - rows.shape[0])).masked_fill_(length == 0, -1)


def _block_lists(
    block_indices: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, seqused_k: Tensor | None,
    leftpad_k: Tensor | None, *, seq_len_k: int, block_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch, seq_len, num_kv_heads, _ = block_indices.shape
    if block_indices.numel() >= 2**31:
        raise NotImplementedError(f"{block_indices.numel()} selections are more than a list numbers, 2**31")
    device = block_indices.device
    rows = torch.arange(seq_len, dtype=torch.int32, device=device)
    if cu_seqlens_q is not None:
        cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        position, first_block = _packed_rows(cu_seqlens_q, cu_seqlens_k, rows, seq_len_k, block_size)
        position, first_block = position[None], first_block[None]
    else:
        position = _padded_rows(seqused_k, leftpad_k, rows, seq_len_k)
        first_block = torch.arange(batch, dtype=torch.int32, device=device)[:, None] * (-(-seq_len_k // block_size))
    num_lists, most = _sizes(block_indices, cu_seqlens_k, seq_len_k, block_size)
    # floor division of a negative position gives a negative block, which nothing is at or before
    last_block = torch.div(position, block_size, rounding_mode="floor")[..., None, None]
    heads = torch.arange(num_kv_heads, dtype=torch.int32, device=device) * (num_lists // num_kv_heads)
    first_list = first_block[:, :, None, None] + heads[:, None]  # [B or 1, T or 1, HK, 1]
    visible = (block_indices >= 0) & (block_indices <= last_block)
    # A radix sort's time goes with the width of its keys.
    key_dtype = torch.int16 if num_lists < 2**15 else torch.int32
    keys = torch.where(visible, block_indices + first_list, num_lists).to(key_dtype).reshape(-1)
    keys, entries = torch.sort(keys, stable=True)
    lists = torch.arange(num_lists + 1, dtype=key_dtype, device=device)
    list_offsets = torch.searchsorted(keys, lists, out_int32=True)
    tiles = (list_offsets.diff() + (ENTRIES_PER_TILE - 1)) // ENTRIES_PER_TILE
    tile_offsets = F.pad(tiles.cumsum(0, dtype=torch.int32), (1, 0))
    tile_list = torch.searchsorted(
        tile_offsets[1:], torch.arange(most, dtype=torch.int32, device=device), right=True, out_int32=True
    )
    return entries.int(), tile_list.masked_fill_(tile_list == num_lists, -1), tile_offsets, list_offsets


define(
    f"_block_lists(Tensor block_indices, {SEQUENCES}, *, SymInt seq_len_k, int block_size) "
    "-> (Tensor entries, Tensor tile_list, Tensor tile_offsets, Tensor list_offsets)"
)
torch.library.register_fake("fsa::_block_lists", _fake, lib=LIB)
impl("_block_lists", _block_lists, "CUDA", "CPU")
