"""`fsa::_block_lists`: the queries of each selected block, listed on the device and without waiting for it.

Stable sorting keeps the entries of a list in row order, so that sums over a list have one order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...templates.kernel import SEQUENCES
from ...templates.selected.listing import blocks_of_call
from ...tiling import ENTRIES_PER_TILE
from ..kernels import KERNEL_KEYS
from ..schema import LIB, define, impl

_ops = torch.ops.fsa


def _sizes(block_indices: Tensor, cu_seqlens_k: Tensor | None, seq_len_k: int, block_size: int) -> tuple[int, int]:
    """How many lists and tiles there are at most; lengths on the device do not enter."""
    batch, _, num_kv_heads, _ = block_indices.shape
    num_seqs = cu_seqlens_k.shape[0] - 1 if cu_seqlens_k is not None else batch
    num_lists = num_kv_heads * blocks_of_call(batch, seq_len_k, num_seqs, cu_seqlens_k is not None, block_size)
    return num_lists, block_indices.numel() // ENTRIES_PER_TILE + num_lists


def _fake(
    block_indices: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, seqused_k: Tensor | None,
    leftpad_k: Tensor | None, *, seq_len_k: int, block_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    num_lists, most = _sizes(block_indices, cu_seqlens_k, seq_len_k, block_size)
    return (
        block_indices.new_empty(block_indices.numel(), dtype=torch.int32),
        block_indices.new_empty(most, dtype=torch.int32),
        block_indices.new_empty(num_lists + 1, dtype=torch.int32),
        block_indices.new_empty(num_lists + 1, dtype=torch.int32),
    )


def block_lists(
    block_indices: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, seqused_k: Tensor | None,
    leftpad_k: Tensor | None, *, seq_len_k: int, block_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``Lists``: entries, tile_list, tile_offsets, list_offsets."""
    if block_indices.numel() >= 2**31:
        raise NotImplementedError(f"{block_indices.numel()} selections are more than a list numbers, 2**31")
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    num_lists, most = _sizes(block_indices, cu_seqlens_k, seq_len_k, block_size)
    runs = (cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k)
    keys = _ops._list_keys(block_indices, *runs, seq_len_k=seq_len_k, block_size=block_size)
    keys, places = torch.sort(keys.view(-1), stable=True)
    list_offsets, tiles, entries = _ops._list_offsets(keys, places, num_lists=num_lists)
    tile_offsets = tiles.cumsum(0, dtype=torch.int32)
    return entries, _ops._list_tiles(tile_offsets, num_tiles=most), tile_offsets, list_offsets


define(
    f"_block_lists(Tensor block_indices, {SEQUENCES}, *, SymInt seq_len_k, int block_size) "
    "-> (Tensor entries, Tensor tile_list, Tensor tile_offsets, Tensor list_offsets)"
)
torch.library.register_fake("fsa::_block_lists", _fake, lib=LIB)
impl("_block_lists", block_lists, *KERNEL_KEYS)
