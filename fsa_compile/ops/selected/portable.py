"""Selected attention in plain PyTorch, for any device: correct whatever the tensors hold, and not fast."""

from __future__ import annotations

from torch import Tensor

from ..attend import attend, attend_backward
from ..options import Layout, Selected
from ..visibility import selected_visibility

__all__ = ["selected_attention_backward", "selected_attention_forward"]


def selected_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, options: Selected, layout: Layout
) -> tuple[Tensor, Tensor, Tensor]:
    """`(out, shift, log_sum)`."""
    visibility = selected_visibility(q, k.shape[1], block_indices, options.block_size, layout)
    return attend(q, k, v, visibility, options.scale)


def selected_attention_backward(
    grad_out: Tensor | None, grad_log_sum: Tensor | None, q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor,
    out: Tensor, shift: Tensor, log_sum: Tensor, options: Selected, layout: Layout,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k and v."""
    visibility = selected_visibility(q, k.shape[1], block_indices, options.block_size, layout)
    return attend_backward(grad_out, grad_log_sum, q, k, v, out, shift, log_sum, visibility, options.scale)
