"""NSA and its branches as people write them by hand, and what looks like it and is not.

A program takes `q, k, v, ids` in its layout: "bhtd" q (batch, num_q_heads, seq_len, head_dim), k and v likewise with
num_kv_heads, ids (batch, num_kv_heads, seq_len, num_selected) int64; "bthd" with seq_len before the heads. `BLOCK`
tokens are a block. `ids` may repeat; with `padded` there are -1 among them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BLOCK = 16

Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Program:
    """One program of the corpus."""

    name: str
    fn: Attention
    layout: str = "bhtd"
    padded: bool = False  # its ids have -1 among them
    ids_of_query_heads: bool = False
    group: int = 2
    reason: str = ""  # of a near miss: what the site says
    static_only: bool = False  # left alone where lengths are dynamic
    specialises: bool = False  # torch itself compiles it for each length
    length: int = 72  # not a multiple of BLOCK
    empty_rows: bool = True  # its inputs have rows that see nothing
    selects: bool = False  # its ids become `select_blocks`
    op: str = "selected_attention"  # that a positive becomes


POSITIVES: dict[str, Program] = {}
NEAR_MISSES: dict[str, Program] = {}


def positive(**options: Any) -> Callable[[Attention], Attention]:
    """Register a program that has to be replaced."""

    def register(fn: Attention) -> Attention:
        POSITIVES[fn.__name__] = Program(fn.__name__, fn, **options)
        return fn

    return register


def near_miss(reason: str, **options: Any) -> Callable[[Attention], Attention]:
    """Register a program that is not selected attention, with words that the site says."""

    def register(fn: Attention) -> Attention:
        NEAR_MISSES[fn.__name__] = Program(fn.__name__, fn, reason=reason, **options)
        return fn

    return register


def make_inputs(program: Program, length: int, *, batch: int = 2, requires_grad: bool, seed: int = 0) -> list[Tensor]:
    """Random inputs; ids in no order, with repetitions, some of the future; some rows without their own block."""
    g = torch.Generator().manual_seed(seed)
    heads_k, dim, slots = 2, 16, 3
    heads = heads_k * program.group
    q = torch.randn(batch, heads, length, dim, generator=g)
    k, v = (torch.randn(batch, heads_k, length, dim, generator=g) for _ in "kv")
    blocks = -(-length // BLOCK)
    rows = heads if program.ids_of_query_heads else heads_k
    ids = torch.randint(0, blocks, (batch, rows, length, slots), generator=g)
    own = torch.arange(length)[:, None] // BLOCK
    keep = torch.rand(batch, rows, length, 1, generator=g) < (0.8 if program.empty_rows else 2.0)
    ids[..., 1:2] = torch.where(keep, own.expand_as(ids[..., :1]), ids[..., 1:2])
    if program.padded:
        drop = torch.rand(ids.shape, generator=g) < 0.3
        drop[..., 1:2] &= program.empty_rows
        ids = ids.masked_fill(drop, -1)
    tensors = [q, k, v, ids]
    if program.layout == "bthd":
        tensors = [x.transpose(1, 2).contiguous() for x in tensors]
    return [x.requires_grad_(requires_grad) if x.is_floating_point() else x for x in tensors]


from . import (  # noqa: E402
    branch_near_misses,  # noqa: F401
    branch_positives,  # noqa: F401
    indexer_near_misses,  # noqa: F401
    indexer_positives,  # noqa: F401
    models,  # noqa: F401
    near_misses,  # noqa: F401
    padded,  # noqa: F401
    pooled,  # noqa: F401
    positives,  # noqa: F401
    probability_positives,  # noqa: F401
    written,  # noqa: F401
)
