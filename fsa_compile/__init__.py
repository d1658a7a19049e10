"""Native Sparse Attention under `torch.compile`."""

from . import ops as ops
