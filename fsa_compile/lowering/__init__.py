"""From semantic operators to templated kernels under ``torch.compile``: a joint-graph pass and Inductor lowerings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .sites import Site, collect_sites
from .switch import disable, enable, is_enabled

if TYPE_CHECKING:
    from .install import PASS, PRE_GRAD_PASS

__all__ = ["PASS", "PRE_GRAD_PASS", "Site", "collect_sites", "disable", "enable", "is_enabled"]


def __getattr__(name: str) -> Any:
    if name in ("PASS", "PRE_GRAD_PASS"):  # of a class of the compiler's, which is imported with it
        from . import install

        return getattr(install, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
