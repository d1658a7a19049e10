"""The specification in plain PyTorch: the oracle for every other implementation, never the fast path.

It materialises every score and loops over packed sequences on the host. Any floating dtype works, float64 included;
gradients come from plain autograd. Products are in the inputs' dtype and softmax in at least float32, as eager
attention is usually written, so at a 16-bit dtype it is also the measure of what plain PyTorch loses there. Arguments
and defaults are those of the operators of the same name, but nothing is checked, and `lse` has the dtype of the
softmax.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import unchecked
from .options import Compressed, Compression, Layout, Nsa, Selected, Selection, Sliding


@unchecked("mean_compress")
def mean_compress(x: Tensor, options: Compression, layout: Layout) -> Tensor:
    """Stage 1: means of windows of `kernel_size` tokens, `kernel_stride` apart. [B, T, H, D] -> [B, NC, H, D]."""
    kernel_size, kernel_stride = options
    count = max(0, (x.shape[1] - kernel_size) // kernel_stride + 1)
    runs = _runs(x.shape[0], x.shape[1], x.shape[1], layout)
    if runs is not None:
        rows = count if layout.packed_keys is None else x.shape[1] // kernel_stride
        out = x.new_zeros(x.shape[0], rows, *x.shape[2:]) + _nothing(x)
        for run, row in zip(runs, _compressed_runs(runs, layout, options), strict=True):
            out[row.batch, row.keys] = mean_compress(x[run.batch, run.keys], **options._asdict())
        return out
    if count == 0:
        return x[:, :0] * 1
    windowed = x.unfold(1, kernel_size, kernel_stride)  # [B, NC, H, D, kernel_size]
    return windowed.to(_softmax_dtype(x)).mean(-1).to(x.dtype)


@unchecked("compressed_attention")
def compressed_attention(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, options: Compressed, layout: Layout
) -> tuple[Tensor, Tensor]:
    """Stage 2: attention over the compressed tokens whose whole window is in the past."""
    runs = _runs(q.shape[0], q.shape[1], options.seq_len_k, layout)
    if runs is not None:
        return _each(compressed_attention, _compressed_runs(runs, layout, options), q, k_cmp, v_cmp, options=options)
    visible = _visible_windows(q, k_cmp, options.seq_len_k, options.kernel_size, options.kernel_stride)
    return _attention(q, k_cmp, v_cmp, visible, options.scale)


@unchecked("select_blocks")
def select_blocks(q: Tensor, k_cmp: Tensor, lse: Tensor | None, options: Selection, layout: Layout) -> Tensor:
    """Stage 3: the forced blocks, then the highest scores; ascending, -1 filling the end. [B, T, HK, S] int32."""
    block_size, num_selected, length = options.block_size, options.num_selected, options.seq_len_k
    runs = _runs(q.shape[0], q.shape[1], length, layout)
    if runs is not None:
        chosen = torch.full((*q.shape[:2], k_cmp.shape[2], num_selected), -1, dtype=torch.int32, device=q.device)
        for b, rows, cols, length in _compressed_runs(runs, layout, options):
            lse_ = None if lse is None else lse[b, rows]
            alone = options._replace(seq_len_k=length)
            chosen[b, rows] = select_blocks(q[b, rows], k_cmp[b, cols], lse_, **alone._asdict())
        return chosen
    score = block_scores(q, k_cmp, lse, **options._asdict())
    block = torch.arange(score.shape[-1], device=q.device)
    current = (_positions(q, length) // block_size)[:, None, None]  # [T, 1, 1]
    forced = (block < options.init_blocks) | (block > current - options.local_blocks)
    score = score.masked_fill(forced, torch.inf).masked_fill(block > current, -torch.inf)
    future = (block > current).expand_as(score)
    # stable: ties to the lower block id, which no block of the future has
    order = score.sort(dim=-1, descending=True, stable=True).indices[..., :num_selected]
    last = order.shape[-1]  # sorts behind every block
    chosen = torch.where(future.gather(-1, order), block.numel(), order).sort(-1).values
    chosen = torch.where(chosen == block.numel(), -1, chosen)
    return F.pad(chosen, (0, num_selected - last), value=-1).to(torch.int32)


@unchecked("select_blocks")
def block_scores(q: Tensor, k_cmp: Tensor, lse: Tensor | None, options: Selection, layout: Layout) -> Tensor:
    """Scores of the blocks of unpacked sequences, nothing forced or masked: [B, T, HK, ceil(Tk / block_size)]."""
    num_compressed, num_kv_heads = k_cmp.shape[1:3]
    block_size, kernel_size, kernel_stride = options.block_size, options.kernel_size, options.kernel_stride
    visible = _visible_windows(q, k_cmp, options.seq_len_k, kernel_size, kernel_stride)
    logits = _logits(q, k_cmp, options.scale).masked_fill(~visible, -torch.inf)  # [B, T, HQ, NC]
    p = logits
    if lse is not None:
        lse = lse.to(logits.dtype).masked_fill(lse == -torch.inf, 0)  # sees nothing: exp(-inf - 0) = 0
        p = (logits - lse[..., None]).exp()
    group = p.unflatten(2, (num_kv_heads, q.shape[2] // num_kv_heads)).sum(3)  # [B, T, HK, NC]
    steps, overlap = block_size // kernel_stride, kernel_size // kernel_stride
    num_blocks = -(-options.seq_len_k // block_size)
    more = (overlap - 1, max(0, steps * num_blocks - num_compressed))
    if options.pool == "max":
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


@unchecked("selected_attention")
def selected_attention(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, options: Selected, layout: Layout
) -> tuple[Tensor, Tensor]:
    """Stage 4: exact attention over the tokens of the selected blocks that are not in the future."""
    runs = _runs(q.shape[0], q.shape[1], k.shape[1], layout)
    if runs is not None:
        return _each(selected_attention, runs, q, k, v, block_indices, options=options)
    block_size = options.block_size
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
    return _attention(q, k, v, visible.repeat_interleave(q.shape[2] // k.shape[2], 2), options.scale)


@unchecked("sliding_window_attention")
def sliding_window_attention(
    q: Tensor, k: Tensor, v: Tensor, options: Sliding, layout: Layout
) -> tuple[Tensor, Tensor]:
    """The window branch: attention over the query's own key and the `window_size - 1` keys before it."""
    runs = _runs(q.shape[0], q.shape[1], k.shape[1], layout)
    if runs is not None:
        return _each(sliding_window_attention, runs, q, k, v, options=options)
    key = torch.arange(k.shape[1], device=q.device)
    position = _positions(q, k.shape[1])[:, None]
    visible = (key <= position) & (key > position - options.window_size)  # [T, Tk]
    return _attention(q, k, v, visible[:, None], options.scale)


