"""Where the pass sits in Inductor, what makes its cache entries valid, and how it shares the slot with others.

A pass without a ``uuid()`` silently switches off the FX-graph and AOTAutograd caches, and lowerings and templates are
in no cache key at all; so the pass's uuid answers for every source file of the package, and for the constants that
were calibrated on this machine, as loop orders are chosen by them.
"""

from __future__ import annotations

import functools
import hashlib
import warnings
from pathlib import Path
from typing import Any

import torch

from .. import debug
from ..cost.calibration import digest
from . import _inductor
from .expand import expand_graph, semantic_operators
from .recognise import recognise_graph
from .switch import is_recognising, is_switched_on

__all__ = [
    "FsaPass", "PASS", "PRE_GRAD_PASS", "PassChain", "PreGradPass", "in_slot", "install", "source_hash", "uninstall",
    "warn_if_replaced",
]  # fmt: skip

_SOURCES = ("*.py", "*.json")


@functools.cache
def source_hash() -> str:
    """sha256 of every source file of the package and of the versions of torch and triton, as they were at import."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for path in sorted(p for pattern in _SOURCES for p in root.rglob(pattern)):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
        digest.update(path.read_bytes())
    try:
        from triton import __version__ as triton_version
    except ImportError:
        triton_version = "none"
    digest.update(f"\0torch {torch.__version__} triton {triton_version}".encode())
    return digest.hexdigest()


class FsaPass(_inductor.CustomGraphPass):
    """The joint-graph pass of this package, one object per process. Disabled, it does nothing and its uuid says so."""

    def __init__(self) -> None:
        source_hash()

    def __call__(self, graph: torch.fx.Graph) -> None:
        if is_switched_on():
            _warn_if_not_recognising()
            expand_graph(graph)

    def uuid(self) -> str:
        # It answers for the pre-grad pass too, whose own uuid is in no cache key on torch 2.11.
        if not is_switched_on():
            return "fsa_compile off"
        options = f"validating={debug.is_validating()} recognising={is_recognising()}"
        return f"fsa_compile {source_hash()} {options} calibrated={digest()}"

    def __deepcopy__(self, memo: dict[int, Any]) -> FsaPass:
        return self  # Inductor copies configuration values; identity is how we find ourselves again

    def __reduce__(self) -> tuple[Any, ...]:
        return _the_pass, ()


class PreGradPass(_inductor.CustomGraphPass):
    """The pass that recognises plain PyTorch, before autograd; one object per process."""

    def __init__(self) -> None:
        self.is_met = False  # since the joint-graph pass last looked: another's pass may call this one

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.is_met = True
        if is_recognising():
            recognise_graph(graph)

    def uuid(self) -> str:
        return f"fsa_compile {source_hash()}" if is_recognising() else "fsa_compile recognises nothing"

    def __deepcopy__(self, memo: dict[int, Any]) -> PreGradPass:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _the_pre_grad_pass, ()


class PassChain(_inductor.CustomGraphPass):
    """Several passes in a slot that holds one. They run in order; without a uuid of each the chain has none."""

    def __init__(self, *passes: Any) -> None:
        self.passes = passes

    def __call__(self, graph: torch.fx.Graph) -> None:
        for one in self.passes:
            one(graph)

    def uuid(self) -> Any:
        uuids = []
        for one in self.passes:
            uuid = one.uuid() if isinstance(one, _inductor.CustomGraphPass) else None
            if not uuid:
                return None
            uuids.append(uuid)
        return tuple(uuids)


PASS = FsaPass()
PRE_GRAD_PASS = PreGradPass()
_SLOTS = {_inductor.SLOT: PASS, _inductor.PRE_GRAD_SLOT: PRE_GRAD_PASS}


def _the_pass() -> FsaPass:
    return PASS


def _the_pre_grad_pass() -> PreGradPass:
    return PRE_GRAD_PASS


def _contains(value: Any, ours: Any) -> bool:
    if isinstance(value, PassChain):
        return any(_contains(one, ours) for one in value.passes)
    return value is ours


def in_slot(slot: str = _inductor.SLOT) -> bool:
    """Whether the slot holds the pass, as this thread sees it."""
    return any(_contains(one, _SLOTS[slot]) for one in _inductor.slot_passes(slot))


def _without(value: Any, ours: Any) -> tuple[Any, ...]:
    if isinstance(value, PassChain):
        return tuple(p for one in value.passes for p in _without(one, ours))
    return () if value is ours else (value,)


def _write(passes: tuple[Any, ...], slot: str) -> None:
    if len(passes) <= 1:
        _inductor.set_slot(passes[0] if passes else None, slot)
    else:
        _inductor.set_slot(list(passes) if _inductor.slot_takes_sequence() else PassChain(*passes), slot)


def install() -> None:
    """Put each pass into its slot, after what is there."""
    _watch()
    for slot, ours in _SLOTS.items():
        if not in_slot(slot):
            if _inductor.slot_passes(slot):
                _write((*_inductor.slot_passes(slot), ours), slot)
            elif not (_inductor.set_slot_default(ours, slot) and in_slot(slot)):
                _inductor.set_slot(ours, slot)


def uninstall() -> None:
    """Take the passes out of their slots; others in them stay."""
    for slot, ours in _SLOTS.items():
        kept = tuple(p for one in _inductor.slot_passes(slot) for p in _without(one, ours))
        if in_slot(slot):
            _inductor.set_slot_default(None, slot)
            if in_slot(slot):
                _write(kept, slot)


def _watch() -> None:
    """Notice a replaced slot: the semantic operators then reach Inductor, so it is their lowerings that look.

    Not on import, which would have to import the compiler. ``torch._dynamo.reset`` forgets the callback.
    """
    if _inductor.is_compiler_imported():
        _watch_operators()
    else:
        _inductor.on_compile_start(_watch_operators)


@functools.cache
def _watch_operators() -> None:
    for op in semantic_operators():
        _inductor.register_lowering(op, functools.partial(_as_it_is, op))


def _as_it_is(op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Any:
    warn_if_replaced(op._schema.name.removesuffix("_forward"))
    return _inductor.fallback(op)(*args, **kwargs)


_warned: set[str] = set()


def warn_if_replaced(op: str) -> None:
    """Say, once per kind of replacement, that something took the pass's place, so that ``op`` was not lowered."""
    if not is_switched_on() or in_slot():
        return
    found = ", ".join(type(p).__name__ for p in _inductor.slot_passes()) or "None"
    if found in _warned:
        return
    _warned.add(found)
    warnings.warn(
        f"fsa_compile is enabled, but torch._inductor.config.{_inductor.SLOT} holds {found} instead of its pass, so "
        f"{op} is called as it is, and cached code is not checked against this package's sources. "
        "torch.compile(options=...) replaces the slot: give it a list with fsa_compile.lowering.PASS in it (torch 2.13 "
        "and later), or set the slot in the configuration and call fsa_compile.enable().",
        stacklevel=2,
    )


def _warn_if_not_recognising() -> None:
    """Say, once, that something took the pre-grad pass's place."""
    slot = _inductor.PRE_GRAD_SLOT
    is_met, PRE_GRAD_PASS.is_met = PRE_GRAD_PASS.is_met, False
    if not is_recognising() or is_met or in_slot(slot):
        return
    found = ", ".join(type(p).__name__ for p in _inductor.slot_passes(slot)) or "None"
    if f"{slot} {found}" in _warned:
        return
    _warned.add(f"{slot} {found}")
    warnings.warn(
        f"fsa_compile is enabled, but torch._inductor.config.{slot} holds {found} instead of its pass, so attention "
        "that is written in plain PyTorch is not recognised. torch.compile(options=...) replaces the slot: give it a "
        "list with fsa_compile.lowering.PRE_GRAD_PASS in it (torch 2.13 and later), or set the slot in the "
        "configuration and call fsa_compile.enable().",
        stacklevel=2,
    )


# Whoever imports this has the compiler; `switch` counts on the pass being in its slot from then on.
if is_switched_on():
    install()
