"""What the pass over dk and dv reads of each query row and head: what makes softmax weights of scores, and delta."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["row_weights"]


def row_weights(shift: Tensor, log_sum: Tensor, delta: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """The numbers of a row beside each other, as that pass gathers rows: float32 ``[B, T, HQ, 2]``, or ``3``.

    A weight is ``exp2(score * scale * log2(e) + minus)``; the row has ``minus``, -inf if it sees nothing, and
    ``-scale * delta``. One number rounds by 4e-4 at logits of 1e4, as much as a weight does in 16 bits. Of float32
    inputs the row has three: ``shift``, ``log_sum`` (inf if it sees nothing) and ``-delta``.
    """
    nothing = log_sum == -torch.inf
    if dtype == torch.float32:
        numbers = [shift, torch.where(nothing, -log_sum, log_sum), -delta]
    else:
        factor = -math.log2(math.e)
        minus = torch.where(nothing, log_sum, shift * (factor * scale) + log_sum * factor)
        numbers = [minus, delta * -scale]
    return torch.cat([x.unsqueeze(-1) for x in numbers], -1)
