"""Indexers that may leave a query without a key: the lowest number is then not the same as -inf."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import BLOCK, near_miss
from .indexer_positives import (
    LOWEST,
    additive_mask,
    index_operands,
    lightning_indexer,
    one_document,
    own_block,
    pooled_scores,
    tokens_of,
)
from .positives import blocks_of, causal


def attend_lowest(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    mask = ids if ids.dtype == torch.bool else tokens_of(ids, k.shape[2])
    bias = torch.zeros(mask.shape).masked_fill(~mask, LOWEST).repeat_interleave(q.shape[1] // k.shape[1], 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)


@near_miss("own block is not scored +inf")
def indexer_that_forces_nothing(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    return attend_lowest(q, k, v, pooled_scores(q, k).topk(3).indices)


@near_miss("own block is not scored +inf")
def indexer_that_forces_the_block_before(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = k.shape[2]
    before = (torch.arange(t)[:, None] // BLOCK - 1).clamp(min=0) == torch.arange(blocks_of(t))
    return attend_lowest(q, k, v, pooled_scores(q, k).masked_fill(before, math.inf).topk(2).indices)


@near_miss("own block is not scored +inf")
def indexer_that_favours_the_own_block(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """By a number that scores may exceed."""
    t = k.shape[2]
    return attend_lowest(q, k, v, pooled_scores(q, k).masked_fill(own_block(t), 1.0).topk(2).indices)


@near_miss("blocks of the future are not scored -inf")
def indexer_that_scores_the_future(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """A block of the future may be NaN, which ranks above the query's own."""
    t = k.shape[2]
    iq, ik = index_operands(q, k)
    blocks = F.pad(iq @ ik.mT, (0, -t % BLOCK), value=-math.inf).unflatten(-1, (-1, BLOCK)).amax(-1)
    return attend_lowest(q, k, v, blocks.masked_fill(own_block(t), math.inf).topk(2).indices)


@near_miss("blocks of the future are not scored -inf")
def indexer_that_forces_the_block_after(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = k.shape[2]
    after = (torch.arange(t)[:, None] // BLOCK + 1) == torch.arange(blocks_of(t))
    scores = pooled_scores(q, k).masked_fill(own_block(t) | after, math.inf)
    return attend_lowest(q, k, v, scores.topk(2).indices)


@near_miss("blocks of the future are not scored -inf")
def indexer_causal_by_block_only(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """Of ids that are one query late."""
    t = k.shape[2]
    late = (torch.arange(t)[:, None] + 1) // BLOCK
    block = torch.arange(blocks_of(t))
    scores = pooled_scores(q, k).masked_fill(block == late, math.inf).masked_fill(block > late, -math.inf)
    return attend_lowest(q, k, v, scores.topk(2).indices)


@near_miss("not of the highest scores")
def indexer_of_the_lowest(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    scores = pooled_scores(q, k).masked_fill(own_block(k.shape[2]), math.inf)
    return attend_lowest(q, k, v, scores.topk(2, largest=False).indices)


@near_miss("not those of one topk")
def indexer_with_a_threshold(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    scores = pooled_scores(q, k).masked_fill(own_block(k.shape[2]), math.inf)
    best, chosen = scores.topk(2)
    return attend_lowest(q, k, v, chosen.masked_fill(best > 0.5, -1))


@near_miss("not those of one topk")
def indexer_that_drops_the_forced(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    best, chosen = pooled_scores(q, k).masked_fill(own_block(k.shape[2]), math.inf).topk(2)
    return attend_lowest(q, k, v, chosen.masked_fill(best == math.inf, -1))


@near_miss("not those of one topk")
def indexer_written_to_in_place(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    chosen = pooled_scores(q, k).masked_fill(own_block(k.shape[2]), math.inf).topk(2).indices
    chosen.add_(1).clamp_(max=blocks_of(k.shape[2]) - 1)
    return attend_lowest(q, k, v, chosen)


@near_miss("not those of one topk")
def indexer_without_block_zero(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    chosen = pooled_scores(q, k).masked_fill(own_block(k.shape[2]), math.inf).topk(2).indices
    return attend_lowest(q, k, v, chosen.masked_fill(chosen == 0, -1))


@near_miss("not all that the topk gives")
def indexer_without_its_best(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = k.shape[2]
    scores = pooled_scores(q, k).masked_fill(own_block(t), math.inf)
    mask = (scores.topk(3).indices[..., 1:, None] == torch.arange(t) // BLOCK).any(-2) & causal(t)
    return attend_lowest(q, k, v, mask)


@near_miss("not scored +inf|not scored -inf|not those of one topk")
def indexer_of_another_query(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    scores = pooled_scores(q, k).masked_fill(own_block(k.shape[2]), math.inf)
    return attend_lowest(q, k, v, scores.topk(2).indices.flip(2))


@near_miss("hides keys otherwise")
def indexer_with_two_documents(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """Positions start again after 40 tokens."""
    b, h, t, _ = q.shape
    positions = (torch.arange(t) % 40).unsqueeze(0).expand(b, -1)
    chosen = lightning_indexer(q, k, torch.arange(t).unsqueeze(0).expand(b, -1), 2, 1)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=additive_mask(chosen, h, one_document(positions)), enable_gqa=True
    )


@near_miss("hides keys otherwise")
def indexer_with_padding(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    b, h, t, _ = q.shape
    real = (v[:, :1, :, 0] > -1.0)[:, :, None]  # [b, 1, 1, t]
    chosen = lightning_indexer(q, k, torch.arange(t).unsqueeze(0).expand(b, -1), 2, 1)
    mask = additive_mask(chosen, h, causal(t) & real)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


@near_miss("not scored +inf|not scored -inf")
def indexer_of_positions_that_are_given(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    h, t = q.shape[1:3]
    positions = torch.arange(t) + ids[:, 0, :, 0] * 0
    chosen = lightning_indexer(q, k, positions, 2, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=additive_mask(chosen, h, causal(t)), enable_gqa=True)
