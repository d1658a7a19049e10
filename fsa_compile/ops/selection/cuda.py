"""Block selection on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..rules import Rule, Runs, register


def select(
    order: None, q: Tensor, k_cmp: Tensor, lse: Tensor | None, *, runs: Runs, seq_len_k: Any = None,
    pool: str = "overlap", **options: Any,
) -> Tensor:  # fmt: skip
    """`fsa::select_blocks`."""
    length = q.shape[1] if seq_len_k is None else seq_len_k
    chosen = torch.ops.fsa._select_blocks(q, k_cmp, lse, *runs, seq_len_k=length, pool=pool, **options)
    return chosen if isinstance(chosen, Tensor) else chosen[0]  # the rest is workspace


register(Rule("select_blocks", select))
