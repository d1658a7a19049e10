"""Device constants: what a kernel of this package reaches there, not what the data sheet promises.

One table, so that a new measurement changes one line. A row says where its numbers come from.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

_TERA = 1e12
_GIGA = 1e9


# Share of the device's dense matmul rate that each kernel of this package reaches, by pass; these are one H200's. What
# holds a kernel back is its own (the softmax between two matmuls, 2 to 4 warps on 16 to 64 rows).
EFFICIENCY: dict[str, float] = {
    "query-outer": 0.173,
    "query-outer dq": 0.223,
    "KV-outer partials": 0.30,
    "KV-outer dk dv": 0.392,
    "KV-outer dq dk dv": 0.264,
    "query-tile": 0.61,
    "query-tile dq": 0.716,
}


# Seconds that the host needs to launch a kernel eagerly, at least. With little to do, the device waits for it.
HOST_LAUNCH = 25e-6


@dataclass(frozen=True)
class Device:
    """Rates of one device. Bytes, seconds, operations per second (a multiply-add is two)."""

    name: str
    flops: float  # dense 16-bit matmul, peak
    flops_fp32: float  # float32 matmul (IEEE, no TF32), peak
    dram_bandwidth: float  # B/s, reached by a streaming kernel
    l2_bandwidth: float  # B/s, reached by a kernel that gathers K/V blocks
    sort_rate: float  # entries/s that are sorted by block, the small kernels around the sort included
    launch_overhead: float  # s per kernel, as fitted, with some of the host's share; `HOST_LAUNCH` is all of it
    num_sms: int  # multiprocessors (compute units, cores)
    memory: float  # B
    kind: str = "cuda"  # "cuda" (ROCm too) or "cpu"
    only_order: str | None = None  # the loop order of a device that has one path only
    efficiency: tuple[float, ...] = tuple(EFFICIENCY.values())  # in the order of EFFICIENCY
    source: str = "shipped"  # where the constants come from


def _gpu(name: str, **values: Any) -> Device:
    return Device(**{"name": name, "launch_overhead": 15e-6, "kind": "cuda", **values})


# H200: fitted by calibrate.fit to this package's own kernels on one H200 (torch 2.11, triton 3.6, bf16, HK=4, block 64,
#   S=16, T = 1K to 128K, G = 1 to 32; tests/test_cost_measured.py, docs/cost-model.md), bandwidths from T = 4K on.
#   dram_bandwidth is 77 % of 4.8 TB/s: KV-outer partials and merge. l2_bandwidth is 55 % of 132 SMs x 64 B/clk x
#   1.785 GHz. The kernels were older, and no call was cut. launch_overhead is a compromise: eager calls below T = 2K
#   were bound by the host, at 23 us a launch; a CUDA graph hides most of that. Query tiles were not timed there:
#   their shares are the H100's.
# H100: a calibration of one (torch 2.11, triton 3.6; benchmarks/results/calibration_h100.csv), GPU's time alone.
# Others: data sheet x the fractions that the H200 reached, sorts as DRAM. Not measured.
#   A100-80GB: 108 SMs x 64 B/clk x 1.41 GHz of L2, 2.04 TB/s. B200: 148 SMs x 64 B/clk x 1.85 GHz, 8 TB/s.
#   MI300X: K/V come from the 17 TB/s Infinity Cache, 5.3 TB/s of HBM.
# cuda: any other GPU; an A100's ratios, as only the ratios decide. cpu: two cores, fp32, from an ATen probe (T = 16384,
#   HK = 2, G = 4, D = 64: 0.46 s KV-outer, 3.6 s gathering K/V per query), its flops so that the GPU kernels' shares
#   give what ATen reached; its costs are for the report only.
# `python -m fsa_compile.calibrate --row` prints a row.
DEVICES: dict[str, Device] = {
    "H200": _gpu(
        "H200",
        flops=989 * _TERA,
        flops_fp32=67 * _TERA,
        dram_bandwidth=3.7 * _TERA,
        l2_bandwidth=8.33 * _TERA,
        sort_rate=14.1 * _GIGA,
        num_sms=132,
        memory=141 * _GIGA,
    ),
    "H100": _gpu(
        "H100",
        flops=989 * _TERA,
        flops_fp32=67 * _TERA,
        dram_bandwidth=3.21 * _TERA,
        l2_bandwidth=8.36 * _TERA,
        sort_rate=20.1 * _GIGA,
        launch_overhead=5.5e-06,
        num_sms=132,
        memory=80 * _GIGA,
        efficiency=(0.182, 0.276, 0.302, 0.571, 0.489, 0.61, 0.716),
    ),
    "A100": _gpu(
        "A100",
        flops=312 * _TERA,
        flops_fp32=19.5 * _TERA,
        dram_bandwidth=1.59 * _TERA,
        l2_bandwidth=5.26 * _TERA,
        sort_rate=6.4 * _GIGA,
        num_sms=108,
        memory=80 * _GIGA,
    ),
    "B200": _gpu(
        "B200",
        flops=2250 * _TERA,
        flops_fp32=75 * _TERA,
        dram_bandwidth=6.24 * _TERA,
        l2_bandwidth=9.46 * _TERA,
        sort_rate=25 * _GIGA,
        num_sms=148,
        memory=180 * _GIGA,
    ),
    "MI300X": _gpu(
        "MI300X",
        flops=1307 * _TERA,
        flops_fp32=163 * _TERA,
        dram_bandwidth=4.13 * _TERA,
        l2_bandwidth=9.2 * _TERA,
        sort_rate=16.5 * _GIGA,
        num_sms=304,
        memory=192 * _GIGA,
    ),
    "cpu": Device(
        name="cpu",
        kind="cpu",
        only_order="fsa",
        flops=0.3 * _TERA,
        flops_fp32=0.3 * _TERA,
        dram_bandwidth=10 * _GIGA,
        l2_bandwidth=4.8 * _GIGA,
        sort_rate=0.02 * _GIGA,
        launch_overhead=1e-5,
        num_sms=2,
        memory=16 * _GIGA,
    ),
}
DEVICES["cuda"] = replace(DEVICES["A100"], name="cuda", memory=40 * _GIGA, source="assumed")

# GH200 and GB200 are the same GPUs on another board; any other name (H20, A10, MI325X) has other ratios.
_NAME = re.compile(r"(?<![A-Z0-9])G?(H200|H100|A100|B200|MI300X)(?![0-9])", re.IGNORECASE)

# The row that a GPU without one is reckoned from.
_RELATIVES = {"sm_80": "A100", "sm_90": "H100", "sm_100": "B200", "sm_103": "B200", "gfx942": "MI300X"}
_DRAM_SHARE = 0.78  # of the data sheet's bandwidth, that the H200 reached
_HEAD_BYTES = 32 * 2**20  # keys and values of a head at T = 64K, D = 128, 16 bits: what gathering finds in the L2


class Properties(NamedTuple):
    """What a driver says of a GPU. Zero: it does not say."""

    arch: str  # "sm_90", "gfx942"
    num_sms: int
    memory: int  # B
    memory_clock: float = 0  # Hz, of which both edges carry data
    memory_bus: int = 0  # bits
    l2_bytes: int = 0


def known(name: str) -> Device | None:
    """The row of ``DEVICES`` for a GPU as torch names it."""
    found = _NAME.search(name)
    return DEVICES[found.group(1).upper()] if found else None


def derived(name: str, properties: Properties) -> Device:
    """Constants of a GPU that nobody measured, from those of its nearest relative.

    Rates of multiprocessors (matmul, L2) go with their number, those of memory with its clock and bus. Where the L2
    does not hold the keys and values of a head, the rest of them comes from memory.
    """
    base = known(name) or DEVICES[_RELATIVES.get(properties.arch, "cuda")]
    share = properties.num_sms / base.num_sms
    dram = base.dram_bandwidth * share
    if properties.memory_clock and properties.memory_bus:
        dram = _DRAM_SHARE * 2 * properties.memory_clock * properties.memory_bus / 8
    l2 = base.l2_bandwidth * share
    if properties.l2_bytes and base.name != "MI300X":  # which has another cache behind its L2
        held = min(1.0, properties.l2_bytes / _HEAD_BYTES)
        l2 = 1 / (held / l2 + (1 - held) / min(dram, l2))
    return replace(
        base,
        name=name,
        flops=base.flops * share,
        flops_fp32=base.flops_fp32 * share,
        dram_bandwidth=dram,
        l2_bandwidth=l2,
        sort_rate=base.sort_rate * dram / base.dram_bandwidth,
        num_sms=properties.num_sms,
        memory=float(properties.memory),
        source="derived from its properties",
    )


@lru_cache(maxsize=64)
def uncalibrated(name: str, properties: Properties | None = None) -> Device:
    """A GPU's row, or what its properties give where it has none or is another cut of that chip; else the generic row.

    See ``device_for``.
    """
    row = known(name)
    if properties is not None and (row is None or row.num_sms != properties.num_sms):
        return derived(name, properties)
    return row or DEVICES["cuda"]
