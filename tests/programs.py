"""Programs whose emitted code the tests look at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def gated(order: str, **options: Any) -> Callable[..., Any]:
    """Selected attention and the sum of the branches, as nsa_attention composes them."""

    def fn(q, k, v, block_indices, o_cmp, o_swa, g_cmp, g_slc, g_swa, *cu_seqlens):
        packed = dict(zip(("cu_seqlens_q", "cu_seqlens_k"), cu_seqlens, strict=False))
        args = (q, k, v, block_indices)
        out, shift, log_sum = torch.ops.fsa.selected_attention_forward(*args, loop_order=order, **packed, **options)
        sum_ = g_cmp.sigmoid().unsqueeze(-1) * o_cmp + g_slc.sigmoid().unsqueeze(-1) * out
        return (sum_ + g_swa.sigmoid().unsqueeze(-1) * o_swa).to(q.dtype), shift, log_sum

    return fn


def backward(order: str, **options: Any) -> Callable[..., Any]:
    """The backward with a gate before it."""

    def fn(q, k, v, block_indices, out, shift, log_sum, grad, grad_log_sum, gate, *cu_seqlens):
        packed = dict(zip(("cu_seqlens_q", "cu_seqlens_k"), cu_seqlens, strict=False))
        grad = grad * gate.unsqueeze(-1)
        results = (out, shift, log_sum)
        return torch.ops.fsa.selected_attention_backward(
            grad, grad_log_sum, q, k, v, block_indices, *results, loop_order=order, **packed, **options
        )

    return fn
