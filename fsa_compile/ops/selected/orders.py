"""Selected attention on a GPU: each loop order as a sequence of internal operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import cost
from ..options import Layout, Selected
from ..problem import device_of, problem_of
from ..rules import Rule, Runs, kernel_runs, register
from . import block_lists as _block_lists  # noqa: F401  registers the operator

_ops = torch.ops.fsa

_SHARED = (
    "q", "k", "v", "block_indices", "cu_seqlens_q", "cu_seqlens_k", "seqused_k", "leftpad_k", "block_size", "scale",
    "loop_order",
)  # fmt: skip


def _query_outer(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, runs: Runs, sizes: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    return _ops._selected_fwd_query_outer(q, k, v, block_indices, *runs, **sizes)


def _kv_outer(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, runs: Runs, sizes: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    lists = _ops._block_lists(block_indices, *runs, seq_len_k=k.shape[1], block_size=sizes["block_size"])
    partials = _ops._selected_fwd_kv_outer(q, k, v, block_indices, *lists, *runs, **sizes)
    return _ops._merge_partials(*partials, block_indices, *runs, seq_len_k=k.shape[1], **sizes)


# How each order runs a forward, and whether its dq comes as partials of the pass that makes dk and dv.
_FORWARD: dict[str, Callable[..., Any]] = {"nsa": _query_outer, "fsa": _kv_outer}
_WITH_PARTIALS = {"nsa": False, "fsa": True}


def _sizes(options: Selected) -> dict[str, Any]:
    return {"block_size": options.block_size, "scale": options.scale}


def choose(arguments: dict[str, Any], *, training: bool = False, backward: bool = False) -> cost.Choice:
    """The cost model's order for one call."""
    q, k, v, block_indices = (arguments[name] for name in ("q", "k", "v", "block_indices"))
    problem = problem_of(q, k, v, block_indices, arguments["block_size"])
    return cost.choose(problem, device_of(q), arguments["loop_order"], training=training, backward=backward)


def _order(q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, options: Selected, *, backward: bool) -> str:
    if options.loop_order != "auto":
        return options.loop_order
    tensors = {"q": q, "k": k, "v": v, "block_indices": block_indices}
    return choose(tensors | options._asdict(), backward=backward).order


def selected_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, options: Selected, layout: Layout
) -> tuple[Tensor, Tensor, Tensor]:
    """`fsa::selected_attention_forward`."""
    order = _order(q, k, v, block_indices, options, backward=False)
    return _FORWARD[order](q, k, v, block_indices, kernel_runs(layout), _sizes(options))


def selected_attention_backward(
    grad_out: Tensor | None, grad_log_sum: Tensor | None, q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor,
    out: Tensor, shift: Tensor, log_sum: Tensor, options: Selected, layout: Layout,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`fsa::selected_attention_backward`: dk and dv from key blocks outside, dq as the order has it."""
    with_partials = _WITH_PARTIALS[_order(q, k, v, block_indices, options, backward=True)]
    runs, sizes = kernel_runs(layout), _sizes(options)
    blocks = {"seq_len_k": k.shape[1], "block_size": options.block_size}
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
    dk = _ops._reduce_tiles(dk_tiles, lists[2], k, *runs, block_size=options.block_size)
    dv = _ops._reduce_tiles(dv_tiles, lists[2], v, *runs, block_size=options.block_size)
    return dq, dk, dv


register(
    Rule("selected_attention_forward", selected_attention_forward, choose, _SHARED),
    Rule("selected_attention_backward", selected_attention_backward, choose, _SHARED),
)
