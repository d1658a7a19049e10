"""Selected attention whose blocks are chosen by compressed probabilities; `ids` is not used.

Compressed keys are means of blocks. In the second half the attention is recognised, the selection is left.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import BLOCK, positive
from .branch_positives import LOWEST, as_projected, completed, windows_of
from .positives import blocks_of, causal


def probabilities(q: Tensor, k: Tensor, seen: Tensor | None = None, kernel: int = BLOCK) -> Tensor:
    """[b, h, t, windows]."""
    k = windows_of(k, kernel, BLOCK).repeat_interleave(q.shape[1] // k.shape[1], 1)
    seen = completed(q.shape[2], k.shape[2], kernel, BLOCK) if seen is None else seen
    return (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, -math.inf).softmax(-1).nan_to_num()


def chosen_blocks(scores: Tensor, t: int, count: int = 3, local: int = 1, first: bool = False) -> Tensor:
    """The top-k of the past, the newest blocks and perhaps the first among them."""
    own, block = torch.arange(t)[:, None] // BLOCK, torch.arange(blocks_of(t))
    scores = F.pad(scores, (0, blocks_of(t) - scores.shape[-1]))
    forced = (block <= own) & (block > own - local)
    forced = forced | (block == 0) if first else forced
    return scores.masked_fill(forced, math.inf).masked_fill(block > own, -math.inf).topk(count, dim=-1).indices


def attend(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = q.shape[2]
    chosen = torch.zeros(*ids.shape[:-1], blocks_of(t), dtype=torch.bool).scatter(-1, ids, True)
    mask = chosen.repeat_interleave(BLOCK, -1)[..., :t] & causal(t)
    mask = mask.repeat_interleave(q.shape[1] // ids.shape[1], 1)
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


def by_group(p: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return p.unflatten(1, (k.shape[1], -1)).sum(2)


@positive(selects=True, length=88)
def chosen_by_probabilities(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    q, k, v = as_projected(q, k, v)
    return attend(q, k, v, chosen_blocks(by_group(probabilities(q, k), q, k), q.shape[2]))


@positive(selects=True, length=120)
def chosen_with_the_first_and_two_newest(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    q, k, v = as_projected(q, k, v)
    return attend(q, k, v, chosen_blocks(by_group(probabilities(q, k), q, k), q.shape[2], 5, 2, first=True))


@positive(selects=True, length=96)
def chosen_of_grouped_heads(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """Whole blocks, an einsum, and probabilities that are hidden again."""
    q, k, v = as_projected(q, k, v)
    t, n = q.shape[2], k.shape[2] // BLOCK
    means = k[:, :, : n * BLOCK].unflatten(2, (n, BLOCK)).mean(3)
    scores = torch.einsum("bkgid,bkjd->bkgij", q.unflatten(1, (k.shape[1], -1)), means)
    seen = torch.arange(n) < (torch.arange(t)[:, None] + 1) // BLOCK
    p = (scores * 0.25).masked_fill(~seen, LOWEST).softmax(-1).masked_fill(~seen, 0.0)
    return attend(q, k, v, chosen_blocks(p.sum(2), t))


@positive(selects=True, ids_of_query_heads=True, length=88)
def chosen_by_each_query_head(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    q, k, v = as_projected(q, k, v)
    return attend(q, k, v, chosen_blocks(probabilities(q, k), q.shape[2]))


# ---- the selection is left ----


@positive(length=88)
def chosen_by_the_largest_head(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    q, k, v = as_projected(q, k, v)
    return attend(q, k, v, chosen_blocks(probabilities(q, k).unflatten(1, (2, -1)).amax(2), q.shape[2]))


@positive(length=88)
def chosen_by_longer_windows(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """Of two blocks each."""
    q, k, v = as_projected(q, k, v)
    return attend(q, k, v, chosen_blocks(by_group(probabilities(q, k, kernel=2 * BLOCK), q, k), q.shape[2]))


@positive(length=96)
def chosen_by_blocks_that_have_begun(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    q, k, v = as_projected(q, k, v)
    t = q.shape[2]
    seen = torch.arange(t // BLOCK) <= torch.arange(t)[:, None] // BLOCK
    return attend(q, k, v, chosen_blocks(by_group(probabilities(q, k, seen), q, k), t))


@positive(length=88)
def chosen_by_the_block_before(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    q, k, v = as_projected(q, k, v)
    scores = by_group(probabilities(q, k), q, k)
    return attend(q, k, v, chosen_blocks(F.pad(scores, (1, 0))[..., :-1], q.shape[2]))


@positive(length=88)
def chosen_by_the_least_probable(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    q, k, v = as_projected(q, k, v)
    return attend(q, k, v, chosen_blocks(by_group(probabilities(q, k), q, k) * -1.0, q.shape[2]))


@positive(length=88)
def chosen_with_every_other_forced(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    q, k, v = as_projected(q, k, v)
    t = q.shape[2]
    scores = F.pad(by_group(probabilities(q, k), q, k), (0, blocks_of(t) - t // BLOCK))
    return attend(q, k, v, chosen_blocks(scores.masked_fill(torch.arange(blocks_of(t)) % 2 == 1, math.inf), t))


@positive(length=88)
def chosen_by_sums_of_wrong_heads(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """Those of another key/value head."""
    q, k, v = as_projected(q, k, v)
    return attend(q, k, v, chosen_blocks(probabilities(q, k).unflatten(1, (-1, k.shape[1])).sum(1), q.shape[2]))
