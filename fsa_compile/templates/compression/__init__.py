"""The kernels of mean compression.

A *chunk* is ``kernel_stride`` consecutive tokens of a run, counted from its first; since ``kernel_stride`` divides
``kernel_size``, every window is whole chunks. Both kernels are bound by memory: the forward reads a chunk once and adds
neighbouring sums on chip, the backward writes a chunk's one gradient to all its tokens.
"""

from __future__ import annotations

from .backward import MEAN_COMPRESS_BWD
from .forward import MEAN_COMPRESS_FWD

KERNELS = (MEAN_COMPRESS_FWD, MEAN_COMPRESS_BWD)
