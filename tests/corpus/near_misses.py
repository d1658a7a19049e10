"""Programs that look like selected attention and are not, or not provably."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import BLOCK, near_miss, positive
from .positives import blocks_of, causal


def chosen_tokens(ids: Tensor, t: int, block: int = BLOCK) -> Tensor:
    """The positive's part of the mask: tokens of listed blocks."""
    chosen = torch.zeros(*ids.shape[:-1], (t + block - 1) // block, dtype=torch.bool).scatter(-1, ids, True)
    return chosen.repeat_interleave(block, -1)[..., :t]


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **options: float) -> Tensor:
    g = q.shape[1] // mask.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask.repeat_interleave(g, 1), enable_gqa=True, **options)


def softmax(
    q: Tensor, k: Tensor, v: Tensor, hide: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    g = q.shape[1] // k.shape[1]
    scores = hide(q @ k.repeat_interleave(g, 1).mT * q.shape[-1] ** -0.5)
    weights = scores.softmax(-1)
    return (weights if after is None else after(weights)) @ v.repeat_interleave(g, 1)


# ---- another causality ----


@near_miss("lets query i see keys up to i + -1")
def strictly_before(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = q.shape[2]
    return sdpa(q, k, v, chosen_tokens(ids, t) & causal(t).tril(-1))


@near_miss("lets query i see keys up to i + 1")
def one_too_many(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = q.shape[2]
    return sdpa(q, k, v, chosen_tokens(ids, t) & torch.ones(t, t, dtype=torch.bool).tril(1))


@near_miss("not causal")
def not_causal(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    return sdpa(q, k, v, chosen_tokens(ids, q.shape[2]))


@near_miss("not causal")
def anti_causal(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = q.shape[2]
    return sdpa(q, k, v, chosen_tokens(ids, t) & torch.ones(t, t, dtype=torch.bool).triu())


@near_miss("not causal token by token")
def causal_by_block(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = q.shape[2]
    block = torch.arange(t) // BLOCK
    return sdpa(q, k, v, chosen_tokens(ids, t) & (block[None] <= block[:, None]))


@near_miss("not causal")
def causal_or_chosen(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = q.shape[2]
    return sdpa(q, k, v, chosen_tokens(ids, t) | causal(t))


@near_miss("hides keys otherwise (keys far behind")
def windowed(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = q.shape[2]
    i = torch.arange(t)
    return sdpa(q, k, v, chosen_tokens(ids, t) & causal(t) & (i[:, None] - i[None] < 24))


@near_miss("shows keys outside of the listed blocks")
def or_windowed(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = q.shape[2]
    i = torch.arange(t)
    return sdpa(q, k, v, (chosen_tokens(ids, t) | (i[:, None] - i[None] < 24)) & causal(t))


@near_miss("only causal|nothing in its mask")
def dense_causal(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = q.shape[2]
    return sdpa(q, k, v, causal(t).expand(1, q.shape[1], t, t))


# ---- another selection ----


@near_miss("keys of listed blocks are hidden")
def hides_the_chosen(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = q.shape[2]
    return sdpa(q, k, v, ~chosen_tokens(ids, t) & causal(t))


@near_miss("block size is 24")
def block_size_24(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = q.shape[2]
    return sdpa(q, k, v, chosen_tokens(ids.clamp(max=(t + 23) // 24 - 1), t, 24) & causal(t))


@near_miss("block size is 8")
def block_size_8(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = q.shape[2]
    return sdpa(q, k, v, chosen_tokens(ids, t, 8) & causal(t))


@near_miss("blocks that start at multiples of their size")
def blocks_shifted_by_half(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = q.shape[2]
    block = (torch.arange(t) + BLOCK // 2) // BLOCK
    return sdpa(q, k, v, (ids[..., None] == block).any(-2) & causal(t))


@near_miss("ids are of tokens|block")
def token_ids(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = q.shape[2]
    mask = torch.zeros(*ids.shape[:-1], t, dtype=torch.bool).scatter(-1, ids, True)
    return sdpa(q, k, v, mask & causal(t))


@near_miss("blocks that start at multiples|compared with")
def interleaved_blocks(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = q.shape[2]
    return sdpa(q, k, v, (ids[..., None] == torch.arange(t) % 5).any(-2) & causal(t))


@near_miss("two lists at once")
def both_of_two_lists(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = q.shape[2]
    return sdpa(q, k, v, chosen_tokens(ids, t) & chosen_tokens(ids.flip(2), t) & causal(t))


@near_miss("nothing in its mask")
def every_listed_at_once(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = q.shape[2]
    return sdpa(q, k, v, (ids[..., None] == torch.arange(t) // BLOCK).all(-2) & causal(t))


@near_miss("")
def listed_twice_or_more(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = q.shape[2]
    return sdpa(q, k, v, ((ids[..., None] == torch.arange(t) // BLOCK).sum(-2) > 1) & causal(t))


@near_miss("")
def listed_an_odd_number_of_times(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = q.shape[2]
    count = torch.zeros(*ids.shape[:-1], blocks_of(t), dtype=torch.int64).scatter_add(-1, ids, torch.ones_like(ids))
    return sdpa(q, k, v, (count % 2 == 1).repeat_interleave(BLOCK, -1)[..., :t] & causal(t))


@near_miss("")
def last_write_wins(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = q.shape[2]
    ids = torch.arange(blocks_of(t)).expand(*ids.shape[:-1], -1).flip(-1) + ids[..., :1] * 0
    valid = (ids + torch.arange(t)[:, None]) % 3 != 0
    chosen = torch.zeros(*ids.shape[:-1], blocks_of(t), dtype=torch.bool).scatter(-1, ids, valid)
    return sdpa(q, k, v, chosen.repeat_interleave(BLOCK, -1)[..., :t] & causal(t))


@near_miss("")
def block_scores_above_a_threshold(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = q.shape[2]
    scores = q[:, :2, :, :5].detach()
    kth = scores.topk(3, -1).values.amin(-1, keepdim=True)
    return sdpa(q, k, v, (scores >= kth).repeat_interleave(BLOCK, -1)[..., :t] & causal(t))


@near_miss("")
def starts_from_another_mask(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = q.shape[2]
    base = (q[:, :2, :, :5] > 0).clone()
    return sdpa(q, k, v, base.scatter(-1, ids, True).repeat_interleave(BLOCK, -1)[..., :t] & causal(t))


@near_miss("")
def writes_some_rows_only(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = q.shape[2]
    chosen = torch.ones(*ids.shape[:-1], blocks_of(t), dtype=torch.bool)
    chosen = chosen.scatter(-1, ids[:, :, : t // 2], False)
    return sdpa(q, k, v, ~chosen.repeat_interleave(BLOCK, -1)[..., :t] & causal(t))


@near_miss("")
def written_again_later(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = q.shape[2]
    chosen = torch.zeros(*ids.shape[:-1], blocks_of(t), dtype=torch.bool)
    chosen.scatter_(-1, ids, True)
    chosen.scatter_(-1, ids[..., :1], False)
    return sdpa(q, k, v, chosen.repeat_interleave(BLOCK, -1)[..., :t] & causal(t))


@positive()  # by what it does, whatever it looks like
def input_written_in_between(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = q.shape[2]
    ids = ids.sin().abs().long()
    mask = chosen_tokens(ids, t) & causal(t)
    ids.add_(1)
    return sdpa(q, k, v, mask) + ids.sum()


@near_miss("written to in place")
def keys_written_in_between(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t, g = q.shape[2], q.shape[1] // k.shape[1]
    kk = torch.sin(k)
    scores = q @ kk.repeat_interleave(g, 1).mT
    kk.mul_(0.5)
    scores = scores.masked_fill(~(chosen_tokens(ids, t) & causal(t)).repeat_interleave(g, 1), -math.inf)
    return scores.softmax(-1) @ v.repeat_interleave(g, 1) + kk.sum()


# ---- other heads and sequences ----


@positive()  # by what it does, whatever it looks like
def heads_in_the_other_order(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t, g = q.shape[2], q.shape[1] // k.shape[1]
    mask = (chosen_tokens(ids, t) & causal(t)).repeat(1, g, 1, 1)  # h % num_kv_heads, but keys by h // g
    k, v = k.repeat_interleave(g, 1), v.repeat_interleave(g, 1)
    return F.scaled_dot_product_attention(q, k, v, mask)


@near_miss("axis that it may not|taken at|axes")
def keys_and_values_of_other_heads(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t, g = q.shape[2], q.shape[1] // k.shape[1]
    mask = (chosen_tokens(ids, t) & causal(t)).repeat_interleave(g, 1)
    return F.scaled_dot_product_attention(q, k.repeat_interleave(g, 1), v.repeat(1, g, 1, 1), mask)


@positive()  # by what it does, whatever it looks like
def ids_of_the_next_query(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = q.shape[2]
    return sdpa(q, k, v, chosen_tokens(ids.roll(1, 2), t) & causal(t))


@positive()  # by what it does, whatever it looks like
def ids_of_the_other_sequence(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = q.shape[2]
    return sdpa(q, k, v, chosen_tokens(ids.flip(0), t) & causal(t))


@near_miss("hides keys otherwise")
def padding(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = q.shape[2]
    real = (k.detach()[:, :1, :, 0] > -1)[:, :, None]  # [b, 1, 1, t]
    return sdpa(q, k, v, chosen_tokens(ids, t) & causal(t) & real)


@near_miss("hides keys otherwise")
def documents(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = q.shape[2]
    document = ids[:, :1, :, 0].sort(-1).values
    return sdpa(q, k, v, chosen_tokens(ids, t) & causal(t) & (document[..., None] == document[..., None, :]))


# ---- another softmax ----


@near_miss("hidden scores are -1e+09")
def filled_with_minus_1e9(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t, g = q.shape[2], q.shape[1] // k.shape[1]
    hidden = ~(chosen_tokens(ids, t) & causal(t)).repeat_interleave(g, 1)
    return softmax(q, k, v, lambda s: s.masked_fill(hidden, -1e9))


@near_miss("not the same as -inf")
def filled_with_two_numbers(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t, g = q.shape[2], q.shape[1] // k.shape[1]
    hidden = ~chosen_tokens(ids, t).repeat_interleave(g, 1)
    low = torch.finfo(q.dtype).min
    return softmax(q, k, v, lambda s: s.masked_fill(hidden, low).masked_fill(~causal(t), low / 2))


@near_miss("not the same as -inf")
def filled_with_the_smallest_and_scaled(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t, g = q.shape[2], q.shape[1] // k.shape[1]
    hidden = ~(chosen_tokens(ids, t) & causal(t)).repeat_interleave(g, 1)
    return softmax(q, k, v, lambda s: s.masked_fill(hidden, torch.finfo(s.dtype).min) * 1.5)


@near_miss("not the same as -inf")
def biased_by_the_smallest(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = q.shape[2]
    mask = chosen_tokens(ids, t) & causal(t)
    bias = torch.where(mask, 0.0, torch.finfo(q.dtype).min)
    return sdpa(q, k, v, bias)


@near_miss("")
def multiplied_by_the_mask(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t, g = q.shape[2], q.shape[1] // k.shape[1]
    mask = (chosen_tokens(ids, t) & causal(t)).repeat_interleave(g, 1)
    return softmax(q, k, v, lambda s: s * mask)


@near_miss("changed between the softmax")
def masked_after_the_softmax(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t, g = q.shape[2], q.shape[1] // k.shape[1]
    mask = (chosen_tokens(ids, t) & causal(t)).repeat_interleave(g, 1)
    return softmax(q, k, v, lambda s: s.masked_fill(~causal(t), -math.inf), lambda p: p.masked_fill(~mask, 0.0))


@near_miss("something other than a mask")
def with_a_bias(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t, g = q.shape[2], q.shape[1] // k.shape[1]
    hidden = ~(chosen_tokens(ids, t) & causal(t)).repeat_interleave(g, 1)
    slope = (torch.arange(t)[None] - torch.arange(t)[:, None]) * 0.1
    return softmax(q, k, v, lambda s: (s + slope).masked_fill(hidden, -math.inf))


@near_miss("")
def capped_scores(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t, g = q.shape[2], q.shape[1] // k.shape[1]
    hidden = ~(chosen_tokens(ids, t) & causal(t)).repeat_interleave(g, 1)
    return softmax(q, k, v, lambda s: (s / 5).tanh().mul(5).masked_fill(hidden, -math.inf))


@near_miss("not positive")
def negative_scale(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t, g = q.shape[2], q.shape[1] // k.shape[1]
    hidden = ~(chosen_tokens(ids, t) & causal(t)).repeat_interleave(g, 1)
    return softmax(q, k, v, lambda s: (s * -1.0).masked_fill(hidden, -math.inf))


@near_miss("")
def softmax_over_queries(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t, g = q.shape[2], q.shape[1] // k.shape[1]
    hidden = ~(chosen_tokens(ids, t) & causal(t)).repeat_interleave(g, 1)
    scores = (q @ k.repeat_interleave(g, 1).mT).masked_fill(hidden, -1e3)
    return scores.softmax(-2) @ v.repeat_interleave(g, 1)


@near_miss("hidden scores are 0")
def keys_from_the_mask_only(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t, g = q.shape[2], q.shape[1] // k.shape[1]
    mask = (chosen_tokens(ids, t) & causal(t)).repeat_interleave(g, 1)
    scores = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
    return scores.softmax(-1).nan_to_num() @ v.repeat_interleave(g, 1) + q + k.mean()


@near_miss("random|changed between")
def drops_probabilities(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t, g = q.shape[2], q.shape[1] // k.shape[1]
    hidden = ~(chosen_tokens(ids, t) & causal(t)).repeat_interleave(g, 1)
    return softmax(q, k, v, lambda s: s.masked_fill(hidden, -math.inf), lambda p: F.dropout(p, 1.0))


@near_miss("drops out")
def drops_probabilities_in_the_call(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = q.shape[2]
    return sdpa(q, k, v, chosen_tokens(ids, t) & causal(t), dropout_p=1.0)
