"""The selected branch on CUDA: each loop order as a sequence of internal operators.

The eager operators run these sequences; the lowering traces the same ones into the graph, so there is one definition
of an order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import cost
from . import kernels as _kernels  # noqa: F401  registers the internal operators
from .block_lists import Seqs
from .problem import device_of, problem_of
from .schema import impl

_ops = torch.ops.fsa


def _runs(seqs: Seqs) -> Seqs:
    """Packed keys lie as the queries do unless it is said otherwise."""
    cu_seqlens_q, cu_seqlens_k, *padding = seqs
    return (cu_seqlens_q, cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k, *padding)  # type: ignore[return-value]


def forward(
    order: str, q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, seqs: Seqs, *, block_size: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`fsa::selected_attention_forward` in loop order "fsa" or "nsa"."""
    seqs = _runs(seqs)
    sizes = {"block_size": block_size, "scale": scale}
    if order == "nsa":
        return _ops._selected_fwd_query_outer(q, k, v, block_indices, *seqs, **sizes)
    lists = _ops._block_lists(block_indices, *seqs, seq_len_k=k.shape[1], block_size=block_size)
    partials = _ops._selected_fwd_kv_outer(q, k, v, block_indices, *lists, *seqs, **sizes)
    return _ops._merge_partials(*partials, block_indices, *seqs, seq_len_k=k.shape[1], **sizes)


def backward(
    order: str, grad_out: Tensor | None, grad_log_sum: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    block_indices: Tensor, out: Tensor, shift: Tensor, log_sum: Tensor, seqs: Seqs, *, block_size: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`fsa::selected_attention_backward` in loop order "fsa" or "nsa"."""
    seqs = _runs(seqs)
    sizes = {"block_size": block_size, "scale": scale}
    blocks = {"seq_len_k": k.shape[1], "block_size": block_size}
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    delta = _ops._attention_delta(grad_out, grad_log_sum, out)
    args = (grad_out, q, k, v, block_indices, shift, log_sum, delta)
    lists = _ops._block_lists(block_indices, *seqs, **blocks)
    dk_tiles, dv_tiles, dq_partial = _ops._selected_bwd_kv_outer(*args, *lists, *seqs, **sizes, with_dq=order == "fsa")
    if order == "fsa":
        dq = _ops._sum_partials(dq_partial, block_indices, *seqs, **blocks)
    else:
        dq = _ops._selected_bwd_query_outer(*args, *seqs, **sizes)
    dk = _ops._reduce_tiles(dk_tiles, lists[2], k, *seqs, block_size=block_size)
    dv = _ops._reduce_tiles(dv_tiles, lists[2], v, *seqs, block_size=block_size)
    return dq, dk, dv


def selected_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, *, block_size: int = 64, scale: float | None = None,
    cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None, max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None, loop_order: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    problem = problem_of(q, k, v, block_indices.shape[3], block_size)
    order = cost.choose(problem, device_of(q), loop_order).order
    scale = q.shape[3] ** -0.5 if scale is None else scale
    seqs = (cu_seqlens_q, cu_seqlens_k, None, None)
    return forward(order, q, k, v, block_indices, seqs, block_size=block_size, scale=scale)


def selected_attention_backward(
    grad_out: Tensor | None, grad_log_sum: Tensor | None, q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, out:
    Tensor, shift: Tensor, log_sum: Tensor, *, block_size: int = 64, scale: float | None = None, cu_seqlens_q: Tensor
    | None = None, cu_seqlens_k: Tensor | None = None, max_seqlen_q: int | None = None, max_seqlen_k: int | None =
    None, loop_order: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    problem = problem_of(q, k, v, block_indices.shape[3], block_size)
    order = cost.choose(problem, device_of(q), loop_order, backward=True).order
    scale = q.shape[3] ** -0.5 if scale is None else scale
    seqs = (cu_seqlens_q, cu_seqlens_k, None, None)
    return backward(
        order, grad_out, grad_log_sum, q, k, v, block_indices, out, shift, log_sum, seqs, block_size=block_size,
        scale=scale,
    )  # fmt: skip


impl("selected_attention_forward", selected_attention_forward, "CUDA")
impl("selected_attention_backward", selected_attention_backward, "CUDA")
