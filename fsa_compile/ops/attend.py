"""Masked softmax attention in chunked plain PyTorch, for any device: what the stages' portable forms are made of.

Queries are taken a chunk at a time against the keys that the chunk can see, so memory is linear in the length and no
matrix has a side per query and one per key. Lengths and shapes alone decide what is launched: on a GPU nothing is read
back, and a CUDA graph can hold all of it.

What a query does not see does not reach it, whatever it holds: hidden scores are overwritten, not added to, and numbers
that are not finite stay out of products; a column beside the values says who has seen such a row.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .visibility import Visibility

__all__ = ["attend", "attend_backward", "by_group", "by_head", "chunks", "product"]

_MAX_ROWS = 1024  # queries in a chunk
_SCORE_BYTES = {"cpu": 4 << 20}  # of one chunk's float32 scores: what stays in a CPU's cache, what keeps a GPU busy
_SCORE_BYTES_DEFAULT = 256 << 20


def attend(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax attention over the visible keys. q: [B, T, HQ, D], k: [B, N, HK, D], v: [B, N, HK, DV] -> out [B, T, HQ,
    DV], shift (the highest score before scaling) and log_sum [B, T, HQ] f32.
    """
    batch, num_kv_heads = q.shape[0], k.shape[2]
    out = q.new_empty(*q.shape[:3], v.shape[3])
    shift, log_sum = (torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) for _ in range(2))
    k, v = by_head(k), by_head(v)
    v, strange = _finite(v)
    for start, stop, lo, hi in chunks(visibility, q):
        rows = slice(start, stop)
        if hi <= lo:
            out[:, rows], shift[:, rows], log_sum[:, rows] = 0, 0, -torch.inf
            continue
        p = product(by_group(q[:, rows], num_kv_heads), k[:, lo:hi].transpose(1, 2))
        visibility.hide_(p.view(batch, num_kv_heads, stop - start, -1, hi - lo), rows, lo, hi, -torch.inf)
        highest = p.amax(-1, keepdim=True)
        highest.masked_fill_(highest == -torch.inf, 0)  # a row that sees nothing
        total = p.sub_(highest).mul_(scale).exp_().sum(-1, keepdim=True)
        o = product(p.to(v.dtype), v[:, lo:hi]).div_(total.masked_fill(total == 0, 1))
        if strange is not None:
            o.masked_fill_(product(p.to(v.dtype), strange[:, lo:hi]) > 0, torch.nan)
        out[:, rows] = _by_token(o, batch, stop - start)
        shift[:, rows] = _by_token(highest, batch, stop - start)[..., 0]
        log_sum[:, rows] = _by_token(total.log_(), batch, stop - start)[..., 0]
    return out, shift, log_sum


