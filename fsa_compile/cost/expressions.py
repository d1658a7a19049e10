"""The cost model's sympy expressions: one sum of passes per loop order, forward and backward.

A pass takes ``max(arithmetic / rate, L2 bytes / L2 bandwidth, DRAM bytes / DRAM bandwidth) * (1 + tail) + launches *
overhead``. docs/cost-model.md derives each term and compares the result with measurements.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import sympy
from sympy import Expr, Integer, Max, Min, Rational, Symbol, ceiling

from ..tiling import ENTRIES_PER_TILE
from .device import DEVICES
from .problem import KV_OUTER_ROWS


def _sym(name: str) -> Symbol:
    return Symbol(name, positive=True)


B, T, Tk, HK, G, D, DV, bs, S, w = map(_sym, ("B", "T", "Tk", "HK", "G", "D", "DV", "bs", "S", "w"))
M_q, M_kv, N_w, C = map(_sym, ("M_q", "M_kv", "N_w", "C"))
FLOPS, BW_dram, BW_L2 = map(_sym, ("FLOPS", "BW_dram", "BW_L2"))
R_sort, t_launch, SMs = map(_sym, ("R_sort", "t_launch", "SMs"))
E, W, P = map(_sym, ("E", "W", "P"))

# Names that make the expressions readable; substituted before evaluation.
DERIVED: dict[Symbol, Expr] = {
    E: B * T * HK * Min(S, ceiling(Tk / bs)),
    W: E / N_w + Min(E, B * HK * ceiling(Tk / bs)),
    P: E * G * C,
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
    M_q: "rows of the query-outer tile: G rounded up to a power of two, at least 16",
    M_kv: f"rows of the KV-outer tile ({KV_OUTER_ROWS}), each a query head of an entry",
    N_w: f"entries that one work item of a KV-outer pass serves ({ENTRIES_PER_TILE})",
    C: "chunks that the KV-outer passes cut a block into: 1 where the whole of it fits on chip",
    E: "entries: (token, KV head, selected block) triples",
    W: "work items of a KV-outer pass; every list's last one is partly filled",
    P: "rows of partials: one for each entry, query head and chunk",
    FLOPS: "matmul rate at the inputs' dtype, 1/s (a multiply-add is two)",
    BW_dram: "DRAM bandwidth that a streaming kernel reaches, B/s",
    BW_L2: "L2 bandwidth that a gathering kernel reaches, B/s",
    R_sort: "entries that the lists take per second, launches apart; most of it is a stable sort",
    t_launch: "overhead of a launch, s",
    SMs: "multiprocessors; while the last program of a pass runs, the others idle",
}

SIZES = (B, T, Tk, HK, G, D, DV, bs, S, w)
TILES = (M_q, M_kv, N_w, C)
CONSTANTS = (FLOPS, BW_dram, BW_L2, R_sort, t_launch, SMs)


# Share of the device's dense matmul rate that each kernel of this package reached, one H200. What holds a kernel back
# is its own (the softmax between two matmuls, 2 to 4 warps on 16 to 64 rows), so it is the kernel's, not the device's.
EFFICIENCY: dict[str, Rational] = {
    "query-outer": Rational(17, 100),
    "query-outer dq": Rational(24, 100),
    "KV-outer partials": Rational(30, 100),
    "KV-outer dk dv": Rational(37, 100),
    "KV-outer dq dk dv": Rational(265, 1000),
}


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
    launches: int = 1

    def terms(self) -> dict[str, Expr]:
        """Seconds by what they are spent on; the pass takes the largest of the first three plus the others."""
        # The last item starts when the others end, at worst, and has one multiprocessor's share of the device.
        stretch = Integer(1) if self.items is None else 1 + SMs / self.items
        return {
            "arithmetic": self.flops * stretch / (FLOPS * EFFICIENCY.get(self.name, Integer(1))),
            "L2": self.l2_bytes * stretch / BW_L2,
            "DRAM": self.dram_bytes * stretch / BW_dram,
            "sort": self.sorted_keys / R_sort,
            "launch": self.launches * t_launch,
        }

    def time(self) -> Expr:
        """Seconds, in the symbols of MEANING."""
        terms = self.terms()
        return Max(terms["arithmetic"], terms["L2"], terms["DRAM"]) + terms["sort"] + terms["launch"]


def _tensor(rows: Expr, *widths: Expr) -> Expr:
    """Bytes of tensors [rows, width]."""
    return rows * sum(widths, Integer(0)) * w


_q_rows, _k_rows = B * T * HK * G, B * Tk * HK
_read_rows = Min(_k_rows, E * bs)  # rows of k and v that are selected at all
_items_q = B * T * HK
# A query selects a block once, so no list is longer than the sequence.
_items_kv = E * C / Min(N_w, T)

_LISTS = Pass(
    "lists",
    "sort the entries by block: one stable sort, and small kernels for keys, offsets and work items",
    sorted_keys=E,
    launches=20,
)
_DELTA = Pass(
    "delta",
    "rowsum(grad_out * out)",
    dram_bytes=_tensor(_q_rows, DV, DV) + 4 * _q_rows,
)

# An item's last matmul tile is half empty on average.
_kv_rows = E * G + W * M_kv / 2

FORWARD_PASSES: dict[str, tuple[Pass, ...]] = {
    "nsa": (
        Pass(
            "query-outer",
            "each (token, KV head) walks its S blocks; every K/V block read again for every token",
            flops=2 * E * bs * M_q * (D + DV),
            l2_bytes=_tensor(E * bs, D, DV),
            dram_bytes=_tensor(_q_rows, D, DV) + _tensor(_read_rows, D, DV) + 4 * _q_rows + 4 * E,
            items=_items_q,
        ),
    ),
    "fsa": (
        _LISTS,
        Pass(
            "KV-outer partials",
            "each K/V block meets the queries that selected it: gather q rows, write a partial and statistics for each",
            flops=2 * _kv_rows * bs * (D + DV),
            l2_bytes=_tensor(W * bs, D, DV) + _tensor(P, D, DV),
            dram_bytes=_tensor(P, D, DV) + _tensor(_read_rows, D, DV) + 4 * P + 8 * E,
            items=_items_kv,
        ),
        Pass(
            "merge",
            "weigh a token's S partials by their log-sum-exp and add",
            dram_bytes=_tensor(P, DV) + 4 * P + _tensor(_q_rows, DV) + 4 * _q_rows,
        ),
    ),
}

_dkv_tiles = 4 * W * bs * (D + DV)
_TILE_SUM = Pass(
    "sum tiles",
    "add the float32 dk, dv tiles of a block's work items",
    dram_bytes=_dkv_tiles + _tensor(_k_rows, D, DV),
    launches=2,
)

BACKWARD_PASSES: dict[str, tuple[Pass, ...]] = {
    "nsa": (
        _DELTA,
        _LISTS,
        Pass(
            "KV-outer dk dv",
            "s = q k', dp = do v', dv = p' do, dk = ds' q: gather q and do rows, one float32 tile for each work item",
            flops=2 * _kv_rows * bs * (2 * D + 2 * DV),
            l2_bytes=_tensor(W * bs, D, DV) + _tensor(P, D, DV),
            dram_bytes=_tensor(P, D, DV) + 8 * P + 8 * E + _dkv_tiles,
            items=_items_kv,
        ),
        Pass(
            "query-outer dq",
            "s, dp, dq = ds k; K/V blocks read again for every token",
            flops=2 * E * bs * M_q * (2 * D + DV),
            l2_bytes=_tensor(E * bs, D, DV),
            dram_bytes=_tensor(_q_rows, D, DV, D) + _tensor(_read_rows, D, DV) + 8 * _q_rows + 4 * E,
            items=_items_q,
        ),
        _TILE_SUM,
    ),
    "fsa": (
        _DELTA,
        _LISTS,
        Pass(
            "KV-outer dq dk dv",
            "s, dp, dv, dk as for nsa, and dq = ds k as one partial per entry",
            flops=2 * _kv_rows * bs * (3 * D + 2 * DV),
            l2_bytes=_tensor(W * bs, D, DV) + _tensor(P, D, DV, D),
            dram_bytes=_tensor(P, D, DV, D) + 8 * P + 8 * E + _dkv_tiles,
            items=_items_kv,
        ),
        Pass(
            "sum dq partials",
            "add a token's S dq partials",
            dram_bytes=_tensor(P, D) + _tensor(_q_rows, D),
        ),
        _TILE_SUM,
    ),
}


def _total(passes: tuple[Pass, ...]) -> Expr:
    return sum((p.time() for p in passes), Integer(0))


# Seconds of a forward, and of a backward with its own lists, by loop order.
EXPRESSIONS: dict[str, Expr] = {order: _total(passes) for order, passes in FORWARD_PASSES.items()}
BACKWARD_EXPRESSIONS: dict[str, Expr] = {order: _total(passes) for order, passes in BACKWARD_PASSES.items()}
# Seconds of the lists; a training step builds them once when both directions need them.
LISTS_EXPRESSION: Expr = _LISTS.time()
# Bytes of the largest moment's temporaries, (forward, backward); 24 bytes an entry while the lists are sorted.
SCRATCH_EXPRESSIONS: dict[str, tuple[Expr, Expr]] = {
    "nsa": (Integer(0), 24 * E + _dkv_tiles),
    "fsa": (24 * E + _tensor(P, DV) + 4 * P, 24 * E + _tensor(P, D) + _dkv_tiles),
}

_PASSES = {"forward": FORWARD_PASSES, "backward": BACKWARD_PASSES}


def describe(*, unicode: bool = False) -> str:
    """The model as text: symbols, derived sizes, each pass's time, and the device table.

    ``unicode=True`` draws fractions with box characters.
    """

    def pretty(expr: Expr, label: str) -> list[str]:
        block = sympy.pretty(expr, use_unicode=unicode, num_columns=160).splitlines()
        middle = (len(block) - 1) // 2  # the fraction's line
        return [f"    {label if i == middle else '':<13}{line}".rstrip() for i, line in enumerate(block)]

    lines = ["Cost of selected attention by loop order, in seconds.", "", "Symbols"]
    lines += [f"  {symbol!s:<10} {meaning}" for symbol, meaning in MEANING.items()]
    lines += ["", "Derived sizes"]
    for symbol, expr in DERIVED.items():
        lines += pretty(expr, f"{symbol} =")
    lines += [
        "",
        "A pass takes max(arithmetic, L2, DRAM) + sort + launch; 1 + SMs / items in the first three is the tail, in",
    ]
    lines += ["which the last work item runs by itself. Share of FLOPS that a kernel reaches:"]
    lines += [f"  {name:<18} {float(share):.3g}" for name, share in EFFICIENCY.items()]
    for direction, by_order in _PASSES.items():
        for order, passes in by_order.items():
            lines += ["", f"{direction}, loop order {order!r} = " + " + ".join(f"[{p.name}]" for p in passes)]
            for p in passes:
                lines += [f"  [{p.name}] {p.what}"]
                for label, expr in p.terms().items():
                    if expr != 0:
                        lines += pretty(expr, label)
    lines += ["", "Devices (rates in T/s, launch in us)"]
    head = ("name", "FLOPS16", "FLOPS32", "BW_dram", "BW_L2", "R_sort", "t_launch", "SMs")
    lines.append("  " + "".join(f"{h:>10}" for h in head))
    for d in DEVICES.values():
        rates = (d.flops, d.flops_fp32, d.dram_bandwidth, d.l2_bandwidth)
        row = [f"{d.name:>10}", *(f"{r / 1e12:>10.4g}" for r in rates)]
        row += [f"{d.sort_rate / 1e12:>10.3g}", f"{d.launch_overhead * 1e6:>10.3g}", f"{d.num_sms:>10}"]
        lines.append("  " + "".join(row))
    return "\n".join(lines)
