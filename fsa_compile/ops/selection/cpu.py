"""Block selection on a CPU: the portable form, a sequence at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from ..options import Layout, Selection
from ..runs import runs_of, windows_of
from ..schema import impl
from . import portable

__all__ = ["select_blocks"]


def select_blocks(q: Tensor, k_cmp: Tensor, lse: Tensor | None, options: Selection, layout: Layout) -> Tensor:
    """`fsa::select_blocks`."""
    if layout.cu_seqlens_q is None and not layout.is_padded:
        return portable.select_blocks(q, k_cmp, lse, options, layout)
    runs = runs_of(layout, q, options.seq_len_k)
    chosen = torch.full((*q.shape[:2], k_cmp.shape[2], options.num_selected), -1, dtype=torch.int32)
    for run in windows_of(runs, layout, options.kernel_size, options.kernel_stride, k_cmp.shape[1]):
        at = run[:2]
        chosen[at] = portable.select_blocks(
            q[at], k_cmp[run.batch, run.keys], None if lse is None else lse[at],
            options._replace(seq_len_k=run.num_keys), Layout(),
        )  # fmt: skip
    return chosen


impl("select_blocks", select_blocks, "CPU")
