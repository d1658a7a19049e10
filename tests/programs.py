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


def whole(order: str, **options: Any) -> Callable[..., Any]:
    """All of NSA forward, and the backwards of the stages that have no loop order."""

    def fn(q, k, v, g_cmp, g_slc, g_swa, grad, *cu_seqlens):
        fsa = torch.ops.fsa
        packed = dict(zip(("cu_seqlens_q", "cu_seqlens_k"), cu_seqlens, strict=False))
        gates = (g_cmp.sigmoid(), g_slc.sigmoid(), g_swa.sigmoid())
        out = fsa.nsa_attention(q, k, v, *gates, loop_order=order, **packed, **options)
        windows = {name: options[name] for name in ("kernel_size", "kernel_stride")}
        lies = cu_seqlens[-1] if cu_seqlens else None
        k_cmp, v_cmp = (fsa.mean_compress(x, cu_seqlens=lies, **windows) for x in (k, v))
        compressed = {**windows, **packed, "seq_len_k": k.shape[1]}
        results = fsa.compressed_attention_forward(q, k_cmp, v_cmp, **compressed)
        dq, dk_cmp, dv_cmp = fsa.compressed_attention_backward(grad, None, q, k_cmp, v_cmp, *results, **compressed)
        dk, dv = (
            fsa.mean_compress_backward(x, seq_len=k.shape[1], cu_seqlens=lies, **windows) for x in (dk_cmp, dv_cmp)
        )
        sliding = {"window_size": options["window_size"], **packed}
        results = fsa.sliding_window_attention_forward(q, k, v, **sliding)
        return out, dq, dk, dv, *fsa.sliding_window_attention_backward(grad, None, q, k, v, *results, **sliding)

    return fn