@unchecked("nsa_attention")
def nsa_attention(
    q: Tensor, k: Tensor, v: Tensor, g_cmp: Tensor | None, g_slc: Tensor | None, g_swa: Tensor | None, options: Nsa,
    layout: Layout,
) -> Tensor:  # fmt: skip
    """All four stages and the gates: `g_cmp * o_cmp + g_slc * o_slc + g_swa * o_swa`."""
    k_cmp, v_cmp, block_indices = options[:3]
    packed: dict[str, Any] = {"scale": options.scale, **layout._asdict()}
    windows: dict[str, Any] = {"kernel_size": options.kernel_size, "kernel_stride": options.kernel_stride}
    keys: dict[str, Any] = {"cu_seqlens": layout.packed_keys, "seqused": layout.seqused_k, "leftpad": layout.leftpad_k}
    if k_cmp is None:
        k_cmp = mean_compress(k, **windows, **keys)
    if v_cmp is None:
        v_cmp = mean_compress(v, **windows, **keys)
    compressed: dict[str, Any] = {"seq_len_k": k.shape[1], **windows, **packed}
    o_cmp, lse = compressed_attention(q, k_cmp, v_cmp, **compressed)
    if block_indices is None:
        forced: dict[str, Any] = {"init_blocks": options.init_blocks, "local_blocks": options.local_blocks}
        sizes: dict[str, Any] = {"block_size": options.block_size, "num_selected": options.num_selected}
        with torch.no_grad():
            block_indices = select_blocks(q, k_cmp, lse, **sizes, **forced, **compressed)
    o_slc, _ = selected_attention(q, k, v, block_indices, block_size=options.block_size, **packed)
    total = o_slc if g_slc is None else g_slc[..., None] * o_slc
    if g_cmp is not None:
        total = total + g_cmp[..., None] * o_cmp
    if g_swa is not None and options.window_size > 0:
        o_swa, _ = sliding_window_attention(q, k, v, window_size=options.window_size, **packed)
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


def _runs(batch: int, seq_len: int, seq_len_k: int, layout: Layout) -> list[_Run] | None:
    """The sequences of a packed or padded call, never outside the tensors; None if it is neither."""
    runs = []
    if layout.packed_keys is not None:
        starts_k = layout.packed_keys.clamp(0, seq_len_k).tolist()
        starts = starts_k if layout.cu_seqlens_q is None else layout.cu_seqlens_q.clamp(0, seq_len).tolist()
        for q, k in zip(pairwise(starts), pairwise(starts_k), strict=True):
            runs.append(_Run(slice(0, 1), slice(*q), slice(*k), max(0, k[1] - k[0])))
    elif layout.is_padded:
        for b in range(batch):
            first = 0 if layout.leftpad_k is None else min(max(int(layout.leftpad_k[b]), 0), seq_len_k)
            end = seq_len_k if layout.seqused_k is None else min(max(int(layout.seqused_k[b]), 0), seq_len_k)
            length = max(0, end - first)
            runs.append(_Run(slice(b, b + 1), slice(0, seq_len), slice(first, first + length), length))
    else:
        return None
    return runs


def _compressed_runs(runs: list[_Run], layout: Layout, windows: Compression | Compressed | Selection) -> list[_Run]:
    """The same where the keys are compressed tokens; a padded batch row's begin at row 0."""
    made = []
    for run in runs:
        first = 0 if layout.packed_keys is None else run.keys.start // windows.kernel_stride
        count = max(0, (run.length - windows.kernel_size) // windows.kernel_stride + 1)
        made.append(run._replace(keys=slice(first, first + count)))
    return made


def _each(
    attention: Callable[..., tuple[Tensor, Tensor]], runs: list[_Run], q: Tensor, k: Tensor, v: Tensor, *rows: Tensor,
    options: Compressed | Selected | Sliding,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """An attention over each run alone; rows of none have output 0 and lse -inf."""
    out = v.new_zeros(*q.shape[:3], v.shape[3]) + _nothing(q)
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=_softmax_dtype(q)) + _nothing(q)
    for run in runs:
        at, of = run[:2], (run.batch, run.keys)
        alone = options._replace(seq_len_k=run.length) if isinstance(options, Compressed) else options
        out[at], lse[at] = attention(q[at], k[of], v[of], *(x[at] for x in rows), **alone._asdict())
    return out, lse


def _nothing(x: Tensor) -> Tensor:
    """0, and a function of `x` for autograd."""
    return x[:, :0].sum()
