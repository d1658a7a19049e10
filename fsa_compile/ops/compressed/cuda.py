"""Compressed attention on a GPU."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import banded
from ..rules import Rule, Runs, register


def _band(q: Tensor, kernel_size: int, kernel_stride: int, seq_len_k: Any, scale: float) -> dict[str, Any]:
    """A compressed token is seen when its whole window is in the past."""
    length = q.shape[1] if seq_len_k is None else seq_len_k
    return {"seq_len_k": length, "key_stride": kernel_stride, "first_end": kernel_size - 1, "window": 0, "scale": scale}


def forward(
    order: None, q: Tensor, k_cmp: Tensor, v_cmp: Tensor, *, runs: Runs, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """`fsa::compressed_attention_forward`."""
    return banded.forward(q, k_cmp, v_cmp, runs, **_band(q, **options))


def backward(
    order: None, grad_out: Tensor | None, grad_log_sum: Tensor | None, q: Tensor, k_cmp: Tensor, v_cmp: Tensor,
    out: Tensor, shift: Tensor, log_sum: Tensor, *, runs: Runs, **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`fsa::compressed_attention_backward`."""
    inputs, results = (q, k_cmp, v_cmp), (out, shift, log_sum)
    return banded.backward(grad_out, grad_log_sum, inputs, results, runs, **_band(q, **options))


register(Rule("compressed_attention_forward", forward), Rule("compressed_attention_backward", backward))
