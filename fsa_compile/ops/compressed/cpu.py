"""Compressed attention on a CPU: as causal triangles, as whose keys a query sees follows from its position."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ..cpu_tiles import attend, expand, gradients, tile_backward, tile_forward, widen, widen_gradients
from ..options import Compressed, Layout
from ..runs import Results, Run, each_backward, each_forward, runs_of, windows_of
from ..schema import impl
from . import portable

__all__ = ["compressed_attention_backward", "compressed_attention_forward"]


def compressed_attention_forward(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, options: Compressed, layout: Layout
) -> Results:
    """`fsa::compressed_attention_forward`: `(out, shift, log_sum)`."""
    return each_forward(partial(_forward, options), _runs(q, k_cmp, options, layout), q, k_cmp, v_cmp)


def compressed_attention_backward(
    grad_out: Tensor | None, grad_log_sum: Tensor | None, q: Tensor, k_cmp: Tensor, v_cmp: Tensor, out: Tensor,
    shift: Tensor, log_sum: Tensor, options: Compressed, layout: Layout,
) -> Results:  # fmt: skip
    """`fsa::compressed_attention_backward`: the gradients of q, k_cmp and v_cmp."""
    runs = _runs(q, k_cmp, options, layout)
    results = (out, shift, log_sum)
    return each_backward(
        partial(_backward, options), runs, (grad_out, grad_log_sum), q, k_cmp, v_cmp, results
    )  # fmt: skip


def _runs(q: Tensor, k_cmp: Tensor, options: Compressed, layout: Layout) -> list[Run]:
    runs = runs_of(layout, q, options.seq_len_k)
    return windows_of(runs, layout, options.kernel_size, options.kernel_stride, k_cmp.shape[1])


def _forward(options: Compressed, run: Run, q: Tensor, k: Tensor, v: Tensor) -> Results:
    options, scale = options._replace(seq_len_k=run.num_keys), options.scale
    careful = partial(portable.compressed_attention_forward, q, k, v, options, Layout())
    if run.num_keys != q.shape[1]:  # the causal triangle below starts at the first key
        return careful()

    def forward(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        out, lse = q.new_zeros(*q.shape[:3], v.shape[3]), torch.full(q.shape[:3], -torch.inf, dtype=dtype)
        wide_q, wide_k, wide_v = widen(q, k, v, scale, dtype)
        for rows, keys, heads, kv_heads in _triangles(wide_q, wide_k, options.kernel_size, options.kernel_stride):
            part = wide_q[:, rows, heads].transpose(1, 2)
            k_part, v_part = (expand(x[:, keys, kv_heads].transpose(1, 2), part.shape[1]) for x in (wide_k, wide_v))
            o, s = tile_forward(part, k_part, v_part, causal=True)
            out[:, rows, heads] = o.transpose(1, 2)[..., : out.shape[3]].to(out.dtype)
            lse[:, rows, heads] = s.transpose(1, 2)
        return out, lse

    return attend(forward, k, scale, careful)


def _backward(
    options: Compressed, run: Run, grads: tuple[Tensor | None, Tensor | None], q: Tensor, k: Tensor, v: Tensor,
    results: Results,
) -> Results:  # fmt: skip
    options, scale = options._replace(seq_len_k=run.num_keys), options.scale
    args = (*grads, q, k, v, *results)
    careful = partial(portable.compressed_attention_backward, *args, options, Layout())
    if run.num_keys != q.shape[1]:
        return careful()
    dq = q.new_zeros(q.shape)
    grad, wide_q, wide_k, wide_v, delta, lse = widen_gradients(*args, scale)
    dk, dv = wide_k.new_zeros(wide_k.shape), wide_v.new_zeros(wide_v.shape)
    for rows, keys, heads, kv_heads in _triangles(wide_q, wide_k, options.kernel_size, options.kernel_stride):
        grad_part, part = (x[:, rows, heads].transpose(1, 2) for x in (grad, wide_q))
        delta_part, lse_part = (x[:, rows, heads].transpose(1, 2) for x in (delta, lse))
        k_part, v_part = (expand(x[:, keys, kv_heads].transpose(1, 2), part.shape[1]) for x in (wide_k, wide_v))
        dq_part, dk_part, dv_part = tile_backward(grad_part, part, k_part, v_part, delta_part, lse_part, causal=True)
        dq_part = dq_part.transpose(1, 2)[..., : dq.shape[3]].mul_(scale)
        dq[:, rows, heads] = dq_part.to(dq.dtype)
        for total, share in ((dk, dk_part), (dv, dv_part)):
            share = share.unflatten(1, (total[:, :1, kv_heads].shape[2], -1)).sum(2)
            total[:, keys, kv_heads] += share.transpose(1, 2)
    return gradients(dq, dk, dv, k, v, careful)


def _triangles(
    q: Tensor, k: Tensor, kernel_size: int, kernel_stride: int
) -> Iterator[tuple[slice, slice, slice, slice]]:
    """Cuts compressed attention into plain causal triangles: rows of q, rows of k, heads of q, heads of k.

    Of the queries `kernel_size - 1 + r, ... + kernel_stride, ...` the x-th sees the compressed tokens 0 ... x, for
    every r. The earlier queries see none.
    """
    seq_len, num_q_heads, num_kv_heads = q.shape[1], q.shape[2], k.shape[2]
    group_size = num_q_heads // num_kv_heads
    step = num_kv_heads if group_size == 1 else 1  # heads that share no keys can go together
    for first in range(kernel_size - 1, min(seq_len, kernel_size - 1 + kernel_stride)):
        keys = slice(0, len(range(first, seq_len, kernel_stride)))
        for head in range(0, num_kv_heads, step):
            heads = slice(head * group_size, (head + step) * group_size)
            yield slice(first, None, kernel_stride), keys, heads, slice(head, head + step)


impl("compressed_attention_forward", compressed_attention_forward, "CPU")
impl("compressed_attention_backward", compressed_attention_backward, "CPU")
