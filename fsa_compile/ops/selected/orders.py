"""Selected attention on a GPU: each loop order as a sequence of internal operators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...templates.selected.merge_partials import MERGE_PARTIALS
from ...templates.selected.reduce_tiles import REDUCE_TILES
from ...templates.selected.sum_partials import SUM_PARTIALS
from ...tiling import agreeing, union_tokens
from ..options import Layout, Selected
from ..problem import is_traced
from ..rules import Rule, Runs, kernel_runs, register
from . import block_lists as _block_lists  # noqa: F401  registers the operator
from .choice import choose
from .chunks import Chunk, chunks, dense, joined, results, whole_of

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
    return choose(tensors | options._asdict(), backward=backward, eager=not is_traced(q)).order


def _query_outer_forward(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, runs: Runs, sizes: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    return _ops._selected_fwd_query_outer(q, k, v, block_indices, *runs, **sizes)


def _kv_outer_forward(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, runs: Runs, sizes: dict[str, Any],
    more: tuple[Tensor, ...] = (),
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``more``: out, shift and log_sum of attention to other blocks, of all rows."""

    def part(chunk: Chunk, where: Runs, blocks: Tensor, lists: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        of = {"first_head": chunk.kv_heads.start}
        queries, keys, values = chunk.of_query_heads(q, group), chunk.of_kv_heads(k), chunk.of_kv_heads(v)
        partials = _ops._selected_fwd_kv_outer(queries, keys, values, blocks, *lists, *where, **sizes, **of)
        others = [chunk.of_query_heads(x, group) for x in more] or (None,) * 3
        merged = (*partials, blocks, *others, *where)
        place = partial(chunk.of_query_heads, whole_group=group)
        return results(MERGE_PARTIALS, whole, place, *merged, **blocks_of, scale=sizes["scale"], **of)

    blocks_of = {"seq_len_k": k.shape[1], "block_size": sizes["block_size"]}
    group = q.shape[2] // k.shape[2]
    cuts = chunks(q, k, v.shape[3], block_indices.shape[3])
    rows = tuple(q.shape[:3])
    whole = whole_of(cuts, q, ((*rows, v.shape[3]), q.dtype), (rows, torch.float32), (rows, torch.float32))
    parts = []
    for cut in cuts:
        where, blocks = cut[0][0].of_runs(runs), dense(cut[0][0].of_rows(block_indices), block_indices)
        lists = _ops._block_lists(blocks, *where, **blocks_of)
        parts.append([[part(chunk, where, blocks, lists) for chunk in heads] for heads in cut])
    out, shift, log_sum = joined(parts) if whole is None else whole
    return out, shift, log_sum


def _unions(q: Tensor, k: Tensor, block_indices: Tensor, runs: Runs, block_size: int) -> tuple[Any, dict[str, int]]:
    """The unions of query tiles, and their size."""
    tokens = union_tokens(q.shape[2] // k.shape[2], block_indices.shape[3], q.dtype.itemsize)
    tile = {"block_size": block_size, "tokens": tokens}
    return _ops._tile_unions(block_indices, *runs, seq_len_k=k.shape[1], **tile)[:3], tile


def _mixed_forward(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, runs: Runs, sizes: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Query tiles take the blocks that their tokens agree on; lists have the rest."""
    tokens = union_tokens(q.shape[2] // k.shape[2], block_indices.shape[3], q.dtype.itemsize)
    tile = {"block_size": sizes["block_size"], "tokens": tokens}
    *unions, rest = _ops._tile_unions(block_indices, *runs, seq_len_k=k.shape[1], **tile, least=agreeing(tokens))
    agreed = _ops._selected_fwd_union(q, k, v, *unions, *runs, **tile, scale=sizes["scale"])
    return _kv_outer_forward(q, k, v, rest, runs, sizes, agreed)


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
    known: tuple[Tensor, ...], runs: Runs, sizes: dict[str, Any], *, dq_by: Callable[..., Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """dk and dv from key blocks outside; dq by itself."""
    *tensors, shift, log_sum, delta = known
    _, q, k, v, block_indices = tensors
    lists = _ops._block_lists(block_indices, *runs, seq_len_k=k.shape[1], block_size=sizes["block_size"])
    weights = _ops._row_weights(shift, log_sum, delta, scale=sizes["scale"], compensated=q.dtype == torch.float32)
    *tiles, _ = _ops._selected_bwd_kv_outer(*tensors, weights, *lists, *runs, **sizes, with_dq=False)
    block_size = sizes["block_size"]
    dk, dv = (
        _ops._reduce_tiles(x, None, lists[2], like, *runs, block_size=block_size)
        for x, like in zip(tiles, (k, v), strict=True)
    )
    return dq_by(known, runs, sizes), dk, dv


def _kv_outer_backward(known: tuple[Tensor, ...], runs: Runs, sizes: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """All gradients from key blocks outside, dq as partials of that pass."""
    grad_out, q, k, v, block_indices, shift, log_sum, delta = known
    weights = _ops._row_weights(shift, log_sum, delta, scale=sizes["scale"], compensated=q.dtype == torch.float32)
    blocks_of = {"seq_len_k": k.shape[1], "block_size": sizes["block_size"]}
    group = q.shape[2] // k.shape[2]

    cuts = chunks(q, k, q.shape[3], block_indices.shape[3])
    whole_dq = whole_of(cuts, q, (tuple(q.shape), q.dtype))
    whole_kv = whole_of(cuts, q, (tuple(k.shape), k.dtype), (tuple(v.shape), v.dtype))

    def part(heads: list[Chunk]) -> tuple[list[tuple[Tensor, ...]], tuple[Tensor, ...]]:
        """dq of each of the parts of a group, and dk and dv, which are sums over all of it.

        Lists are made for each: the kernel has no registers left for a part of longer ones.
        """
        where = heads[0].of_runs(runs)
        blocks = dense(heads[0].of_kv_heads(block_indices), block_indices)
        lists = _ops._block_lists(blocks, *where, **blocks_of)
        keys, values = heads[0].of_kv_heads(k), heads[0].of_kv_heads(v)
        dq: list[tuple[Tensor, ...]] = []
        tiles: list[list[Tensor]] = []
        for chunk in heads:
            grads, queries = (chunk.of_query_heads(x, group) for x in (grad_out, q))
            rows = dense(chunk.of_query_heads(weights, group), weights)
            given = (grads, queries, keys, values, blocks, rows, *lists, *where)
            *found, partials = _ops._selected_bwd_kv_outer(*given, **sizes, with_dq=True)
            place = partial(chunk.of_query_heads, whole_group=group)
            dq.append(results(SUM_PARTIALS, whole_dq, place, partials, blocks, *where, **blocks_of))
            del partials  # the next take their place
            if len(tiles) == 2:  # the last two are added where they are read
                tiles = [[a + b for a, b in zip(*tiles, strict=True)]]
            tiles.append(found)
        dkv: tuple[Tensor, ...] = ()
        for i, x in enumerate((keys, values)):
            first, more = tiles[0][i], tiles[1][i] if len(tiles) > 1 else None
            whole = None if whole_kv is None else whole_kv[i : i + 1]
            summed = (first, more, lists[2], x, *where)
            dkv += results(REDUCE_TILES, whole, heads[0].of_kv_heads, *summed, block_size=sizes["block_size"])
        return dq, dkv

    parts = [[part(heads) for heads in cut] for cut in cuts]
    (dq,) = whole_dq or joined([[found for found, _ in rows] for rows in parts])
    dk, dv = whole_kv or joined([[[grads] for _, grads in rows] for rows in parts])
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
    "fsa": Order(_kv_outer_forward, _kv_outer_backward),
    "tile": Order(_tile_forward, partial(_backward, dq_by=_tile_dq)),
    "mixed": Order(_mixed_forward, _kv_outer_backward),
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
