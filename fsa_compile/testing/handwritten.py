"""NSA as it is written by hand in plain PyTorch, of any sizes and on any device: what recognition is measured on.

Each takes `q (batch, seq_len, num_q_heads, head_dim)`, `k, v (batch, seq_len, num_kv_heads, head_dim)` and, but for
`whole`, `ids (batch, seq_len, num_kv_heads, num_selected)` of blocks, int64, -1 where there is none, and returns
something like q. `tests/corpus` holds many more, of small sizes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

__all__ = ["bmm_added_mask", "einsum_grouped", "flex", "sdpa_mask", "softmax_by_hand", "whole"]


def _causal(t: int, device: torch.device) -> Tensor:
    return torch.ones(t, t, dtype=torch.bool, device=device).tril()


def _chosen(ids: Tensor, blocks: int) -> Tensor:
    """(..., blocks): whether a block is listed."""
    spare = torch.where(ids < 0, blocks, ids)  # a column that is cut off
    chosen = torch.zeros(*ids.shape[:-1], blocks + 1, dtype=torch.bool, device=ids.device)
    return chosen.scatter_(-1, spare, True)[..., :blocks]


def sdpa_mask(q: Tensor, k: Tensor, v: Tensor, ids: Tensor, *, block_size: int) -> Tensor:
    """`scaled_dot_product_attention` with a mask of tokens; heads are repeated."""
    t, group = q.shape[1], q.shape[2] // k.shape[2]
    q, k, v, ids = (x.transpose(1, 2) for x in (q, k, v, ids))
    mask = _chosen(ids, -(-t // block_size)).repeat_interleave(block_size, dim=-1)[..., :t] & _causal(t, q.device)
    k, v, mask = (x.repeat_interleave(group, dim=1) for x in (k, v, mask))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def softmax_by_hand(q: Tensor, k: Tensor, v: Tensor, ids: Tensor, *, block_size: int) -> Tensor:
    """Scores that are masked, a softmax in float32, two matrix products."""
    t, group = q.shape[1], q.shape[2] // k.shape[2]
    q, k, v, ids = (x.transpose(1, 2) for x in (q, k, v, ids))
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    block, position = torch.arange(t, device=q.device) // block_size, torch.arange(t, device=q.device)
    chosen = _chosen(ids, -(-t // block_size))[..., block]
    mask = (chosen & (position[:, None] >= position)).repeat_interleave(group, dim=1)
    scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1, dtype=torch.float32).to(v.dtype)
    return torch.matmul(weights, v).transpose(1, 2)


def einsum_grouped(q: Tensor, k: Tensor, v: Tensor, ids: Tensor, *, block_size: int) -> Tensor:
    """Groups as an axis of their own, blocks compared with each id."""
    t, d = q.shape[1], q.shape[3]
    grouped = q.unflatten(2, (k.shape[2], -1))
    blocks = torch.arange(-(-t // block_size), device=q.device)
    chosen = (ids[..., None] == blocks).any(dim=-2)  # [b, t, hk, blocks]
    mask = chosen.repeat_interleave(block_size, dim=-1)[..., :t] & _causal(t, q.device)[:, None]
    scores = torch.einsum("bikgd,bjkd->bkgij", grouped, k) * d**-0.5
    scores = torch.where(mask.transpose(1, 2)[:, :, None], scores.float(), -torch.inf)
    return torch.einsum("bkgij,bjkd->bikgd", scores.softmax(-1).type_as(v), v).flatten(2, 3)


def bmm_added_mask(q: Tensor, k: Tensor, v: Tensor, ids: Tensor, *, block_size: int) -> Tensor:
    """`bmm` of batch and heads as one axis, the lowest number added to hidden scores; a query's own block is seen."""
    (b, t, heads, d), kv_heads = q.shape, k.shape[2]
    group, lowest = heads // kv_heads, torch.finfo(q.dtype).min
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    q, k, v = (x.transpose(1, 2).reshape(b * heads, t, d) for x in (q, k, v))
    token = torch.arange(t, device=q.device)
    own, blocks = token.div(block_size, rounding_mode="floor"), torch.arange(-(-t // block_size), device=q.device)
    listed = ids.unsqueeze(-1).eq(blocks).any(dim=-2) | own[:, None, None].eq(blocks)  # [b, t, kv_heads, blocks]
    seen = torch.gather(listed, -1, own.expand(b, t, kv_heads, t)) & (token <= token[:, None])[:, None]
    bias = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill(~seen, lowest)
    bias = bias.transpose(1, 2).repeat_interleave(group, dim=1).reshape(b * heads, t, t)
    scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=d**-0.5)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype)
    return torch.bmm(weights, v).view(b, heads, t, d).transpose(1, 2)


