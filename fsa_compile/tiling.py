"""Configurations as data: tiles and launch options of the kernels, and the tables of measured ones."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

__all__ = [
    "Config", "Device", "ENTRIES_PER_TILE", "agreeing", "configured", "next_power_of_2", "padded", "selected_block_n",
    "WORKSPACE", "selected_chunk_n", "tuned_file", "union_tokens",
]  # fmt: skip


class Device(NamedTuple):
    """What a configuration depends on of a device: its architecture ("sm_90", "hip", "generic") and its name."""

    arch: str
    name: str


@dataclass(frozen=True)
class Config:
    """Hardware tiles of one kernel by constexpr name, warps of a program, software-pipelining depth.

    max_registers: what a thread may use at most, so that more programs share a multiprocessor; not on AMD.
    """

    tiles: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """What Triton is told besides the tiles."""
        limit = {} if self.max_registers is None else {"maxnreg": self.max_registers}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages} | limit


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is >= n."""
    return 1 << max(0, n - 1).bit_length()


def padded(width: int) -> int:
    """A head dim as tiles hold it: a power of two, at least the 16 that a matrix product asks for."""
    return max(16, next_power_of_2(width))


# How many entries of a block's list one program serves. The lists of blocks that every query must select are as long as
# the sequence, so they are cut; the cost of a cut is one more load of the block and one more float32 tile in the
# backward.
ENTRIES_PER_TILE = 1024

# Bytes of partials of the key/value-outer order beyond which a call is cut in parts that take turns.
WORKSPACE = 2**31


def selected_chunk_n(block_size: int, head_dim: int, head_dim_v: int, itemsize: int) -> int:
    """Keys of a chunk of a selected block in the KV-outer kernels, whose bytes go with the number of chunks.

    A chunk's keys and values stay on chip while its list goes by.
    """
    if itemsize == 4 or max(head_dim, head_dim_v) > 128:
        return selected_block_n(block_size, head_dim, head_dim_v, itemsize)
    return min(block_size, 128)


def selected_block_n(block_size: int, head_dim: int, head_dim_v: int, itemsize: int) -> int:
    """Keys of a selected block that the kernels with queries outside take at once.

    float32 is multiplied without tensor cores, from registers, so it takes narrower tiles.
    """
    widest = padded(max(head_dim, head_dim_v))
    return min(block_size, 64 if itemsize < 4 else max(16, 4096 // widest))


def union_tokens(gqa_group_size: int, num_selected: int, itemsize: int) -> int:
    """Tokens of a query tile that attends to the union of their blocks: what fills 64 rows of a matrix product.

    More tokens share more of their blocks, and each then computes more that is not its own. A sort of the tile's
    selections has to fit one program. float32 is multiplied from registers, which hold 16 rows.
    """
    rows = 64 if itemsize < 4 else 16
    return max(1, min(rows // next_power_of_2(gqa_group_size), 2048 // next_power_of_2(num_selected)))


def agreeing(tokens: int) -> int:
    """Tokens of a query tile that have to select a block for the tile to attend to it, in the mixed order.

    A block takes a tile as long as a quarter of its rows take a list (an H100: 4 ns a block, and 1.0 or 0.26 ns an
    entry at G = 4 and 1).
    """
    return max(2, tokens // 4)


def tuned_file(device_name: str) -> Path:
    """The table of measured configurations of a GPU: ``{kernel: {sizes: fields of Config, in order}}``."""
    slug = "".join(c if c.isalnum() else "_" for c in device_name.lower())
    return Path(__file__).resolve().parent / "templates" / "tuned" / f"{slug}.json"


@functools.cache
def _tuned(device_name: str) -> dict[str, dict[str, Any]]:
    file = tuned_file(device_name)
    return json.loads(file.read_text()) if device_name and file.exists() else {}


def key(sizes: Any) -> str:
    """How a table names static sizes."""
    return ",".join(f"{name}={value}" for name, value in sizes._asdict().items())


@functools.cache
def configured(kernel: str, heuristic: Callable[[Any, Device], Config], sizes: Any, device: Device) -> Config:
    """The measured configuration of ``kernel`` for ``sizes`` on ``device``; the heuristic's where none was measured."""
    found = _tuned(device.name).get(kernel, {}).get(key(sizes))
    return Config(*found) if found else heuristic(sizes, device)
