"""From tensors to what the cost model wants: the one place that both the operators and the lowering go through."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .. import cost

__all__ = ["UNKNOWN_LENGTH", "device_of", "gpu_of", "is_traced", "problem_of", "size_hint"]

# Assumed for a size without a hint (an unbacked symbol): long enough for either order to be worth its launches.
UNKNOWN_LENGTH = 8192


def is_traced(x: Tensor) -> bool:
    """Whether a compiler asks what a call is made of, not the call itself what it gives."""
    return isinstance(x, FakeTensor)


def size_hint(size: Any, fallback: int = UNKNOWN_LENGTH) -> int:
    """A likely value of an int or SymInt, without adding a guard; ``fallback`` where nothing is known."""
    if isinstance(size, int):  # a SymInt is not one
        return size
    from torch.fx.experimental import symbolic_shapes

    # torch 2.11 has size_hint only, which later versions deprecate for optimization_hint.
    name = "optimization_hint" if hasattr(symbolic_shapes, "optimization_hint") else "size_hint"
    return int(getattr(symbolic_shapes, name)(size, fallback=fallback))


def problem_of(q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor | Any, block_size: int) -> cost.Problem:
    """The sizes of one selected-attention call. Tensors may be real, fake or meta, and sizes symbolic.

    Args:
        q: (batch, seq_len, num_q_heads, head_dim). k, v: (batch, seq_len_k, num_kv_heads, head_dim or head_dim_v).
        block_indices: (batch, seq_len, num_kv_heads, num_selected), or ``num_selected`` itself.
        block_size: tokens of a block.

    Empty tensors count as one element in each dimension: their cost is that of the launches.
    """
    num_selected = block_indices.shape[3] if isinstance(block_indices, Tensor) else block_indices
    batch, seq_len, num_q_heads, head_dim = (max(1, size_hint(s)) for s in q.shape)
    seq_len_k, num_kv_heads = (max(1, size_hint(s)) for s in k.shape[1:3])
    return cost.Problem(
        batch=batch,
        seq_len=seq_len,
        seq_len_k=seq_len_k,
        num_kv_heads=num_kv_heads,
        gqa_group_size=max(1, num_q_heads // num_kv_heads),
        head_dim=head_dim,
        head_dim_v=max(1, size_hint(v.shape[3])),
        block_size=block_size,
        num_selected=max(1, size_hint(num_selected)),
        itemsize=q.dtype.itemsize,
        agreement=cost.LIKELY_AGREEMENT,
    )


@functools.cache
def gpu_of(index: int | None) -> tuple[str, cost.Properties]:
    """A GPU's name, and what the cost model makes use of in its properties."""
    found = torch.cuda.get_device_properties(index)
    hip = str(getattr(found, "gcnArchName", "")).split(":")[0] if torch.version.hip else ""
    return torch.cuda.get_device_name(index), cost.Properties(
        arch=hip or f"sm_{found.major}{found.minor}",
        num_sms=found.multi_processor_count,
        memory=found.total_memory,
        # Not every version of torch has these. kHz.
        memory_clock=1e3 * getattr(found, "memory_clock_rate", 0),
        memory_bus=getattr(found, "memory_bus_width", 0),
        l2_bytes=getattr(found, "L2_cache_size", 0),
    )


def device_of(tensor: Tensor) -> cost.Device:
    """The device's constants in the cost model; the generic GPU's where its name cannot be asked for."""
    if tensor.device.type != "cuda":
        return cost.device_for("", tensor.device.type)
    try:
        name, properties = gpu_of(tensor.device.index)
    except (AssertionError, RuntimeError):  # fake tensors of a GPU that is not here; not to be remembered
        return cost.device_for("")
    return cost.device_for(name, "cuda", properties)
