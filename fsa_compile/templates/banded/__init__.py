"""Kernels of attention over a band of keys: compressed attention and the sliding window."""

from __future__ import annotations

from .backward_dkv import BANDED_BWD_DKV
from .backward_dq import BANDED_BWD_DQ
from .forward import BANDED_FWD
from .sum_splits import BANDED_SUM

KERNELS = (BANDED_FWD, BANDED_BWD_DQ, BANDED_BWD_DKV, BANDED_SUM)
