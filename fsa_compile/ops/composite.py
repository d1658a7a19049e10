"""`nsa_attention` out of its stages.

It is CompositeImplicitAutograd, as ATen's scaled_dot_product_attention is: the dispatcher replaces the call by the
stage operators, whose backwards exist, and by plain pointwise operators for the gates, which a compiler can fuse into
the stages.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import schema
from .arguments import Size


def nsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_cmp: Tensor | None = None,
    g_slc: Tensor | None = None,
    g_swa: Tensor | None = None,
    *,
    k_cmp: Tensor | None = None,
    v_cmp: Tensor | None = None,
    block_indices: Tensor | None = None,
    block_size: int = 64,
    num_selected: int = 16,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    init_blocks: int = 1,
    local_blocks: int = 2,
    window_size: int = 512,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: Size | None = None,
    max_seqlen_k: Size | None = None,
    loop_order: str = "auto",
) -> Tensor:
    fsa = torch.ops.fsa
    packed: dict[str, Any] = {"scale": scale, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    packed |= {"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k}
    windows: dict[str, Any] = {"kernel_size": kernel_size, "kernel_stride": kernel_stride}
    cu_seqlens = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    compressed: dict[str, Any] = {**windows, **packed, "seq_len_k": k.shape[1]}

    o_cmp = lse = None
    if g_cmp is not None:
        if k_cmp is None:
            k_cmp = fsa.mean_compress.default(k, cu_seqlens=cu_seqlens, **windows)
        if v_cmp is None:
            v_cmp = fsa.mean_compress.default(v, cu_seqlens=cu_seqlens, **windows)
        o_cmp, lse = fsa.compressed_attention.default(q, k_cmp, v_cmp, **compressed)
    if block_indices is None:
        with torch.no_grad():
            q_, k_ = q.detach(), (k if k_cmp is None else k_cmp).detach()
            if k_cmp is None:
                k_ = fsa.mean_compress.default(k_, cu_seqlens=cu_seqlens, **windows)
            if lse is None:
                # Only the log-sum-exp is wanted: one column of anything will do for the values.
                _, lse = fsa.compressed_attention.default(q_, k_, k_[..., :1], **compressed)
            block_indices = fsa.select_blocks.default(
                q_,
                k_,
                lse.detach(),
                block_size=block_size,
                num_selected=num_selected,
                init_blocks=init_blocks,
                local_blocks=local_blocks,
                **compressed,
            )
    o_slc, _ = fsa.selected_attention.default(
        q, k, v, block_indices, block_size=block_size, loop_order=loop_order, **packed
    )
    if g_cmp is None and g_slc is None and (g_swa is None or window_size == 0):
        return o_slc
    # The sum of the branches is rounded once, to the dtype of the result.
    total = _gated(g_slc, o_slc)
    if o_cmp is not None:
        total = total + _gated(g_cmp, o_cmp)
    if g_swa is not None and window_size > 0:
        o_swa, _ = fsa.sliding_window_attention.default(q, k, v, window_size=window_size, **packed)
        total = total + _gated(g_swa, o_swa)
    return total.to(q.dtype)


def _gated(gate: Tensor | None, out: Tensor) -> Tensor:
    out = out.to(torch.float32)
    return out if gate is None else gate.to(torch.float32).unsqueeze(-1) * out


schema.impl("nsa_attention", nsa_attention, "CompositeImplicitAutograd")
