"""Mean compression on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ..options import Compression, CompressionBackward, Layout
from ..rules import Rule, register

_ops = torch.ops.fsa


def mean_compress(x: Tensor, options: Compression, layout: Layout) -> Tensor:
    """`fsa::mean_compress`."""
    return _ops._mean_compress_fwd(
        x, layout.cu_seqlens_k, layout.seqused_k, layout.leftpad_k, **options._asdict()
    )  # fmt: skip


def mean_compress_backward(grad_out: Tensor, options: CompressionBackward, layout: Layout) -> Tensor:
    """`fsa::mean_compress_backward`."""
    return _ops._mean_compress_bwd(
        grad_out, layout.cu_seqlens_k, layout.seqused_k, layout.leftpad_k, **options._asdict()
    )  # fmt: skip


register(Rule("mean_compress", mean_compress), Rule("mean_compress_backward", mean_compress_backward))
