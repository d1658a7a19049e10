"""Sliding-window attention in plain PyTorch, for any device."""

from __future__ import annotations

from torch import Tensor

from ..attend import attend, attend_backward
from ..options import Layout, Sliding
from ..visibility import sliding_visibility

__all__ = ["sliding_window_attention_backward", "sliding_window_attention_forward"]


def sliding_window_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, options: Sliding, layout: Layout
) -> tuple[Tensor, Tensor, Tensor]:
    """`(out, shift, log_sum)`."""
    return attend(q, k, v, sliding_visibility(q, k.shape[1], options.window_size, layout), options.scale)


def sliding_window_attention_backward(
    grad_out: Tensor | None, grad_log_sum: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, shift: Tensor,
    log_sum: Tensor, options: Sliding, layout: Layout,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k and v."""
    visibility = sliding_visibility(q, k.shape[1], options.window_size, layout)
    return attend_backward(grad_out, grad_log_sum, q, k, v, out, shift, log_sum, visibility, options.scale)
