"""Compressed and sliding-window attention on a CPU: whose keys a query sees follows from its position, so tiles need
no lists.

Packed sequences are taken one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor

from . import dense
from .cpu_tiles import (
    TILE_MULTIPLE,
    attend_precisely,
    sequence_slices,
    tile_backward,
    tile_forward,
    widen,
    widen_gradients,
)
from .schema import impl

__all__ = [
    "compressed_attention_backward",
    "compressed_attention_forward",
    "select_blocks",
    "sliding_window_attention_backward",
    "sliding_window_attention_forward",
]

_Sequence: TypeAlias = tuple[slice, slice, dict[str, Any]]  # its queries' rows, its keys' rows, options of its own

_WINDOW_ROWS = 128  # queries in a tile of the sliding window: more waste masked scores, fewer are slower products


def compressed_attention_forward(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, *, kernel_size: int = 32, kernel_stride: int = 16, seq_len_k: int | None
    = None, scale: float | None = None, cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`fsa::compressed_attention_forward`: stage 2 of the specification, `(out, shift, log_sum)`."""
    options: dict[str, Any] = {"kernel_size": kernel_size, "kernel_stride": kernel_stride, "scale": scale}
    if cu_seqlens_q is not None:
        slices = _window_slices(cu_seqlens_q, cu_seqlens_k, kernel_size, kernel_stride)
        return _each_forward(compressed_attention_forward, slices, q, k_cmp, v_cmp, options)
    if seq_len_k not in (None, q.shape[1]):  # the causal triangle below starts at the first key
        return dense.compressed_attention_forward(q, k_cmp, v_cmp, seq_len_k=seq_len_k, **options)
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def forward(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        out, lse = q.new_zeros(*q.shape[:3], v_cmp.shape[3]), torch.full(q.shape[:3], -torch.inf, dtype=dtype)
        wide, k, v = widen(q, k_cmp, v_cmp, scale, dtype)
        for rows, keys, heads, kv_heads in _triangles(wide, k, kernel_size, kernel_stride):
            part = wide[:, rows, heads].transpose(1, 2)
            k_part, v_part = (_expand(x[:, keys, kv_heads].transpose(1, 2), part.shape[1]) for x in (k, v))
            o, s = tile_forward(part, k_part, v_part, causal=True)
            out[:, rows, heads] = o.transpose(1, 2)[..., : out.shape[3]].to(out.dtype)
            lse[:, rows, heads] = s.transpose(1, 2)
        return out, lse

    return attend_precisely(forward, q.dtype, scale)


def compressed_attention_backward(
    grad_out: Tensor | None, grad_log_sum: Tensor | None, q: Tensor, k_cmp: Tensor, v_cmp: Tensor, out: Tensor, shift:
    Tensor, log_sum: Tensor, *, kernel_size: int = 32, kernel_stride: int = 16, seq_len_k: int | None = None, scale:
    float | None = None, cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None, max_seqlen_q: int |
    None = None, max_seqlen_k: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`fsa::compressed_attention_backward`: the gradients of q, k_cmp and v_cmp."""
    options: dict[str, Any] = {"kernel_size": kernel_size, "kernel_stride": kernel_stride, "scale": scale}
    args = grad_out, grad_log_sum, q, k_cmp, v_cmp, out, shift, log_sum
    if cu_seqlens_q is not None:
        slices = _window_slices(cu_seqlens_q, cu_seqlens_k, kernel_size, kernel_stride)
        return _each_backward(compressed_attention_backward, slices, *args, options)
    if seq_len_k not in (None, q.shape[1]):
        return dense.compressed_attention_backward(*args, seq_len_k=seq_len_k, **options)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dq = q.new_zeros(q.shape)
    grad, q, k, v, delta, lse = widen_gradients(*args, scale)
    dk, dv = k.new_zeros(k.shape), v.new_zeros(v.shape)
    for rows, keys, heads, kv_heads in _triangles(q, k, kernel_size, kernel_stride):
        grad_part, part = (x[:, rows, heads].transpose(1, 2) for x in (grad, q))
        delta_part, lse_part = (x[:, rows, heads].transpose(1, 2) for x in (delta, lse))
        k_part, v_part = (_expand(x[:, keys, kv_heads].transpose(1, 2), part.shape[1]) for x in (k, v))
        dq_part, dk_part, dv_part = tile_backward(grad_part, part, k_part, v_part, delta_part, lse_part, causal=True)
        dq_part = dq_part.transpose(1, 2)[..., : dq.shape[3]].mul_(scale)
        dq[:, rows, heads] = dq_part.to(dq.dtype)
        for total, share in ((dk, dk_part), (dv, dv_part)):
            share = share.unflatten(1, (total[:, :1, kv_heads].shape[2], -1)).sum(2)
            total[:, keys, kv_heads] += share.transpose(1, 2)
    return dq, _like(dk, k_cmp), _like(dv, v_cmp)


def _triangles(
    q: Tensor, k: Tensor, kernel_size: int, kernel_stride: int
) -> Iterator[tuple[slice, slice, slice, slice]]:
    """Cuts compressed attention into plain causal triangles: rows of q, rows of k, heads of q, heads of k.

    Of the queries `kernel_size - 1 + r, ... + kernel_stride, ...` the x-th sees the compressed tokens 0 ... x, for
    every r. The earlier queries see none.
    """
    seq_len, num_q_heads, num_kv_heads = q.shape[1], q.shape[2], k.shape[2]
    group_size = num_q_heads // num_kv_heads
    step = num_kv_heads if group_size == 1 else 1  # heads that share no keys can go together
    for first in range(kernel_size - 1, min(seq_len, kernel_size - 1 + kernel_stride)):
        keys = slice(0, len(range(first, seq_len, kernel_stride)))
        for head in range(0, num_kv_heads, step):
            heads = slice(head * group_size, (head + step) * group_size)
            yield slice(first, None, kernel_stride), keys, heads, slice(head, head + step)


def sliding_window_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, *, window_size: int, scale: float | None = None, cu_seqlens_q: Tensor | None =
    None, cu_seqlens_k: Tensor | None = None, max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`fsa::sliding_window_attention_forward`: causal attention over the last `window_size` keys, `(out, shift,
    log_sum)`.
    """
    if cu_seqlens_q is not None:
        options = {"window_size": window_size, "scale": scale}
        return _each_forward(sliding_window_attention_forward, _slices(cu_seqlens_q, cu_seqlens_k), q, k, v, options)
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def forward(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        out, lse = q.new_empty(*q.shape[:3], v.shape[3]), torch.empty(q.shape[:3], dtype=dtype)
        wide_q, *wide = widen(q, k, v, scale, dtype)
        wide_k, wide_v = (x.transpose(1, 2).contiguous() for x in wide)
        for rows, keys, mask in _bands(wide_q, wide_k, window_size):
            part = _by_group(wide_q[:, rows], k.shape[2])
            o, s = tile_forward(part, wide_k[:, :, keys], wide_v[:, :, keys], mask=mask)
            out[:, rows] = _by_token(o, rows)[..., : out.shape[3]].to(out.dtype)
            lse[:, rows] = _by_token(s[..., None], rows)[..., 0]
        return out, lse

    return attend_precisely(forward, q.dtype, scale)


def sliding_window_attention_backward(
    grad_out: Tensor | None, grad_log_sum: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, shift: Tensor,
    log_sum: Tensor, *, window_size: int, scale: float | None = None, cu_seqlens_q: Tensor | None = None, cu_seqlens_k:
    Tensor | None = None, max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`fsa::sliding_window_attention_backward`: the gradients of q, k and v."""
    args = grad_out, grad_log_sum, q, k, v, out, shift, log_sum
    if cu_seqlens_q is not None:
        options = {"window_size": window_size, "scale": scale}
        return _each_backward(sliding_window_attention_backward, _slices(cu_seqlens_q, cu_seqlens_k), *args, options)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    num_kv_heads = k.shape[2]
    dq, k_in, v_in = q.new_empty(q.shape), k, v
    grad, q, k, v, delta, lse = widen_gradients(*args, scale)
    k, v = k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()
    dk, dv = k.new_zeros(k.shape), v.new_zeros(v.shape)
    for rows, keys, mask in _bands(q, k, window_size):
        grad_part, part = (_by_group(x[:, rows], num_kv_heads) for x in (grad, q))
        delta_part, lse_part = (_by_group(x[:, rows, :, None], num_kv_heads)[..., 0] for x in (delta, lse))
        dq_part, dk_part, dv_part = tile_backward(
            grad_part, part, k[:, :, keys], v[:, :, keys], delta_part, lse_part, mask=mask
        )
        dq[:, rows] = _by_token(dq_part.mul_(scale), rows)[..., : dq.shape[3]].to(dq.dtype)
        dk[:, :, keys] += dk_part
        dv[:, :, keys] += dv_part
    return dq, _like(dk.transpose(1, 2), k_in), _like(dv.transpose(1, 2), v_in)


def _bands(q: Tensor, k: Tensor, window_size: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Cuts the window into tiles: rows of q, rows of k, and the tile's mask [1, 1, rows * G, keys], to be added.

    k: [B, HK, Tk, D].
    """
    seq_len, seq_len_k = q.shape[1], k.shape[2]
    offset, group_size = seq_len_k - seq_len, q.shape[2] // k.shape[1]
    masks: dict[tuple[int, int, int], Tensor] = {}
    for start in range(0, seq_len, _WINDOW_ROWS):
        stop = min(start + _WINDOW_ROWS, seq_len)
        first = offset + start - window_size + 1
        first = max(0, first - (first - offset - stop) % TILE_MULTIPLE)  # keys more, which the mask hides
        shape = (stop - start, offset + stop - first, offset + start - first)  # rows, keys, the first row's own key
        if shape not in masks:
            mask = _band_mask(*shape, window_size, group_size, k.dtype)
            masks = {shape: mask}  # tiles of one shape follow each other
        yield slice(start, stop), slice(first, offset + stop), masks[shape]


def _band_mask(rows: int, keys: int, own: int, window_size: int, group_size: int, dtype: torch.dtype) -> Tensor:
    behind = own + torch.arange(rows)[:, None] - torch.arange(keys)
    mask = torch.zeros(rows, keys, dtype=dtype).masked_fill_((behind < 0) | (behind >= window_size), -torch.inf)
    return mask.repeat_interleave(group_size, 0)[None, None]


def select_blocks(
    q: Tensor, k_cmp: Tensor, lse: Tensor, *, block_size: int = 64, num_selected: int = 16, kernel_size: int = 32,
    kernel_stride: int = 16, init_blocks: int = 1, local_blocks: int = 2, seq_len_k: int | None = None, scale: float |
    None = None, cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None, max_seqlen_q: int | None =
    None, max_seqlen_k: int | None = None,
) -> Tensor:  # fmt: skip
    """`fsa::select_blocks`: stage 3 of the specification, [B, T, HK, num_selected] int32."""
    options: dict[str, Any] = {
        "block_size": block_size, "num_selected": num_selected, "kernel_size": kernel_size,
        "kernel_stride": kernel_stride, "init_blocks": init_blocks, "local_blocks": local_blocks, "scale": scale,
    }  # fmt: skip
    if cu_seqlens_q is None:
        return dense.select_blocks(q, k_cmp, lse, seq_len_k=seq_len_k, **options)
    chosen = torch.empty(1, q.shape[1], k_cmp.shape[2], num_selected, dtype=torch.int32)
    for rows, windows, more in _window_slices(cu_seqlens_q, cu_seqlens_k, kernel_size, kernel_stride):
        chosen[:, rows] = dense.select_blocks(q[:, rows], k_cmp[:, windows], lse[:, rows], **options, **more)
    return chosen


def _slices(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None) -> list[_Sequence]:
    """The packed sequences."""
    return [(rows, cols, {}) for rows, cols in sequence_slices(cu_seqlens_q, cu_seqlens_k)]


def _window_slices(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None, kernel_size: int, kernel_stride: int
) -> list[_Sequence]:
    """The packed sequences where the keys are compressed tokens."""
    sequences: list[_Sequence] = []
    for rows, cols in sequence_slices(cu_seqlens_q, cu_seqlens_k):
        length, first = cols.stop - cols.start, cols.start // kernel_stride
        count = max(0, (length - kernel_size) // kernel_stride + 1)
        sequences.append((rows, slice(first, first + count), {"seq_len_k": length}))
    return sequences


def _each_forward(
    forward: Callable[..., tuple[Tensor, Tensor, Tensor]], sequences: list[_Sequence], q: Tensor, k: Tensor, v: Tensor,
    options: dict,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """A forward over each packed sequence by itself."""
    out = q.new_empty(*q.shape[:3], v.shape[3])
    shift, log_sum = (torch.empty(q.shape[:3], dtype=torch.float32) for _ in range(2))
    for rows, cols, more in sequences:
        out[:, rows], shift[:, rows], log_sum[:, rows] = forward(q[:, rows], k[:, cols], v[:, cols], **options, **more)
    return out, shift, log_sum


def _each_backward(
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]], sequences: list[_Sequence], grad_out: Tensor | None,
    grad_log_sum: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, shift: Tensor, log_sum: Tensor, options:
    dict,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """A backward over each packed sequence by itself."""
    dq, dk, dv = q.new_empty(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    for rows, cols, more in sequences:
        grads = (None if x is None else x[:, rows] for x in (grad_out, grad_log_sum))
        results = (x[:, rows] for x in (out, shift, log_sum))
        dq[:, rows], dk[:, cols], dv[:, cols] = backward(
            *grads, q[:, rows], k[:, cols], v[:, cols], *results, **options, **more
        )
    return dq, dk, dv


def _expand(x: Tensor, num_heads: int) -> Tensor:
    """One key head for all the query heads of its group; no copy."""
    return x if x.shape[1] == num_heads else x.expand(-1, num_heads, -1, -1)


def _by_group(x: Tensor, num_kv_heads: int) -> Tensor:
    """[B, rows, HQ, D] -> [B, HK, rows * G, D]."""
    return x.unflatten(2, (num_kv_heads, -1)).transpose(1, 2).flatten(2, 3)


def _by_token(x: Tensor, rows: slice) -> Tensor:
    """[B, HK, rows * G, D] -> [B, rows, HQ, D]."""
    return x.unflatten(2, (rows.stop - rows.start, -1)).transpose(1, 2).flatten(2, 3)


def _like(x: Tensor, like: Tensor) -> Tensor:
    """A gradient without the widening, in its input's dtype, contiguous."""
    return x[..., : like.shape[3]].to(like.dtype).contiguous()


for _fn in (
    compressed_attention_forward, compressed_attention_backward, select_blocks, sliding_window_attention_forward,
    sliding_window_attention_backward,
):  # fmt: skip
    impl(_fn.__name__, _fn, "CPU")
