"""The `fsa` operators: importing this package registers all of them."""

from __future__ import annotations

import importlib
from contextlib import suppress

from . import autograd as autograd
from . import composite as composite
from . import fakes as fakes
from . import schema as schema

for _name in ("dense", "cpu_bands", "cpu", "loop_order", "cuda"):
    with suppress(ImportError):
        importlib.import_module(f"{__name__}.{_name}")
