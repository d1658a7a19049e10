"""Masks that are nearly a sliding window or that of compressed keys."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import near_miss
from .branch_positives import (
    KERNEL,
    LOWEST,
    STRIDE,
    WINDOW,
    as_projected,
    completed,
    grouped,
    windows_of,
)
from .positives import causal


def window(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


# ---- windows ----


@near_miss("lets query i see keys up to i + -1")
def window_that_leaves_the_own_key_out(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    i = torch.arange(q.shape[2])
    return window(q, k, v, (i[:, None] > i) & (i[:, None] - i < WINDOW))


@near_miss("lets query i see keys up to i + 1")
def window_of_the_next_key(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    i = torch.arange(q.shape[2])
    return window(q, k, v, (i[:, None] + 1 >= i) & (i[:, None] - i < WINDOW))


@near_miss("lets query i see keys up to i + 23")
def window_on_both_sides(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    i = torch.arange(q.shape[2])
    return window(q, k, v, (i[:, None] - i).abs() < WINDOW)


@near_miss("lets query i see keys up to i + 23")
def window_of_the_future(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    i = torch.arange(q.shape[2])
    return window(q, k, v, (i[:, None] <= i) & (i - i[:, None] < WINDOW))


@near_miss("not made of a list of block ids")
def window_by_block(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """The own block and the one before."""
    i = torch.arange(q.shape[2])
    return window(q, k, v, (i[:, None] >= i) & (i[:, None] // STRIDE - i // STRIDE < 2))


@near_miss("not made of a list of block ids")
def window_that_grows(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    i = torch.arange(q.shape[2])
    return window(q, k, v, (i[:, None] >= i) & (i >= i[:, None] // 2))


@near_miss("not made of a list of block ids")
def window_and_the_first_keys(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """Attention sinks."""
    i = torch.arange(q.shape[2])
    return window(q, k, v, (i[:, None] >= i) & ((i[:, None] - i < WINDOW) | (i < 4)))


@near_miss("not made of a list of block ids")
def dilated_window(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    i = torch.arange(q.shape[2])
    near = (i[:, None] >= i) & (i[:, None] - i < WINDOW)
    return window(q, k, v, near & ((i[:, None] - i) % 2 == 0))


@near_miss("not made of a list of block ids")
def window_with_padding(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    i = torch.arange(q.shape[2])
    near = (i[:, None] >= i) & (i[:, None] - i < WINDOW)
    real = (k.detach()[:, :1, :, 0] > -1)[:, :, None]
    return window(q, k, v, near & real)


@near_miss("only causal|nothing in its mask")
def window_as_wide_as_the_keys(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    i = torch.arange(q.shape[2])
    return window(q, k, v, (i[:, None] >= i) & (i[:, None] - i < q.shape[2]))


@near_miss("hidden scores are -1e+09")
def window_filled_with_minus_1e9(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    i = torch.arange(q.shape[2])
    k, v = grouped(q, k, v)
    mask = causal(q.shape[2]) & (i[:, None] - i < WINDOW)
    return (q @ k.mT).masked_fill(~mask, -1e9).softmax(-1) @ v


@near_miss("changed between the softmax")
def window_of_probabilities(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """Hidden after the softmax, which is over all the past."""
    t = q.shape[2]
    i = torch.arange(t)
    k, v = grouped(q, k, v)
    weights = (q @ k.mT * 0.25).masked_fill(~causal(t), -math.inf).softmax(-1)
    return weights.masked_fill(i[:, None] - i >= WINDOW, 0.0) @ v


# ---- compressed keys ----


@near_miss("no mask|nothing in its mask")
def compressed_not_causal(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, windows_of(k), windows_of(v), enable_gqa=True)


@near_miss("not causal token by token")
def compressed_of_the_future(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    k, v = windows_of(k), windows_of(v)
    return window(q, k, v, ~completed(q.shape[2], k.shape[2]))


@near_miss("hides them otherwise", length=88)
def compressed_in_a_window(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    k, v = windows_of(k), windows_of(v)
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    return window(q, k, v, completed(q.shape[2], k.shape[2]) & (j * STRIDE + 48 > i))


@near_miss("hides them otherwise", length=88)
def compressed_but_the_first(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    k, v = windows_of(k), windows_of(v)
    return window(q, k, v, completed(q.shape[2], k.shape[2]) & (torch.arange(k.shape[2]) > 0))


@near_miss("not causal token by token|hides")
def compressed_with_one_that_all_see(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    k, v = windows_of(k), windows_of(v)
    return window(q, k, v, completed(q.shape[2], k.shape[2]) | (torch.arange(k.shape[2]) == 0))


@near_miss("compressed keys, where the last query sees")
def compressed_keys_too_few(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """The last window is missing."""
    k, v = windows_of(k)[:, :, :-1], windows_of(v)[:, :, :-1]
    return window(q, k, v, completed(q.shape[2], k.shape[2]))


@near_miss("compressed keys, where the last query sees")
def compressed_seen_early(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """When it begins: the last query sees one more than there are."""
    k, v = windows_of(k), windows_of(v)
    return window(q, k, v, torch.arange(k.shape[2]) * STRIDE <= torch.arange(q.shape[2])[:, None])


@near_miss("which is not the same as -inf where a query sees no key")
def compressed_biased_by_the_lowest(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    k, v = grouped(q, windows_of(k), windows_of(v))
    bias = torch.where(completed(q.shape[2], k.shape[2]), 0.0, LOWEST)
    return (q @ k.mT * 0.25 + bias).softmax(-1) @ v


@near_miss("gradients NaN")
def compressed_biased_and_nan_to_num(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    k, v = grouped(q, windows_of(k), windows_of(v))
    bias = torch.where(completed(q.shape[2], k.shape[2]), 0.0, -math.inf)
    return (q @ k.mT * 0.25 + bias).softmax(-1).nan_to_num() @ v


@near_miss("changed between the softmax")
def compressed_probabilities_hidden_otherwise(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    k, v = grouped(q, windows_of(k), windows_of(v))
    t, n = q.shape[2], k.shape[2]
    weights = (q @ k.mT * 0.25).masked_fill(~completed(t, n), LOWEST).softmax(-1)
    return weights.masked_fill(~completed(t, n, KERNEL + STRIDE), 0.0) @ v


@near_miss("changed between the softmax")
def compressed_probabilities_with_ones(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    k, v = grouped(q, windows_of(k), windows_of(v))
    scores = (q @ k.mT * 0.25).masked_fill(~completed(q.shape[2], k.shape[2]), -math.inf)
    return scores.softmax(-1).nan_to_num(1.0) @ v


@near_miss("softmax is not over the keys")
def compressed_with_a_null_key(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """A key of zeros that every query sees, so that no row is empty."""
    q, k, v = as_projected(q, k, v)
    k, v = grouped(q, windows_of(k), windows_of(v))
    scores = (q @ k.mT * 0.25).masked_fill(~completed(q.shape[2], k.shape[2]), -math.inf)
    weights = F.pad(scores, (1, 0)).softmax(-1)[..., 1:]
    return weights @ v
