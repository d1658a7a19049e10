"""The cost model's symbols, and the time of a pass in them.

A pass takes ``max(arithmetic / rate, L2 bytes / L2 bandwidth, DRAM bytes / DRAM bandwidth) * (1 + tail) + launches *
overhead``. docs/cost-model.md derives each term and compares the result with measurements.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from sympy import Expr, Integer, Max, Min, Rational, Symbol, ceiling, exp

from ..tiling import ENTRIES_PER_TILE, WORKSPACE
from .device import EFFICIENCY
from .problem import KV_OUTER_ROWS


def _sym(name: str) -> Symbol:
    return Symbol(name, positive=True)


B, T, Tk, HK, G, D, DV, bs, S, w = map(_sym, ("B", "T", "Tk", "HK", "G", "D", "DV", "bs", "S", "w"))
a = Symbol("a", nonnegative=True)
M_q, M_kv, N_w, N_t, C, X = map(_sym, ("M_q", "M_kv", "N_w", "N_t", "C", "X"))
FLOPS, BW_dram, BW_L2 = map(_sym, ("FLOPS", "BW_dram", "BW_L2"))
R_sort, t_launch, SMs = map(_sym, ("R_sort", "t_launch", "SMs"))
E, W, P, U = map(_sym, ("E", "W", "P", "U"))

# By pass: its share of FLOPS, a constant of the device (`Device.efficiency`).
SHARES: dict[str, Symbol] = {name: _sym("eta_" + "".join(re.findall(r"\b\w", name))) for name in EFFICIENCY}

_blocks = ceiling(Tk / bs)
_own_blocks = Min(ceiling(T / bs), _blocks)  # the last ones, which hold the queries
# Causal: queries of the first of these see so many blocks fewer than they have slots, those of the next one less few.
_too_few = Max(0, Min(S, _blocks) - (_blocks - _own_blocks) - 1)
_filled = Min(S, _blocks) - _too_few * (_too_few + 1) / (2 * _own_blocks)  # slots of a query, on average
_seen = (Tk - Min(T, Tk) / 2) / bs + Rational(1, 2)  # blocks up to a query, on average
_half = Max(S, Tk / (2 * bs))  # blocks that a query can select, on average
# Names that make the expressions readable; substituted before evaluation.
DERIVED: dict[Symbol, Expr] = {
    E: B * T * HK * _filled,
    W: E / N_w + Min(E, B * HK * ceiling(Tk / bs)),
    P: E * G * C,
    U: Min((1 - a) * _half * (1 - exp(-Min(N_t, T) * S / _half)) + a * S, _seen),
}

MEANING: dict[Symbol, str] = {
    B: "batch",
    T: "seq_len, queries of a sequence",
    Tk: "seq_len_k, keys of a sequence",
    HK: "num_kv_heads",
    G: "gqa_group_size, query heads of one key/value head",
    D: "head_dim of q and k",
    DV: "head_dim of v",
    bs: "block_size, tokens of a selected block",
    S: "num_selected, blocks that a query selects",
    w: "bytes of an element of q, k, v",
    a: "agreement: 0 where neighbours select independently of each other, 1 where a tile's select the same",
    M_q: "rows of the query-outer tile: G rounded up to a power of two, at least 16",
    M_kv: f"rows of the KV-outer tile ({KV_OUTER_ROWS}), each a query head of an entry",
    N_w: f"entries that one work item of a KV-outer pass serves ({ENTRIES_PER_TILE})",
    N_t: "tokens of a query tile",
    C: "chunks that the KV-outer passes cut a block into: 1 where the whole of it fits on chip",
    X: f"bytes of partials at once ({WORKSPACE >> 30} GiB); a call with more is cut in parts",
    E: "entries: (token, KV head, selected block) triples; a sequence's first tokens have fewer than S",
    W: "work items of a KV-outer pass; every list's last one is partly filled",
    P: "rows of partials: one for each entry, query head and chunk",
    U: "blocks of a query tile's union",
    FLOPS: "matmul rate at the inputs' dtype, 1/s (a multiply-add is two)",
    BW_dram: "DRAM bandwidth that a streaming kernel reaches, B/s",
    BW_L2: "L2 bandwidth that a gathering kernel reaches, B/s",
    R_sort: "entries that the lists take per second, launches apart; most of it is a stable sort",
    t_launch: "overhead of a launch, s",
    SMs: "multiprocessors; while the last program of a pass runs, the others idle",
    **{share: f"share of FLOPS that [{name}] reaches" for name, share in SHARES.items()},
}

SIZES = (B, T, Tk, HK, G, D, DV, bs, S, w, a)
TILES = (M_q, M_kv, N_w, N_t, C, X)
CONSTANTS = (FLOPS, BW_dram, BW_L2, R_sort, t_launch, SMs, *SHARES.values())


@dataclass(frozen=True)
class Pass:
    """One kernel, or a few that one name covers; the terms of its time."""

    name: str
    what: str
    flops: Expr = field(default_factory=lambda: Integer(0))
    l2_bytes: Expr = field(default_factory=lambda: Integer(0))
    dram_bytes: Expr = field(default_factory=lambda: Integer(0))
    sorted_keys: Expr = field(default_factory=lambda: Integer(0))
    items: Expr | None = None  # the pass in work items as large as its largest; None: small and many
    launches: Expr | int = 1
    kernel: str = ""  # the pass whose kernel it runs, and whose share of the matmul rate it has; "": its own

    def terms(self) -> dict[str, Expr]:
        """Seconds by what they are spent on; the pass takes the largest of the first three plus the others."""
        # The last item starts when the others end, at worst, and has one multiprocessor's share of the device.
        stretch = Integer(1) if self.items is None else 1 + SMs / self.items
        return {
            "arithmetic": self.flops * stretch / (FLOPS * SHARES.get(self.kernel or self.name, Integer(1))),
            "L2": self.l2_bytes * stretch / BW_L2,
            "DRAM": self.dram_bytes * stretch / BW_dram,
            "sort": self.sorted_keys / R_sort,
            "launch": self.launches * t_launch,
        }

    def time(self) -> Expr:
        """Seconds, in the symbols of MEANING."""
        terms = self.terms()
        return Max(terms["arithmetic"], terms["L2"], terms["DRAM"]) + terms["sort"] + terms["launch"]


def tensor_bytes(rows: Expr, *widths: Expr) -> Expr:
    """Bytes of tensors [rows, width]."""
    return rows * sum(widths, Integer(0)) * w
