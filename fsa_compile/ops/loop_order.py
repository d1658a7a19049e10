"""Internal operators that fix the loop order of the selected branch; eager CUDA and the lowering both call them.

NSA order walks the blocks of a query (`_query_outer`). FSA order walks the queries of a block (`_kv_outer`), leaves one
partial per (query, slot) and merges. Names and shapes, besides those of the semantic operators:

- an *entry* is one (batch, row, key/value head, slot) of block_indices, numbered in row-major order;
- a *list* is the entries that chose one block, numbered `hk * num_blocks + block`, blocks counted over all sequences;
- a *tile* is up to `ENTRIES_PER_TILE` consecutive entries of a list;
- *partials* are `[B, T, HK, S, C, G, D]`: C chunks of a block (1 up to 64 keys), G heads of the group; the forward's
  come with their softmax statistics `[B, T, HK, S, C, G, 2]` (largest score, unscaled, and sum). Slots whose block is
  not visible are never written and never read.

Nothing here waits for the device, and results do not depend on the order in which lists were built.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..templates import merge_partials, selected_fwd_kv_outer, selected_fwd_query_outer
from ..templates.config import ENTRIES_PER_TILE, Lists, StaticSizes
from .schema import define, fake, impl

# Triton's interpreter runs the kernels on CPU tensors.
KERNEL_KEYS = ("CUDA", "CPU") if triton.knobs.runtime.interpret else ("CUDA",)

_TABLES = "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seq_ids"
_LISTS = "Tensor entries, Tensor tile_list, Tensor tile_offsets, Tensor list_offsets"


def _rows(x: Tensor) -> Tensor:
    """The kernels take any strides but ask for a contiguous last axis."""
    return x if x.stride(-1) == 1 else x.contiguous()


# Tables of packed sequences


def _packed_tables_fake(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *, total_q: int, total_k: int, block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    num_seqs = cu_seqlens_k.shape[0] - 1
    return (
        cu_seqlens_q.new_empty(total_q),
        cu_seqlens_q.new_empty(num_seqs + 1),
        cu_seqlens_q.new_empty(total_k // block_size + num_seqs),
    )


def _sequence_ids(offsets: Tensor, total: int) -> Tensor:
    """The sequence of each of `total` items that lie by `offsets` `[num_seqs + 1]`; past the end, the last one."""
    items = torch.arange(total, dtype=offsets.dtype, device=offsets.device)
    ids = torch.searchsorted(offsets[1:], items, right=True, out_int32=True)
    return ids.clamp_(max=offsets.shape[0] - 2)


def _packed_tables(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *, total_q: int, total_k: int, block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    num_seqs = cu_seqlens_k.shape[0] - 1
    blocks = (cu_seqlens_k.diff() + (block_size - 1)) // block_size
    block_base = torch.nn.functional.pad(blocks.cumsum(0, dtype=torch.int32), (1, 0))
    # Rounding every sequence up adds at most one block each, so the bound is known without reading a length.
    return (
        _sequence_ids(cu_seqlens_q, total_q),
        block_base,
        _sequence_ids(block_base, total_k // block_size + num_seqs),
    )


define(
    "_packed_tables(Tensor cu_seqlens_q, Tensor cu_seqlens_k, *, SymInt total_q, SymInt total_k, int block_size) "
    "-> (Tensor seq_ids, Tensor block_base, Tensor block_seq_ids)"
)
fake("_packed_tables", _packed_tables_fake)
impl("_packed_tables", _packed_tables, "CUDA", "CPU")


# Lists of the entries of each block


def _list_sizes(
    block_indices: Tensor, block_seq_ids: Tensor | None, seq_len_k: int, block_size: int
) -> tuple[int, int]:
    batch, _, num_kv_heads, _ = block_indices.shape
    num_blocks = batch * (-(-seq_len_k // block_size)) if block_seq_ids is None else block_seq_ids.shape[0]
    num_lists = num_kv_heads * num_blocks
    return num_lists, block_indices.numel() // ENTRIES_PER_TILE + num_lists


def _block_lists_fake(
    block_indices: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seq_ids: Tensor | None,
    block_base: Tensor | None,
    block_seq_ids: Tensor | None,
    *,
    seq_len_k: int,
    block_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_lists, num_tiles = _list_sizes(block_indices, block_seq_ids, seq_len_k, block_size)
    return (
        block_indices.new_empty(block_indices.numel(), dtype=torch.int64),
        block_indices.new_empty(num_tiles, dtype=torch.int32),
        block_indices.new_empty(num_lists + 1, dtype=torch.int32),
        block_indices.new_empty(num_lists + 1, dtype=torch.int64),
    )


def _block_lists(
    block_indices: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seq_ids: Tensor | None,
    block_base: Tensor | None,
    block_seq_ids: Tensor | None,
    *,
    seq_len_k: int,
    block_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, seq_len, num_kv_heads, _ = block_indices.shape
    num_lists, num_tiles = _list_sizes(block_indices, block_seq_ids, seq_len_k, block_size)
    device = block_indices.device
    rows = torch.arange(seq_len, dtype=torch.int32, device=device)
    if seq_ids is None:
        last_block = (rows + (seq_len_k - seq_len)) // block_size
        first_block = torch.arange(batch, dtype=torch.int32, device=device)[:, None] * (-(-seq_len_k // block_size))
    else:
        assert cu_seqlens_q is not None
        assert cu_seqlens_k is not None
        assert block_base is not None
        shift = cu_seqlens_k.diff() - cu_seqlens_q.diff() - cu_seqlens_q[:-1]
        last_block = (rows + shift[seq_ids]) // block_size
        first_block = block_base[seq_ids][None]
    heads = torch.arange(num_kv_heads, dtype=torch.int32, device=device) * (num_lists // num_kv_heads)
    first_list = first_block[:, :, None, None] + heads[:, None]  # [B or 1, T or 1, HK, 1]
    visible = (block_indices >= 0) & (block_indices <= last_block[:, None, None])
    # A radix sort's time goes with the width of its keys.
    key_dtype = torch.int16 if num_lists < 2**15 else torch.int32
    keys = torch.where(visible, block_indices + first_list, num_lists).to(key_dtype).reshape(-1)
    keys, entries = torch.sort(keys, stable=True)
    lists = torch.arange(num_lists + 1, dtype=key_dtype, device=device)
    list_offsets = torch.searchsorted(keys, lists)
    tiles = (list_offsets.diff() + (ENTRIES_PER_TILE - 1)) // ENTRIES_PER_TILE
    tile_offsets = torch.nn.functional.pad(tiles.cumsum(0, dtype=torch.int32), (1, 0))
    tile_list = torch.searchsorted(
        tile_offsets[1:], torch.arange(num_tiles, dtype=torch.int32, device=device), right=True, out_int32=True
    )
    return entries, tile_list.masked_fill_(tile_list == num_lists, -1), tile_offsets, list_offsets


define(
    f"_block_lists(Tensor block_indices, {_TABLES}, Tensor? block_base, Tensor? block_seq_ids, *, SymInt seq_len_k, "
    f"int block_size) -> ({_LISTS})"
)
fake("_block_lists", _block_lists_fake)
impl("_block_lists", _block_lists, "CUDA", "CPU")


# Forward


def _results(like: Tensor, rows: tuple[int, ...], head_dim_v: int) -> tuple[Tensor, Tensor, Tensor]:
    shift, log_sum = (like.new_empty(rows, dtype=torch.float32) for _ in range(2))
    return like.new_empty(*rows, head_dim_v), shift, log_sum


def _selected_fwd_query_outer_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seq_ids: Tensor | None,
    *,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _results(q, q.shape[:3], v.shape[3])


def _selected_fwd_query_outer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seq_ids: Tensor | None,
    *,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    out, shift, log_sum = _results(q, q.shape[:3], v.shape[3])
    tables = (cu_seqlens_q, cu_seqlens_k, seq_ids)
    selected_fwd_query_outer.launch(
        _rows(q), _rows(k), _rows(v), block_indices.contiguous(), out, shift, log_sum, tables, block_size, scale
    )
    return out, shift, log_sum


define(
    f"_selected_fwd_query_outer(Tensor q, Tensor k, Tensor v, Tensor block_indices, {_TABLES}, *, int block_size, "
    "float scale) -> (Tensor out, Tensor shift, Tensor log_sum)"
)
fake("_selected_fwd_query_outer", _selected_fwd_query_outer_fake)
impl("_selected_fwd_query_outer", _selected_fwd_query_outer, *KERNEL_KEYS)


def _selected_fwd_kv_outer_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    entries: Tensor,
    tile_list: Tensor,
    tile_offsets: Tensor,
    list_offsets: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seq_ids: Tensor | None,
    *,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    sizes = StaticSizes.of(q, k, v, block_indices, block_size, seq_ids is not None)
    shape = (*block_indices.shape, sizes.num_chunks, sizes.group)
    return q.new_empty(*shape, sizes.head_dim_v), q.new_empty(*shape, 2, dtype=torch.float32)


def _selected_fwd_kv_outer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    entries: Tensor,
    tile_list: Tensor,
    tile_offsets: Tensor,
    list_offsets: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seq_ids: Tensor | None,
    *,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    lists = Lists(entries, tile_list, tile_offsets, list_offsets)
    tables = (cu_seqlens_q, cu_seqlens_k, seq_ids)
    partial_out, partial_stats = _selected_fwd_kv_outer_fake(
        q, k, v, block_indices, *lists, *tables, block_size=block_size, scale=scale
    )
    selected_fwd_kv_outer.launch(
        _rows(q),
        _rows(k),
        _rows(v),
        block_indices.contiguous(),
        lists,
        partial_out,
        partial_stats,
        tables,
        block_size,
        scale,
    )
    return partial_out, partial_stats


define(
    f"_selected_fwd_kv_outer(Tensor q, Tensor k, Tensor v, Tensor block_indices, {_LISTS}, {_TABLES}, *, "
    "int block_size, float scale) -> (Tensor partial_out, Tensor partial_stats)"
)
fake("_selected_fwd_kv_outer", _selected_fwd_kv_outer_fake)
impl("_selected_fwd_kv_outer", _selected_fwd_kv_outer, *KERNEL_KEYS)


def _merge_partials_fake(
    partial_out: Tensor,
    partial_stats: Tensor,
    block_indices: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seq_ids: Tensor | None,
    *,
    seq_len_k: int,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, seq_len, num_kv_heads, _, _, group, head_dim_v = partial_out.shape
    return _results(partial_out, (batch, seq_len, num_kv_heads * group), head_dim_v)


def _merge_partials(
    partial_out: Tensor,
    partial_stats: Tensor,
    block_indices: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seq_ids: Tensor | None,
    *,
    seq_len_k: int,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    tables = (cu_seqlens_q, cu_seqlens_k, seq_ids)
    out, shift, log_sum = _merge_partials_fake(
        partial_out, partial_stats, block_indices, *tables, seq_len_k=seq_len_k, block_size=block_size, scale=scale
    )
    merge_partials.launch(
        partial_out, partial_stats, block_indices.contiguous(), out, shift, log_sum, tables, seq_len_k, block_size,
        scale,
    )  # fmt: skip
    return out, shift, log_sum


define(
    f"_merge_partials(Tensor partial_out, Tensor partial_stats, Tensor block_indices, {_TABLES}, *, SymInt seq_len_k, "
    "int block_size, float scale) -> (Tensor out, Tensor shift, Tensor log_sum)"
)
fake("_merge_partials", _merge_partials_fake)
impl("_merge_partials", _merge_partials, *KERNEL_KEYS)
