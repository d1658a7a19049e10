"""Selected attention on a GPU: each loop order as a sequence of internal operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import cost
from ..problem import device_of, problem_of
from ..rules import Rule, Runs, register
from . import block_lists as _block_lists  # noqa: F401  registers the operator

_ops = torch.ops.fsa

_SHARED = (
    "q", "k", "v", "block_indices", "cu_seqlens_q", "cu_seqlens_k", "seqused_k", "leftpad_k", "block_size", "scale",
    "loop_order",
)  # fmt: skip


def _query_outer(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, *, runs: Runs, block_size: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _ops._selected_fwd_query_outer(q, k, v, block_indices, *runs, block_size=block_size, scale=scale)


def _kv_outer(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, *, runs: Runs, block_size: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    sizes = {"block_size": block_size, "scale": scale}
    lists = _ops._block_lists(block_indices, *runs, seq_len_k=k.shape[1], block_size=block_size)
    partials = _ops._selected_fwd_kv_outer(q, k, v, block_indices, *lists, *runs, **sizes)
    return _ops._merge_partials(*partials, block_indices, *runs, seq_len_k=k.shape[1], **sizes)


def _backward(
    with_partials: bool, grad_out: Tensor | None, grad_log_sum: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    block_indices: Tensor, out: Tensor, shift: Tensor, log_sum: Tensor, *, runs: Runs, block_size: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dk and dv from key blocks outside; dq as partials of that pass, or from a pass over the queries."""
    sizes = {"block_size": block_size, "scale": scale}
    blocks = {"seq_len_k": k.shape[1], "block_size": block_size}
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    delta = _ops._attention_delta(grad_out, grad_log_sum, out)
    args = (grad_out, q, k, v, block_indices, shift, log_sum, delta)
    lists = _ops._block_lists(block_indices, *runs, **blocks)
    dk_tiles, dv_tiles, dq_partial = _ops._selected_bwd_kv_outer(*args, *lists, *runs, **sizes, with_dq=with_partials)
    if with_partials:
        dq = _ops._sum_partials(dq_partial, block_indices, *runs, **blocks)
    else:
        dq = _ops._selected_bwd_query_outer(*args, *runs, **sizes)
    dk = _ops._reduce_tiles(dk_tiles, lists[2], k, *runs, block_size=block_size)
    dv = _ops._reduce_tiles(dv_tiles, lists[2], v, *runs, block_size=block_size)
    return dq, dk, dv


_FORWARD: dict[str, Callable[..., Any]] = {"nsa": _query_outer, "fsa": _kv_outer}
_WITH_PARTIALS = {"nsa": False, "fsa": True}


def forward(order: str, *args: Tensor, **call: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`fsa::selected_attention_forward` in a loop order."""
    return _FORWARD[order](*args, **call)


def backward(order: str, *args: Any, **call: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`fsa::selected_attention_backward` in a loop order."""
    return _backward(_WITH_PARTIALS[order], *args, **call)


def choose(arguments: dict[str, Any], *, training: bool = False, backward: bool = False) -> cost.Choice:
    """The cost model's order for one call."""
    q, k, v, block_indices = (arguments[name] for name in ("q", "k", "v", "block_indices"))
    problem = problem_of(q, k, v, block_indices, arguments["block_size"])
    return cost.choose(problem, device_of(q), arguments["loop_order"], training=training, backward=backward)


register(
    Rule("selected_attention_forward", forward, choose, _SHARED),
    Rule("selected_attention_backward", backward, choose, _SHARED),
)
