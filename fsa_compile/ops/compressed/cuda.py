"""Compressed attention on a GPU."""

from __future__ import annotations

from torch import Tensor

from .. import banded
from ..options import Compressed, Layout
from ..rules import Rule, register


def _band(options: Compressed) -> banded.Band:
    """A compressed token is seen when its whole window is in the past."""
    return banded.Band(options.seq_len_k, options.kernel_stride, options.kernel_size - 1, 0, options.scale)


def compressed_attention_forward(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, options: Compressed, layout: Layout
) -> tuple[Tensor, Tensor, Tensor]:
    """`fsa::compressed_attention_forward`."""
    return banded.forward(q, k_cmp, v_cmp, _band(options), layout)


def compressed_attention_backward(
    grad_out: Tensor | None, grad_log_sum: Tensor | None, q: Tensor, k_cmp: Tensor, v_cmp: Tensor, out: Tensor,
    shift: Tensor, log_sum: Tensor, options: Compressed, layout: Layout,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`fsa::compressed_attention_backward`."""
    inputs, results = (q, k_cmp, v_cmp), (out, shift, log_sum)
    return banded.backward((grad_out, grad_log_sum), inputs, results, _band(options), layout)


register(
    Rule("compressed_attention_forward", compressed_attention_forward),
    Rule("compressed_attention_backward", compressed_attention_backward),
)
