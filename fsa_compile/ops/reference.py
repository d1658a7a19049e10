"""The specification in plain PyTorch: the oracle for every other implementation, never the fast path.

It materialises every score and loops over packed sequences on the host. Any floating dtype works, float64 included;
gradients come from plain autograd. Products are in the inputs' dtype and softmax in at least float32, as eager
attention is usually written, so at a 16-bit dtype it is also the measure of what plain PyTorch loses there. Arguments
are those of the operators of the same name, but `lse` has the dtype of the softmax.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "compressed_attention",
    "mean_compress",
    "nsa_attention",
    "select_blocks",
    "selected_attention",
    "sliding_window_attention",
]


def mean_compress(
    x: Tensor,
    *,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    cu_seqlens: Tensor | None = None,
    seqused: Tensor | None = None,
    leftpad: Tensor | None = None,
) -> Tensor:
    """Stage 1: means of windows of `kernel_size` tokens, `kernel_stride` apart. [B, T, H, D] -> [B, NC, H, D]."""
    windows: dict[str, Any] = {"kernel_size": kernel_size, "kernel_stride": kernel_stride}
    count = max(0, (x.shape[1] - kernel_size) // kernel_stride + 1)
    if cu_seqlens is not None or seqused is not None or leftpad is not None:
        rows = count if cu_seqlens is None else x.shape[1] // kernel_stride
        out = x.new_zeros(x.shape[0], rows, *x.shape[2:]) + _nothing(x)
        runs = _runs(x.shape[0], x.shape[1], x.shape[1], cu_seqlens, None, seqused, leftpad) or []
        for run, row in zip(runs, _compressed_runs(runs, cu_seqlens is not None, **windows), strict=True):
            out[row.batch, row.keys] = mean_compress(x[run.batch, run.keys], **windows)
        return out
    if count == 0:
        return x[:, :0] * 1
    windowed = x.unfold(1, kernel_size, kernel_stride)  # [B, NC, H, D, kernel_size]
    return windowed.to(_softmax_dtype(x)).mean(-1).to(x.dtype)


def compressed_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    *,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    seq_len_k: int | None = None,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Stage 2: attention over the compressed tokens whose whole window is in the past."""
    length = q.shape[1] if seq_len_k is None else seq_len_k
    runs = _runs(q.shape[0], q.shape[1], length, cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k)
    if runs is not None:
        options: dict[str, Any] = {"kernel_size": kernel_size, "kernel_stride": kernel_stride}
        runs = _compressed_runs(runs, cu_seqlens_q is not None, **options)
        return _each(compressed_attention, runs, q, k_cmp, v_cmp, with_length=True, scale=scale, **options)
    visible = _visible_windows(q, k_cmp, length, kernel_size, kernel_stride)
    return _attention(q, k_cmp, v_cmp, visible, scale)


