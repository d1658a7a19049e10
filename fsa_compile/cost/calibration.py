"""Constants that ``python -m fsa_compile.calibrate`` measured on this machine: where they are kept, and reading them.

One JSON file for each device and version of the kernels. They are read once in a process, at the first choice, so that
every choice of the process, and the key under which compiled code is cached, are of the same constants.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from .device import EFFICIENCY, Device

__all__ = ["SOURCE", "cache_dir", "calibrations", "digest", "file_for", "forget", "kernels_version", "load", "save"]

log = logging.getLogger(__name__)

SOURCE = "calibrated on this machine"
_ROOT = Path(__file__).resolve().parent.parent
# What the constants are constants of: the kernels, their tiles, and the expressions that they are put into.
_KERNELS = ("tiling.py", "cost/expressions.py", "cost/orders.py", "cost/problem.py", "templates", "ops/selected")
_TEXT = ("name", "kind")
_NUMBERS = tuple(f.name for f in fields(Device) if f.type in ("float", "int"))


def cache_dir() -> Path:
    """``$FSA_COMPILE_CACHE_DIR``, else ``$XDG_CACHE_HOME/fsa_compile``, else ``~/.cache/fsa_compile``."""
    if given := os.environ.get("FSA_COMPILE_CACHE_DIR"):
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification has a relative path ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "fsa_compile"


@functools.cache
def kernels_version() -> str:
    """Twelve hexadecimal digits of a hash of the sources that constants depend on."""
    digest = hashlib.sha256()
    for name in _KERNELS:
        path = _ROOT / name
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in (".py", ".json"))
        for file in files:
            digest.update(f"{file.relative_to(_ROOT).as_posix()}\0".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def file_for(device_name: str) -> Path:
    """The file of a device, as torch names it, and of the present kernels; it need not exist."""
    slug = "".join(c if c.isalnum() else "_" for c in device_name.lower())
    return cache_dir() / f"calibration-{slug}-{kernels_version()}.json"


def save(device: Device, about: Mapping[str, Any]) -> Path:
    """Write the constants of ``device``, whose ``name`` is what torch calls it, and return the file.

    Args:
        device: the constants.
        about: what they were measured with, for people.

    Whole or not at all. Raises OSError where the directory cannot be written.
    """
    content = {
        "kernels": kernels_version(),
        **{name: getattr(device, name) for name in (*_TEXT, *_NUMBERS)},
        "efficiency": dict(zip(EFFICIENCY, device.efficiency, strict=True)),
        "about": dict(about),
    }
    file = file_for(device.name)
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.stem}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(json.dumps(content, indent=1) + "\n")
        os.replace(name, file)
    except BaseException:
        os.unlink(name)
        raise
    forget()
    return file


def load(file: Path) -> Device:
    """The constants in a file.

    Raises OSError, or ValueError if it is of other kernels or is not what ``save`` writes.
    """
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not an object")
    if content.get("kernels") != kernels_version():
        raise ValueError(f"it is of kernels {content.get('kernels')}, these are {kernels_version()}")
    shares = content.get("efficiency")
    if not isinstance(shares, dict) or set(shares) != set(EFFICIENCY):
        raise ValueError("its efficiencies are not those of the model's passes")
    values = {name: content.get(name) for name in _NUMBERS}
    for name, value in (values | shares).items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and value > 0):
            raise ValueError(f"its {name} is {value!r}, not a positive number")
    texts = {name: content.get(name) for name in _TEXT}
    if not all(isinstance(text, str) for text in texts.values()):
        raise ValueError("it does not name its device")
    return Device(**texts, **values, efficiency=tuple(shares[name] for name in EFFICIENCY), source=SOURCE)  # type: ignore[arg-type]


@functools.cache
def calibrations() -> Mapping[str, Device]:
    """Devices that were calibrated, by the name that torch has for them. What cannot be used is logged and left out."""
    found: dict[str, Device] = {}
    try:
        files = sorted(cache_dir().glob("calibration-*.json"))  # none where there is no such directory
    except (OSError, RuntimeError):  # not readable; no home directory
        return found
    for file in files:
        # Files of other kernels lie beside: they are left over, not broken.
        if not file.stem.endswith(kernels_version()):
            continue
        try:
            device = load(file)
        except (OSError, ValueError) as error:
            log.warning("%s is ignored: %s; python -m fsa_compile.calibrate writes it anew", file, error)
        else:
            found[device.name] = device
    return found


@functools.cache
def digest() -> str:
    """What code that was compiled with these calibrations depends on; ``"none"`` without one."""
    found = calibrations()
    return hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest() if found else "none"


def forget() -> None:
    """Read the files again at the next choice. Code that is compiled already stays as it is."""
    calibrations.cache_clear()
    digest.cache_clear()
