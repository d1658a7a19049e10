"""The selected branch on CUDA: each loop order as a sequence of internal operators.

The eager operators run these sequences; the lowering traces the same ones into the graph, so there is one definition
of an order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import cost
from . import loop_order as _loop_order  # noqa: F401  registers the internal operators
from . import loop_order_backward as _loop_order_backward  # noqa: F401
from .problem import device_of, problem_of
from .schema import impl

_ops = torch.ops.fsa


class PackedTables(NamedTuple):
    """Where packed sequences and their blocks lie (see `fsa::_packed_tables`); all None when batched."""

    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    seq_ids: Tensor | None
    block_base: Tensor | None
    block_seq_ids: Tensor | None

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, block_size: int
    ) -> PackedTables:
        """Build the tables, on the device and without waiting for it."""
        if cu_seqlens_q is None:
            return cls(None, None, None, None, None)
        cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        tables = _ops._packed_tables(
            cu_seqlens_q, cu_seqlens_k, total_q=q.shape[1], total_k=k.shape[1], block_size=block_size
        )
        return cls(cu_seqlens_q, cu_seqlens_k, *tables)

    @property
    def queries(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """What the kernels that walk queries take."""
        return self[:3]


def forward(
    order: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`fsa::selected_attention_forward` in loop order "fsa" or "nsa"."""
    tables = PackedTables.of(q, k, cu_seqlens_q, cu_seqlens_k, block_size)
    if order == "nsa":
        return _ops._selected_fwd_query_outer(
            q, k, v, block_indices, *tables.queries, block_size=block_size, scale=scale
        )
    lists = _ops._block_lists(block_indices, *tables, seq_len_k=k.shape[1], block_size=block_size)
    partials = _ops._selected_fwd_kv_outer(
        q, k, v, block_indices, *lists, *tables.queries, block_size=block_size, scale=scale
    )
    lengths = {"seq_len_k": k.shape[1], "block_size": block_size}
    return _ops._merge_partials(*partials, block_indices, *tables.queries, **lengths, scale=scale)


def backward(
    order: str,
    grad_out: Tensor | None,
    grad_log_sum: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    out: Tensor,
    shift: Tensor,
    log_sum: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`fsa::selected_attention_backward` in loop order "fsa" or "nsa"."""
    tables = PackedTables.of(q, k, cu_seqlens_q, cu_seqlens_k, block_size)
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    delta = _ops._attention_delta(grad_out, grad_log_sum, out)
    args = (grad_out, q, k, v, block_indices, shift, log_sum, delta)
    lists = _ops._block_lists(block_indices, *tables, seq_len_k=k.shape[1], block_size=block_size)
    dk_tiles, dv_tiles, dq_partial = _ops._selected_bwd_kv_outer(
        *args, *lists, *tables.queries, block_size=block_size, scale=scale, with_dq=order == "fsa"
    )
    if order == "fsa":
        dq = _ops._sum_partials(dq_partial, block_indices, *tables.queries, seq_len_k=k.shape[1], block_size=block_size)
    else:
        dq = _ops._selected_bwd_query_outer(*args, *tables.queries, block_size=block_size, scale=scale)
    blocks = (tables.cu_seqlens_k, tables.block_base, tables.block_seq_ids)
    dk = _ops._reduce_tiles(dk_tiles, lists[2], k, *blocks, block_size=block_size)
    dv = _ops._reduce_tiles(dv_tiles, lists[2], v, *blocks, block_size=block_size)
    return dq, dk, dv


def selected_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    *,
    block_size: int = 64,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    loop_order: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    problem = problem_of(q, k, v, block_indices.shape[3], block_size)
    order = cost.choose(problem, device_of(q), loop_order).order
    scale = q.shape[3] ** -0.5 if scale is None else scale
    return forward(order, q, k, v, block_indices, cu_seqlens_q, cu_seqlens_k, block_size, scale)


def selected_attention_backward(
    grad_out: Tensor | None,
    grad_log_sum: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    out: Tensor,
    shift: Tensor,
    log_sum: Tensor,
    *,
    block_size: int = 64,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    loop_order: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    problem = problem_of(q, k, v, block_indices.shape[3], block_size)
    order = cost.choose(problem, device_of(q), loop_order, backward=True).order
    scale = q.shape[3] ** -0.5 if scale is None else scale
    return backward(
        order, grad_out, grad_log_sum, q, k, v, block_indices, out, shift, log_sum, cu_seqlens_q, cu_seqlens_k,
        block_size, scale,
    )  # fmt: skip


impl("selected_attention_forward", selected_attention_forward, "CUDA")
impl("selected_attention_backward", selected_attention_backward, "CUDA")
