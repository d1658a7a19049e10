"""`nsa_attention` out of its stages, and the attention stages out of their forwards.

They are CompositeImplicitAutograd, as ATen's scaled_dot_product_attention is: the dispatcher replaces the call by
operators whose backwards exist, and by plain pointwise operators for the gates and the log-sum-exp, which a compiler
can fuse into their neighbours or leave out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import schema
from .arguments import Size

fsa = torch.ops.fsa


class _Attended(NamedTuple):
    """What a forward returns; `scale` is the one that its `shift` is meant with."""

    out: Tensor
    shift: Tensor
    log_sum: Tensor
    scale: float

    @classmethod
    def by(cls, forward: Any, q: Tensor, *inputs: Tensor, scale: float | None, **options: Any) -> _Attended:
        """Call a forward, which wants a positive scale: with any other, the maximum of `q @ k` is not the logits'."""
        if scale is not None and scale <= 0:
            q, scale = (q * 0, 1.0) if scale == 0 else (-q, -scale)
        out, shift, log_sum = forward(q, *inputs, scale=scale, **options)
        return cls(out, shift, log_sum, q.shape[3] ** -0.5 if scale is None else scale)

    @property
    def lse(self) -> Tensor:
        """The log-sum-exp. Without a visible key log_sum is -inf, and shift finite."""
        return torch.add(self.log_sum, self.shift, alpha=self.scale)


def selected_attention(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, *, block_size: int = 64, scale: float | None = None,
    cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None, max_seqlen_q: Size | None = None,
    max_seqlen_k: Size | None = None, loop_order: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    attended = _Attended.by(
        fsa.selected_attention_forward.default, q, k, v, block_indices, block_size=block_size, scale=scale,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
        loop_order=loop_order,
    )  # fmt: skip
    return attended.out, attended.lse


def compressed_attention(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, *, kernel_size: int = 32, kernel_stride: int = 16, seq_len_k: Size | None
    = None, scale: float | None = None, cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: Size | None = None, max_seqlen_k: Size | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    attended = _Attended.by(
        fsa.compressed_attention_forward.default, q, k_cmp, v_cmp, kernel_size=kernel_size, kernel_stride=kernel_stride,
        seq_len_k=seq_len_k, scale=scale, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
    )  # fmt: skip
    return attended.out, attended.lse


def sliding_window_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window_size: int, scale: float | None = None, cu_seqlens_q: Tensor | None =
    None, cu_seqlens_k: Tensor | None = None, max_seqlen_q: Size | None = None, max_seqlen_k: Size | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    attended = _Attended.by(
        fsa.sliding_window_attention_forward.default, q, k, v, window_size=window_size, scale=scale,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
    )  # fmt: skip
    return attended.out, attended.lse


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
    selected_forward, sliding_forward = fsa.selected_attention_forward, fsa.sliding_window_attention_forward
    blocks: dict[str, Any] = {"block_size": block_size, "loop_order": loop_order}
    o_slc = _Attended.by(selected_forward.default, q, k, v, block_indices, **blocks, **packed).out
    if g_cmp is None and g_slc is None and (g_swa is None or window_size == 0):
        return o_slc
    # The sum of the branches is rounded once, to the dtype of the result.
    total = _gated(g_slc, o_slc)
    if o_cmp is not None:
        total = total + _gated(g_cmp, o_cmp)
    if g_swa is not None and window_size > 0:
        o_swa = _Attended.by(sliding_forward.default, q, k, v, window_size=window_size, **packed).out
        total = total + _gated(g_swa, o_swa)
    return total.to(q.dtype)


def _gated(gate: Tensor | None, out: Tensor) -> Tensor:
    out = out.to(torch.float32)
    return out if gate is None else gate.to(torch.float32).unsqueeze(-1) * out


for _fn in (nsa_attention, selected_attention, compressed_attention, sliding_window_attention):
    schema.impl(_fn.__name__, _fn, "CompositeImplicitAutograd")
