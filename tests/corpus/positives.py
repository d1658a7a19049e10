"""Programs that are selected attention."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import BLOCK, positive


def blocks_of(length: int) -> int:
    return (length + BLOCK - 1) // BLOCK


def causal(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


@positive()
def sdpa_scatter_in_place(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    b, hk, t, _ = k.shape
    chosen = torch.zeros(b, hk, t, blocks_of(t), dtype=torch.bool, device=q.device)
    chosen.scatter_(-1, ids, True)
    mask = chosen.repeat_interleave(BLOCK, dim=-1)[..., :t] & causal(t)
    group = q.shape[1] // hk
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.repeat_interleave(group, 1))


@positive()
def sdpa_enable_gqa(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = q.size(2)
    chosen = torch.zeros(*ids.shape[:-1], blocks_of(t), dtype=torch.bool).scatter(-1, ids, True)
    block = torch.arange(t) // BLOCK
    position = torch.arange(t)
    mask = chosen[..., block] & (position[:, None] >= position[None, :])
    mask = mask.repeat_interleave(q.size(1) // k.size(1), dim=1)
    return F.scaled_dot_product_attention(q, k, v, mask, scale=0.2, enable_gqa=True)


@positive()
def sdpa_additive_mask(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    b, hk, t, _ = k.shape
    chosen = torch.full((b, hk, t, blocks_of(t)), float("-inf"))
    chosen = chosen.scatter(-1, ids, 0.0)
    bias = chosen.repeat_interleave(BLOCK, -1)[:, :, :, :t]
    bias = bias + torch.full((t, t), float("-inf")).triu(1)
    g = q.shape[1] // hk
    bias = bias[:, :, None].expand(b, hk, g, t, t).reshape(b, hk * g, t, t)
    k = k[:, :, None].expand(b, hk, g, t, k.shape[-1]).reshape(b, hk * g, t, -1)
    v = v[:, :, None].expand(b, hk, g, t, v.shape[-1]).reshape(b, hk * g, t, -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


@positive(layout="bthd")
def sdpa_bthd_compare(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t, g = q.shape[1], q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    ids = ids.permute(0, 2, 1, 3)
    pos = torch.arange(t)
    hit = (ids[..., None] == (pos // BLOCK)).any(dim=-2)  # [b, hk, t, t]
    mask = torch.logical_and(hit, pos[None, :] <= pos[:, None])
    k, v, mask = (x.repeat_interleave(g, dim=1) for x in (k, v, mask))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


@positive(static_only=True)
def sdpa_one_hot(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = q.shape[-2]
    chosen = F.one_hot(ids, blocks_of(t)).any(dim=-2)
    mask = chosen.repeat_interleave(BLOCK, dim=-1)[..., :t].logical_and(causal(t))
    g = q.shape[1] // k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask.repeat_interleave(g, 1), enable_gqa=True)


@positive(static_only=True)
def sdpa_one_hot_sum(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = q.shape[-2]
    chosen = F.one_hot(ids, num_classes=blocks_of(t)).sum(-2) > 0
    tokens = chosen.unsqueeze(-1).expand(*chosen.shape, BLOCK).flatten(-2)[..., :t]
    mask = tokens & causal(t)
    g = q.shape[1] // k.shape[1]
    mask = mask.unsqueeze(2).expand(-1, -1, g, -1, -1).flatten(1, 2)
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


@positive(padded=True)
def sdpa_throwaway_column(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = q.shape[-2]
    n = blocks_of(t)
    safe = torch.where(ids < 0, n, ids)
    chosen = torch.zeros(*ids.shape[:-1], n + 1, dtype=torch.bool).scatter_(-1, safe, True)[..., :n]
    mask = chosen.repeat_interleave(BLOCK, -1)[..., :t] & causal(t)
    g = q.shape[1] // k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask.repeat_interleave(g, 1), enable_gqa=True)


@positive(padded=True)
def sdpa_shifted_column(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = q.shape[-2]
    chosen = torch.zeros(*ids.shape[:-1], blocks_of(t) + 1, dtype=torch.bool)
    chosen = chosen.scatter(-1, ids + 1, True)[..., 1:]
    mask = chosen.repeat_interleave(BLOCK, -1)[..., :t] & causal(t)
    g = q.shape[1] // k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask.repeat_interleave(g, 1), enable_gqa=True)


@positive(padded=True)
def sdpa_validity_scattered(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = q.shape[-2]
    valid = ids >= 0
    count = torch.zeros(*ids.shape[:-1], blocks_of(t), dtype=torch.int32)
    count = count.scatter_add(-1, ids.clamp(min=0), valid.to(torch.int32))
    mask = (count > 0).repeat_interleave(BLOCK, -1)[..., :t] & causal(t)
    g = q.shape[1] // k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask.repeat_interleave(g, 1), enable_gqa=True)


@positive(padded=True)
def sdpa_compare_padded(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = q.shape[-2]
    blocks = torch.arange(blocks_of(t))
    chosen = ((ids.unsqueeze(-1) == blocks) & (ids >= 0).unsqueeze(-1)).any(-2)
    at = (torch.arange(t) // BLOCK).expand(*chosen.shape[:-1], t)
    mask = torch.gather(chosen, -1, at) & causal(t)
    g = q.shape[1] // k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask.repeat_interleave(g, 1), enable_gqa=True)


@positive()
def sdpa_forced_blocks(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = q.shape[-2]
    n = blocks_of(t)
    chosen = torch.zeros(*ids.shape[:-1], n, dtype=torch.bool).scatter(-1, ids, True)
    own, block = torch.arange(t)[:, None] // BLOCK, torch.arange(n)[None, :]
    chosen = chosen | (block == own) | (block == 0) | (block == own - 1)
    chosen = chosen & (block <= own)
    mask = chosen.repeat_interleave(BLOCK, -1)[..., :t] & causal(t)
    g = q.shape[1] // k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask.repeat_interleave(g, 1), enable_gqa=True)


@positive()
def sdpa_topk_of_scores(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    b, h, t, d = q.shape
    hk, n = k.shape[1], blocks_of(t)
    means = F.pad(k, (0, 0, 0, n * BLOCK - t)).reshape(b, hk, n, BLOCK, d).mean(3)
    scores = torch.einsum("bkgtd,bknd->bktn", q.reshape(b, hk, h // hk, t, d), means)
    own, block = torch.arange(t)[:, None] // BLOCK, torch.arange(n)
    scores = scores.masked_fill(block > own, float("-inf")).masked_fill(block == own, float("inf"))
    top = scores.topk(2, dim=-1).indices
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, top, True)
    mask = chosen.repeat_interleave(BLOCK, -1)[..., :t] & causal(t)
    return F.scaled_dot_product_attention(q, k, v, mask.repeat_interleave(h // hk, 1), enable_gqa=True)


@positive(ids_of_query_heads=True)
def sdpa_selection_of_each_query_head(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = q.shape[-2]
    chosen = torch.zeros(*ids.shape[:-1], blocks_of(t), dtype=torch.bool).scatter(-1, ids, True)
    mask = chosen.repeat_interleave(BLOCK, -1)[..., :t] & causal(t)
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


# ---- softmax between two products ----


@positive()
def softmax_masked_fill(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t, g = q.shape[-2], q.shape[1] // k.shape[1]
    k, v, ids = (x.repeat_interleave(g, 1) for x in (k, v, ids))
    chosen = torch.zeros(*ids.shape[:-1], blocks_of(t), dtype=torch.bool)
    chosen.scatter_(-1, ids, True)
    mask = chosen.repeat_interleave(BLOCK, -1)[..., :t] & causal(t)
    scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~mask, float("-inf"))
    return torch.softmax(scores, dim=-1) @ v


@positive(layout="bthd")
def softmax_einsum_bthd(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t, g = q.shape[1], q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(g, 2), v.repeat_interleave(g, 2)
    chosen = torch.zeros(*ids.shape[:-1], blocks_of(t), dtype=torch.bool).scatter(-1, ids, True)
    mask = chosen.transpose(1, 2).repeat_interleave(g, 1).repeat_interleave(BLOCK, -1)[..., :t] & causal(t)
    scores = torch.einsum("bihd,bjhd->bhij", q * q.shape[-1] ** -0.5, k)
    scores = torch.where(mask, scores, float("-inf"))
    weights = scores.float().softmax(-1).type_as(q)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


@positive()
def softmax_grouped(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    b, h, t, d = q.shape
    hk = k.shape[1]
    q5 = q.view(b, hk, h // hk, t, d)
    chosen = torch.zeros(b, hk, t, blocks_of(t), dtype=torch.bool).scatter_(-1, ids, True)
    mask = (chosen.repeat_interleave(BLOCK, -1)[..., :t] & causal(t)).unsqueeze(2)
    scores = torch.einsum("bkgid,bkjd->bkgij", q5, k) * (d**-0.5)
    scores = scores.masked_fill(mask.logical_not(), -torch.inf)
    out = torch.einsum("bkgij,bkjd->bkgid", F.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype), v)
    return out.reshape(b, h, t, d)


@positive()
def softmax_grouped_matmul(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    h, t, d = q.shape[1:]
    hk = k.shape[1]
    q5 = q.unflatten(1, (hk, h // hk))
    pos = torch.arange(t)
    hit = (ids[..., None] == pos // BLOCK).any(-2) & (pos[None] <= pos[:, None])
    scores = torch.matmul(q5, k[:, :, None].transpose(-1, -2))
    scores = (scores * d**-0.5).masked_fill(~hit[:, :, None], float("-inf"))
    return torch.matmul(scores.softmax(-1), v[:, :, None]).flatten(1, 2)


@positive()
def softmax_additive(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t, g = q.shape[-2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(g, 1), v.repeat_interleave(g, 1)
    chosen = torch.zeros(*ids.shape[:-1], blocks_of(t), dtype=torch.bool).scatter(-1, ids, True)
    mask = chosen.repeat_interleave(BLOCK, -1)[..., :t] & causal(t)
    bias = torch.zeros(mask.shape).masked_fill(~mask, float("-inf")).repeat_interleave(g, 1)
    scores = (q @ k.mT) * 0.25 + bias
    return F.softmax(scores, -1) @ v


@positive()
def softmax_masked_in_place(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t, g = q.shape[-2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(g, 1), v.repeat_interleave(g, 1)
    chosen = torch.zeros(*ids.shape[:-1], blocks_of(t), dtype=torch.bool)
    chosen.scatter_(-1, ids, True)
    hidden = ~chosen.repeat_interleave(BLOCK, -1)[..., :t]
    hidden |= torch.ones(t, t, dtype=torch.bool).triu(1)
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    scores.masked_fill_(hidden.repeat_interleave(g, 1), float("-inf"))
    return F.dropout(F.softmax(scores, -1), 0.0) @ v


@positive()
def softmax_flat_bmm(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    b, h, t, d = q.shape
    g = h // k.shape[1]
    k, v = (x.repeat_interleave(g, 1).reshape(b * h, t, d) for x in (k, v))
    chosen = torch.zeros(*ids.shape[:-1], blocks_of(t), dtype=torch.bool).scatter(-1, ids, True)
    mask = (chosen.repeat_interleave(BLOCK, -1)[..., :t] & causal(t)).repeat_interleave(g, 1).reshape(b * h, t, t)
    scores = torch.bmm(q.reshape(b * h, t, d), k.transpose(1, 2)).mul(d**-0.5)
    scores = scores.masked_fill(~mask, float("-inf"))
    return torch.bmm(scores.softmax(dim=-1), v).view(b, h, t, d)


@positive(padded=True)
def softmax_two_masks(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t, g = q.shape[-2], q.shape[1] // k.shape[1]
    n = blocks_of(t)
    chosen = torch.zeros(*ids.shape[:-1], n + 1).scatter(-1, ids.masked_fill(ids < 0, n), 1.0)[..., :n].bool()
    chosen = chosen.repeat_interleave(g, 1)[:, :, :, torch.arange(t).div(BLOCK, rounding_mode="floor")]
    k, v = k.repeat_interleave(g, 1), v.repeat_interleave(g, 1)
    scores = (q * 0.25) @ k.mT
    scores = scores.masked_fill(~chosen, float("-inf"))
    scores = scores.masked_fill(torch.ones(t, t).triu(1).bool(), float("-inf"))
    return scores.softmax(-1) @ v


@positive(layout="bthd")
def softmax_packed_qkv(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    b, t, h, d = q.shape
    hk = k.shape[2]
    packed = torch.cat([x.flatten(2) for x in (q, k, v)], -1).sin()  # as a linear layer gives it
    q, k, v = packed.split([h * d, hk * d, hk * d], dim=-1)
    q = q.view(b, t, hk, h // hk, d)
    k, v = (x.view(b, t, hk, d) for x in (k, v))
    chosen = torch.zeros(b, t, hk, blocks_of(t), dtype=torch.bool).scatter(-1, ids, True)
    mask = chosen.repeat_interleave(BLOCK, -1)[..., :t] & causal(t)[:, None]
    scores = torch.einsum("bikgd,bjkd->bikgj", q, k) * d**-0.5
    scores = scores.masked_fill(~mask[:, :, :, None], float("-inf"))
    return torch.einsum("bikgj,bjkd->bikgd", scores.softmax(-1), v).reshape(b, t, h, d)


# ---- what must keep its gradients ----


@positive()
def keys_without_gradient(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t, g = q.shape[-2], q.shape[1] // k.shape[1]
    with torch.no_grad():
        chosen = torch.zeros(*ids.shape[:-1], blocks_of(t), dtype=torch.bool).scatter(-1, ids, True)
        mask = (chosen.repeat_interleave(BLOCK, -1)[..., :t] & causal(t)).repeat_interleave(g, 1)
        frozen_k, frozen_v = k.repeat_interleave(g, 1), v.repeat_interleave(g, 1)
    out = F.scaled_dot_product_attention(q, frozen_k, frozen_v, mask)
    return out + 0.1 * k.sum() + 0.1 * v.sum()


@positive()
def scores_halved_in_the_softmax(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """Rotary-like operands, a scale in three places."""
    b, hk, t, d = k.shape
    g = q.shape[1] // hk
    angle = torch.outer(torch.arange(t).float(), 1.0 / torch.arange(1, d // 2 + 1))
    cos, sin = (torch.cat([f(angle)] * 2, -1) for f in (torch.cos, torch.sin))

    def rotated(x: Tensor) -> Tensor:
        return x * cos + torch.cat([-x[..., d // 2 :], x[..., : d // 2]], -1) * sin

    q, k = rotated(q) * 0.5, rotated(k)
    chosen = torch.zeros(b, hk, t, blocks_of(t), dtype=torch.bool).scatter(-1, ids, True)
    mask = (chosen.repeat_interleave(BLOCK, -1)[..., :t] & causal(t)).repeat_interleave(g, 1)
    k, v = (x[:, :, None].expand(b, hk, g, t, d).reshape(b, hk * g, t, d) for x in (k, v))
    scores = (q @ k.transpose(-1, -2)) / d**0.5
    scores = torch.where(mask, scores, torch.tensor(float("-inf")))
    return torch.softmax(scores * 0.7, dim=-1) @ v


def chosen_or_own(ids: Tensor, t: int) -> Tensor:
    """[b, hk, t, t]: the listed blocks, of which the query's own is one in any case."""
    chosen = torch.zeros(*ids.shape[:-1], blocks_of(t), dtype=torch.bool, device=ids.device).scatter(-1, ids, True)
    block = torch.arange(t, device=ids.device) // BLOCK
    own = block[:, None] == torch.arange(blocks_of(t), device=ids.device)
    return (chosen | own)[..., block]


