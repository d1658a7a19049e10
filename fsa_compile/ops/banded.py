"""Attention over a band of keys on a GPU: what compressed and sliding-window attention have in common.

Key ``i`` covers positions up to ``i * key_stride + first_end``, and a query at ``t`` sees it if the last of them is one
of the ``window`` positions up to ``t`` (0: any up to ``t``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .rules import Runs

_ops = torch.ops.fsa


def forward(q: Tensor, k: Tensor, v: Tensor, runs: Runs, **band: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``(out, shift, log_sum)``."""
    return _ops._banded_fwd(q, k, v, *runs, **band)


def backward(
    grad_out: Tensor | None, grad_log_sum: Tensor | None, inputs: tuple[Tensor, Tensor, Tensor],
    results: tuple[Tensor, Tensor, Tensor], runs: Runs, **band: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k and v."""
    out, shift, log_sum = results
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    delta = _ops._attention_delta(grad_out, grad_log_sum, out)
    args = (grad_out, *inputs, shift, log_sum, delta, *runs)
    dq = _ops._banded_bwd_dq(*args, **band)
    return dq, *_ops._banded_bwd_dkv(*args, **band)
