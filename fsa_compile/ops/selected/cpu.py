"""The selected branch on a CPU, key/value blocks outermost.

The queries of each block are listed and cut into tiles of one size; a tile is attended with its block whole, and the
parts of a row are merged by log-sum-exp in slot order (Flash Sparse Attention, arXiv 2508.18224, without its separate
pass for the row statistics). A row's current block, the only one that needs a causal mask, is a dense band and takes
no list. Rows are taken a chunk at a time, so what the parts occupy is bounded and memory linear in the length. Both
loop orders of the operator run this.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cpu_tiles import TILE_MULTIPLE, attend, gradients, tile_backward, tile_forward, widen, widen_gradients
from ..options import Layout, Selected
from ..runs import Results, Run, each_backward, each_forward, runs_of
from ..schema import impl
from . import portable

__all__ = ["selected_attention_backward", "selected_attention_forward"]

_PARTS_BYTES = 256 << 20  # the most that the parts of one chunk of rows may take
_NUM_CHUNKS = 8  # up to that size: a smaller buffer of parts stays nearer, but a block's list gets shorter
_TILES_BYTES = 2 << 20  # of the query rows gathered at a time: what stays in cache
_MAX_TILE_ROWS = 64


def selected_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, options: Selected, layout: Layout
) -> Results:
    """`fsa::selected_attention_forward`: `(out, shift, log_sum)`."""
    runs = runs_of(layout, q, k.shape[1], by_row=True)
    return each_forward(partial(_forward_of_run, options), runs, q, k, v, block_indices)


def selected_attention_backward(
    grad_out: Tensor | None, grad_log_sum: Tensor | None, q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor,
    out: Tensor, shift: Tensor, log_sum: Tensor, options: Selected, layout: Layout,
) -> Results:  # fmt: skip
    """`fsa::selected_attention_backward`: the gradients of q, k and v."""
    runs = runs_of(layout, q, k.shape[1], by_row=True)
    return each_backward(
        partial(_backward_of_run, options), runs, (grad_out, grad_log_sum), q, k, v, (out, shift, log_sum),
        block_indices,
    )  # fmt: skip


def _forward_of_run(options: Selected, run: Run, q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor) -> Results:
    """Of one sequence, whose batch is 1."""

    def forward(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        out, lse = q.new_empty(*q.shape[:3], v.shape[3]), torch.empty(q.shape[:3], dtype=dtype)
        wide_q, wide_k, wide_v = widen(q[0], k[0], v[0], options.scale, dtype)
        _forward(_Problem(wide_q, wide_k, wide_v, block_indices[0], options.block_size), out[0], lse[0])
        return out, lse

    careful = partial(portable.selected_attention_forward, q, k, v, block_indices, options, Layout())
    return attend(forward, k, options.scale, careful)


def _backward_of_run(
    options: Selected, run: Run, grads: tuple[Tensor | None, Tensor | None], q: Tensor, k: Tensor, v: Tensor,
    results: Results, block_indices: Tensor,
) -> Results:  # fmt: skip
    dq = q.new_empty(q.shape)
    grad_out, grad_log_sum = (None if x is None else x[0] for x in grads)
    out, shift, log_sum = (x[0] for x in results)
    grad, wide_q, wide_k, wide_v, delta, lse = widen_gradients(
        grad_out, grad_log_sum, q[0], k[0], v[0], out, shift, log_sum, options.scale
    )
    problem = _Problem(wide_q, wide_k, wide_v, block_indices[0], options.block_size)
    dk, dv = _backward(problem, grad, delta, lse, options.scale, dq[0])
    args = (*grads, q, k, v, block_indices, *results)
    careful = partial(portable.selected_attention_backward, *args, options, Layout())
    return gradients(dq, dk[None], dv[None], k, v, careful)


class _Problem:
    """One sequence in float32 or float64: q [T, HQ, W], k and v [Tk, HK, W], block_indices [T, HK, S]."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, block_size: int) -> None:
        self.seq_len, self.num_q_heads, self.width = q.shape
        self.seq_len_k, self.num_kv_heads, _ = k.shape
        self.group_size = self.num_q_heads // self.num_kv_heads
        self.num_slots = block_indices.shape[2]
        self.block_size = block_size
        self.offset = self.seq_len_k - self.seq_len
        self.num_blocks = -(-self.seq_len_k // block_size)
        self.q, self.block_indices = q, block_indices
        self.row_bytes = q[0].nbytes
        self.k, self.v = self.blocks(k), self.blocks(v)
        self.current = torch.arange(self.offset, self.seq_len_k) // block_size  # [T]

    def blocks(self, x: Tensor) -> Tensor:
        """[Tk, HK, W] -> [HK, NB, block_size, W], zeros after the last key."""
        x = F.pad(x, (0, 0, 0, 0, 0, self.num_blocks * self.block_size - self.seq_len_k))
        return x.unflatten(0, (self.num_blocks, self.block_size)).permute(2, 0, 1, 3).contiguous()

    def unblock(self, x: Tensor) -> Tensor:
        """The inverse of `blocks`."""
        return x.permute(1, 2, 0, 3).flatten(0, 1)[: self.seq_len_k]

    def rows(self, x: Tensor) -> Tensor:
        """[T, HQ, W] -> [T * HK + 1, G * W]: what one query has for one key head in a row, and a row of zeros to fill
        tiles with.
        """
        return F.pad(x.reshape(self.seq_len * self.num_kv_heads, -1), (0, 0, 0, 1))

    def chunks(self) -> list[tuple[int, int]]:
        most = _PARTS_BYTES // (self.num_slots * self.row_bytes)
        size = max(self.block_size, min(most, max(512, -(-self.seq_len // _NUM_CHUNKS))))
        return [(start, min(start + size, self.seq_len)) for start in range(0, self.seq_len, size)]


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """The rows of one chunk, listed by block and cut into tiles. A row is `token * HK + key head`, a block `key head *
    NB + block`.
    """

    rows: Tensor  # [num_tiles * size]: row of each place, T * HK where there is none
    blocks: Tensor  # [num_tiles]
    places: Tensor  # [rows of the chunk, S]: where each slot of a row is, -1 of none
    size: int

    def steps(self, row_bytes: int) -> list[tuple[slice, slice]]:
        """Tiles, and places in them, to take at a time."""
        step = max(1, _TILES_BYTES // (self.size * row_bytes))
        count = self.blocks.shape[0]
        tiles = (slice(start, min(start + step, count)) for start in range(0, count, step))
        return [(part, slice(part.start * self.size, part.stop * self.size)) for part in tiles]


def _tiles(problem: _Problem, start: int, stop: int) -> _Tiles:
    """Lists the slots whose block lies before the row's current one. Ids out of range, -1 and the current block are
    not listed.
    """
    num_kv_heads, num_blocks, num_slots = problem.num_kv_heads, problem.num_blocks, problem.num_slots
    ids = problem.block_indices[start:stop].long()
    whole = (ids >= 0) & (ids < problem.current[start:stop, None, None])
    num_lists = num_kv_heads * num_blocks
    ids = ids + (torch.arange(num_kv_heads) * num_blocks)[:, None]
    lists, entries = ids.masked_fill_(~whole, num_lists).flatten().sort(stable=True)
    counts = torch.bincount(lists, minlength=num_lists + 1)[:num_lists]
    count = int(counts.sum())
    size = _tile_rows(count / max(1, int((counts > 0).sum())))
    tiles = (counts + size - 1) // size
    ends = tiles.cumsum(0)
    lists, entries = lists[:count], entries[:count]
    shift = (ends - tiles) * size - (counts.cumsum(0) - counts)  # from place in the sorted lists to place in the tiles
    places = torch.arange(count) + shift[lists]
    num_tiles = int(ends[-1])
    rows = torch.full((num_tiles * size,), problem.seq_len * num_kv_heads)
    rows[places] = entries // num_slots + start * num_kv_heads
    slots = torch.full((ids.numel(),), -1)
    slots[entries] = places
    return _Tiles(rows, torch.repeat_interleave(torch.arange(num_lists), tiles), slots.view(-1, num_slots), size)


def _tile_rows(mean_length: float) -> int:
    """Half of a list's last tile is filling, on average: keep that at an eighth of the list."""
    size = _MAX_TILE_ROWS
    while size > TILE_MULTIPLE and size > mean_length / 4:
        size //= 2
    return size


def _parts(problem: _Problem, tiles: _Tiles, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """[num_tiles * size, G, W] in `buffer`, or in a larger one: the first touch of fresh memory costs as much as the
    attention.
    """
    shape = (tiles.rows.shape[0], problem.group_size, problem.width)
    count = math.prod(shape)
    if buffer.numel() < count:
        buffer = buffer.new_empty(count + count // 8)
    return buffer, buffer[:count].view(shape)


def _sum_slots(problem: _Problem, tiles: _Tiles, parts: Tensor, weights: Tensor) -> Tensor:
    """Adds up the parts of each row. parts: [num_tiles * size * G, W], weights: [rows, G, S], 0 of no slot -> [rows,
    G, W].
    """
    places, group_size = tiles.places, problem.group_size
    shape = (places.shape[0], group_size, problem.width)
    if parts.shape[0] == 0:
        return parts.new_zeros(shape)
    # a slot without a block points at another one of its row: with weight 0 it adds nothing, unless that is NaN anyway
    other = places.amax(1, keepdim=True)
    index = torch.where(places < 0, other.clamp(min=0), places)
    index = index[:, None] * group_size + torch.arange(group_size)[:, None]  # [rows, G, S]
    total = F.embedding_bag(
        index.flatten(0, 1), parts, per_sample_weights=weights.reshape(-1, problem.num_slots), mode="sum"
    )
    return total.view(shape).masked_fill_((other < 0)[..., None], 0)


def _diagonal(problem: _Problem, *tensors: Tensor) -> tuple[slice, list[Tensor]]:
    """Query rows by block. Each [T, HQ, W] -> [blocks, block_size, HQ, W], and which blocks of keys those are."""
    before = problem.offset % problem.block_size
    first = problem.offset // problem.block_size
    after = problem.num_blocks * problem.block_size - problem.seq_len_k
    blocked = [F.pad(x, (0, 0, 0, 0, before, after)).unflatten(0, (-1, problem.block_size)) for x in tensors]
    return slice(first, problem.num_blocks), blocked


def _undiagonal(problem: _Problem, x: Tensor) -> Tensor:
    """[blocks, block_size, ...] -> [T, ...]."""
    before = problem.offset % problem.block_size
    return x.flatten(0, 1)[before : before + problem.seq_len]


def _has_current(problem: _Problem) -> Tensor:
    """[T, HQ]: whether the row selects its own block."""
    has = (problem.block_indices == problem.current[:, None, None]).any(-1)
    return has.repeat_interleave(problem.group_size, 1)


def _heads(problem: _Problem, kv_head: int) -> slice:
    return slice(kv_head * problem.group_size, (kv_head + 1) * problem.group_size)


def _forward(problem: _Problem, out: Tensor, lse: Tensor) -> None:
    """Fills out [T, HQ, DV] and lse [T, HQ]."""
    group_size, width, num_slots = problem.group_size, problem.width, problem.num_slots
    own, own_lse = _forward_diagonal(problem)
    q_rows = problem.rows(problem.q)
    k_blocks, v_blocks = problem.k.flatten(0, 1), problem.v.flatten(0, 1)
    buffer = own.new_empty(0)
    for start, stop in problem.chunks():
        tiles = _tiles(problem, start, stop)
        buffer, parts = _parts(problem, tiles, buffer)
        parts_lse = own.new_empty(tiles.rows.shape[0], group_size)
        for step, places in tiles.steps(problem.row_bytes // problem.num_kv_heads):
            blocks = tiles.blocks[step]
            o, s = tile_forward(
                q_rows.index_select(0, tiles.rows[places]).view(blocks.shape[0], 1, -1, width),
                k_blocks.index_select(0, blocks)[:, None],
                v_blocks.index_select(0, blocks)[:, None],
            )
            parts[places] = o.view(-1, group_size, width)
            parts_lse[places] = s.view(-1, group_size)
        none = (tiles.places < 0).flatten()
        row_lse = parts_lse.new_full((none.shape[0], group_size), -torch.inf)
        if parts.shape[0]:
            row_lse = parts_lse.index_select(0, tiles.places.flatten().clamp(min=0))
            row_lse.masked_fill_(none[:, None], -torch.inf)
        row_lse = row_lse.view(-1, num_slots, group_size).transpose(1, 2)  # [rows, G, S]
        current_lse = own_lse[start:stop].reshape(-1, group_size)
        highest = torch.maximum(row_lse.amax(-1), current_lse).masked_fill_(~_seen(row_lse, current_lse), 0)
        total = (row_lse - highest[..., None]).exp_().sum(-1) + (current_lse - highest).exp_()
        total = total.log_().add_(highest)  # -inf where nothing is seen
        anchor = total.masked_fill(total == -torch.inf, 0)
        merged = _sum_slots(problem, tiles, parts.flatten(0, 1), (row_lse - anchor[..., None]).exp_())
        merged += own[start:stop].reshape(-1, group_size, width) * (current_lse - anchor).exp_()[..., None]
        out[start:stop] = merged.view(stop - start, -1, width)[..., : out.shape[2]].to(out.dtype)
        lse[start:stop] = total.view(stop - start, -1)


def _seen(row_lse: Tensor, current_lse: Tensor) -> Tensor:
    return (row_lse.amax(-1) > -torch.inf) | (current_lse > -torch.inf)


def _forward_diagonal(problem: _Problem) -> tuple[Tensor, Tensor]:
    """Each row against its own block: [T, HQ, W], lse [T, HQ], -inf where the row does not select that block."""
    blocks, (q,) = _diagonal(problem, problem.q)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3])
    for head in range(problem.num_kv_heads):
        part = q[:, :, _heads(problem, head)].transpose(1, 2)
        k, v = (x[head, blocks, None].expand(-1, problem.group_size, -1, -1) for x in (problem.k, problem.v))
        o, s = tile_forward(part, k, v, causal=True)
        out[:, :, _heads(problem, head)] = o.transpose(1, 2)
        lse[:, :, _heads(problem, head)] = s.transpose(1, 2)
    return _undiagonal(problem, out), _undiagonal(problem, lse).masked_fill(~_has_current(problem), -torch.inf)


def _backward(
    problem: _Problem, grad: Tensor, delta: Tensor, lse: Tensor, scale: float, dq: Tensor
) -> tuple[Tensor, Tensor]:
    """Fills dq [T, HQ, D]; returns dk, dv [Tk, HK, W]."""
    group_size, width = problem.group_size, problem.width
    dq_own, dk, dv = _backward_diagonal(problem, grad, delta, lse)
    dk_blocks, dv_blocks = dk.flatten(0, 1), dv.flatten(0, 1)
    k_blocks, v_blocks = problem.k.flatten(0, 1), problem.v.flatten(0, 1)
    q_rows, grad_rows = problem.rows(problem.q), problem.rows(grad)
    delta_rows = F.pad(delta.reshape(-1, group_size), (0, 0, 0, 1))
    # what fills a tile has no share in the gradients
    lse_rows = F.pad(lse.view(-1, group_size), (0, 0, 0, 1), value=torch.inf)
    buffer = grad.new_empty(0)
    for start, stop in problem.chunks():
        tiles = _tiles(problem, start, stop)
        buffer, parts = _parts(problem, tiles, buffer)
        for step, places in tiles.steps(problem.row_bytes // problem.num_kv_heads):
            blocks, rows = tiles.blocks[step], tiles.rows[places]
            grad_part, q_part = (
                x.index_select(0, rows).view(blocks.shape[0], 1, -1, width) for x in (grad_rows, q_rows)
            )
            delta_part, lse_part = (
                x.index_select(0, rows).view(blocks.shape[0], 1, -1) for x in (delta_rows, lse_rows)
            )
            dq_part, dk_part, dv_part = tile_backward(
                grad_part,
                q_part,
                k_blocks.index_select(0, blocks)[:, None],
                v_blocks.index_select(0, blocks)[:, None],
                delta_part,
                lse_part,
            )
            parts[places] = dq_part.view(-1, group_size, width)
            dk_blocks.index_add_(0, blocks, dk_part[:, 0])
            dv_blocks.index_add_(0, blocks, dv_part[:, 0])
        weights = (tiles.places >= 0).to(parts.dtype)[:, None].expand(-1, group_size, -1)
        total = _sum_slots(problem, tiles, parts.flatten(0, 1), weights).view(stop - start, -1, width)
        dq[start:stop] = (total + dq_own[start:stop])[..., : dq.shape[2]].mul_(scale).to(dq.dtype)
    return problem.unblock(dk), problem.unblock(dv)


def _backward_diagonal(problem: _Problem, grad: Tensor, delta: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The share of each row's own block: dq [T, HQ, W], dk, dv [HK, NB, block_size, W]."""
    lse = lse.masked_fill(~_has_current(problem), torch.inf)
    blocks, (grad, q, delta) = _diagonal(problem, grad, problem.q, delta[..., None])
    before = problem.offset % problem.block_size
    after = problem.num_blocks * problem.block_size - problem.seq_len_k
    lse = F.pad(lse, (0, 0, before, after), value=torch.inf).unflatten(0, (-1, problem.block_size))
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(problem.k), torch.zeros_like(problem.v)
    for head in range(problem.num_kv_heads):
        heads = _heads(problem, head)
        grad_part, q_part, delta_part, lse_part = (x[:, :, heads].transpose(1, 2) for x in (grad, q, delta, lse))
        k, v = (x[head, blocks, None].expand(-1, problem.group_size, -1, -1) for x in (problem.k, problem.v))
        dq_part, dk_part, dv_part = tile_backward(grad_part, q_part, k, v, delta_part[..., 0], lse_part, causal=True)
        dq[:, :, heads] = dq_part.transpose(1, 2)
        dk[head, blocks], dv[head, blocks] = dk_part.sum(1), dv_part.sum(1)
    return _undiagonal(problem, dq), dk, dv


impl("selected_attention_forward", selected_attention_forward, "CPU")
impl("selected_attention_backward", selected_attention_backward, "CPU")
