"""NSA and dense attention in float64 for some rows only, so that results at benchmark lengths can be checked.

Arguments are whole tensors, `[1, T, H, D]`; a function gives the results of `rows` alone. Where the upstream gradient
is zero in all other rows, autograd of it gives every gradient that there is, whole.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def means(x: Tensor, kernel_size: int, kernel_stride: int) -> Tensor:
    """Compressed keys or values, all of them."""
    overlap, chunks = kernel_size // kernel_stride, x.shape[1] // kernel_stride
    chunk = x[:, : chunks * kernel_stride].unflatten(1, (chunks, kernel_stride)).mean(2)
    count = max(0, chunks - overlap + 1)
    return torch.stack([chunk[:, n : n + count] for n in range(overlap)]).mean(0)


def attention(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, visible: Tensor) -> Tensor:
    """`visible` broadcasts to [rows, HK, 1, keys]; a row that sees nothing gives 0."""
    return _by_head(probabilities(q, k, rows, visible), v[0].transpose(0, 1)).flatten(1, 2)[None]


def _by_head(x: Tensor, y: Tensor) -> Tensor:
    """[rows, HK, G, I] times [HK, I, J]: one product a head, which copies `y` for no row (a GB of each at 128K)."""
    return (x.transpose(0, 1).flatten(1, 2) @ y).unflatten(1, x.shape[::2]).transpose(0, 1)


def probabilities(q: Tensor, k: Tensor, rows: Tensor, visible: Tensor) -> Tensor:
    """[rows, HK, G, keys]."""
    group = q[0, rows].unflatten(1, (k.shape[2], -1))  # [rows, HK, G, D]
    logits = _by_head(group, k[0].permute(1, 2, 0)) * q.shape[3] ** -0.5
    seen = visible.any(-1, keepdim=True)
    return torch.where(seen, logits.masked_fill(~visible & seen, -torch.inf).softmax(-1), 0)


def dense(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    """Causal attention."""
    return attention(q, k, v, rows, _keys(k) <= _at(rows))


def window(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, window_size: int) -> Tensor:
    """Causal attention over the last `window_size` keys."""
    return attention(q, k, v, rows, (_keys(k) <= _at(rows)) & (_keys(k) > _at(rows) - window_size))


def selected(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, block_indices: Tensor, block_size: int, starts: Tensor | int = 0
) -> Tensor:
    """Causal attention over the blocks that `block_indices` ([1, T, HK, S]) names, counted from `starts` ([rows])."""
    ids = block_indices[0, rows].long()  # [rows, HK, S]
    num_blocks = -(-k.shape[1] // block_size)
    chosen = torch.zeros(*ids.shape[:2], num_blocks + 1, dtype=torch.bool, device=q.device)
    chosen = chosen.scatter(-1, ids.masked_fill(ids < 0, num_blocks), True)
    position = _keys(k) - torch.as_tensor(starts, device=q.device).reshape(-1, 1)  # [rows or 1, keys]
    block = torch.where(position < 0, num_blocks, position // block_size)[:, None]
    there = chosen.gather(-1, block.expand(*chosen.shape[:2], -1)) & (block < num_blocks)
    return attention(q, k, v, rows, there[:, :, None] & (_keys(k) <= _at(rows)))


def compressed(q: Tensor, k_cmp: Tensor, v_cmp: Tensor, rows: Tensor, kernel_size: int, kernel_stride: int) -> Tensor:
    """Attention over the compressed tokens that end by the query."""
    return attention(q, k_cmp, v_cmp, rows, _windows(k_cmp, rows, kernel_size, kernel_stride))


def blocks(
    q: Tensor, k_cmp: Tensor, rows: Tensor, kernel_size: int, kernel_stride: int, block_size: int, num_selected: int,
    init_blocks: int, local_blocks: int, seq_len: int,
) -> Tensor:  # fmt: skip
    """Selected blocks, [rows, HK, S], -1 for none."""
    p = probabilities(q, k_cmp, rows, _windows(k_cmp, rows, kernel_size, kernel_stride)).sum(2)
    steps, overlap = block_size // kernel_stride, kernel_size // kernel_stride
    num_blocks = -(-seq_len // block_size)
    p = F.pad(p, (overlap - 1, max(0, steps * num_blocks - p.shape[-1])))[..., : steps * num_blocks + overlap - 1]
    touching = p.unfold(-1, steps + overlap - 1, steps)  # [rows, HK, blocks, tokens that touch it]
    weights = F.pad(p.new_ones(overlap), (steps - 1, steps - 1)).unfold(0, steps, 1).sum(-1)
    block, current = torch.arange(num_blocks, device=q.device), (rows // block_size)[:, None, None]
    score = (touching * weights).sum(-1)
    score = score.masked_fill((block < init_blocks) | (block > current - local_blocks), torch.inf)
    score = score.masked_fill(block > current, -torch.inf)
    found = score.topk(min(num_selected, num_blocks), -1)
    return found.indices.masked_fill(found.values == -torch.inf, -1)


def missing(ids: Tensor, exact: Tensor) -> float:
    """The share of the exact blocks that `ids` lacks."""
    there = (exact[..., :, None] == ids[..., None, :]).any(-1) | (exact < 0)
    return 1 - float(there.double().mean())


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Of the Frobenius norms."""
    exact = exact.detach()
    return float((actual.double() - exact).norm() / exact.norm().clamp(min=1e-300))


def _keys(k: Tensor) -> Tensor:
    return torch.arange(k.shape[1], device=k.device)


def _at(rows: Tensor) -> Tensor:
    return rows[:, None, None, None]


def _windows(k_cmp: Tensor, rows: Tensor, kernel_size: int, kernel_stride: int) -> Tensor:
    return _keys(k_cmp) * kernel_stride + kernel_size - 1 <= _at(rows)
