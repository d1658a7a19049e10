"""Sliding-window attention on a GPU."""

from __future__ import annotations

from torch import Tensor

from .. import banded
from ..options import Layout, Sliding
from ..rules import Rule, register


def _band(k: Tensor, options: Sliding) -> banded.Band:
    return banded.Band(k.shape[1], 1, 0, options.window_size, options.scale)


def sliding_window_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, options: Sliding, layout: Layout
) -> tuple[Tensor, Tensor, Tensor]:
    """`fsa::sliding_window_attention_forward`."""
    return banded.forward(q, k, v, _band(k, options), layout)


def sliding_window_attention_backward(
    grad_out: Tensor | None, grad_log_sum: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, shift: Tensor,
    log_sum: Tensor, options: Sliding, layout: Layout,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`fsa::sliding_window_attention_backward`."""
    results = (out, shift, log_sum)
    return banded.backward((grad_out, grad_log_sum), (q, k, v), results, _band(k, options), layout)


register(
    Rule("sliding_window_attention_forward", sliding_window_attention_forward),
    Rule("sliding_window_attention_backward", sliding_window_attention_backward),
)
