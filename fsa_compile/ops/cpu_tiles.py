"""Attention of small tiles on a CPU: ATen's fused CPU kernel, with the row statistics handed in from outside.

The fused kernel keeps a tile's scores in cache and returns its log-sum-exp. Its backward takes log-sum-exp and output
as arguments, so given those of the whole row it returns the share of one tile in the gradients of an attention over
many. It computes in float32 as long as that resolves the log-sum-exps well enough, else in float64.

Its forward scales the scores after the product and its backward within, which rounds them differently. `widen` scales q
instead, so that both have the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .runs import Results

__all__ = [
    "TILE_MULTIPLE",
    "attend",
    "expand",
    "gradients",
    "tile_backward",
    "tile_forward",
    "widen",
    "widen_gradients",
]

# The largest log-sum-exp that float32 is good enough for: rounding one is a relative error in all the probabilities of
# its row, of 1e-6 at most for float32 inputs, which rounding the logits makes as well, and of 3e-5 for 16-bit ones.
_FAR = {torch.float32: 16.0, torch.float16: 512.0, torch.bfloat16: 512.0}
# Over a few float32 keys plain PyTorch is more exact than that, and float64 costs next to nothing.
_FEW_KEYS, _FAR_OF_FEW = 16, 4.0

_LANES = 4  # widths that are no multiple of it cost a quarter
TILE_MULTIPLE = 16  # of rows and keys that are no multiple of it, the library multiplies the rest in another order


def tile_forward(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """q: [N, H, rows, W], k, v: [N, H, keys, W] -> normalised output [N, H, rows, W] and lse [N, H, rows].

    Every row has to see a key, and one among the first 512 (the kernel's own step over the keys).
    """
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=mask, scale=1.0
    )
    if causal:
        # A row whose scores are all NaN the kernel takes for one without keys, whose output is 0. Each sees key 0.
        spoiled = torch.matmul(q, k[:, :, :1].transpose(2, 3)).squeeze(3).isnan()
        if spoiled.any():
            out, lse = out.masked_fill(spoiled[..., None], torch.nan), lse.masked_fill(spoiled, torch.nan)
    return out, lse


def tile_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, delta: Tensor, lse: Tensor, *, causal: bool = False, mask: Tensor
    | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The tile's share of dq, dk, dv, of what `widen_gradients` returns; q's is that of the scaled q.

    delta and lse: [N, H, rows]. A row with `lse = inf` has no share; `lse = -inf` must not occur.
    """
    rows, keys = q.shape[2], k.shape[2]
    more_rows, more_keys = -rows % TILE_MULTIPLE, -keys % TILE_MULTIPLE
    if more_rows or more_keys:  # rows without a share, and keys that the mask hides
        assert causal or mask is not None or not more_keys
        grad_out, q = (F.pad(x, (0, 0, 0, more_rows)) for x in (grad_out, q))
        k, v = (F.pad(x, (0, 0, 0, more_keys)) for x in (k, v))
        delta, lse = F.pad(delta, (0, more_rows)), F.pad(lse, (0, more_rows), value=torch.inf)
        mask = None if mask is None else F.pad(mask, (0, more_keys, 0, more_rows), value=-torch.inf)
    out = torch.zeros_like(grad_out)
    out[..., -1] = delta  # meets the 1 in grad_out
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=1.0
    )
    return dq[:, :, :rows], dk[:, :, :keys], dv[:, :, :keys]


def attend(
    forward: Callable[[torch.dtype], tuple[Tensor, Tensor]], k: Tensor, scale: float, careful: Callable[[], Results]
) -> Results:
    """(out, shift, log_sum) of a forward that takes the dtype to compute in and returns (out, lse).

    k: [B, N, HK, D], the keys. careful: the results of an implementation that lets no hidden key through.
    """
    return _unless_nan(_precise(forward, k, scale), careful)


def gradients(dq: Tensor, dk: Tensor, dv: Tensor, k: Tensor, v: Tensor, careful: Callable[[], Results]) -> Results:
    """(dq, dk, dv), the latter two without the widening, in the dtypes of k and v; careful: as in `attend`."""
    return _unless_nan((dq, _like(dk, k), _like(dv, v)), careful)


