"""Compressed and sliding-window attention on a CPU: whose keys a query sees follows from its position, so tiles need
no lists.

Packed sequences are taken one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from . import dense
from .cpu_tiles import sequence_slices, tile_backward, tile_forward, widen, widen_gradients
from .schema import impl

__all__ = [
    "compressed_attention",
    "compressed_attention_backward",
    "select_blocks",
    "sliding_window_attention",
    "sliding_window_attention_backward",
]

_WINDOW_ROWS = 128  # queries in a tile of the sliding window: more waste masked scores, fewer are slower products


def compressed_attention(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, *, kernel_size: int = 32, kernel_stride: int = 16, seq_len_k: int | None
    = None, scale: float | None = None, cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`fsa::compressed_attention`: stage 2 of the specification, `(out, lse)`."""
    options = {"kernel_size": kernel_size, "kernel_stride": kernel_stride, "scale": scale}
    out = q.new_zeros(*q.shape[:3], v_cmp.shape[3])
    lse = torch.full(q.shape[:3], -torch.inf)
    if cu_seqlens_q is not None:
        for rows, windows, length in _packed_windows(cu_seqlens_q, cu_seqlens_k, kernel_size, kernel_stride):
            out[:, rows], lse[:, rows] = compressed_attention(
                q[:, rows], k_cmp[:, windows], v_cmp[:, windows], seq_len_k=length, **options  # type: ignore[arg-type]
            )  # fmt: skip
        return out, lse
    if seq_len_k not in (None, q.shape[1]):  # the causal triangle below starts at the first key
        return dense.compressed_attention(q, k_cmp, v_cmp, seq_len_k=seq_len_k, **options)  # type: ignore[arg-type]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = widen(q, k_cmp, v_cmp)
    for rows, keys, heads, kv_heads in _triangles(q, k, kernel_size, kernel_stride):
        part = q[:, rows, heads].transpose(1, 2)
        k_part, v_part = (_expand(x[:, keys, kv_heads].transpose(1, 2), part.shape[1]) for x in (k, v))
        o, s = tile_forward(part, k_part, v_part, scale, causal=True)
        out[:, rows, heads] = o.transpose(1, 2)[..., : out.shape[3]].to(out.dtype)
        lse[:, rows, heads] = s.transpose(1, 2)
    return out, lse


