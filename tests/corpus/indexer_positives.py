"""Selected attention whose blocks are the top-k of block scores, computed in the program by an indexer.

The indexer's queries and keys are means of q and k, which are not looked into; `ids` is not used.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import BLOCK, positive
from .positives import blocks_of, causal


def index_operands(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """A query for each key/value head, one key: (b, hk, t, d) and (b, 1, t, d)."""
    return q.unflatten(1, (k.shape[1], -1)).mean(2), k.mean(1, keepdim=True)


def pooled_scores(q: Tensor, k: Tensor) -> Tensor:
    """[b, hk, t, blocks]: the largest product of a block's tokens that the query sees, -inf where there is none."""
    t = k.shape[2]
    iq, ik = index_operands(q, k)
    scores = (iq @ ik.transpose(-1, -2)).masked_fill(~causal(t), -math.inf)
    scores = F.pad(scores, (0, -t % BLOCK), value=-math.inf)
    return scores.unflatten(-1, (-1, BLOCK)).amax(-1)


def own_block(t: int) -> Tensor:
    """[t, blocks]: whether a block is the query's own."""
    return torch.arange(t)[:, None] // BLOCK == torch.arange(blocks_of(t))


def tokens_of(ids: Tensor, t: int) -> Tensor:
    """[b, hk, t, t]: tokens of listed blocks up to the query, of ids that have -1 among them."""
    n = blocks_of(t)
    chosen = torch.zeros(*ids.shape[:-1], n + 1, dtype=torch.bool).scatter_(-1, ids.masked_fill(ids < 0, n), True)
    return chosen[..., :n].repeat_interleave(BLOCK, -1)[..., :t] & causal(t)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, fill: float = -math.inf) -> Tensor:
    """With scores that are hidden by adding."""
    g = q.shape[1] // k.shape[1]
    bias = torch.zeros(mask.shape).masked_fill(~mask, fill).repeat_interleave(g, 1)
    scores = q @ k.repeat_interleave(g, 1).mT * q.shape[-1] ** -0.5 + bias
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v.repeat_interleave(g, 1)


LOWEST = torch.finfo(torch.float32).min


