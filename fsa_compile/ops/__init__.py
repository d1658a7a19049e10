"""The `fsa` operators: importing this package registers all of them."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

from ..on_import import when_imported
from . import autograd as autograd
from . import composite as composite
from . import schema as schema
from . import transforms as transforms

_STAGES = ("compressed", "compression", "selected", "selection", "window")

for _stage in _STAGES:
    import_module(f".{_stage}.cpu", __name__)
if find_spec("triton") is not None:  # where there is no Triton (macOS), the CPU still works
    from . import kernels as kernels

    for _stage in _STAGES:
        import_module(f".{_stage}.{'orders' if _stage == 'selected' else 'cuda'}", __name__)

import_module(".fallback", __name__)  # last: what no kernel has taken
when_imported("torch.distributed.tensor", lambda: import_module(".dtensor", __name__))
