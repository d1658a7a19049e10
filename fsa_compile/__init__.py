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
from .explain import Explanation, explain
from .lowering import disable, enable, is_enabled

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "compressed_attention",
    "debug",
    "disable",
    "enable",
    "explain",
    "is_enabled",
    "mean_compress",
    "nsa_attention",
    "select_blocks",
    "selected_attention",
    "sliding_window_attention",
]

enable()