def select_blocks(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor | None,
    *,
    block_size: int = 64,
    num_selected: int = 16,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    init_blocks: int = 1,
    local_blocks: int = 2,
    seq_len_k: int | None = None,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    pool: str = "overlap",
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
) -> Tensor:
    """Stage 3: the forced blocks, then the highest scores; ascending, -1 filling the end. [B, T, HK, S] int32."""
    windows: dict[str, Any] = {"kernel_size": kernel_size, "kernel_stride": kernel_stride}
    selection: dict[str, Any] = {"block_size": block_size, "num_selected": num_selected}
    selection |= {"init_blocks": init_blocks, "local_blocks": local_blocks}
    selection |= {"scale": scale, "pool": pool}
    length = q.shape[1] if seq_len_k is None else seq_len_k
    runs = _runs(q.shape[0], q.shape[1], length, cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k)
    if runs is not None:
        chosen = torch.full((*q.shape[:2], k_cmp.shape[2], num_selected), -1, dtype=torch.int32, device=q.device)
        for run in _compressed_runs(runs, cu_seqlens_q is not None, **windows):
            b, rows, cols, length = run
            lse_ = None if lse is None else lse[b, rows]
            chosen[b, rows] = select_blocks(
                q[b, rows], k_cmp[b, cols], lse_, seq_len_k=length, **windows, **selection
            )  # fmt: skip
        return chosen
    score = block_scores(q, k_cmp, lse, block_size=block_size, seq_len_k=length, scale=scale, pool=pool, **windows)
    block = torch.arange(score.shape[-1], device=q.device)
    current = (_positions(q, length) // block_size)[:, None, None]  # [T, 1, 1]
    forced = (block < init_blocks) | (block > current - local_blocks)
    score = score.masked_fill(forced, torch.inf).masked_fill(block > current, -torch.inf)
    future = (block > current).expand_as(score)
    # stable: ties to the lower block id, which no block of the future has
    order = score.sort(dim=-1, descending=True, stable=True).indices[..., :num_selected]
    last = order.shape[-1]  # sorts behind every block
    chosen = torch.where(future.gather(-1, order), block.numel(), order).sort(-1).values
    chosen = torch.where(chosen == block.numel(), -1, chosen)
    return F.pad(chosen, (0, num_selected - last), value=-1).to(torch.int32)


def block_scores(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor | None,
    *,
    block_size: int = 64,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    seq_len_k: int | None = None,
    scale: float | None = None,
    pool: str = "overlap",
) -> Tensor:
    """Scores of the blocks of unpacked sequences, nothing forced or masked: [B, T, HK, ceil(Tk / block_size)]."""
    seq_len = q.shape[1]
    num_compressed, num_kv_heads = k_cmp.shape[1:3]
    length = seq_len if seq_len_k is None else seq_len_k
    visible = _visible_windows(q, k_cmp, length, kernel_size, kernel_stride)
    logits = _logits(q, k_cmp, scale).masked_fill(~visible, -torch.inf)  # [B, T, HQ, NC]
    p = logits
    if lse is not None:
        lse = lse.to(logits.dtype).masked_fill(lse == -torch.inf, 0)  # sees nothing: exp(-inf - 0) = 0
        p = (logits - lse[..., None]).exp()
    group = p.unflatten(2, (num_kv_heads, q.shape[2] // num_kv_heads)).sum(3)  # [B, T, HK, NC]
    steps, overlap = block_size // kernel_stride, kernel_size // kernel_stride
    num_blocks = -(-length // block_size)
    more = (overlap - 1, max(0, steps * num_blocks - num_compressed))
    if pool == "max":
        group = F.pad(group.masked_fill(~visible, -torch.inf), more, value=-torch.inf)
        columns = [group[..., m:][..., : num_blocks * steps : steps] for m in range(steps + overlap - 1)]
        columns = [F.pad(column, (0, num_blocks - column.shape[-1]), value=-torch.inf) for column in columns]
        highest = torch.stack(columns).amax(0)
        return highest if lse is None else highest.clamp(min=0)
    group = F.pad(group, more)
    score = torch.zeros_like(group[..., : num_blocks * steps : steps])
    for m in range(steps):
        for n in range(overlap):
            score = score + group[..., m + n :][..., : num_blocks * steps : steps]
    return score


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    *,
    block_size: int = 64,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    loop_order: str = "auto",
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Stage 4: exact attention over the tokens of the selected blocks that are not in the future."""
    runs = _runs(q.shape[0], q.shape[1], k.shape[1], cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k)
    if runs is not None:
        return _each(selected_attention, runs, q, k, v, block_indices, block_size=block_size, scale=scale)
    num_blocks = -(-k.shape[1] // block_size)
    ids = block_indices.long()
    ids = torch.where(
        (ids < 0) | (ids >= num_blocks), num_blocks, ids
    )  # -1 and ids out of range: a column cut off below
    selected = torch.zeros(*ids.shape[:-1], num_blocks + 1, dtype=torch.bool, device=q.device)
    selected = selected.scatter(-1, ids, True)[..., :num_blocks]  # [B, T, HK, NB]
    key = torch.arange(k.shape[1], device=q.device)
    visible = selected[..., key // block_size]  # [B, T, HK, Tk]
    visible = visible & (key <= _positions(q, k.shape[1])[:, None])[:, None]
    return _attention(q, k, v, visible.repeat_interleave(q.shape[2] // k.shape[2], 2), scale)


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window_size: int,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The window branch: attention over the query's own key and the `window_size - 1` keys before it."""
    runs = _runs(q.shape[0], q.shape[1], k.shape[1], cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k)
    if runs is not None:
        return _each(sliding_window_attention, runs, q, k, v, window_size=window_size, scale=scale)
    key = torch.arange(k.shape[1], device=q.device)
    position = _positions(q, k.shape[1])[:, None]
    visible = (key <= position) & (key > position - window_size)  # [T, Tk]
    return _attention(q, k, v, visible[:, None], scale)


def nsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_cmp: Tensor | None = None,
    g_slc: Tensor | None = None,
    g_swa: Tensor | None = None,
    *,
    k_cmp: Tensor | None = None,
    v_cmp: Tensor | None = None,
    block_indices: Tensor | None = None,
    block_size: int = 64,
    num_selected: int = 16,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    init_blocks: int = 1,
    local_blocks: int = 2,
    window_size: int = 512,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    loop_order: str = "auto",
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
) -> Tensor:
    """All four stages and the gates: `g_cmp * o_cmp + g_slc * o_slc + g_swa * o_swa`."""
    packed: dict[str, Any] = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "scale": scale}
    packed |= {"seqused_k": seqused_k, "leftpad_k": leftpad_k}
    windows: dict[str, Any] = {"kernel_size": kernel_size, "kernel_stride": kernel_stride}
    keys: dict[str, Any] = {"cu_seqlens": cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k}
    keys |= {"seqused": seqused_k, "leftpad": leftpad_k, **windows}
    if k_cmp is None:
        k_cmp = mean_compress(k, **keys)
    if v_cmp is None:
        v_cmp = mean_compress(v, **keys)
    o_cmp, lse = compressed_attention(q, k_cmp, v_cmp, **windows, seq_len_k=k.shape[1], **packed)
    if block_indices is None:
        with torch.no_grad():
            block_indices = select_blocks(
                q,
                k_cmp,
                lse,
                block_size=block_size,
                num_selected=num_selected,
                init_blocks=init_blocks,
                local_blocks=local_blocks,
                seq_len_k=k.shape[1],
                **windows,
                **packed,
            )
    o_slc, _ = selected_attention(q, k, v, block_indices, block_size=block_size, **packed)
    total = o_slc if g_slc is None else g_slc[..., None] * o_slc
    if g_cmp is not None:
        total = total + g_cmp[..., None] * o_cmp
    if g_swa is not None and window_size > 0:
        o_swa, _ = sliding_window_attention(q, k, v, window_size=window_size, **packed)
        total = total + g_swa[..., None] * o_swa
    return total.to(q.dtype)


def _softmax_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _logits(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    """[B, T, HQ, Tk]: query head h against key head h // G."""
    group_size = q.shape[2] // k.shape[2]
    logits = torch.einsum("bthd,bkhd->bthk", q, k.repeat_interleave(group_size, 2))
    return logits.to(_softmax_dtype(q)) * (q.shape[3] ** -0.5 if scale is None else scale)


def _attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """Softmax attention over the keys that are visible; `visible` broadcasts to [B, T, HQ, Tk].

    A row that sees no key has output 0 and lse -inf, and no NaN in its gradients.
    """
    logits = _logits(q, k, scale).masked_fill(~visible, -torch.inf)
    values = v.repeat_interleave(q.shape[2] // k.shape[2], 2)
    if k.shape[1] == 0:  # amax of nothing is an error
        return torch.einsum("bthk,bkhd->bthd", logits.to(v.dtype), values), logits.sum(-1) - torch.inf
    highest = logits.detach().amax(-1, keepdim=True)
    empty = highest == -torch.inf
    weights = (logits - highest.masked_fill(empty, 0)).exp()
    total = weights.sum(-1, keepdim=True).masked_fill(empty, 1)  # 1: neither the division nor the logarithm meets a 0
    out = torch.einsum("bthk,bkhd->bthd", (weights / total).to(v.dtype), values)
    lse = (highest.masked_fill(empty, 0) + total.log()).masked_fill(empty, -torch.inf)
    return out, lse[..., 0]


def _positions(q: Tensor, seq_len_k: int) -> Tensor:
    """Position of each query: the queries are the last ones of the sequence."""
    return torch.arange(seq_len_k - q.shape[1], seq_len_k, device=q.device)


def _visible_windows(q: Tensor, k_cmp: Tensor, seq_len_k: int, kernel_size: int, kernel_stride: int) -> Tensor:
    """[T, 1, NC]: whether compressed token i ends at or before position t."""
    end = torch.arange(k_cmp.shape[1], device=q.device) * kernel_stride + kernel_size - 1
    return (end <= _positions(q, seq_len_k)[:, None])[:, None]


class _Run(NamedTuple):
    """Rows of queries and of keys that belong together, and how many tokens the keys stand for."""

    batch: slice
    rows: slice
    keys: slice
    length: int


def _runs(
    batch: int, seq_len: int, seq_len_k: int, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
    seqused_k: Tensor | None, leftpad_k: Tensor | None,
) -> list[_Run] | None:  # fmt: skip
    """The sequences of a packed or padded call, never outside the tensors; None if it is neither."""
    runs = []
    if cu_seqlens_q is not None:
        starts = cu_seqlens_q.clamp(0, seq_len).tolist()
        starts_k = (cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k).clamp(0, seq_len_k).tolist()
        for q, k in zip(pairwise(starts), pairwise(starts_k), strict=True):
            runs.append(_Run(slice(0, 1), slice(*q), slice(*k), max(0, k[1] - k[0])))
    elif seqused_k is not None or leftpad_k is not None:
        for b in range(batch):
            first = 0 if leftpad_k is None else min(max(int(leftpad_k[b]), 0), seq_len_k)
            end = seq_len_k if seqused_k is None else min(max(int(seqused_k[b]), 0), seq_len_k)
            length = max(0, end - first)
            runs.append(_Run(slice(b, b + 1), slice(0, seq_len), slice(first, first + length), length))
    else:
        return None
    return runs


def _compressed_runs(runs: list[_Run], packed: bool, kernel_size: int, kernel_stride: int) -> list[_Run]:
    """The same where the keys are compressed tokens; a padded batch row's begin at row 0."""
    made = []
    for run in runs:
        first = run.keys.start // kernel_stride if packed else 0
        count = max(0, (run.length - kernel_size) // kernel_stride + 1)
        made.append(run._replace(keys=slice(first, first + count)))
    return made


def _each(
    attention: Callable[..., tuple[Tensor, Tensor]], runs: list[_Run], q: Tensor, k: Tensor, v: Tensor, *rows: Tensor,
    with_length: bool = False, **options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """An attention over each run alone; rows of none have output 0 and lse -inf."""
    out = v.new_zeros(*q.shape[:3], v.shape[3]) + _nothing(q)
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=_softmax_dtype(q)) + _nothing(q)
    for run in runs:
        at, of = run[:2], (run.batch, run.keys)
        length = {"seq_len_k": run.length} if with_length else {}
        out[at], lse[at] = attention(q[at], k[of], v[of], *(x[at] for x in rows), **length, **options)
    return out, lse


def _nothing(x: Tensor) -> Tensor:
    """0, and a function of `x` for autograd."""
    return x[:, :0].sum()
