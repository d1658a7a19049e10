"""The other branches: compressed attention and sliding windows. `ids` is not used.

Compressed keys are means, which are not looked into: what counts is the mask.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import positive
from .positives import causal

KERNEL, STRIDE, WINDOW = 32, 16, 24
LOWEST = torch.finfo(torch.float32).min

compressed = functools.partial(positive, op="compressed_attention", length=88)
sliding = functools.partial(positive, op="sliding_window_attention")


def as_projected(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """Of one length, as projections of one tensor are."""
    heads = [x.shape[1] for x in (q, k, v)]
    return list(torch.cat([q, k, v], 1).split(heads, 1))


def windows_of(x: Tensor, kernel: int = KERNEL, stride: int = STRIDE) -> Tensor:
    """(b, h, windows, d): means of the windows along axis 2."""
    return x.unfold(2, kernel, stride).mean(-1)


def completed(t: int, n: int, kernel: int = KERNEL, stride: int = STRIDE) -> Tensor:
    """[t, n]: whether a window is in the past."""
    return torch.arange(n) * stride + kernel - 1 <= torch.arange(t)[:, None]


def grouped(q: Tensor, *keys: Tensor) -> list[Tensor]:
    return [x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in keys]


def weighed(scores: Tensor, mask: Tensor, v: Tensor, fill: float = -math.inf) -> Tensor:
    return scores.masked_fill(~mask, fill).softmax(-1) @ v


# ---- compressed attention ----


@compressed()
def compressed_sdpa(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    q, k, v = as_projected(q, k, v)
    k, v = windows_of(k), windows_of(v)
    return F.scaled_dot_product_attention(q, k, v, completed(q.shape[2], k.shape[2]), enable_gqa=True)


@compressed()
def compressed_sdpa_additive(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    q, k, v = as_projected(q, k, v)
    k, v = grouped(q, windows_of(k), windows_of(v))
    ends = torch.arange(k.shape[2]) * STRIDE + (KERNEL - 1)
    future = ends[None, :] > torch.arange(q.shape[2])[:, None]
    bias = torch.zeros(future.shape).masked_fill(future, -math.inf)
    return F.scaled_dot_product_attention(q, k, v, bias, scale=0.3)


@compressed()
def compressed_softmax(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """The first rows are NaN."""
    q, k, v = as_projected(q, k, v)
    k, v = grouped(q, windows_of(k), windows_of(v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    return weighed(scores, completed(q.shape[2], k.shape[2]), v)


@compressed()
def compressed_softmax_nan_to_num(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    q, k, v = as_projected(q, k, v)
    k, v = grouped(q, windows_of(k), windows_of(v))
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~completed(q.shape[2], k.shape[2]), -math.inf)
    return torch.nan_to_num(F.softmax(scores, dim=-1), nan=0.0) @ v


@compressed()
def compressed_softmax_hidden_again(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """Rows that see nothing weigh all alike, and are set to zero afterwards."""
    q, k, v = as_projected(q, k, v)
    k, v = grouped(q, windows_of(k), windows_of(v))
    mask = completed(q.shape[2], k.shape[2])
    weights = (q @ k.mT * 0.25).masked_fill(~mask, LOWEST).softmax(-1, dtype=torch.float32)
    return weights.masked_fill(~mask, 0.0).to(v.dtype) @ v


@compressed()
def compressed_softmax_of_rows_that_see(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    q, k, v = as_projected(q, k, v)
    k, v = grouped(q, windows_of(k), windows_of(v))
    mask = completed(q.shape[2], k.shape[2])
    weights = (q @ k.mT * 0.25 + torch.where(mask, 0.0, LOWEST)).softmax(-1)
    return torch.where(mask.any(-1, keepdim=True), weights, 0.0) @ v


@compressed()
def compressed_lowest(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """Rows that see nothing weigh all values alike."""
    q, k, v = as_projected(q, k, v)
    k, v = grouped(q, windows_of(k), windows_of(v))
    return weighed(q @ k.mT * 0.25, completed(q.shape[2], k.shape[2]), v, LOWEST)


@compressed(layout="bthd", static_only=True)  # nothing in it says that there are as many queries as keys
def compressed_einsum(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    b, t, h, d = q.shape
    hk = k.shape[2]
    k, v = (x.unfold(1, KERNEL, STRIDE).mean(-1) for x in (k, v))
    scores = torch.einsum("bikgd,bjkd->bkgij", q.view(b, t, hk, h // hk, d), k) * d**-0.5
    position = torch.arange(t)
    seen = (position - KERNEL + 1) // STRIDE + 1  # how many are complete
    scores = scores.masked_fill(torch.arange(k.shape[1]) >= seen[:, None], -math.inf)
    return torch.einsum("bkgij,bjkd->bikgd", scores.softmax(-1).nan_to_num(0.0), v).flatten(2, 3)


@compressed(static_only=True)  # a short sequence would have fewer windows seen than one
def compressed_clamped_count(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    q, k, v = as_projected(q, k, v)
    k, v = windows_of(k), windows_of(v)
    seen = ((torch.arange(q.shape[2]) - KERNEL) // STRIDE + 1 + 1 - 1).clamp(min=0)
    mask = torch.arange(k.shape[2])[None] < seen[:, None]  # one position late: strictly before
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


@compressed(static_only=True)
def compressed_whole_blocks(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """Blocks are windows; the last one is not full, and seen by nobody."""
    q, k, v = as_projected(q, k, v)
    t = q.shape[2]
    k, v = (F.pad(x, (0, 0, 0, -t % STRIDE)).unflatten(2, (-1, STRIDE)).mean(3) for x in (k, v))
    mask = torch.arange(k.shape[2]) < (torch.arange(t)[:, None] + 1) // STRIDE
    return F.scaled_dot_product_attention(q, *grouped(q, k, v), attn_mask=mask)


@compressed(static_only=True)  # by what it does: queries stand one position earlier
def compressed_blocks_before_the_own(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    q, k, v = as_projected(q, k, v)
    t = q.shape[2]
    k, v = (windows_of(x, STRIDE, STRIDE) for x in (k, v))
    mask = torch.arange(k.shape[2]) < torch.arange(t)[:, None] // STRIDE
    return F.scaled_dot_product_attention(q, *grouped(q, k, v), attn_mask=mask)


@compressed()
def compressed_from_ends(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    q, k, v = as_projected(q, k, v)
    t = q.shape[2]
    k, v = grouped(q, windows_of(k), windows_of(v))
    mask = torch.arange(t).unsqueeze(-1) >= torch.arange(KERNEL - 1, t, STRIDE).unsqueeze(0)
    return F.scaled_dot_product_attention(q, k, v, mask)


@compressed()
def compressed_flat_bmm(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    q, k, v = as_projected(q, k, v)
    b, h, t, d = q.shape
    k, v = (x.flatten(0, 1) for x in grouped(q, windows_of(k), windows_of(v)))
    scores = torch.bmm(q.reshape(b * h, t, d), k.transpose(1, 2)) * 0.2
    return weighed(scores, completed(t, k.shape[1]), v).view(b, h, t, d)


# ---- sliding windows ----


@sliding()
def window_sdpa(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    i = torch.arange(q.shape[2])
    mask = (i[:, None] >= i) & (i[:, None] - i < WINDOW)
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


@sliding()
def window_sdpa_additive(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = q.shape[2]
    hidden = torch.ones(t, t, dtype=torch.bool).triu(1) | torch.ones(t, t, dtype=torch.bool).tril(-WINDOW)
    bias = torch.zeros(t, t).masked_fill(hidden, LOWEST)
    return F.scaled_dot_product_attention(q, *grouped(q, k, v), attn_mask=bias)


@sliding()
def window_softmax(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = q.shape[2]
    i = torch.arange(t)
    mask = causal(t) & (i[:, None] - i[None] < WINDOW)
    k, v = grouped(q, k, v)
    return weighed(q @ k.mT * q.shape[-1] ** -0.5, mask, v)


@sliding()
def window_softmax_band(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = q.shape[2]
    k, v = grouped(q, k, v)
    return weighed(q @ k.mT * 0.25, torch.ones(t, t).tril().triu(1 - WINDOW).bool(), v, LOWEST)


@sliding(layout="bthd")
def window_einsum(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    b, t, h, d = q.shape
    hk = k.shape[2]
    scores = torch.einsum("bikgd,bjkd->bkgij", q.view(b, t, hk, h // hk, d), k) * d**-0.5
    i, j = torch.arange(t)[:, None], torch.arange(t)[None]
    scores = torch.where((j > i - WINDOW) & (j <= i), scores, -math.inf)
    return torch.einsum("bkgij,bjkd->bikgd", scores.softmax(-1), v).flatten(2, 3)


@sliding()
def window_two_masks(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = q.shape[2]
    k, v = grouped(q, k, v)
    scores = (q @ k.mT * 0.25).masked_fill(~causal(t), -math.inf)
    i = torch.arange(t)
    return scores.masked_fill((i[:, None] - i).abs() >= WINDOW, -math.inf).softmax(-1) @ v


@sliding()
def window_of_distances(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    i = torch.arange(q.shape[2])
    distance = i[:, None] - i[None, :]
    mask = torch.logical_and(distance >= 0, distance <= WINDOW - 1)
    bias = torch.full(mask.shape, -math.inf).masked_fill(mask, 0.0)
    k, v = grouped(q, k, v)
    return (q @ k.mT * 0.25 + bias).softmax(-1) @ v


def later_queries(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """With the first 40 positions as keys only."""

    @functools.wraps(fn)
    def wrapped(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        return fn(q[:, :, 40:], k, v, ids)

    return wrapped


@sliding(static_only=True)
@later_queries
def window_of_later_queries(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    i, j = torch.arange(k.shape[2] - q.shape[2], k.shape[2])[:, None], torch.arange(k.shape[2])
    mask = (j <= i) & (i < j + WINDOW)
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


@compressed(static_only=True)
@later_queries
def compressed_of_later_queries(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t, n = k.shape[2], q.shape[2]
    k, v = windows_of(k), windows_of(v)
    mask = completed(t, k.shape[2])[t - n :]
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
