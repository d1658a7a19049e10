"""Padding that is told by lengths, which are data: what is the operators', and what only looks like it.

Lengths are taken from `ids`. In a right-padded batch the queries of the padding still attend, and what they give is
part of the result.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import near_miss
from .branch_positives import LOWEST, WINDOW, as_projected, completed, grouped, sliding, windows_of
from .near_misses import chosen_tokens
from .positives import causal


def padding_of(ids: Tensor) -> Tensor:
    """[b, 1]: how many keys are padding; some of them more than there are keys, some negative."""
    return ids[:, 0, :1, 0] * 13 - 5


def recent(t: int) -> Tensor:
    i = torch.arange(t)
    return (i[:, None] >= i) & (i[:, None] - i < WINDOW)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


# ---- left padding of a sliding window ----


@sliding()
def window_padded_on_the_left(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = q.shape[2]
    real = torch.arange(t) >= padding_of(ids)
    return attend(q, k, v, recent(t) & real[:, None, None, :])


@sliding()
def window_of_lengths_from_the_end(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = q.shape[2]
    lengths = (ids[:, 0, 0, 0] + 1) * 14
    hidden = torch.arange(t)[None] < (t - lengths)[:, None]
    return attend(q, k, v, recent(t) & ~hidden[:, None, None])


@sliding()
def window_padded_softmax(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """NaN where a query sees nothing."""
    t = q.shape[2]
    k, v = grouped(q, k, v)
    mask = recent(t)[None, None] & (padding_of(ids)[:, :, None, None] <= torch.arange(t))
    return (q @ k.mT * 0.25).masked_fill(~mask, -math.inf).softmax(-1) @ v


@sliding()
def window_padded_lowest(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """The average of all where a query sees nothing."""
    t = q.shape[2]
    k, v = grouped(q, k, v)
    mask = recent(t)[None, None] & (padding_of(ids)[:, :, None, None] <= torch.arange(t))
    return (q @ k.mT * 0.25).masked_fill(~mask, LOWEST).softmax(-1) @ v


@sliding(static_only=True)
def later_queries_padded_on_the_left(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = k.shape[2]
    real = torch.arange(t) >= padding_of(ids)
    return attend(q[:, :, 40:], k, v, (recent(t)[40:] & real[:, None, None, :]))


# ---- nearly ----


@near_miss("as right padding does")
def window_padded_on_the_right(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = q.shape[2]
    real = torch.arange(t) < (t - padding_of(ids))
    return attend(q, k, v, recent(t) & real[:, None, None, :])


@near_miss("as right padding does")
def window_padded_on_both_sides(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = q.shape[2]
    real = (torch.arange(t) >= padding_of(ids)) & (torch.arange(t) < 60 + padding_of(ids))
    return attend(q, k, v, recent(t) & real[:, None, None, :])


@near_miss("not made of a list of block ids")
def window_of_padded_queries(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """It is queries that are padding: they see nothing, whatever is there."""
    t = q.shape[2]
    real = torch.arange(t) >= padding_of(ids)
    return attend(q, k, v, recent(t) & real[:, None, :, None])


@near_miss("depends on an axis that it may not depend on")
def window_padded_for_each_head(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = q.shape[2]
    real = torch.arange(t) >= (ids[:, :, 0, :1] * 9).repeat_interleave(2, 1)
    return attend(q, k, v, recent(t) & real[:, :, None, :])


@near_miss("depends on an axis that it may not depend on")
def window_padded_for_each_query(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """As documents that follow each other are."""
    t = q.shape[2]
    real = torch.arange(t) >= (ids[:, 0, :, :1] * 9)
    return attend(q, k, v, recent(t) & real[:, None])


@near_miss("not made of a list of block ids")
def window_padded_by_a_half(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = q.shape[2]
    real = torch.arange(t) >= padding_of(ids) / 2  # no integers
    return attend(q, k, v, recent(t) & real[:, None, None, :])


@near_miss("not made of a list of block ids")
def window_of_other_than_padding(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """Or'ed, where padding is and'ed."""
    t = q.shape[2]
    real = torch.arange(t) >= padding_of(ids)
    return attend(q, k, v, causal(t) & ((torch.arange(t)[:, None] - torch.arange(t) < WINDOW) | real[:, None, None, :]))


@near_miss("not made of a list of block ids|nothing in its mask")
def causal_padded_on_the_left(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """Without a window it is dense."""
    t = q.shape[2]
    real = torch.arange(t) >= padding_of(ids)
    return attend(q, k, v, causal(t) & real[:, None, None, :])


@near_miss("leftpad_k from the first key that counts")
def selected_padded_on_the_left(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """Blocks start at the first row, padding or not."""
    t = q.shape[2]
    real = torch.arange(t) >= padding_of(ids)
    mask = (chosen_tokens(ids, t) & causal(t)).repeat_interleave(2, 1)
    return attend(q, k, v, mask & real[:, None, None, :])


@near_miss("pad on the left and pass leftpad_k")
def selected_padded_on_the_right(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t = q.shape[2]
    real = torch.arange(t) < (ids[:, 0, 0, 0] * 20)[:, None]
    mask = (chosen_tokens(ids, t) & causal(t)).repeat_interleave(2, 1)
    return attend(q, k, v, mask & real[:, None, None, :])


@near_miss("which the operators take as leftpad_k or seqused_k")
def selected_with_a_mask_that_is_data(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """Any keys may be hidden."""
    t = q.shape[2]
    real = ids[:, 0, :, 0] > 0
    mask = (chosen_tokens(ids, t) & causal(t)).repeat_interleave(2, 1)
    return attend(q, k, v, mask & real.logical_not()[:, None, None, :])


@near_miss("hides them otherwise", length=88)
def compressed_padded_on_the_left(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    q, k, v = as_projected(q, k, v)
    k, v = windows_of(k), windows_of(v)
    real = torch.arange(k.shape[2]) >= ids[:, 0, :1, 0]
    return attend(q, k, v, completed(q.shape[2], k.shape[2]) & real[:, None, None, :])
