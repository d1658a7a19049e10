"""Every kernel, with its default options, compiles for GPUs that are not here and fits on them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fsa_compile.ops import cuda, loop_order, loop_order_backward
from fsa_compile.templates import (
    attention_delta,
    merge_partials,
    reduce_tiles,
    selected_bwd_kv_outer,
    selected_bwd_query_outer,
    selected_fwd_kv_outer,
    selected_fwd_query_outer,
    sum_partials,
)
from fsa_compile.testing.compile_only import SHARED_MEMORY, TARGETS, Recorder, compile_for

MODULES = (
    attention_delta,
    merge_partials,
    reduce_tiles,
    selected_bwd_kv_outer,
    selected_bwd_query_outer,
    selected_fwd_kv_outer,
    selected_fwd_query_outer,
    sum_partials,
)
# Bytes a thread may spill. The two kernels named took less time on an H200 with a few registers spilled than without;
# heads wider than 128 do not fit the backward's four tiles and are not tuned.
STACK = 16  # a few bytes of stack are not spills
SPILL_ALLOWANCE = {"selected_bwd_kv_outer_kernel": 128, "selected_bwd_query_outer_kernel": 32}
WIDE_SPILL_ALLOWANCE = 640

PROBLEMS = {
    # group, head_dim, head_dim_v, block_size, dtype
    "g1-bf16": (1, 128, 128, 64, torch.bfloat16),
    "g4-fp16": (4, 64, 64, 64, torch.float16),
    "g16-bf16": (16, 128, 128, 64, torch.bfloat16),
    "g4-fp32": (4, 64, 128, 32, torch.float32),
    "g3-wide-bf16": (3, 192, 128, 64, torch.bfloat16),
}


def record(
    monkeypatch: pytest.MonkeyPatch,
    group: int,
    head_dim: int,
    head_dim_v: int,
    block_size: int,
    dtype: torch.dtype,
    cu_seqlens: torch.Tensor | None = None,
) -> list[Recorder]:
    """What forward and backward in both orders would launch, from the launchers themselves."""
    recorders = []
    for module in MODULES:
        name = module.__name__.rsplit(".", 1)[1] + "_kernel"
        recorders.append(Recorder(getattr(module, name)))
        monkeypatch.setattr(module, name, recorders[-1])
    seq_len, num_kv_heads = 1024, 2
    q = torch.empty(1, seq_len, num_kv_heads * group, head_dim, dtype=dtype)
    k = torch.empty(1, seq_len, num_kv_heads, head_dim, dtype=dtype)
    v = torch.empty(1, seq_len, num_kv_heads, head_dim_v, dtype=dtype)
    block_indices = torch.zeros(1, seq_len, num_kv_heads, 16, dtype=torch.int32)
    tables = cuda.PackedTables.of(q, k, cu_seqlens, None, block_size)
    queries, blocks = tables.queries, (tables.cu_seqlens_k, tables.block_base, tables.block_seq_ids)
    sizes: dict[str, Any] = {"block_size": block_size, "scale": 0.1}
    lengths: dict[str, Any] = {"block_size": block_size, "seq_len_k": seq_len}
    lists = loop_order._block_lists(block_indices, *tables, **lengths)
    out, shift, log_sum = loop_order._selected_fwd_query_outer(q, k, v, block_indices, *queries, **sizes)
    partials = loop_order._selected_fwd_kv_outer(q, k, v, block_indices, *lists, *queries, **sizes)
    loop_order._merge_partials(*partials, block_indices, *queries, **lengths, scale=0.1)
    args = (out, q, k, v, block_indices, shift, log_sum, loop_order_backward._attention_delta(out, None, out))
    loop_order_backward._selected_bwd_query_outer(*args, *queries, **sizes)
    loop_order_backward._selected_bwd_kv_outer(*args, *lists, *queries, **sizes, with_dq=False)
    dk_tiles, _, dq_partial = loop_order_backward._selected_bwd_kv_outer(*args, *lists, *queries, **sizes, with_dq=True)
    loop_order_backward._sum_partials(dq_partial, block_indices, *queries, **lengths)
    loop_order_backward._reduce_tiles(dk_tiles, lists[2], k, *blocks, block_size=block_size)
    assert all(recorder.calls for recorder in recorders)
    return recorders


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_default_options_fit(monkeypatch: pytest.MonkeyPatch, problem: str, target: str) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4" if target.startswith("gfx") else None)
    wide = max(PROBLEMS[problem][1:3]) > 128
    too_much = []
    for recorder in record(monkeypatch, *PROBLEMS[problem]):
        name = recorder.kernel.__name__
        allowed = max(SPILL_ALLOWANCE.get(name, STACK), WIDE_SPILL_ALLOWANCE if wide else 0)
        for args, kwargs in recorder.calls:
            usage = compile_for(recorder.kernel, args, kwargs, target)
            if usage.spilled > allowed or usage.shared > SHARED_MEMORY[target]:
                too_much.append((name, usage))
    assert not too_much


def test_packed_kernels_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """The packed variants differ in where a row lies, not in what a tile needs: one target is enough."""
    cu_seqlens = torch.tensor([0, 300, 1024], dtype=torch.int32)
    for recorder in record(monkeypatch, 2, 64, 64, 64, torch.bfloat16, cu_seqlens):
        for args, kwargs in recorder.calls:
            assert kwargs.get("PACKED", True)
            allowed = SPILL_ALLOWANCE.get(recorder.kernel.__name__, STACK)
            assert compile_for(recorder.kernel, args, kwargs, "sm_90").spilled <= allowed
