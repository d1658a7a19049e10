"""Native Sparse Attention under `torch.compile`. Importing it registers `torch.ops.fsa` and switches the pass on."""

from __future__ import annotations

from . import debug as debug
from .api import (
    compressed_attention,
    mean_compress,
    nsa_attention,
    select_blocks,
    selected_attention,
    sliding_window_attention,
)

__all__ = [
    "compressed_attention",
    "debug",
    "mean_compress",
    "nsa_attention",
    "select_blocks",
    "selected_attention",
    "sliding_window_attention",
]