def compressed_attention_backward(
    grad_out: Tensor | None, grad_lse: Tensor | None, q: Tensor, k_cmp: Tensor, v_cmp: Tensor, out: Tensor, lse:
    Tensor, *, kernel_size: int = 32, kernel_stride: int = 16, seq_len_k: int | None = None, scale: float | None =
    None, cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None, max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`fsa::compressed_attention_backward`: the gradients of q, k_cmp and v_cmp."""
    options = {"kernel_size": kernel_size, "kernel_stride": kernel_stride, "scale": scale}
    if cu_seqlens_q is not None:
        slices = [
            (rows, windows, {"seq_len_k": length})
            for rows, windows, length in _packed_windows(cu_seqlens_q, cu_seqlens_k, kernel_size, kernel_stride)
        ]
        return _each_backward(
            compressed_attention_backward, slices, grad_out, grad_lse, q, k_cmp, v_cmp, out, lse, options
        )  # fmt: skip
    if seq_len_k not in (None, q.shape[1]):
        return dense.compressed_attention_backward(
            grad_out, grad_lse, q, k_cmp, v_cmp, out, lse, seq_len_k=seq_len_k, **options  # type: ignore[arg-type]
        )  # fmt: skip
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dq = q.new_zeros(q.shape)
    grad, q, k, v, out, lse = widen_gradients(grad_out, grad_lse, q, k_cmp, v_cmp, out, lse)
    dk, dv = k.new_zeros(k.shape), v.new_zeros(v.shape)
    for rows, keys, heads, kv_heads in _triangles(q, k, kernel_size, kernel_stride):
        grad_part, part, out_part = (x[:, rows, heads].transpose(1, 2) for x in (grad, q, out))
        lse_part = lse[:, rows, heads].transpose(1, 2)
        k_part, v_part = (_expand(x[:, keys, kv_heads].transpose(1, 2), part.shape[1]) for x in (k, v))
        dq_part, dk_part, dv_part = tile_backward(
            grad_part, part, k_part, v_part, out_part, lse_part, scale, causal=True
        )
        dq[:, rows, heads] = dq_part.transpose(1, 2)[..., : dq.shape[3]].to(dq.dtype)
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


def sliding_window_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window_size: int, scale: float | None = None, cu_seqlens_q: Tensor | None =
    None, cu_seqlens_k: Tensor | None = None, max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`fsa::sliding_window_attention`: causal attention over the last `window_size` keys, `(out, lse)`."""
    out = q.new_empty(*q.shape[:3], v.shape[3])
    lse = torch.empty(q.shape[:3], dtype=torch.float32)
    if cu_seqlens_q is not None:
        for rows, cols in sequence_slices(cu_seqlens_q, cu_seqlens_k):
            out[:, rows], lse[:, rows] = sliding_window_attention(
                q[:, rows], k[:, cols], v[:, cols], window_size=window_size, scale=scale
            )
        return out, lse
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    num_kv_heads = k.shape[2]
    q, k, v = widen(q, k, v)
    k, v = k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()
    for rows, keys, mask in _bands(q, k, window_size):
        part = _by_group(q[:, rows], num_kv_heads)
        o, s = tile_forward(part, k[:, :, keys], v[:, :, keys], scale, mask=mask)
        out[:, rows] = _by_token(o, rows)[..., : out.shape[3]].to(out.dtype)
        lse[:, rows] = _by_token(s[..., None], rows)[..., 0]
    return out, lse


def sliding_window_attention_backward(
    grad_out: Tensor | None, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *,
    window_size: int, scale: float | None = None, cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None =
    None, max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`fsa::sliding_window_attention_backward`: the gradients of q, k and v."""
    if cu_seqlens_q is not None:
        slices: list[tuple[slice, slice, dict]] = [
            (rows, cols, {}) for rows, cols in sequence_slices(cu_seqlens_q, cu_seqlens_k)
        ]
        options = {"window_size": window_size, "scale": scale}
        return _each_backward(sliding_window_attention_backward, slices, grad_out, grad_lse, q, k, v, out, lse, options)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    num_kv_heads = k.shape[2]
    dq, k_in, v_in = q.new_empty(q.shape), k, v
    grad, q, k, v, out, lse = widen_gradients(grad_out, grad_lse, q, k, v, out, lse)
    k, v = k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()
    dk, dv = k.new_zeros(k.shape), v.new_zeros(v.shape)
    for rows, keys, mask in _bands(q, k, window_size):
        grad_part, part, out_part = (_by_group(x[:, rows], num_kv_heads) for x in (grad, q, out))
        lse_part = _by_group(lse[:, rows, :, None], num_kv_heads)[..., 0]
        dq_part, dk_part, dv_part = tile_backward(
            grad_part, part, k[:, :, keys], v[:, :, keys], out_part, lse_part, scale, mask=mask
        )
        dq[:, rows] = _by_token(dq_part, rows)[..., : dq.shape[3]].to(dq.dtype)
        dk[:, :, keys] += dk_part
        dv[:, :, keys] += dv_part
    return dq, _like(dk.transpose(1, 2), k_in), _like(dv.transpose(1, 2), v_in)


def _bands(q: Tensor, k: Tensor, window_size: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Cuts the window into tiles: rows of q, rows of k, and the float mask [1, 1, rows * G, keys] of the tile.

    k: [B, HK, Tk, D].
    """
    seq_len, seq_len_k = q.shape[1], k.shape[2]
    offset, group_size = seq_len_k - seq_len, q.shape[2] // k.shape[1]
    masks: dict[tuple[int, int, int], Tensor] = {}
    for start in range(0, seq_len, _WINDOW_ROWS):
        stop = min(start + _WINDOW_ROWS, seq_len)
        first = max(0, offset + start - window_size + 1)
        shape = (stop - start, offset + stop - first, offset + start - first)  # rows, keys, the first row's own key
        if shape not in masks:
            masks = {shape: _band_mask(*shape, window_size, group_size)}  # tiles of one shape follow each other
        yield slice(start, stop), slice(first, offset + stop), masks[shape]


def _band_mask(rows: int, keys: int, own: int, window_size: int, group_size: int) -> Tensor:
    behind = own + torch.arange(rows)[:, None] - torch.arange(keys)
    mask = torch.zeros(rows, keys).masked_fill_((behind < 0) | (behind >= window_size), -torch.inf)
    return mask.repeat_interleave(group_size, 0)[None, None]


def select_blocks(
    q: Tensor, k_cmp: Tensor, lse: Tensor, *, block_size: int = 64, num_selected: int = 16, kernel_size: int = 32,
    kernel_stride: int = 16, init_blocks: int = 1, local_blocks: int = 2, seq_len_k: int | None = None, scale: float |
    None = None, cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None, max_seqlen_q: int | None =
    None, max_seqlen_k: int | None = None,
) -> Tensor:  # fmt: skip
    """`fsa::select_blocks`: stage 3 of the specification, [B, T, HK, num_selected] int32."""
    options = {
        "block_size": block_size, "num_selected": num_selected, "kernel_size": kernel_size,
        "kernel_stride": kernel_stride, "init_blocks": init_blocks, "local_blocks": local_blocks, "scale": scale,
    }  # fmt: skip
    if cu_seqlens_q is None:
        return dense.select_blocks(q, k_cmp, lse, seq_len_k=seq_len_k, **options)  # type: ignore[arg-type]
    chosen = torch.empty(1, q.shape[1], k_cmp.shape[2], num_selected, dtype=torch.int32)
    for rows, windows, length in _packed_windows(cu_seqlens_q, cu_seqlens_k, kernel_size, kernel_stride):
        chosen[:, rows] = dense.select_blocks(
            q[:, rows], k_cmp[:, windows], lse[:, rows], seq_len_k=length, **options  # type: ignore[arg-type]
        )  # fmt: skip
    return chosen


def _packed_windows(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None, kernel_size: int, kernel_stride: int
) -> list[tuple[slice, slice, int]]:
    """The rows of the queries and of the compressed tokens of each sequence, and how many keys it has."""
    sequences = []
    for rows, cols in sequence_slices(cu_seqlens_q, cu_seqlens_k):
        length, first = cols.stop - cols.start, cols.start // kernel_stride
        count = max(0, (length - kernel_size) // kernel_stride + 1)
        sequences.append((rows, slice(first, first + count), length))
    return sequences


def _each_backward(
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]], slices: list[tuple[slice, slice, dict]], grad_out: Tensor
    | None, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, options: dict,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """A backward over each packed sequence by itself."""
    dq, dk, dv = q.new_empty(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    for rows, cols, more in slices:
        grads = (None if x is None else x[:, rows] for x in (grad_out, grad_lse))
        dq[:, rows], dk[:, cols], dv[:, cols] = backward(
            *grads, q[:, rows], k[:, cols], v[:, cols], out[:, rows], lse[:, rows], **options, **more
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
    compressed_attention, compressed_attention_backward, select_blocks, sliding_window_attention,
    sliding_window_attention_backward,
):  # fmt: skip
    impl(_fn.__name__, _fn, "CPU")
