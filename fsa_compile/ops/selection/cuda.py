"""Block selection on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ..options import Layout, Selection
from ..rules import Rule, kernel_runs, register


def select_blocks(q: Tensor, k_cmp: Tensor, lse: Tensor | None, options: Selection, layout: Layout) -> Tensor:
    """`fsa::select_blocks`; the kernel's other results are its workspace."""
    return torch.ops.fsa._select_blocks(q, k_cmp, lse, *kernel_runs(layout), **options._asdict())[0]


register(Rule("select_blocks", select_blocks))