@positive()
def softmax_filled_with_the_smallest(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """A row that sees nothing weighs all values alike."""
    t, g = q.shape[2], q.shape[1] // k.shape[1]
    chosen = torch.zeros(*ids.shape[:-1], blocks_of(t), dtype=torch.bool).scatter(-1, ids, True)
    mask = (chosen.repeat_interleave(BLOCK, -1)[..., :t] & causal(t)).repeat_interleave(g, 1)
    scores = (q @ k.repeat_interleave(g, 1).mT * q.shape[-1] ** -0.5).masked_fill(~mask, torch.finfo(q.dtype).min)
    return scores.softmax(-1) @ v.repeat_interleave(g, 1)


@positive()
def softmax_biased_by_the_smallest(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t, g = q.shape[2], q.shape[1] // k.shape[1]
    mask = (chosen_or_own(ids, t) & causal(t)).repeat_interleave(g, 1)
    bias = torch.where(mask, 0.0, torch.finfo(q.dtype).min)
    scores = q @ k.repeat_interleave(g, 1).mT * 0.3 + bias
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v.repeat_interleave(g, 1)


@positive()
def sdpa_biased_by_the_smallest(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t, g = q.shape[2], q.shape[1] // k.shape[1]
    mask = (chosen_or_own(ids, t) & causal(t)).repeat_interleave(g, 1)
    bias = torch.full((t, t), torch.finfo(q.dtype).min, dtype=q.dtype).masked_fill(mask, 0.0)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)


@positive(layout="bthd", padded=True)
def sdpa_flattened_ids(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """What stands for no block is told after ids are flattened, which copies: they lie in memory transposed."""
    (b, t, hk, _), g = k.shape, q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    flat = (ids + 0).transpose(1, 2).reshape(b * hk, t, -1)
    flat = torch.where(flat < 0, blocks_of(t), flat)
    chosen = torch.zeros(b * hk, t, blocks_of(t) + 1, dtype=torch.bool).scatter_(-1, flat, True)
    tokens = chosen[..., :-1].repeat_interleave(BLOCK, -1)[..., :t] & causal(t)
    mask = tokens.unflatten(0, (b, hk)).repeat_interleave(g, 1)
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).transpose(1, 2)
