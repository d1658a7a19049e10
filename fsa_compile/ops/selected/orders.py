"""Selected attention on a GPU: each loop order as a sequence of internal operators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...tiling import union_tokens
from ..options import Layout, Selected
from ..rules import Rule, Runs, kernel_runs, register
from . import block_lists as _block_lists  # noqa: F401  registers the operator
from .choice import choose

_ops = torch.ops.fsa

_SHARED = (
    "q", "k", "v", "block_indices", "cu_seqlens_q", "cu_seqlens_k", "seqused_k", "leftpad_k", "block_size", "scale",
    "loop_order",
)  # fmt: skip


def _sizes(options: Selected) -> dict[str, Any]:
    return {"block_size": options.block_size, "scale": options.scale}


def _order(q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, options: Selected, *, backward: bool) -> str:
    if options.loop_order != "auto":
        return options.loop_order
    tensors = {"q": q, "k": k, "v": v, "block_indices": block_indices}
    return choose(tensors | options._asdict(), backward=backward).order


def _query_outer_forward(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, runs: Runs, sizes: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    return _ops._selected_fwd_query_outer(q, k, v, block_indices, *runs, **sizes)


def _kv_outer_forward(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, runs: Runs, sizes: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    lists = _ops._block_lists(block_indices, *runs, seq_len_k=k.shape[1], block_size=sizes["block_size"])
    partials = _ops._selected_fwd_kv_outer(q, k, v, block_indices, *lists, *runs, **sizes)
    return _ops._merge_partials(*partials, block_indices, *runs, seq_len_k=k.shape[1], **sizes)


def _unions(q: Tensor, k: Tensor, block_indices: Tensor, runs: Runs, block_size: int) -> tuple[Any, dict[str, int]]:
    """The unions of query tiles, and their size."""
    tokens = union_tokens(q.shape[2] // k.shape[2], block_indices.shape[3], q.dtype.itemsize)
    tile = {"block_size": block_size, "tokens": tokens}
    return _ops._tile_unions(block_indices, *runs, seq_len_k=k.shape[1], **tile), tile


def _tile_forward(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, runs: Runs, sizes: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    unions, tile = _unions(q, k, block_indices, runs, sizes["block_size"])
    return _ops._selected_fwd_union(q, k, v, *unions, *runs, **tile, scale=sizes["scale"])


def _query_outer_dq(known: tuple[Tensor, ...], runs: Runs, sizes: dict[str, Any]) -> Tensor:
    return _ops._selected_bwd_query_outer(*known, *runs, **sizes)


def _tile_dq(known: tuple[Tensor, ...], runs: Runs, sizes: dict[str, Any]) -> Tensor:
    grad_out, q, k, v, block_indices, *statistics = known
    unions, tile = _unions(q, k, block_indices, runs, sizes["block_size"])
    return _ops._selected_bwd_union(grad_out, q, k, v, *statistics, *unions, *runs, **tile, scale=sizes["scale"])


def _backward(
    known: tuple[Tensor, ...], runs: Runs, sizes: dict[str, Any], *, dq_by: Callable[..., Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """dk and dv from key blocks outside; dq by itself, or (None) as partials of that pass."""
    _, _, k, v, block_indices, *_ = known
    blocks = {"seq_len_k": k.shape[1], "block_size": sizes["block_size"]}
    lists = _ops._block_lists(block_indices, *runs, **blocks)
    dk_tiles, dv_tiles, dq = _ops._selected_bwd_kv_outer(*known, *lists, *runs, **sizes, with_dq=dq_by is None)
    dq = _ops._sum_partials(dq, block_indices, *runs, **blocks) if dq_by is None else dq_by(known, runs, sizes)
    dk = _ops._reduce_tiles(dk_tiles, lists[2], k, *runs, block_size=sizes["block_size"])
    dv = _ops._reduce_tiles(dv_tiles, lists[2], v, *runs, block_size=sizes["block_size"])
    return dq, dk, dv


@dataclass(frozen=True)
class Order:
    """How a loop order runs.

    forward: ``(q, k, v, block_indices, runs, sizes)`` to ``(out, shift, log_sum)``.
    backward: ``((grad_out, q, k, v, block_indices, shift, log_sum, delta), runs, sizes)`` to ``(dq, dk, dv)``.
    """

    forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


ORDERS = {
    "nsa": Order(_query_outer_forward, partial(_backward, dq_by=_query_outer_dq)),
    "fsa": Order(_kv_outer_forward, partial(_backward, dq_by=None)),
    "tile": Order(_tile_forward, partial(_backward, dq_by=_tile_dq)),
}


def selected_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, options: Selected, layout: Layout
) -> tuple[Tensor, Tensor, Tensor]:
    """`fsa::selected_attention_forward`."""
    order = ORDERS[_order(q, k, v, block_indices, options, backward=False)]
    return order.forward(q, k, v, block_indices, kernel_runs(layout), _sizes(options))


def selected_attention_backward(
    grad_out: Tensor | None, grad_log_sum: Tensor | None, q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor,
    out: Tensor, shift: Tensor, log_sum: Tensor, options: Selected, layout: Layout,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`fsa::selected_attention_backward`."""
    order = ORDERS[_order(q, k, v, block_indices, options, backward=True)]
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    delta = _ops._attention_delta(grad_out, grad_log_sum, out)
    known = (grad_out, q, k, v, block_indices, shift, log_sum, delta)
    return order.backward(known, kernel_runs(layout), _sizes(options))


register(
    Rule("selected_attention_forward", selected_attention_forward, choose, _SHARED),
    Rule("selected_attention_backward", selected_attention_backward, choose, _SHARED),
)
