"""The `fsa` operators: importing this package registers all of them."""

from __future__ import annotations

import importlib.util

from . import autograd as autograd
from . import composite as composite
from . import cpu as cpu
from . import dense as dense
from . import fakes as fakes
from . import schema as schema

if importlib.util.find_spec("triton") is not None:  # where there is no Triton (macOS), the CPU still works
    from . import kernels as kernels
    from .selected import orders as orders
