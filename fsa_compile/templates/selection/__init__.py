"""The kernel of block selection: scores of blocks and the best of them, in one launch."""

from __future__ import annotations

from .top_blocks import SELECT_BLOCKS

KERNELS = (SELECT_BLOCKS,)
