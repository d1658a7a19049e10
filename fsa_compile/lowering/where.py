"""Where in the user's code a node of a graph comes from."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

__all__ = ["frames_of", "innermost", "where_of"]

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# With a separator: a file beside the package may begin with its name.
_LIBRARIES = (os.path.dirname(torch.__file__) + os.sep, _PACKAGE + os.sep)
_DEMO = os.path.join(_PACKAGE, "demo") + os.sep  # the demo's model is a user's model


def frames_of(trace: str) -> list[tuple[str, Any]]:
    """File and line of each frame of a stack trace, the innermost last."""
    return _FRAME.findall(trace)


def innermost(frames: Sequence[tuple[str, Any]]) -> str | None:
    """``file:line`` of the innermost frame that is neither torch's nor ours; of the innermost one if all are."""
    for file, line in reversed(frames):
        if file.startswith(_DEMO) or not file.startswith(_LIBRARIES):
            return f"{file}:{line}"
    return f"{frames[-1][0]}:{frames[-1][1]}" if frames else None


def where_of(node: fx.Node) -> str | None:
    """``file:line`` of the user's call that a node comes from."""
    return innermost(frames_of(node.meta.get("stack_trace") or ""))
