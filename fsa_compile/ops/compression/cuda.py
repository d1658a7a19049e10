"""Mean compression on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..rules import Rule, register

_ops = torch.ops.fsa


def _lies(call: dict[str, Any]) -> tuple[Tensor | None, ...]:
    return tuple(call.pop(name, None) for name in ("cu_seqlens", "seqused", "leftpad"))


def forward(order: None, x: Tensor, **call: Any) -> Tensor:
    """`fsa::mean_compress`."""
    lies = _lies(call)
    return _ops._mean_compress_fwd(x, *lies, **call)


def backward(order: None, grad_out: Tensor, **call: Any) -> Tensor:
    """`fsa::mean_compress_backward`."""
    lies = _lies(call)
    return _ops._mean_compress_bwd(grad_out, *lies, **call)


register(Rule("mean_compress", forward), Rule("mean_compress_backward", backward))
