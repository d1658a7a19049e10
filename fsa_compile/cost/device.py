"""Device constants: what a kernel of this package reaches there, not what the data sheet promises.

One table, so that a new measurement changes one line. A row says where its numbers come from.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

_TERA = 1e12
_GIGA = 1e9


@dataclass(frozen=True)
class Device:
    """Rates of one device. Bytes, seconds, operations per second (a multiply-add is two)."""

    name: str
    flops: float  # dense 16-bit matmul, peak
    flops_fp32: float  # float32 matmul (IEEE, no TF32), peak
    dram_bandwidth: float  # B/s, reached by a streaming kernel
    l2_bandwidth: float  # B/s, reached by a kernel that gathers K/V blocks
    sort_rate: float  # entries/s that are sorted by block, the small kernels around the sort included
    launch_overhead: float  # s per kernel, the host's share included
    num_sms: int  # multiprocessors (compute units, cores)
    memory: float  # B
    kind: str = "cuda"  # "cuda" (ROCm too) or "cpu"
    only_order: str | None = None  # the loop order of a device that has one path only


def _gpu(name: str, **values: Any) -> Device:
    num_sms = int(values.pop("num_sms"))
    return Device(name=name, num_sms=num_sms, launch_overhead=15e-6, kind="cuda", **values)


# H200: fitted to this package's own kernels on one H200 (torch 2.11, triton 3.6, bf16, HK=4, block 64, S=16;
#   tests/test_cost_measured.py, docs/cost-model.md). dram_bandwidth is 71 % of 4.8 TB/s: KV-outer partials and merge.
#   l2_bandwidth is 57 % of 132 SMs x 64 B/clk x 1.785 GHz: 137 GB of K/V in 16.0 ms at any G <= 16, forward and dq.
#   sort_rate: two radix passes and the small kernels, 0.25 ms of device time for 4.2M entries. launch_overhead is a
#   compromise: eager calls below T = 2K are bound by the host, at 25 us a launch; a CUDA graph would hide most of that.
# Others: data sheet x the fractions that the H200 reached, sorts as DRAM. Not measured.
#   H100: the H200's die with 3.35 TB/s of HBM3. A100-80GB: 108 SMs x 64 B/clk x 1.41 GHz of L2, 2.04 TB/s.
#   B200: 148 SMs x 64 B/clk x 1.85 GHz, 8 TB/s. MI300X: K/V come from the 17 TB/s Infinity Cache, 5.3 TB/s of HBM.
# cuda: any other GPU; an A100's ratios, as only the ratios decide. cpu: two cores, fp32, from an ATen probe (T = 16384,
#   HK = 2, G = 4, D = 64: 0.46 s KV-outer, 3.6 s gathering K/V per query), its flops so that the GPU kernels' shares
#   give what ATen reached; its costs are for the report only.
DEVICES: dict[str, Device] = {
    "H200": _gpu(
        "H200",
        flops=989 * _TERA,
        flops_fp32=67 * _TERA,
        dram_bandwidth=3.4 * _TERA,
        l2_bandwidth=8.6 * _TERA,
        sort_rate=15 * _GIGA,
        num_sms=132,
        memory=141 * _GIGA,
    ),
    "H100": _gpu(
        "H100",
        flops=989 * _TERA,
        flops_fp32=67 * _TERA,
        dram_bandwidth=2.37 * _TERA,
        l2_bandwidth=8.6 * _TERA,
        sort_rate=10.5 * _GIGA,
        num_sms=132,
        memory=80 * _GIGA,
    ),
    "A100": _gpu(
        "A100",
        flops=312 * _TERA,
        flops_fp32=19.5 * _TERA,
        dram_bandwidth=1.44 * _TERA,
        l2_bandwidth=5.56 * _TERA,
        sort_rate=6.4 * _GIGA,
        num_sms=108,
        memory=80 * _GIGA,
    ),
    "B200": _gpu(
        "B200",
        flops=2250 * _TERA,
        flops_fp32=75 * _TERA,
        dram_bandwidth=5.67 * _TERA,
        l2_bandwidth=10.0 * _TERA,
        sort_rate=25 * _GIGA,
        num_sms=148,
        memory=180 * _GIGA,
    ),
    "MI300X": _gpu(
        "MI300X",
        flops=1307 * _TERA,
        flops_fp32=163 * _TERA,
        dram_bandwidth=3.75 * _TERA,
        l2_bandwidth=9.7 * _TERA,
        sort_rate=16.5 * _GIGA,
        num_sms=304,
        memory=192 * _GIGA,
    ),
    "cuda": _gpu(
        "cuda",
        flops=312 * _TERA,
        flops_fp32=19.5 * _TERA,
        dram_bandwidth=1.44 * _TERA,
        l2_bandwidth=5.56 * _TERA,
        sort_rate=6.4 * _GIGA,
        num_sms=108,
        memory=40 * _GIGA,
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

# GH200 and GB200 are the same GPUs on another board; any other name (H20, A10, MI325X) has other ratios.
_NAME = re.compile(r"(?<![A-Z0-9])G?(H200|H100|A100|B200|MI300X)(?![0-9])", re.IGNORECASE)


def device_for(name: str, type: str = "cuda") -> Device:
    """The row of ``DEVICES`` for a device as torch names it.

    Args:
        name: ``torch.cuda.get_device_name(...)``, such as ``"NVIDIA H200"``; ignored for ``type="cpu"``.
        type: ``tensor.device.type``. Every type but ``"cpu"`` is taken for a GPU.

    A GPU that is not in the table gets the generic row.
    """
    if type == "cpu":
        return DEVICES["cpu"]
    found = _NAME.search(name)
    return DEVICES[found.group(1).upper() if found else "cuda"]