def lightning_indexer(q: Tensor, k: Tensor, positions: Tensor, topk: int, local_blocks: int) -> Tensor:
    """[b, hk, t, topk], -1 at the end: positions decide what is the future and which blocks are local."""
    b, hk, t, _ = k.shape
    iq, ik = index_operands(q, k)
    n = -(-t // BLOCK)
    scores = torch.matmul(iq.float(), ik.float().transpose(-1, -2))
    future = torch.arange(t)[None, None, None, :] > positions[:, None, :, None]
    scores = scores.masked_fill(future, float("-inf"))
    if n * BLOCK - t:
        scores = F.pad(scores, (0, n * BLOCK - t), value=float("-inf"))
    blocks = scores.view(b, hk, t, n, BLOCK).amax(dim=-1)
    near = ((positions // BLOCK)[..., None] - torch.arange(local_blocks).view(1, 1, -1)).clamp(min=0)
    blocks.scatter_(-1, near.unsqueeze(1).expand(-1, hk, -1, -1), float("inf"))
    best, ids = blocks.topk(min(topk, n), dim=-1)
    return ids.masked_fill(best == float("-inf"), -1)


def additive_mask(ids: Tensor, heads: int, allowed: Tensor) -> Tensor:
    """[b, heads, t, t]: 0 for what is allowed in a listed block, the lowest number elsewhere."""
    b, hk, t, _ = ids.shape
    n = -(-t // BLOCK)
    bias = torch.full((b, hk, t, n + 1), float("-inf"))
    bias.scatter_(-1, ids.masked_fill(ids < 0, n), 0.0)
    keep = (bias[..., :n] == 0.0).repeat_interleave(BLOCK, dim=-1)[..., :t].repeat_interleave(heads // hk, dim=1)
    keep = keep & (allowed if allowed.dtype == torch.bool else allowed == 0)
    return torch.zeros(keep.shape).masked_fill(~keep, LOWEST)


def one_document(positions: Tensor) -> Tensor:
    """[b, 1, t, t]: causal within a run of positions; there is one run."""
    b, t = positions.shape
    run = (torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    rows, at = torch.arange(b)[:, None, None, None], torch.arange(t)
    same = run[rows, at[None, None, :, None]] == run[rows, at[None, None, None, :]]
    return same & (at[None, None, None, :] <= at[None, None, :, None])


@positive(selects=True)
def indexer_sdpa(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    b, h, t, _ = q.shape
    positions = torch.arange(t).unsqueeze(0).expand(b, -1)
    chosen = lightning_indexer(q, k, positions, 3, 1)
    mask = additive_mask(chosen, h, one_document(positions))
    k, v = (x.repeat_interleave(h // x.shape[1], 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@positive(selects=True)
def indexer_softmax_float_masks(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    b, h, t, _ = q.shape
    positions = torch.arange(t).unsqueeze(0).expand(b, -1)
    chosen = lightning_indexer(q, k, positions, 4, 2)
    allowed = torch.where(causal(t)[None, None], torch.tensor(0.0), LOWEST).expand(b, 1, t, t)
    mask = additive_mask(chosen, h, allowed)
    k, v = (x.repeat_interleave(h // x.shape[1], 1) for x in (k, v))
    weights = F.softmax(torch.matmul(q, k.transpose(2, 3)) * 0.25 + mask, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(F.dropout(weights, p=0.0, training=True), v)


@positive(selects=True)
def indexer_with_an_empty_cache(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """Keys are appended to what a cache holds, which is nothing yet."""
    b, h, t, _ = q.shape
    positions = (torch.arange(t) + 0).unsqueeze(0).expand(b, -1)
    k, v = (torch.cat([torch.tensor([], dtype=x.dtype), x], dim=-2) for x in (k, v))
    chosen = lightning_indexer(q, k, positions, 2, 1)
    mask = additive_mask(chosen, h, torch.arange(t) <= positions[:, None, :, None])
    k, v = (x[:, :, None].expand(-1, -1, h // x.shape[1], -1, -1).reshape(b, h, t, -1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@positive(selects=True)
def indexer_compared(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """The own block is forced by a comparison; a row is never left without a key, so that any low number hides."""
    t = k.shape[2]
    scores = torch.where(own_block(t), math.inf, pooled_scores(q, k))
    chosen = torch.topk(scores, 3).indices
    mask = (chosen[..., None] == torch.arange(t) // BLOCK).any(-2) & causal(t)
    return attend(q, k, v, mask, LOWEST)


@positive(selects=True, layout="bthd", length=80, static_only=True)
def indexer_einsum_whole_blocks(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    b, t, hk, d = k.shape
    q5 = q.unflatten(2, (hk, -1))
    scores = torch.einsum("bihd,bjd->bhij", q5.mean(3), k.mean(2)) * 0.5
    scores = scores.masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), -math.inf)
    block, own = torch.arange(t // BLOCK), torch.arange(t)[:, None] // BLOCK
    blocks = scores.view(b, hk, t, t // BLOCK, BLOCK).amax(-1).masked_fill((block <= own) & (block > own - 2), math.inf)
    chosen = torch.zeros(b, hk, t, t // BLOCK, dtype=torch.bool).scatter(-1, blocks.topk(3, -1)[1], True)
    mask = chosen.repeat_interleave(BLOCK, -1) & causal(t)
    weights = torch.einsum("bikgd,bjkd->bkgij", q5, k) * d**-0.5
    weights = weights.masked_fill(~mask[:, :, None], LOWEST).softmax(-1)
    return torch.einsum("bkgij,bjkd->bikgd", weights, v).flatten(2, 3)


# ---- the attention is selected attention, the selection is not `select_blocks` ----


@positive()
def indexer_of_block_means(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """No row is left without a key, whatever the scores are."""
    t = k.shape[2]
    means = F.pad(k, (0, 0, 0, -t % BLOCK)).unflatten(2, (-1, BLOCK)).mean(3)
    block, own = torch.arange(blocks_of(t)), torch.arange(t)[:, None] // BLOCK
    scores = (
        (index_operands(q, k)[0] @ means.mT).masked_fill(block > own, -math.inf).masked_fill(block == own, math.inf)
    )
    return attend(q, k, v, tokens_of(scores.topk(2).indices, t), LOWEST)


@positive(selects=True)
def indexer_that_forces_the_first_block_too(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = k.shape[2]
    forced = own_block(t) | (torch.arange(blocks_of(t)) == 0)
    best, chosen = pooled_scores(q, k).masked_fill(forced, math.inf).topk(3)
    return attend(q, k, v, tokens_of(chosen.masked_fill(best == -math.inf, -1), t), LOWEST)


@positive()
def indexer_of_sums(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = k.shape[2]
    iq, ik = index_operands(q, k)
    scores = F.pad((iq @ ik.mT).masked_fill(~causal(t), 0.0), (0, -t % BLOCK)).unflatten(-1, (-1, BLOCK)).sum(-1)
    scores = scores.masked_fill(torch.arange(blocks_of(t)) > torch.arange(t)[:, None] // BLOCK, -math.inf)
    return attend(q, k, v, tokens_of(scores.masked_fill(own_block(t), math.inf).topk(3).indices, t), LOWEST)


@positive()
def indexer_with_a_bias(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = k.shape[2]
    iq, ik = index_operands(q, k)
    scores = iq @ ik.mT + 0.01 * torch.arange(t)
    scores = F.pad(scores.masked_fill(~causal(t), -math.inf), (0, -t % BLOCK), value=-math.inf)
    blocks = scores.unflatten(-1, (-1, BLOCK)).amax(-1).masked_fill(own_block(t), math.inf)
    return attend(q, k, v, tokens_of(blocks.topk(3).indices, t), LOWEST)


@positive()
def indexer_of_the_lowest_products(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = k.shape[2]
    iq, ik = index_operands(q, k)
    scores = F.pad(((iq * -1.0) @ ik.mT).masked_fill(~causal(t), -math.inf), (0, -t % BLOCK), value=-math.inf)
    blocks = scores.unflatten(-1, (-1, BLOCK)).amax(-1).masked_fill(own_block(t), math.inf)
    return attend(q, k, v, tokens_of(blocks.topk(3).indices, t), LOWEST)


@positive()
def indexer_that_skips_every_other_token(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = k.shape[2]
    iq, ik = index_operands(q, k)
    hidden = ~causal(t) | (torch.arange(t) % 2 == 1)
    scores = F.pad((iq @ ik.mT).masked_fill(hidden, -math.inf), (0, -t % BLOCK), value=-math.inf)
    blocks = scores.unflatten(-1, (-1, BLOCK)).amax(-1).masked_fill(own_block(t), math.inf)
    return attend(q, k, v, tokens_of(blocks.topk(3).indices, t), LOWEST)


@positive()
def indexer_whose_scores_are_used(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """Also by something else, so that they are computed anyway."""
    t = k.shape[2]
    best, chosen = pooled_scores(q, k).masked_fill(own_block(t), math.inf).topk(3)
    out = attend(q, k, v, tokens_of(chosen, t), LOWEST)
    return out + 0.1 * best.isinf().sum()


@positive()
def indexer_all_but_the_last_choice(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = k.shape[2]
    chosen = pooled_scores(q, k).masked_fill(own_block(t), math.inf).topk(3).indices[..., :2]
    return attend(q, k, v, tokens_of(chosen, t))


@positive()
def indexer_shifted_in_place(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """The ids are no longer the topk's, and are not all different."""
    t = k.shape[2]
    chosen = pooled_scores(q, k).masked_fill(own_block(t), math.inf).topk(3).indices
    chosen.clamp_(max=1)
    return attend(q, k, v, tokens_of(chosen, t))
