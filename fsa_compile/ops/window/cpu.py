"""Sliding-window attention on a CPU: in bands, as whose keys a query sees follows from its position."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ..cpu_tiles import TILE_MULTIPLE, attend, gradients, tile_backward, tile_forward, widen, widen_gradients
from ..options import Layout, Sliding
from ..runs import Results, Run, each_backward, each_forward, runs_of
from ..schema import impl
from . import portable

__all__ = ["sliding_window_attention_backward", "sliding_window_attention_forward"]

_WINDOW_ROWS = 128  # queries in a tile of the sliding window: more waste masked scores, fewer are slower products


def sliding_window_attention_forward(q: Tensor, k: Tensor, v: Tensor, options: Sliding, layout: Layout) -> Results:
    """`fsa::sliding_window_attention_forward`: `(out, shift, log_sum)`."""
    return each_forward(partial(_forward, options), runs_of(layout, q, k.shape[1]), q, k, v)


def sliding_window_attention_backward(
    grad_out: Tensor | None, grad_log_sum: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, shift: Tensor,
    log_sum: Tensor, options: Sliding, layout: Layout,
) -> Results:  # fmt: skip
    """`fsa::sliding_window_attention_backward`: the gradients of q, k and v."""
    runs = runs_of(layout, q, k.shape[1])
    return each_backward(
        partial(_backward, options), runs, (grad_out, grad_log_sum), q, k, v, (out, shift, log_sum)
    )  # fmt: skip


def _forward(options: Sliding, run: Run, q: Tensor, k: Tensor, v: Tensor) -> Results:
    window_size, scale = options

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

    careful = partial(portable.sliding_window_attention_forward, q, k, v, options, Layout())
    return attend(forward, k, scale, careful)


def _backward(
    options: Sliding, run: Run, grads: tuple[Tensor | None, Tensor | None], q: Tensor, k: Tensor, v: Tensor,
    results: Results,
) -> Results:  # fmt: skip
    window_size, scale = options
    args = (*grads, q, k, v, *results)
    num_kv_heads = k.shape[2]
    dq = q.new_empty(q.shape)
    grad, wide_q, wide_k, wide_v, delta, lse = widen_gradients(*args, scale)
    wide_k, wide_v = wide_k.transpose(1, 2).contiguous(), wide_v.transpose(1, 2).contiguous()
    dk, dv = wide_k.new_zeros(wide_k.shape), wide_v.new_zeros(wide_v.shape)
    for rows, keys, mask in _bands(wide_q, wide_k, window_size):
        grad_part, part = (_by_group(x[:, rows], num_kv_heads) for x in (grad, wide_q))
        delta_part, lse_part = (_by_group(x[:, rows, :, None], num_kv_heads)[..., 0] for x in (delta, lse))
        dq_part, dk_part, dv_part = tile_backward(
            grad_part, part, wide_k[:, :, keys], wide_v[:, :, keys], delta_part, lse_part, mask=mask
        )
        dq[:, rows] = _by_token(dq_part.mul_(scale), rows)[..., : dq.shape[3]].to(dq.dtype)
        dk[:, :, keys] += dk_part
        dv[:, :, keys] += dv_part
    careful = partial(portable.sliding_window_attention_backward, *args, options, Layout())
    return gradients(dq, dk.transpose(1, 2), dv.transpose(1, 2), k, v, careful)


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


def _by_group(x: Tensor, num_kv_heads: int) -> Tensor:
    """[B, rows, HQ, D] -> [B, HK, rows * G, D]."""
    return x.unflatten(2, (num_kv_heads, -1)).transpose(1, 2).flatten(2, 3)


def _by_token(x: Tensor, rows: slice) -> Tensor:
    """[B, HK, rows * G, D] -> [B, rows, HQ, D]."""
    return x.unflatten(2, (rows.stop - rows.start, -1)).transpose(1, 2).flatten(2, 3)


impl("sliding_window_attention_forward", sliding_window_attention_forward, "CPU")
impl("sliding_window_attention_backward", sliding_window_attention_backward, "CPU")
