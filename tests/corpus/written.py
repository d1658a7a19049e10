"""Masks and block scores that are written to in place: all writes count, or the attention is left."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import BLOCK, near_miss, positive
from .indexer_positives import attend as attend_additive
from .indexer_positives import own_block, pooled_scores, tokens_of
from .near_misses import chosen_tokens
from .positives import blocks_of, causal


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask.repeat_interleave(q.shape[1] // k.shape[1], 1), enable_gqa=True)


def mask_of(q: Tensor, ids: Tensor) -> Tensor:
    t = q.shape[2]
    return (chosen_tokens(ids, t) & causal(t)).clone()


# ---- looked through ----


@positive()
def first_block_set(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = q.shape[2]
    chosen = torch.zeros(*ids.shape[:-1], blocks_of(t), dtype=torch.bool).scatter_(-1, ids, True)
    chosen[..., 0] = True
    return attend(q, k, v, chosen.repeat_interleave(BLOCK, -1)[..., :t] & causal(t))


@positive(static_only=True)
def two_first_blocks_set(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = q.shape[2]
    chosen = torch.zeros(*ids.shape[:-1], blocks_of(t), dtype=torch.bool).scatter_(-1, ids, True)
    chosen[..., :2] = True
    return attend(q, k, v, chosen.repeat_interleave(BLOCK, -1)[..., :t] & causal(t))


@positive(selects=True)
def first_block_scored_in_place(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = k.shape[2]
    scores = pooled_scores(q, k).masked_fill(own_block(t), math.inf)
    scores[..., 0] = math.inf
    return attend_additive(q, k, v, tokens_of(scores.topk(3).indices, t))


@positive()
def keys_that_were_written_before(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """As rotary embeddings do; only what comes later would be forgotten."""
    k = k * 2.0
    k[..., :4] = k[..., 4:8] * -1.0
    return attend(q, k, v, mask_of(q, ids))


# ---- left alone ----


@near_miss("")
def first_key_shown(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    mask = mask_of(q, ids)
    mask[..., 0] = True
    return attend(q, k, v, mask)


@near_miss("")
def last_query_sees_all(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    mask = mask_of(q, ids)
    mask[:, :, -1:] = True
    return attend(q, k, v, mask)


@near_miss("")
def mask_written_through_a_view(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    mask = mask_of(q, ids)
    mask.transpose(2, 3)[:, :, 3:9] = True
    return attend(q, k, v, mask)


@near_miss("written to in place")
def mask_inverted_by_xor(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    mask = mask_of(q, ids)
    mask.logical_xor_(torch.ones_like(mask))
    return attend(q, k, v, mask)


@near_miss("written to in place")
def mask_with_another_diagonal(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    mask = mask_of(q, ids)
    mask[0, 0].fill_diagonal_(False)
    return attend(q, k, v, mask)


@near_miss("written to in place")
def mask_copied_over_by_index(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    mask = mask_of(q, ids)
    mask.index_copy_(-1, torch.tensor([0, 5]), torch.ones(*mask.shape[:-1], 2, dtype=torch.bool))
    return attend(q, k, v, mask)


@near_miss("written to in place")
def mask_drawn_in_place(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    mask = mask_of(q, ids)
    mask.bernoulli_(1.0)
    return attend(q, k, v, mask)


@near_miss("written to in place")
def mask_that_becomes_another_tensor(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    mask = mask_of(q, ids)
    mask.set_(torch.ones_like(mask))
    return attend(q, k, v, mask)


@near_miss("written to in place")
def mask_written_by_a_function_under_checkpoint(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    mask = mask_of(q, ids)

    def write(mask: Tensor) -> Tensor:
        mask.logical_or_(torch.ones_like(mask))
        return mask.sum()

    return 0 * checkpoint(write, mask, use_reentrant=False) + attend(q, k, v, mask)


@near_miss("written to in place")
def bias_written_because_it_is_told_to(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    bias = torch.zeros(q.shape[0], k.shape[1], *[q.shape[2]] * 2).masked_fill(~mask_of(q, ids), -math.inf)
    F.hardtanh(bias, -2.0, 2.0, True)
    return attend(q, k, v, bias)