def _precise(forward: Callable[[torch.dtype], tuple[Tensor, Tensor]], k: Tensor, scale: float) -> Results:
    out, lse = forward(torch.float32)
    few = k.dtype == torch.float32 and k.shape[1] <= _FEW_KEYS
    if not ((lse.abs() > (_FAR_OF_FEW if few else _FAR[k.dtype])) & lse.isfinite()).any():
        return out, torch.zeros_like(lse), lse
    out, lse = forward(torch.float64)
    shift = (lse / scale).masked_fill_(~lse.isfinite(), 0).float()
    return out, shift, (lse - scale * shift.double()).float()


def widen(q: Tensor, k: Tensor, v: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """`dtype`, q scaled, and zeros after the last dim so that keys and values have one width, as the fused kernel
    wants.
    """
    width = max(q.shape[-1], v.shape[-1])
    return _widen(q, width, dtype) * scale, _widen(k, width, dtype), _widen(v, width, dtype)


def widen_gradients(
    grad_out: Tensor | None, grad_log_sum: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, shift: Tensor,
    log_sum: Tensor, scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`widen` for the backward: (grad_out, q, k, v, delta, lse) for `tile_backward`, in `attend`'s dtype.

    The fused kernel takes `delta` to be `rowsum(grad_out * out)`. It should be less by grad_log_sum, and added up in
    the order of the product `grad_out @ v` that it is subtracted from: where one key has all of a row's probability,
    `out` is its `v`, and the two have to cancel. So grad_out ends in a column of ones, and delta will be that of `out`,
    which is 0 otherwise.
    """
    dtype = torch.float64 if shift.any() else torch.float32
    lse = log_sum.to(dtype) + scale * shift.to(dtype)
    nothing = lse == -torch.inf
    width = max(q.shape[-1], v.shape[-1]) + 1
    width += -width % _LANES
    if grad_out is None:
        delta, grad_out = torch.zeros_like(lse), lse.new_zeros(*lse.shape, width)
    else:
        delta, grad_out = _rowsum(grad_out.to(dtype), out.to(dtype)), _widen(grad_out, width, dtype)
    grad_out[..., -1] = 1
    if grad_log_sum is not None:  # without a key it is that of a constant, whatever came back
        delta = delta - grad_log_sum.masked_fill(nothing, 0)
    q, k, v = _widen(q, width, dtype) * scale, _widen(k, width, dtype), _widen(v, width, dtype)
    return grad_out, q, k, v, delta, lse.masked_fill(nothing, torch.inf)


def _rowsum(a: Tensor, b: Tensor) -> Tensor:
    """`(a * b).sum(-1)`, added up as a matrix product of tiles is."""
    count = a.shape[:-1].numel()
    x, y = (
        F.pad(x.reshape(count, -1), (0, 0, 0, -count % TILE_MULTIPLE)).unflatten(0, (-1, TILE_MULTIPLE)) for x in (a, b)
    )
    return torch.bmm(x, y.transpose(1, 2)).diagonal(dim1=1, dim2=2).flatten()[:count].view(a.shape[:-1])


def _unless_nan(results: Results, careful: Callable[[], Results]) -> Results:
    """`results`, with those of an implementation that lets no hidden key through in the place of NaNs.

    A tile multiplies what its mask hides by 0, which of a NaN or an infinity is a NaN; and a NaN stays one. So what is
    none has met none, and keeps its bits.
    """
    clean = all(math.isfinite(x.sum(dtype=torch.float32)) for x in results if x.dim() == 4)  # one pass, no copy
    if clean:
        return results
    strays = [x.isnan() for x in results]
    if results[1].dim() == 3:  # (out, shift, log_sum): a row's are of one kind
        row = strays[0].any(-1) | strays[2]
        strays = [row[..., None], row, row]
    if not any(bool(x.any()) for x in strays):
        return results
    pairs = zip(strays, careful(), results, strict=True)
    first, second, third = (torch.where(stray, new, old) for stray, new, old in pairs)
    return first, second, third


def expand(x: Tensor, num_heads: int) -> Tensor:
    """One key head for all the query heads of its group; no copy."""
    return x if x.shape[1] == num_heads else x.expand(-1, num_heads, -1, -1)


def _like(x: Tensor, given: Tensor) -> Tensor:
    """A gradient without the widening, in its input's dtype, contiguous."""
    return x[..., : given.shape[3]].to(given.dtype).contiguous()


def _widen(x: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    x = x.to(dtype)
    x = x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))
    return x if x.stride(-1) == 1 else x.contiguous()
