"""The lowering's switch. Importing it imports nothing of the compiler.

A process that never compiles does not pay for the compiler's import: the pass is put into its slot when something else
imports the compiler. Not at the import of its configuration, which happens in the middle of a circle of imports.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

__all__ = ["disable", "enable", "is_enabled", "is_recognising", "is_switched_on"]

_COMPILER = "torch._inductor.compile_fx"
_INSTALL = f"{__package__}.install"
_on = False
_recognising = True


def is_switched_on() -> bool:
    """Whether the last of ``enable`` and ``disable`` was ``enable``."""
    return _on


def is_recognising() -> bool:
    """Whether attention in plain PyTorch is looked at: switched on, and not with ``recognise=False``."""
    return _on and _recognising


def enable(*, recognise: bool = True) -> None:
    """Switch the lowering on (it is, after ``import fsa_compile``).

    The passes are put after whatever sits in ``torch._inductor.config.joint_custom_pre_pass`` and
    ``pre_grad_custom_pass``; call it again after another package has overwritten one of these slots. Functions that are
    compiled already stay as they are.

    Args:
        recognise: whether selected attention that is written in plain PyTorch is found and replaced, too.
    """
    global _on, _recognising
    _on, _recognising = True, recognise
    if _INSTALL in sys.modules:
        _install()
    else:
        _when_imported(_COMPILER, _install)


def disable() -> None:
    """Switch the lowering off: operators compiled from now on are called as they are, as if eagerly.

    Other passes in the slot stay. Functions that are compiled already stay as they are.
    """
    global _on
    _on = False
    if _INSTALL in sys.modules:
        from . import install

        install.uninstall()


def is_enabled() -> bool:
    """Whether compiling now would run the pass: switched on, and in the slot."""
    if not _on or _INSTALL not in sys.modules:
        return _on
    from . import install

    return install.in_slot()


def _install() -> None:
    if _on:
        from . import install

        install.install()


def _when_imported(name: str, then: Callable[[], None]) -> None:
    """Call ``then`` now if the module is imported, else as soon as it is."""
    module = sys.modules.get(name)
    if module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False):
        then()
    elif not any(isinstance(finder, _Finder) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(name, then))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing by itself: it lets the others find one module and calls back when that has been executed."""

    def __init__(self, name: str, then: Callable[[], None]) -> None:
        self.name, self.then = name, then

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.then)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: Any, then: Callable[[], None]) -> None:
        self.loader, self.then = loader, then

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: Any) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.then()
