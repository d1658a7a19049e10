"""Attention of small tiles on a CPU: ATen's fused CPU kernel, in float32, with the row statistics handed in from
outside.

The fused kernel keeps a tile's scores in cache and returns its log-sum-exp. Its backward takes log-sum-exp and output
as arguments, so given those of the whole row it returns the share of one tile in the gradients of an attention over
many.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["sequence_slices", "tile_backward", "tile_forward", "widen", "widen_gradients"]


def tile_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """q: [N, H, rows, W], k, v: [N, H, keys, W], float32 -> normalised output [N, H, rows, W] and lse [N, H, rows].

    Every row has to see a key, and one among the first 512 (the kernel's own step over the keys).
    """
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)


def tile_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, *, causal: bool =
    False, mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The tile's share of dq, dk, dv. A row with `lse = inf` has none; `lse = -inf` must not occur."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale
    )


def widen(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """float32, and zeros after the last dim so that keys and values have one width, as the fused kernel wants."""
    width = max(q.shape[-1], v.shape[-1])
    return _widen(q, width), _widen(k, width), _widen(v, width)


def widen_gradients(
    grad_out: Tensor | None, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, ...]:
    """`widen` for the backward: (grad_out, q, k, v, out, lse) for `tile_backward`.

    The kernel computes `delta = rowsum(grad_out * out)` itself, where a gradient of lse asks for `delta - grad_lse`.
    One column more, which is 1 in grad_out, -grad_lse in out and 0 in the others, makes it so.
    """
    width = max(q.shape[-1], v.shape[-1])
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grad_out, out = _widen(grad_out, width), _widen(out, width)
    nothing = lse == -torch.inf
    if grad_lse is not None:
        width += 1
        grad_lse = grad_lse.masked_fill(nothing, 0)  # its lse is a constant, whatever came back for it
        grad_out = torch.cat([grad_out, torch.ones_like(grad_lse)[..., None]], -1)
        out = torch.cat([out, -grad_lse[..., None]], -1)
    lse = lse.masked_fill(nothing, torch.inf)
    return grad_out, _widen(q, width), _widen(k, width), _widen(v, width), out, lse


def sequence_slices(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None) -> list[tuple[slice, slice]]:
    """The rows of the queries and of the keys of each packed sequence that has queries. Reads `cu_seqlens`, which is
    on the CPU here.
    """
    bounds_q = cu_seqlens_q.tolist()
    bounds_k = bounds_q if cu_seqlens_k is None else cu_seqlens_k.tolist()
    pairs = zip(itertools.pairwise(bounds_q), itertools.pairwise(bounds_k), strict=True)
    return [(slice(*rows), slice(*cols)) for rows, cols in pairs if rows[1] > rows[0]]


def _widen(x: Tensor, width: int) -> Tensor:
    x = x.float()
    x = x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))
    return x if x.stride(-1) == 1 else x.contiguous()
