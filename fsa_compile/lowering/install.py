"""Where the pass sits in Inductor, what makes its cache entries valid, and how it shares the slot with others.

A pass without a ``uuid()`` silently switches off the FX-graph and AOTAutograd caches, and lowerings and templates are
in no cache key at all; so the pass's uuid answers for every source file of the package.
"""

from __future__ import annotations

import functools
import hashlib
import warnings
from pathlib import Path
from typing import Any

import torch

from .. import debug
from . import _inductor
from .expand import expand_graph, semantic_operators
from .switch import is_switched_on

__all__ = ["FsaPass", "PASS", "PassChain", "in_slot", "install", "source_hash", "uninstall", "warn_if_replaced"]

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
            expand_graph(graph)

    def uuid(self) -> str:
        if not is_switched_on():
            return "fsa_compile off"
        return f"fsa_compile {source_hash()} validating={debug.is_validating()}"

    def __deepcopy__(self, memo: dict[int, Any]) -> FsaPass:
        return self  # Inductor copies configuration values; identity is how we find ourselves again

    def __reduce__(self) -> tuple[Any, ...]:
        return _the_pass, ()


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


def _the_pass() -> FsaPass:
    return PASS


def _contains(value: Any) -> bool:
    if isinstance(value, PassChain):
        return any(map(_contains, value.passes))
    return value is PASS


def in_slot() -> bool:
    """Whether the slot holds the pass, as this thread sees it."""
    return any(map(_contains, _inductor.slot_passes()))


def _without_ours(value: Any) -> tuple[Any, ...]:
    if isinstance(value, PassChain):
        return tuple(p for one in value.passes for p in _without_ours(one))
    return () if value is PASS else (value,)


def _write(passes: tuple[Any, ...]) -> None:
    if len(passes) <= 1:
        _inductor.set_slot(passes[0] if passes else None)
    else:
        _inductor.set_slot(list(passes) if _inductor.slot_takes_sequence() else PassChain(*passes))


def install() -> None:
    """Put the pass into the slot, after what is there."""
    _watch()
    if not in_slot():
        if _inductor.slot_passes():
            _write((*_inductor.slot_passes(), PASS))
        elif not (_inductor.set_slot_default(PASS) and in_slot()):
            _inductor.set_slot(PASS)


def uninstall() -> None:
    """Take the pass out of the slot; others in it stay."""
    kept = tuple(p for one in _inductor.slot_passes() for p in _without_ours(one))
    if in_slot():
        _inductor.set_slot_default(None)
        if in_slot():
            _write(kept)


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


# Whoever imports this has the compiler; `switch` counts on the pass being in its slot from then on.
if is_switched_on():
    install()
