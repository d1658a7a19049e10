"""A limit of registers for a template's kernel, which the decorator that Inductor writes cannot state.

Modules that Inductor generated import this, in its compile workers too: nothing of Inductor is imported here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["limit_registers"]


class _Options:
    """The options that an autotuner compiles with, and a limit. A class, as autotuners travel between processes."""

    def __init__(self, autotuner: Any, most: int) -> None:
        self.autotuner = autotuner
        self.most = most

    def __call__(self, *args: Any) -> dict[str, Any]:
        return {**type(self.autotuner)._create_compile_options(self.autotuner, *args), "maxnreg": self.most}


def limit_registers(most: int) -> Callable[[Any], Any]:
    """Decorator over Inductor's own: no thread of the kernel uses more than ``most`` registers."""

    def limited(autotuner: Any) -> Any:
        autotuner._create_compile_options = _Options(autotuner, most)
        return autotuner

    return limited