def attend_backward(
    grad_out: Tensor | None, grad_log_sum: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, shift: Tensor,
    log_sum: Tensor, visibility: Visibility, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of `attend`, each with the shape and dtype of its input."""
    batch, num_kv_heads = q.shape[0], k.shape[2]
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    nothing = log_sum == -torch.inf
    log_sum = log_sum.masked_fill(nothing, torch.inf)  # a row that sees nothing: exp(s - inf) = 0
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dtypes = k.dtype, v.dtype
    k, v = by_head(k), by_head(v)
    careful = q.device.type != "cpu" or not all(_is_finite(x) for x in (q, k, v, grad_out, out))
    k_finite = _finite(k)[0] if careful else k
    dk = torch.zeros(k.shape, dtype=torch.float32, device=q.device)
    dv = torch.zeros(v.shape, dtype=torch.float32, device=q.device)
    for start, stop, lo, hi in chunks(visibility, q):
        rows = slice(start, stop)
        if hi <= lo:
            dq[:, rows] = 0
            continue
        q_rows, do = by_group(q[:, rows], num_kv_heads), by_group(grad_out[:, rows], num_kv_heads)
        scores = batch, num_kv_heads, stop - start, -1, hi - lo
        # the very product of the forward: with scores rounded otherwise, p of large logits would not add up to 1
        p = (
            product(q_rows, k[:, lo:hi].transpose(1, 2))
            .sub_(by_group(shift[:, rows, :, None], num_kv_heads))
            .mul_(scale)
            .sub_(by_group(log_sum[:, rows, :, None], num_kv_heads))
            .exp_()
        )
        visibility.hide_(p.view(scores), rows, lo, hi, 0.0)
        dp = product(do, v[:, lo:hi].transpose(1, 2))
        strange = None
        if careful:
            visibility.hide_(dp.view(scores), rows, lo, hi, 0.0)
            (do, strange), (q_rows, _) = _finite(do), _finite(q_rows)
        dv[:, lo:hi] += product(p.to(do.dtype).transpose(1, 2), do)
        if strange is not None:
            dv[:, lo:hi].masked_fill_(product(p.to(do.dtype).transpose(1, 2), strange) > 0, torch.nan)
        # takes the mean of dP out of this dP: where p is nearly 1 the two cancel, to the last bit
        ds = torch._softmax_backward_data(dp, p, -1, torch.float32)
        if grad_log_sum is not None:
            grad = grad_log_sum[:, rows].masked_fill(nothing[:, rows], 0)
            ds.addcmul_(p, by_group(grad[..., None], num_kv_heads))
        if careful:
            visibility.hide_(ds.view(scores), rows, lo, hi, 0.0)
        ds = ds.mul_(scale).to(k.dtype)
        dq[:, rows] = _by_token(product(ds, k_finite[:, lo:hi]), batch, stop - start)
        dk[:, lo:hi] += product(ds.transpose(1, 2), q_rows)
    return (
        dq,
        dk.unflatten(0, (batch, num_kv_heads)).transpose(1, 2).to(dtypes[0]).contiguous(),
        dv.unflatten(0, (batch, num_kv_heads)).transpose(1, 2).to(dtypes[1]).contiguous(),
    )


def _is_finite(x: Tensor) -> bool:
    return bool(x.isfinite().all())


def _finite(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """`x` [N, rows, W] with 0 for what is not finite, and [N, rows, 1] which rows that was in; None: in none."""
    bad = ~x.isfinite()
    if x.device.type == "cpu" and not bad.any():
        return x, None
    return x.masked_fill(bad, 0), bad.any(-1, keepdim=True).to(x.dtype)


def chunks(visibility: Visibility, q: Tensor) -> Iterator[tuple[int, int, int, int]]:
    """Cuts the queries so that a chunk's scores fit the budget: (start, stop) of the queries, (lo, hi) of the keys
    they can see.
    """
    batch, seq_len, num_q_heads, _ = q.shape
    budget = _SCORE_BYTES.get(q.device.type, _SCORE_BYTES_DEFAULT) // (4 * max(1, batch) * num_q_heads)
    most = _MAX_ROWS if visibility.window is None else min(_MAX_ROWS, max(64, visibility.window // 2))
    start = 0
    while start < seq_len and batch:
        stop = min(start + most, seq_len)
        lo, hi = visibility.keys(start, stop)
        stop = min(stop, start + max(1, budget // max(1, hi - lo)))
        yield start, stop, *visibility.keys(start, stop)
        start = stop


def product(a: Tensor, b: Tensor) -> Tensor:
    """Batched product of operands of one dtype, accumulated and returned in float32."""
    if a.dtype == torch.float32:
        return torch.bmm(a, b)
    return torch.bmm(a, b, out_dtype=torch.float32)


def _operand(x: Tensor) -> Tensor:
    """`x` in the dtype that products take it in: a CPU has no product of 16-bit operands that returns float32."""
    return x.float() if x.device.type == "cpu" else x


def by_head(x: Tensor) -> Tensor:
    """[B, N, HK, D] -> contiguous [B * HK, N, D]."""
    return _operand(x).transpose(1, 2).flatten(0, 1).contiguous()


def by_group(x: Tensor, num_kv_heads: int) -> Tensor:
    """[B, rows, HQ, D] -> [B * HK, rows * G, D]: all the heads of a group against one matrix of keys."""
    x = _operand(x).unflatten(2, (num_kv_heads, -1)).transpose(1, 2)  # [B, HK, rows, G, D]
    return x.reshape(x.shape[0] * num_kv_heads, x.shape[2] * x.shape[3], x.shape[-1])


def _by_token(x: Tensor, batch: int, rows: int) -> Tensor:
    """The inverse of `by_group`."""
    x = x.view(batch, -1, rows, x.shape[1] // rows, x.shape[2])  # [B, HK, rows, G, D]
    return x.transpose(1, 2).flatten(2, 3)
