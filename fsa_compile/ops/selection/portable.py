"""Block selection in plain PyTorch, for any device: chunk by chunk, as `ops/attend.py`."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attend import by_group, by_head, chunks, product
from ..options import Layout, Selection
from ..visibility import compressed_visibility

__all__ = ["select_blocks"]


def select_blocks(q: Tensor, k_cmp: Tensor, lse: Tensor | None, options: Selection, layout: Layout) -> Tensor:
    """[B, T, HK, num_selected] int32."""
    batch, seq_len = q.shape[:2]
    num_compressed, num_kv_heads = k_cmp.shape[1:3]
    kernel_size, kernel_stride, block_size = options.kernel_size, options.kernel_stride, options.block_size
    visibility = compressed_visibility(q, num_compressed, kernel_size, kernel_stride, options.seq_len_k, layout)
    length, first = options.seq_len_k, None
    if visibility.q_sequence is not None and layout.packed_keys is not None:
        length = length if layout.max_seqlen_k is None else min(length, layout.max_seqlen_k)
        # the row of k_cmp that each query's block 0 starts at
        first = (layout.packed_keys.clamp(0, options.seq_len_k)[:-1] // kernel_stride)[visibility.q_sequence].long()
    num_blocks = -(-length // block_size)
    steps, overlap = block_size // kernel_stride, kernel_size // kernel_stride
    k_cmp = by_head(k_cmp)
    if lse is not None:
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # a row that sees nothing: exp(s - inf) = 0
    hidden = 0.0 if options.pool == "overlap" else -torch.inf
    pool = _overlap_scores if options.pool == "overlap" else _highest_scores
    chosen = torch.empty(batch, seq_len, num_kv_heads, options.num_selected, dtype=torch.int32, device=q.device)
    for start, stop, lo, hi in chunks(visibility, q):
        rows = slice(start, stop)
        blocks = num_blocks
        if first is None and visibility.offset is not None:
            blocks = max(0, min(num_blocks, (visibility.offset + stop - 1) // block_size + 1))
        weights = q.new_zeros(batch, num_kv_heads, stop - start, 0, dtype=torch.float32)
        if hi > lo:
            scores = product(by_group(q[:, rows], num_kv_heads), k_cmp[:, lo:hi].transpose(1, 2)).mul_(options.scale)
            scores = scores.view(batch, num_kv_heads, stop - start, -1, hi - lo)
            if lse is not None:
                scores.sub_(lse[:, rows].unflatten(2, (num_kv_heads, -1)).transpose(1, 2)[..., None]).exp_()
            # masked after the exponential: of a hidden key that may be inf, which masked_fill_ drops
            visibility.hide_(scores, rows, lo, hi, hidden)
            weights = scores.sum(3)
        score = pool(weights, blocks, steps, overlap, None if first is None else first[rows, None] - lo)
        if options.pool == "max" and lse is not None:
            score = score.clamp_(min=0)  # probabilities, 0 where none is visible
        current = (visibility.q_position[:, rows] // block_size)[:, None, :, None]
        chosen[:, rows] = _top_blocks(score, current, options).transpose(1, 2)
    return chosen


def _overlap_scores(weights: Tensor, num_blocks: int, steps: int, overlap: int, first: Tensor | None) -> Tensor:
    """Sums what the group gives to the compressed tokens that touch each block, once for each stride they share.

    weights: [B, HK, rows, n] of the compressed tokens; `steps` tokens start in a block and `overlap` touch a token's
    stride. first: [rows, 1], the column of a row's block 0, None where that is the first. Returns [B, HK, rows,
    num_blocks].
    """
    count = weights.shape[-1]
    if first is None:
        span = steps * num_blocks
        weights = F.pad(weights, (overlap - 1, max(0, span - count)))
        boxes = weights[..., :span]
        for shift in range(1, overlap):
            boxes = boxes + weights[..., shift : span + shift]
        return boxes.unflatten(-1, (num_blocks, steps)).sum(-1)
    span = count + overlap  # scores at every compressed token, of which each query then takes those at its own blocks
    # the tokens of other sequences are zeros, which add nothing
    weights = F.pad(weights, (overlap - 1, steps + overlap))
    boxes = functools.reduce(torch.add, (weights[..., n : n + span + steps - 1] for n in range(overlap)))
    score = functools.reduce(torch.add, (boxes[..., m : m + span] for m in range(steps)))
    return _at_blocks(score, num_blocks, steps, first, 0.0)


def _highest_scores(weights: Tensor, num_blocks: int, steps: int, overlap: int, first: Tensor | None) -> Tensor:
    """As `_overlap_scores`, but the largest of a block; hidden tokens have -inf, and so have blocks without others."""
    span = weights.shape[-1] + overlap if first is not None else steps * num_blocks
    more = max(0, span + steps - weights.shape[-1])
    weights = F.pad(weights, (overlap - 1, more), value=-torch.inf)
    columns = (weights[..., n : n + span] for n in range(steps + overlap - 1))
    score = functools.reduce(torch.maximum, columns)  # at every compressed token
    if first is None:
        return score[..., ::steps]
    return _at_blocks(score, num_blocks, steps, first, -torch.inf)


def _at_blocks(score: Tensor, num_blocks: int, steps: int, first: Tensor, outside: float) -> Tensor:
    span = score.shape[-1]
    column = first + steps * torch.arange(num_blocks, device=score.device)  # [rows, num_blocks]
    beyond = column >= span
    column = column.clamp(0, span - 1).expand(*score.shape[:2], -1, -1)
    return score.gather(-1, column).masked_fill_(beyond, outside)


def _top_blocks(score: Tensor, current: Tensor, options: Selection) -> Tensor:
    """[B, HK, rows, num_blocks] scores, [b, 1, rows, 1] current block -> [B, HK, rows, num_selected] ids, ascending, -1
    at the end.

    A block's key is its score's bits, made to order as the scores do, above its negated id: so that orders as score and
    then id do, and as no two keys are equal, top-k, which promises nothing for ties, has one answer.
    """
    num_selected, num_blocks = options.num_selected, score.shape[-1]
    block = torch.arange(num_blocks, device=score.device)
    low = (1 << 31) - 1
    forced = (block < options.init_blocks) | (block > current - options.local_blocks)
    # forced blocks rank first; NaN ranks last; adding 0 makes one zero of two
    score = (
        score.nan_to_num(-torch.inf, torch.finfo(torch.float32).max, -torch.inf)
        .masked_fill_(forced, torch.inf)
        .add_(0.0)
    )
    bits = score.view(torch.int32)
    key = bits.bitwise_xor((bits >> 31).bitwise_and_(low)).long().add_(1 << 31)
    key = key.bitwise_left_shift_(31).add_(low - block).masked_fill_(block > current, -1)
    key = key.topk(min(num_selected, num_blocks), dim=-1).values
    ids = low - key.bitwise_and(low)
    ids = ids.masked_fill_(key < 0, low).sort(-1).values
    ids = ids.masked_fill_(ids == low, -1).to(torch.int32)
    return F.pad(ids, (0, num_selected - ids.shape[-1]), value=-1)
