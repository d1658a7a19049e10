"""Compressed attention in plain PyTorch, for any device."""

from __future__ import annotations

from torch import Tensor

from ..attend import attend, attend_backward
from ..options import Compressed, Layout
from ..visibility import Visibility, compressed_visibility

__all__ = ["compressed_attention_backward", "compressed_attention_forward"]


def _visibility(q: Tensor, k_cmp: Tensor, options: Compressed, layout: Layout) -> Visibility:
    kernel_size, kernel_stride, seq_len_k, _ = options
    return compressed_visibility(q, k_cmp.shape[1], kernel_size, kernel_stride, seq_len_k, layout)


def compressed_attention_forward(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, options: Compressed, layout: Layout
) -> tuple[Tensor, Tensor, Tensor]:
    """`(out, shift, log_sum)`."""
    return attend(q, k_cmp, v_cmp, _visibility(q, k_cmp, options, layout), options.scale)


def compressed_attention_backward(
    grad_out: Tensor | None, grad_log_sum: Tensor | None, q: Tensor, k_cmp: Tensor, v_cmp: Tensor, out: Tensor,
    shift: Tensor, log_sum: Tensor, options: Compressed, layout: Layout,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k_cmp and v_cmp."""
    visibility = _visibility(q, k_cmp, options, layout)
    return attend_backward(
        grad_out, grad_log_sum, q, k_cmp, v_cmp, out, shift, log_sum, visibility, options.scale
    )  # fmt: skip
