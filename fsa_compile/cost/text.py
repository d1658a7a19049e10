"""The cost model as text."""

from __future__ import annotations

import sympy
from sympy import Expr

from .calibration import calibrations
from .device import DEVICES, EFFICIENCY, Device
from .expressions import DERIVED, MEANING, SHARES
from .orders import ORDERS


def describe(*, unicode: bool = False) -> str:
    """The model as text: symbols, derived sizes, each pass's time, and the devices' constants.

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
    lines += ["which the last work item runs by itself."]
    for direction in ("forward", "backward"):
        for name, order in ORDERS.items():
            passes = order.passes(direction)
            lines += ["", f"{direction}, loop order {name!r} = " + " + ".join(f"[{p.name}]" for p in passes)]
            for p in passes:
                lines += [f"  [{p.name}] {p.what}"]
                for label, expr in p.terms().items():
                    if expr != 0:
                        lines += pretty(expr, label)
    return "\n".join([*lines, "", *_devices([*DEVICES.values(), *calibrations().values()])])


def _devices(devices: list[Device]) -> list[str]:
    """The constants, and where they come from."""
    width = max(len(d.name) for d in devices) + 2
    lines = ["Devices (rates in T/s, launch in us)"]
    head = ("FLOPS16", "FLOPS32", "BW_dram", "BW_L2", "R_sort", "t_launch", "SMs")
    lines.append(" " * width + "".join(f"{h:>10}" for h in head) + "  constants")
    for d in devices:
        rates = (d.flops, d.flops_fp32, d.dram_bandwidth, d.l2_bandwidth)
        row = [f"{d.name:>{width}}", *(f"{r / 1e12:>10.4g}" for r in rates)]
        row += [f"{d.sort_rate / 1e12:>10.3g}", f"{d.launch_overhead * 1e6:>10.3g}", f"{d.num_sms:>10}"]
        lines.append("".join(row) + f"  {d.source}")
    lines += ["", "Share of FLOPS that a kernel reaches"]
    lines.append(" " * width + "".join(f"{SHARES[name]!s:>10}" for name in EFFICIENCY))
    lines += [f"{d.name:>{width}}" + "".join(f"{share:>10.3g}" for share in d.efficiency) for d in devices]
    lines += [
        "",
        "A GPU that is not listed gets constants derived from its properties, or an A100's ratios where there are",
    ]
    return [*lines, "none. python -m fsa_compile.calibrate measures those of the GPU that is here."]
