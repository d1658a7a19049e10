"""The lowering's switch. Importing it imports nothing of the compiler.

A process that never compiles does not pay for the compiler's import: the pass is put into its slot when something else
imports the compiler. Not at the import of its configuration, which happens in the middle of a circle of imports.
"""

from __future__ import annotations

import sys

from ..on_import import when_imported

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
        when_imported(_COMPILER, _install)


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
