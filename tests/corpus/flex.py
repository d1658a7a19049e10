"""FlexAttention whose mask_mod reads block ids, and what looks like it: forward only, as it is on the CPU.

Block tables have blocks of 32 here, but for one program: the length is not a multiple of it, nor of BLOCK.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, and_masks, create_block_mask, flex_attention

from fsa_compile.testing import handwritten

from . import BLOCK, Attention, Program
from .positives import blocks_of

FLEX_POSITIVES: dict[str, Program] = {}
FLEX_NEAR_MISSES: dict[str, Program] = {}

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _positive(**options: Any) -> Callable[[Attention], Attention]:
    def register(fn: Attention) -> Attention:
        FLEX_POSITIVES[fn.__name__] = Program(fn.__name__, fn, **options)
        return fn

    return register


def _near_miss(reason: str, **options: Any) -> Callable[[Attention], Attention]:
    def register(fn: Attention) -> Attention:
        FLEX_NEAR_MISSES[fn.__name__] = Program(fn.__name__, fn, reason=reason, **options)
        return fn

    return register


def scattered(ids: Tensor, t: int) -> Tensor:
    chosen = torch.zeros(*ids.shape[:-1], blocks_of(t), dtype=torch.bool, device=ids.device)
    return chosen.scatter_(-1, ids, True)


def attend(q: Tensor, k: Tensor, v: Tensor, mask_mod: MaskMod, block: int = 32, **options: Any) -> Any:
    b, h, t, _ = q.shape
    made = create_block_mask(mask_mod, b, h, t, t, device=q.device, BLOCK_SIZE=block)
    return flex_attention(q, k, v, block_mask=made, enable_gqa=q.shape[1] != k.shape[1], **options)


def of_blocks(selected: Tensor, group: int) -> MaskMod:
    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return selected[b, h // group, i, j // BLOCK] & (j <= i)

    return mask_mod


def causal_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j


# ---- selected ----


@_positive()
def flex_of_scattered_blocks(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    return attend(q, k, v, of_blocks(scattered(ids, q.shape[2]), q.shape[1] // k.shape[1]))


@_positive()
def flex_of_compared_ids(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    group = q.shape[1] // k.shape[1]

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (ids[b, h // group, i] == j // BLOCK).any(-1) & (i >= j)

    return attend(q, k, v, mask_mod, scale=0.3)


@_positive(static_only=True)
def flex_of_one_hot(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    chosen = torch.nn.functional.one_hot(ids, blocks_of(q.shape[2])).sum(-2) > 0
    chosen = chosen.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return attend(q, k, v, lambda b, h, i, j: chosen[b, h, i, j // BLOCK] & (i - j >= 0))


@_positive()
def flex_of_anded_mods(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    selected, group = scattered(ids, q.shape[2]), q.shape[1] // k.shape[1]

    def chosen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return selected[b, h // group, i, j // BLOCK]

    return attend(q, k, v, and_masks(chosen, causal_mod))


@_positive(padded=True)
def flex_of_padded_ids(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    group, t = q.shape[1] // k.shape[1], q.shape[2]
    blocks = blocks_of(t)
    spare = torch.where(ids < 0, blocks, ids)
    selected = torch.zeros(*ids.shape[:-1], blocks + 1, dtype=torch.bool).scatter(-1, spare, True)[..., :blocks]
    return attend(q, k, v, of_blocks(selected, group))


@_positive()
def flex_of_token_mask(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t, group = q.shape[2], q.shape[1] // k.shape[1]
    tokens = scattered(ids, t).repeat_interleave(BLOCK, -1)[..., :t] & torch.ones(t, t, dtype=torch.bool).tril()
    return attend(q, k, v, lambda b, h, i, j: tokens[b, h // group, i, j], block=128)


@_positive(ids_of_query_heads=True)
def flex_of_each_query_head(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    return attend(q, k, v, of_blocks(scattered(ids, q.shape[2]), 1))


@_positive(group=1)
def flex_without_groups(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    return attend(q, k, v, of_blocks(scattered(ids, q.shape[2]), 1))


@_positive(layout="bthd")
def flex_of_another_layout(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    q, k, v, ids = (x.transpose(1, 2) for x in (q, k, v, ids))
    return attend(q, k, v, of_blocks(scattered(ids, q.shape[2]), q.shape[1] // k.shape[1])).transpose(1, 2)


@_positive(layout="bthd", padded=True)
def long_flex(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    return handwritten.flex(q, k, v, ids, block_size=BLOCK)


@_positive()
def flex_scaled_by_score_mod(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    mask_mod = of_blocks(scattered(ids, q.shape[2]), q.shape[1] // k.shape[1])
    return attend(q, k, v, mask_mod, score_mod=lambda score, b, h, i, j: 2 * score / 3.0)


@_positive()
def flex_with_own_block(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    selected, group = scattered(ids, q.shape[2]), q.shape[1] // k.shape[1]

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (selected[b, h // group, i, j // BLOCK] | (i // BLOCK == j // BLOCK)) & (i >= j)

    return attend(q, k, v, mask_mod)


@_positive()
def flex_whose_ids_are_shared_by_heads(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """One BlockMask for all heads, which the mask_mod does not tell apart."""
    selected = scattered(ids[:, 0], q.shape[2])
    made = create_block_mask(
        lambda b, h, i, j: selected[b, i, j // BLOCK] & (i >= j),
        q.shape[0], None, q.shape[2], q.shape[2], device=q.device, BLOCK_SIZE=(64, 32),
    )  # fmt: skip
    return flex_attention(q, k, v, block_mask=made, enable_gqa=True)


@_positive()
def flex_of_interleaved_heads(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """Query head h takes the ids of h modulo their heads, and the keys of h divided by the group: one list each."""
    selected, heads = scattered(ids, q.shape[2]), ids.shape[1]
    return attend(q, k, v, lambda b, h, i, j: selected[b, h % heads, i, j // BLOCK] & (j <= i))


@_positive()
def flex_with_ids_of_another_sequence(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """Of the last sequence for the first: the ids are taken from there."""
    selected, group, n = scattered(ids, q.shape[2]), q.shape[1] // k.shape[1], q.shape[0]
    return attend(q, k, v, lambda b, h, i, j: selected[n - 1 - b, h // group, i, j // BLOCK] & (j <= i))


# ---- windows ----


def _window(q: Tensor, k: Tensor, v: Tensor, mask_mod: MaskMod) -> Tensor:
    t = q.shape[2]
    made = create_block_mask(mask_mod, None, None, t, t, device=q.device, BLOCK_SIZE=32)
    return flex_attention(q, k, v, block_mask=made, enable_gqa=True)


@_positive(op="sliding_window_attention")
def flex_of_window(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    return _window(q, k, v, lambda b, h, i, j: (i >= j) & (i - j < 20))


@_positive(op="sliding_window_attention")
def flex_of_anded_window(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    return _window(q, k, v, and_masks(causal_mod, lambda b, h, i, j: j > i - 24))


# ---- near misses: masks ----


@_near_miss("lets query i see keys up to i + -1")
def flex_strictly_before(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    selected, group = scattered(ids, q.shape[2]), q.shape[1] // k.shape[1]
    return attend(q, k, v, lambda b, h, i, j: selected[b, h // group, i, j // BLOCK] & (j < i))


@_near_miss("not causal")
def flex_not_causal(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    selected, group = scattered(ids, q.shape[2]), q.shape[1] // k.shape[1]
    return attend(q, k, v, lambda b, h, i, j: selected[b, h // group, i, j // BLOCK] & (j >= 0))


@_near_miss("block|hides keys otherwise")
def flex_of_blocks_of_12(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    group, block = q.shape[1] // k.shape[1], 12

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (ids[b, h // group, i] == j // block).any(-1) & (i >= j)

    return attend(q, k, v, mask_mod)


@_near_miss("hides keys otherwise (keys far behind")
def flex_windowed(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    mask_mod = of_blocks(scattered(ids, q.shape[2]), q.shape[1] // k.shape[1])
    return attend(q, k, v, and_masks(mask_mod, lambda b, h, i, j: i - j < 40))


@_near_miss("not made of a list of block ids")
def flex_of_documents(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    document = ids[:, 0, :, 0].contiguous()
    return attend(q, k, v, lambda b, h, i, j: (document[b, i] == document[b, j]) & (i >= j))


@_near_miss("not causal token by token")
def flex_of_a_causal_mask_in_blocks(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """Whole blocks are seen as soon as they begin."""
    selected, group = scattered(ids, q.shape[2]), q.shape[1] // k.shape[1]
    return attend(q, k, v, lambda b, h, i, j: selected[b, h // group, i, j // BLOCK] & (j // BLOCK <= i // BLOCK))


@_near_miss("hides keys otherwise")
def flex_with_a_given_token_mask(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    mask_mod, seen = of_blocks(scattered(ids, q.shape[2]), q.shape[1] // k.shape[1]), v[:, 0, :, 0] > -1.0
    return attend(q, k, v, lambda b, h, i, j: mask_mod(b, h, i, j) & seen[b, j])


@_near_miss("dense attention, not NSA")
def flex_only_causal(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    return attend(q, k, v, causal_mod)


@_near_miss("it has no block_mask")
def flex_without_mask(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    return flex_attention(q, k, v, enable_gqa=True)


# ---- near misses: what else the call does ----


@_near_miss("score_mod")
def flex_with_bias(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    mask_mod = of_blocks(scattered(ids, q.shape[2]), q.shape[1] // k.shape[1])
    return attend(q, k, v, mask_mod, score_mod=lambda score, b, h, i, j: score + (j - i) * 0.1)


@_near_miss("score_mod")
def flex_capped(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    mask_mod = of_blocks(scattered(ids, q.shape[2]), q.shape[1] // k.shape[1])
    return attend(q, k, v, mask_mod, score_mod=lambda score, b, h, i, j: 20 * torch.tanh(score / 20))


@_near_miss("score_mod")
def flex_scaled_by_a_negative_number(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    mask_mod = of_blocks(scattered(ids, q.shape[2]), q.shape[1] // k.shape[1])
    return attend(q, k, v, mask_mod, score_mod=lambda score, b, h, i, j: score * -1.0)


@_near_miss("score_mod")
def flex_scaled_by_head(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    mask_mod = of_blocks(scattered(ids, q.shape[2]), q.shape[1] // k.shape[1])
    return attend(q, k, v, mask_mod, score_mod=lambda score, b, h, i, j: score * h)


@_near_miss("log-sum-exp")
def flex_with_lse(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    mask_mod = of_blocks(scattered(ids, q.shape[2]), q.shape[1] // k.shape[1])
    out, aux = attend(q, k, v, mask_mod, return_aux=AuxRequest(lse=True))
    return out * aux.lse[..., None].sigmoid()


# ---- near misses: tables ----


def _with_tables(
    q: Tensor, k: Tensor, v: Tensor, ids: Tensor, change: Callable[[BlockMask, MaskMod], BlockMask]
) -> Tensor:
    mask_mod = of_blocks(scattered(ids, q.shape[2]), q.shape[1] // k.shape[1])
    b, h, t, _ = q.shape
    made = create_block_mask(mask_mod, b, h, t, t, device=q.device, BLOCK_SIZE=32)
    return flex_attention(q, k, v, block_mask=change(made, mask_mod), enable_gqa=True)


@_near_miss("what create_block_mask makes of its mask_mod")
def flex_of_tables_by_hand(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    def first_block_only(made: BlockMask, mask_mod: MaskMod) -> BlockMask:
        count, at = made.kv_num_blocks.clamp(max=1), made.kv_indices.contiguous()
        return BlockMask.from_kv_blocks(count, at, BLOCK_SIZE=32, mask_mod=mask_mod, seq_lengths=made.seq_lengths)

    return _with_tables(q, k, v, ids, first_block_only)


@_near_miss("what create_block_mask makes of its mask_mod")
def flex_of_another_mask_mod(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """The tables are those of a causal mask: what they list as full is not masked."""

    def of_causal(made: BlockMask, mask_mod: MaskMod) -> BlockMask:
        t = q.shape[2]
        other = create_block_mask(causal_mod, q.shape[0], q.shape[1], t, t, device=q.device, BLOCK_SIZE=32)
        return BlockMask.from_kv_blocks(
            other.kv_num_blocks, other.kv_indices, other.full_kv_num_blocks, other.full_kv_indices, BLOCK_SIZE=32,
            mask_mod=mask_mod, seq_lengths=made.seq_lengths,
        )  # fmt: skip

    return _with_tables(q, k, v, ids, of_causal)


@_near_miss("what create_block_mask makes of its mask_mod|written to")
def flex_of_tables_before_a_write(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """The mask_mod sees what is selected now, the tables what was selected before."""
    selected, group = scattered(ids, q.shape[2]), q.shape[1] // k.shape[1]
    made = create_block_mask(
        of_blocks(selected, group), q.shape[0], q.shape[1], q.shape[2], q.shape[2], device=q.device, BLOCK_SIZE=32
    )
    selected[..., 0] = True
    return flex_attention(q, k, v, block_mask=made, enable_gqa=True)


@_near_miss("give create_block_mask the numbers of sequences and of query heads")
def flex_of_tables_of_one_head(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """The tables are those of head 0."""
    mask_mod = of_blocks(scattered(ids, q.shape[2]), q.shape[1] // k.shape[1])
    made = create_block_mask(mask_mod, q.shape[0], None, q.shape[2], q.shape[2], device=q.device, BLOCK_SIZE=32)
    return flex_attention(q, k, v, block_mask=made, enable_gqa=True)
