"""Mean compression on a CPU: the portable form; of padded batches a row at a time, as each alone."""

from __future__ import annotations

from torch import Tensor

from ..options import Compression, CompressionBackward, Layout
from ..runs import runs_of
from ..schema import impl
from . import portable

__all__ = ["mean_compress", "mean_compress_backward"]


def mean_compress(x: Tensor, options: Compression, layout: Layout) -> Tensor:
    """`fsa::mean_compress`."""
    if not layout.is_padded:
        return portable.mean_compress(x, options, layout)
    batch, seq_len, *sizes = x.shape
    count = max(0, seq_len // options.kernel_stride - options.kernel_size // options.kernel_stride + 1)
    out = x.new_zeros(batch, count, *sizes)
    for run in runs_of(layout, x, seq_len):
        part = portable.mean_compress(x[run.batch, run.keys], options, Layout())
        out[run.batch, : part.shape[1]] = part
    return out


def mean_compress_backward(grad_out: Tensor, options: CompressionBackward, layout: Layout) -> Tensor:
    """`fsa::mean_compress_backward`."""
    if not layout.is_padded:
        return portable.mean_compress_backward(grad_out, options, layout)
    batch, _, *sizes = grad_out.shape
    dx = grad_out.new_zeros(batch, options.seq_len, *sizes)
    for run in runs_of(layout, dx, options.seq_len):
        windows = max(0, (run.num_keys - options.kernel_size) // options.kernel_stride + 1)
        alone = options._replace(seq_len=run.num_keys)
        dx[run.batch, run.keys] = portable.mean_compress_backward(grad_out[run.batch, :windows], alone, Layout())
    return dx


impl("mean_compress", mean_compress, "CPU")
impl("mean_compress_backward", mean_compress_backward, "CPU")