def flex(q: Tensor, k: Tensor, v: Tensor, ids: Tensor, *, block_size: int) -> Tensor:
    """FlexAttention whose mask_mod reads a table of blocks; `sdpa_mask` is the same function."""
    (b, t, heads, _), group = q.shape, q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    selected = _chosen(ids.transpose(1, 2), -(-t // block_size))

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return selected[b, h // group, i, j // block_size] & (j <= i)

    block_mask = create_block_mask(mask_mod, b, heads, t, t, device=q.device)
    out = flex_attention(q, k, v, block_mask=block_mask, enable_gqa=True)
    assert isinstance(out, Tensor)
    return out.transpose(1, 2)


def whole(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, *, block_size: int, num_selected: int, window_size: int,
    kernel_size: int = 32, kernel_stride: int = 16,
) -> Tensor:  # fmt: skip
    """All of NSA: means of windows, probabilities that choose the blocks, the chosen blocks, a window, a gated sum.

    gates: (batch, seq_len, num_q_heads, 3). The first block and the two newest are among the chosen ones.
    """
    t, heads, dim, group = q.shape[1], q.shape[2], q.shape[3], q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    position = torch.arange(t, device=q.device)

    k_cmp, v_cmp = (x.unfold(2, kernel_size, kernel_stride).mean(-1) for x in (k, v))
    windows = torch.arange(k_cmp.shape[2], device=q.device)
    complete = windows * kernel_stride + kernel_size - 1 <= position[:, None]
    scores = torch.matmul(q, k_cmp.repeat_interleave(group, dim=1).transpose(-1, -2)) * dim**-0.5
    weights = scores.float().masked_fill(~complete, float("-inf")).softmax(-1).nan_to_num()
    out_cmp = torch.matmul(weights.to(v.dtype), v_cmp.repeat_interleave(group, dim=1))

    blocks, steps, overlap = -(-t // block_size), block_size // kernel_stride, kernel_size // kernel_stride
    shares = weights.unflatten(1, (heads // group, group)).sum(2)
    padded = F.pad(shares, (overlap - 1, steps * blocks + 1 - shares.shape[-1]))
    pooled = [padded[..., i + j :: steps][..., :blocks] for i in range(steps) for j in range(overlap)]
    block, own = torch.arange(blocks, device=q.device), position[:, None] // block_size
    forced = (block <= own) & (block > own - 2) | (block < 1)
    total = sum(pooled[1:], pooled[0])
    ranked = total.masked_fill(forced, float("inf")).masked_fill(block > own, float("-inf"))
    ids = ranked.topk(min(num_selected, blocks), dim=-1).indices

    chosen = torch.zeros(*ids.shape[:-1], blocks, dtype=torch.bool, device=q.device).scatter(-1, ids, True)
    mask = chosen.repeat_interleave(block_size, dim=-1)[..., :t] & _causal(t, q.device)
    k, v, mask = (x.repeat_interleave(group, dim=1) for x in (k, v, mask))
    out_slc = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    near = (position[:, None] >= position) & (position[:, None] - position < window_size)
    out_swa = F.scaled_dot_product_attention(q, k, v, attn_mask=near)

    parts = torch.stack([out_cmp, out_slc, out_swa], dim=-1).transpose(1, 2)
    return (parts * gates[..., None, :]).sum(-1)
