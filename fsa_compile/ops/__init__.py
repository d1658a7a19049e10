"""The `fsa` operators: importing this package registers all of them."""

from __future__ import annotations

from . import schema as schema
