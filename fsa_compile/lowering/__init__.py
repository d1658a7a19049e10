"""From semantic operators to templated kernels under ``torch.compile``: a joint-graph pass and Inductor lowerings."""

from __future__ import annotations

from .expand import Site, collect_sites
from .install import PASS, disable, enable, is_enabled

__all__ = ["PASS", "Site", "collect_sites", "disable", "enable", "is_enabled"]
