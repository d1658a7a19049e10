"""Attention over a band of keys on a GPU: what compressed and sliding-window attention have in common.

Key ``i`` covers positions up to ``i * key_stride + first_end``, and a query at ``t`` sees it if the last of them is one
of the ``window`` positions up to ``t`` (0: any up to ``t``).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .options import Layout
from .rules import kernel_runs

_ops = torch.ops.fsa

# Programs that share the queries of a tile of compressed keys: the first keys are seen by all queries and the last by
# few, and there are too few tiles to even that out.
SPLITS = 4


class Band(NamedTuple):
    """Which keys a query sees."""

    seq_len_k: int
    key_stride: int
    first_end: int
    window: int
    scale: float


def forward(q: Tensor, k: Tensor, v: Tensor, band: Band, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """``(out, shift, log_sum)``."""
    if isinstance(k.shape[1], int) and k.shape[1] == 0:  # too short for a compressed key; ptxas 12.8 crashes on it
        # full, as Inductor lowers no other of its kind this late
        out = torch.full((*q.shape[:3], v.shape[3]), 0.0, dtype=q.dtype, device=q.device)
        shift, log_sum = (torch.full(q.shape[:3], x, dtype=torch.float32, device=q.device) for x in (0.0, -torch.inf))
        return out, shift, log_sum
    return _ops._banded_fwd(q, k, v, *kernel_runs(layout), **band._asdict())


def backward(
    grads: tuple[Tensor | None, Tensor | None], inputs: tuple[Tensor, Tensor, Tensor],
    results: tuple[Tensor, Tensor, Tensor], band: Band, layout: Layout,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k and v."""
    grad_out, grad_log_sum = grads
    out, shift, log_sum = results
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    delta = _ops._attention_delta(grad_out, grad_log_sum, out)
    runs = kernel_runs(layout)
    dq = _ops._banded_bwd_dq(grad_out, *inputs, shift, log_sum, delta, *runs, **band._asdict())
    splits = SPLITS if band.window == 0 and band.key_stride > 1 else 1
    compensated = inputs[0].dtype == torch.float32
    weights = _ops._row_weights(shift, log_sum, delta, scale=band.scale, compensated=compensated)
    dk, dv = _ops._banded_bwd_dkv(grad_out, *inputs, weights, *runs, **band._asdict(), splits=splits)
    if splits > 1:
        dk, dv = (
            _ops._banded_sum(parts, like, splits=splits) for parts, like in zip((dk, dv), inputs[1:], strict=True)
        )
    return dq, dk, dv
