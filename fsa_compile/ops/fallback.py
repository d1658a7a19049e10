"""On a GPU, the operators that no kernel has taken run in plain PyTorch."""

from __future__ import annotations

from .compressed import portable as compressed
from .compression import portable as compression
from .rules import RULES
from .schema import impl
from .selected import portable as selected
from .selection import portable as selection
from .window import portable as window

for _module in (compressed, compression, selected, selection, window):
    for _name in _module.__all__:
        if _name not in RULES:
            impl(_name, getattr(_module, _name), "CUDA")
