"""The cost model as text."""

from __future__ import annotations

import sympy
from sympy import Expr

from .device import DEVICES
from .expressions import DERIVED, EFFICIENCY, MEANING
from .orders import ORDERS


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
    for direction in ("forward", "backward"):
        for name, order in ORDERS.items():
            passes = order.passes(direction)
            lines += ["", f"{direction}, loop order {name!r} = " + " + ".join(f"[{p.name}]" for p in passes)]
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
