"""Mean compression of keys and values in plain PyTorch, for any device."""

from __future__ import annotations

import torch
from torch import Tensor

from ..options import Compression, CompressionBackward, Layout
from ..visibility import packed_tokens, packed_windows, padded_keys

__all__ = ["mean_compress", "mean_compress_backward"]

_GATHERED_BYTES = 64 << 20


def mean_compress(x: Tensor, options: Compression, layout: Layout) -> Tensor:
    """The mean of each window, [B, NC, H, D]; packed [1, T // kernel_stride, H, D]. Rows of no window are 0."""
    kernel_size, kernel_stride = options
    batch, seq_len, heads, head_dim = x.shape
    count = max(0, seq_len // kernel_stride - kernel_size // kernel_stride + 1)
    if layout.cu_seqlens_k is not None:
        rows = seq_len // kernel_stride
        cu_seqlens = layout.cu_seqlens_k.clamp(0, seq_len)
        sequence, window, inside = packed_windows(cu_seqlens, rows, kernel_size, kernel_stride)
        return _gathered(x, (cu_seqlens[sequence] + window * kernel_stride)[None], inside[None], kernel_size)
    if layout.is_padded:
        first, length = padded_keys(layout, batch, seq_len, x.device)
        start = torch.arange(count, device=x.device, dtype=torch.int32) * kernel_stride
        return _gathered(x, first[:, None] + start, start + kernel_size <= length[:, None], kernel_size)
    overlap = kernel_size // kernel_stride
    if count == 0:
        return x.new_empty(batch, 0, heads, head_dim)
    steps = _added(x[:, : (count + overlap - 1) * kernel_stride].unflatten(1, (-1, kernel_stride)))
    total = steps[:, :count]
    for shift in range(1, overlap):
        total = total + steps[:, shift : shift + count]
    return (total / kernel_size).to(x.dtype).contiguous()


def _added(x: Tensor) -> Tensor:
    """The sum over dimension 2 in float32. By halves, as the order in which `sum` adds depends on how many heads there
    are: of some of the heads it should be the same bits, on a device that has no others.
    """
    while (rows := x.shape[2]) > 1:
        half = rows // 2
        added = x[:, :, :half].to(torch.float32) + x[:, :, half : 2 * half].to(torch.float32)
        x = torch.cat([added, x[:, :, 2 * half :]], 2) if rows % 2 else added
    return x[:, :, 0].to(torch.float32)


def _gathered(x: Tensor, start: Tensor, inside: Tensor, kernel_size: int) -> Tensor:
    """Means over the `kernel_size` rows of x [B, T, H, D] from `start` [B, N] on, 0 where not `inside`."""
    batch, seq_len, heads, head_dim = x.shape
    out = x.new_zeros(batch, start.shape[1], heads, head_dim)
    if seq_len == 0 or out.numel() == 0:
        return out
    offset = torch.arange(kernel_size, device=x.device)
    at = torch.arange(batch, device=x.device)[:, None, None]
    step = max(1, _GATHERED_BYTES // (4 * batch * kernel_size * heads * head_dim))
    for first in range(0, out.shape[1], step):
        rows = slice(first, first + step)
        hidden = ~inside[:, rows, None]
        token = (start[:, rows, None] + offset).masked_fill(hidden, 0)
        part = _added(x[at, token]) / kernel_size
        out[:, rows] = part.masked_fill(hidden[..., None], 0).to(x.dtype)
    return out


def mean_compress_backward(grad_out: Tensor, options: CompressionBackward, layout: Layout) -> Tensor:
    """Each token gets the gradients of its windows, divided by their size."""
    seq_len, kernel_size, kernel_stride = options
    batch, count, heads, head_dim = grad_out.shape
    overlap = kernel_size // kernel_stride
    if layout.cu_seqlens_k is None and not layout.is_padded:
        # stride step s lies in the windows s - overlap + 1 ... s
        steps = torch.zeros(
            batch, -(-seq_len // kernel_stride), heads, head_dim, dtype=torch.float32, device=grad_out.device
        )
        if count > 0:
            for shift in range(overlap):
                steps[:, shift : shift + count] += grad_out
        steps = (steps / kernel_size).to(grad_out.dtype)
        return steps.repeat_interleave(kernel_stride, 1)[:, :seq_len].contiguous()
    total = torch.zeros(batch, seq_len, heads, head_dim, dtype=torch.float32, device=grad_out.device)
    if count == 0:
        return total.to(grad_out.dtype)
    if layout.cu_seqlens_k is not None:
        cu_seqlens = layout.cu_seqlens_k.clamp(0, seq_len)
        sequence, position, covered = packed_tokens(cu_seqlens, seq_len)
        position, length = position.masked_fill(~covered, -1)[None], cu_seqlens.diff()[sequence][None]
        first = (cu_seqlens[sequence] // kernel_stride)[None]  # row of its sequence's window 0
    else:
        start, length = padded_keys(layout, batch, seq_len, grad_out.device)
        position = torch.arange(seq_len, device=grad_out.device) - start[:, None]
        length, first = length[:, None], torch.zeros_like(position)
    windows = (length - kernel_size).div(kernel_stride, rounding_mode="floor") + 1  # below 1: none
    at = torch.arange(batch, device=grad_out.device)[:, None]
    for shift in range(overlap):
        window = position.div(kernel_stride, rounding_mode="floor") - shift
        hidden = (window < 0) | (window >= windows)
        row = (first + window).masked_fill(hidden, 0)
        total += grad_out[at, row].masked_fill(hidden[..., None, None], 0)
    return (total / kernel_size).to(grad_out.dtype)
