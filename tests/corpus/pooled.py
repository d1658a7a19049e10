"""Blocks that are chosen by probabilities of windows which are not the blocks: longer ones, several to a block."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import positive
from .branch_positives import LOWEST, as_projected, completed, windows_of
from .positives import causal

Pool = Callable[[Tensor, int], Tensor]  # of [b, h, t, windows] and a number of blocks


def weights_of(q: Tensor, k: Tensor, kernel: int, stride: int, fill: float = -math.inf) -> Tensor:
    """[b, heads, t, windows], zero for queries that see none."""
    k = windows_of(k, kernel, stride).repeat_interleave(q.shape[1] // k.shape[1], 1)
    seen = completed(q.shape[2], k.shape[2], kernel, stride)
    p = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, fill).softmax(-1)
    return p.nan_to_num() if fill == -math.inf else p.masked_fill(~seen, 0.0)


def of_group(p: Tensor, k: Tensor) -> Tensor:
    return p.unflatten(1, (k.shape[1], -1)).sum(2)


def chosen(scores: Tensor, t: int, size: int, count: int, local: int, init: int) -> Tensor:
    own, block = torch.arange(t)[:, None] // size, torch.arange(scores.shape[-1])
    forced = (block <= own) & (block > own - local) | (block < init)
    return scores.masked_fill(forced, math.inf).masked_fill(block > own, -math.inf).topk(count, dim=-1).indices


def select(
    q: Tensor, k: Tensor, v: Tensor, scores: Tensor, size: int, count: int = 3, local: int = 1, init: int = 0
) -> Tensor:
    t = q.shape[2]
    ids = chosen(scores, t, size, count, local, init)
    mask = torch.zeros(*ids.shape[:-1], -(-t // size), dtype=torch.bool).scatter(-1, ids, True)
    mask = mask.repeat_interleave(size, -1)[..., :t] & causal(t)
    return F.scaled_dot_product_attention(q, k, v, mask.repeat_interleave(q.shape[1] // k.shape[1], 1), enable_gqa=True)


def by_pool(
    q: Tensor, k: Tensor, v: Tensor, pool: Pool, kernel: int, stride: int, size: int, *, fill: float = -math.inf,
    count: int = 3, local: int = 1, init: int = 0,
) -> Tensor:  # fmt: skip
    q, k, v = as_projected(q, k, v)
    p = of_group(weights_of(q, k, kernel, stride, fill), k)
    return select(q, k, v, pool(p, -(-q.shape[2] // size)), size, count, local, init)


def slices(p: Tensor, blocks: int, steps: int, weights: dict[int, float]) -> Tensor:
    """Added up: window `steps * j + c` with a weight by `c`."""
    first, last = min(weights), max(weights)
    padded = F.pad(p, (-first, steps * blocks + last - p.shape[-1]))
    total: Tensor | int = 0
    for c, weight in weights.items():
        part = padded[..., c - first :: steps][..., :blocks]
        total = total + (part if weight == 1 else weight * part)
    assert isinstance(total, Tensor)
    return total


# ---- looked through ----


@positive(selects=True, length=120)
def longer_windows(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """Of two blocks each: a block is touched by the window that starts in it and the one before."""
    return by_pool(q, k, v, lambda p, n: F.pad(p, (1, n - p.shape[-1])).unfold(-1, 2, 1).sum(-1), 32, 16, 16)


@positive(selects=True, length=120)
def longer_windows_by_slices(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    def pool(p: Tensor, n: int) -> Tensor:
        p = F.pad(p, (0, n - p.shape[-1]))
        return p + F.pad(p[..., :-1], (1, 0))

    return by_pool(q, k, v, pool, 32, 16, 16, fill=LOWEST)


@positive(selects=True, length=150)
def windows_of_three_blocks(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    return by_pool(q, k, v, lambda p, n: slices(p, n, 1, {-2: 1, -1: 1, 0: 1}), 48, 16, 16, local=2, count=4)


@positive(selects=True, length=280)
def definition_of_nsa(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """Windows of 32 every 16, blocks of 64, each window as often as it shares 16 tokens with a block."""

    def pool(p: Tensor, n: int) -> Tensor:
        padded = F.pad(p, (1, 4 * n + 1 - p.shape[-1]))
        return sum(padded[..., i + j :: 4][..., :n] for i in range(4) for j in range(2))  # type: ignore[return-value]

    return by_pool(q, k, v, pool, 32, 16, 64, count=3, init=1)


@positive(selects=True, length=264)
def definition_by_weights(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    return by_pool(q, k, v, lambda p, n: slices(p, n, 4, {-1: 1, 0: 2, 1: 2, 2: 2, 3: 1}), 32, 16, 64, local=2)


@positive(selects=True, length=264)
def definition_by_unfolding_twice(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    def pool(p: Tensor, n: int) -> Tensor:
        return F.pad(p, (1, 4 * n - p.shape[-1])).unfold(-1, 2, 1).sum(-1).unfold(-1, 4, 4).mean(-1)

    return by_pool(q, k, v, pool, 32, 16, 64)


@positive(selects=True, length=150)
def several_windows_to_a_block(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """The mean over the group too, in one step."""
    q, k, v = as_projected(q, k, v)
    n = -(-q.shape[2] // 32)
    p = weights_of(q, k, 16, 16)
    p = F.pad(p, (0, 2 * n - p.shape[-1])).unflatten(1, (k.shape[1], -1)).unflatten(-1, (n, 2))
    return select(q, k, v, p.mean(2).sum(-1), 32)


@positive(selects=True, length=160)
def several_windows_averaged(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    def pool(p: Tensor, n: int) -> Tensor:
        return F.avg_pool1d(p.flatten(0, 2)[:, None], 2, 2).view(*p.shape[:3], n)

    return by_pool(q, k, v, pool, 16, 16, 32)


@positive(selects=True, length=160)
def largest_of_several_windows(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    return by_pool(q, k, v, lambda p, n: p.unflatten(-1, (n, 2)).amax(-1), 16, 16, 32)


@positive(selects=True, length=180, specialises=True)
def largest_by_a_pooling_function(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    def pool(p: Tensor, n: int) -> Tensor:
        return F.max_pool1d(F.pad(p, (0, 2 * n - p.shape[-1])).flatten(0, 1), 2, 2).unflatten(0, p.shape[:2])

    return by_pool(q, k, v, pool, 16, 16, 32)


# ---- the selection is left ----


@positive(length=264)
def each_touching_window_once(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """Not as often as it overlaps."""
    return by_pool(q, k, v, lambda p, n: F.pad(p, (1, 4 * n - p.shape[-1])).unfold(-1, 5, 4).sum(-1), 32, 16, 64)


@positive(length=264)
def only_windows_that_start_in_the_block(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    return by_pool(q, k, v, lambda p, n: F.pad(p, (0, 4 * n - p.shape[-1])).unflatten(-1, (n, 4)).sum(-1), 32, 16, 64)


@positive(length=264)
def largest_of_those_that_start_in_it(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    return by_pool(q, k, v, lambda p, n: F.pad(p, (0, 4 * n - p.shape[-1])).unflatten(-1, (n, 4)).amax(-1), 32, 16, 64)


@positive(length=120)
def windows_one_block_late(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    return by_pool(q, k, v, lambda p, n: F.pad(p, (0, n + 1 - p.shape[-1])).unfold(-1, 2, 1).sum(-1), 32, 16, 16)


@positive(length=120)
def windows_one_block_early(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    return by_pool(q, k, v, lambda p, n: slices(p, n, 1, {-2: 1, -1: 1}), 32, 16, 16)


@positive(length=120)
def windows_weighed_by_age(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    return by_pool(q, k, v, lambda p, n: slices(p, n, 1, {-1: 0.5, 0: 1}), 32, 16, 16)


@positive(length=120)
def the_newer_minus_the_older(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    return by_pool(q, k, v, lambda p, n: slices(p, n, 1, {-1: -1, 0: 1}), 32, 16, 16)


@positive(length=120)
def sum_of_the_largest_heads(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    q, k, v = as_projected(q, k, v)
    p = weights_of(q, k, 32, 16).unflatten(1, (k.shape[1], -1))
    scores = slices(p.amax(2), -(-q.shape[2] // 16), 1, {-1: 1, 0: 1})
    return select(q, k, v, scores, 16)


@positive(length=120)
def largest_of_two_and_summed_afterwards(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """Over the heads."""
    q, k, v = as_projected(q, k, v)
    p = weights_of(q, k, 32, 16)
    p = F.pad(p, (1, -(-q.shape[2] // 16) - p.shape[-1])).unfold(-1, 2, 1).amax(-1)
    return select(q, k, v, of_group(p, k), 16)


@positive(length=120)
def of_two_softmaxes(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    q, k, v = as_projected(q, k, v)
    p, sharper = (of_group(weights_of(q * by, k, 32, 16), k) for by in (1.0, 2.0))
    n = -(-q.shape[2] // 16)
    return select(q, k, v, slices(p, n, 1, {0: 1}) + slices(sharper, n, 1, {-1: 1}), 16)


@positive(length=120)
def only_even_windows_count_twice(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    def pool(p: Tensor, n: int) -> Tensor:
        p = p.masked_fill(torch.arange(p.shape[-1]) % 2 == 1, 0.0)
        return slices(p, n, 1, {-1: 1, 0: 1})

    return by_pool(q, k, v, pool, 32, 16, 16)


@positive(length=120)
def windows_that_ended_a_while_ago(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """Seen sixteen tokens after they are complete: of another length, if they are windows."""
    q, k, v = as_projected(q, k, v)
    t = q.shape[2]
    means = windows_of(k, 32, 16).repeat_interleave(q.shape[1] // k.shape[1], 1)
    seen = completed(t, means.shape[2], 48, 16)
    p = of_group((q @ means.mT).masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(), k)
    return select(q, k, v, slices(p, -(-t // 16), 1, {-1: 1, 0: 1}), 16)


@positive(length=120)
def rows_that_see_no_window_weigh_all_alike(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """Those of the future too, so that their blocks do not all have a score of 0."""
    q, k, v = as_projected(q, k, v)
    t = q.shape[2]
    means = windows_of(k, 32, 16).repeat_interleave(q.shape[1] // k.shape[1], 1)
    p = (q @ means.mT).masked_fill(~completed(t, means.shape[2], 32, 16), LOWEST).softmax(-1)
    return select(q, k, v, slices(of_group(p, k), -(-t // 16), 1, {-1: 1, 0: 1}), 16)


@positive(length=150)
def many_blocks_before_the_first_window(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """Which all have a score of 0; a topk may take any, `select_blocks` takes the first."""
    return by_pool(q, k, v, lambda p, n: slices(p, n, 1, dict.fromkeys(range(-3, 1), 1.0)), 64, 16, 16, count=8)


@positive(length=120)
def hidden_windows_that_rank_last(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """With -inf where nothing is seen yet, which a topk takes only after the future's."""
    q, k, v = as_projected(q, k, v)
    t, n = q.shape[2], -(-q.shape[2] // 16)
    p = of_group(weights_of(q, k, 32, 16), k)
    p = p.masked_fill(~completed(t, p.shape[-1], 32, 16), -math.inf)
    p = F.pad(p, (1, n - p.shape[-1]), value=-math.inf).unfold(-1, 2, 1).amax(-1)
    return select(q, k, v, p, 16)


# Where a window touches two blocks, both often have one score: a topk may take either.


@positive(length=264)
def largest_of_touching_windows(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    def pool(p: Tensor, n: int) -> Tensor:
        return F.max_pool1d(F.pad(p, (1, 4 * n - p.shape[-1])).flatten(0, 1), 5, 4).unflatten(0, p.shape[:2])

    return by_pool(q, k, v, pool, 32, 16, 64)


@positive(length=120)
def largest_of_two(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    return by_pool(q, k, v, lambda p, n: F.pad(p, (1, n - p.shape[-1])).unfold(-1, 2, 1).amax(-1), 32, 16, 16)
