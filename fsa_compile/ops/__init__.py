"""The `fsa` operators: importing this package registers all of them."""

from __future__ import annotations

from . import autograd as autograd
from . import composite as composite
from . import cpu as cpu
from . import cuda as cuda
from . import dense as dense
from . import fakes as fakes
from . import loop_order as loop_order
from . import schema as schema
