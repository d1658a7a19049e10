"""Sliding-window attention on a GPU."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import banded
from ..rules import Rule, Runs, register


def _band(k: Tensor, window_size: int, scale: float) -> dict[str, Any]:
    return {"seq_len_k": k.shape[1], "key_stride": 1, "first_end": 0, "window": window_size, "scale": scale}


def forward(
    order: None, q: Tensor, k: Tensor, v: Tensor, *, runs: Runs, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """`fsa::sliding_window_attention_forward`."""
    return banded.forward(q, k, v, runs, **_band(k, **options))


def backward(
    order: None, grad_out: Tensor | None, grad_log_sum: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
    shift: Tensor, log_sum: Tensor, *, runs: Runs, **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`fsa::sliding_window_attention_backward`."""
    return banded.backward(grad_out, grad_log_sum, (q, k, v), (out, shift, log_sum), runs, **_band(k, **options))


register(Rule("sliding_window_attention_forward", forward), Rule("sliding_window_attention_backward", backward))
