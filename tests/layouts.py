"""Where sequences lie, in every way that a call can say: cases, arguments, and what holds of the result."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fsa_compile.testing.budget import assert_within_budget
from fsa_compile.testing.calls import Call, run, upstream_of
from fsa_compile.testing.specs import Spec

S = Spec()

PACKED = (
    # rows of q and of k, cu_seqlens_q, cu_seqlens_k (None: the same)
    pytest.param(30, 40, (0, 20, 30), (0, 10, 40), id="more_queries_than_keys"),
    pytest.param(50, 30, (0, 40, 50), (0, 0, 30), id="queries_without_keys"),
    pytest.param(9, 80, (0, 0, 9), (0, 50, 80), id="keys_without_queries"),
    pytest.param(64, 64, (0, 20, 50), None, id="a_tail"),
    pytest.param(64, 64, (7, 20, 50), None, id="a_head_and_a_tail"),
    pytest.param(64, 90, (5, 20, 50), (13, 40, 77), id="heads_and_tails_of_two_lengths"),
    pytest.param(64, 64, (0, 20, 80), None, id="past_the_end"),
    pytest.param(64, 64, (-9, 20, 64), None, id="before_the_start"),
    pytest.param(64, 40, (0, 20, 90), (0, 90, 95), id="past_both_ends"),
    pytest.param(64, 64, (64, 64, 64), None, id="nothing_but_a_head"),
)


PADDED = (  # rows of q, capacity of k, ends and starts of the keys
    pytest.param(5, 70, (70, 31, 64), None, id="cache"),
    pytest.param(40, 70, (70, 11, 0), (0, 3, 0), id="any"),
    pytest.param(40, 40, None, (0, 13, 39), id="left"),
    pytest.param(40, 40, (40, 17, 25), None, id="right"),
    pytest.param(33, 70, (70, 60, 35), (2, 50, 5), id="both"),
    pytest.param(20, 50, (90, 30, -5), (-3, 40, 0), id="outside"),
)


def packed_layout(bounds_q: Any, bounds_k: Any, device: str) -> dict[str, Tensor]:
    """Of a case of PACKED."""
    given = {"cu_seqlens_q": bounds_q, "cu_seqlens_k": bounds_k}
    return {n: torch.tensor(x, dtype=torch.int32, device=device) for n, x in given.items() if x is not None}


def padded_layout(used: Any, left: Any, device: str) -> dict[str, Tensor]:
    """Of a case of PADDED."""
    given = {"seqused_k": used, "leftpad_k": left}
    return {n: torch.tensor(x, dtype=torch.int32, device=device) for n, x in given.items() if x is not None}


def tensors(
    batch: int, seq_len: int, seq_len_k: int, device: str, seed: int = 0, packed: bool = False
) -> SimpleNamespace:
    """Random arguments of every stage, by name; block ids anywhere, in the future as well, none twice in a row."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    rows = (batch, seq_len, S.num_q_heads)
    count = seq_len_k // S.kernel_stride if packed else max(0, (seq_len_k - S.kernel_size) // S.kernel_stride + 1)
    num_blocks = max(S.num_selected, -(-seq_len_k // S.block_size))
    rank = torch.rand(batch, seq_len, S.num_kv_heads, num_blocks, generator=generator)
    return SimpleNamespace(
        q=normal(*rows, S.head_dim),
        **{name: normal(batch, seq_len_k, S.num_kv_heads, S.head_dim) for name in ("k", "v")},
        **{name: normal(batch, count, S.num_kv_heads, S.head_dim) for name in ("k_cmp", "v_cmp")},
        gates=[normal(*rows).sigmoid() for _ in range(3)],
        lse=normal(*rows),
        block_indices=rank.argsort(-1)[..., : S.num_selected].int().to(device),
    )


def call_with(name: str, x: SimpleNamespace, seq_len_k: int, **layout: Any) -> Call:
    """A call of any operator; `layout` in the names of the attention stages."""
    if name == "mean_compress":
        keys = layout.get("cu_seqlens_k", layout.get("cu_seqlens_q"))
        options = {"cu_seqlens": keys, "seqused": layout.get("seqused_k"), "leftpad": layout.get("leftpad_k")}
        return Call(name, (x.k,), (), {**S.windows, **options})
    if name == "compressed_attention":
        return Call(name, (x.q, x.k_cmp, x.v_cmp), (), {**S.windows, **layout, "seq_len_k": seq_len_k})
    if name == "select_blocks":
        return Call(name, (x.q, x.k_cmp), (x.lse,), {**S.windows, **S.selection, **layout, "seq_len_k": seq_len_k})
    if name == "selected_attention":
        return Call(name, (x.q, x.k, x.v), (x.block_indices,), {**layout, "block_size": S.block_size})
    if name == "sliding_window_attention":
        return Call(name, (x.q, x.k, x.v), (), {**layout, "window_size": S.window_size})
    options = {**S.windows, **S.selection, **layout, "window_size": S.window_size, "block_indices": x.block_indices}
    return Call(name, (x.q, x.k, x.v, *x.gates), (), options)


def agrees_with_reference(call: Call, op: Any) -> None:
    """Results and gradients of `op` are the reference's."""
    double = call.to(torch.float64)
    upstream = upstream_of(call)
    have, have_grads = run(op, call, upstream)
    want, want_grads = run(call.reference(), double, upstream)
    eager, eager_grads = run(call.reference(), call, upstream)
    triples = zip([*have, *have_grads], [*want, *want_grads], [*eager, *eager_grads], strict=True)
    for i, (a, b, c) in enumerate(triples):
        assert a.is_contiguous()
        if b.numel():
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5, msg=lambda m, i=i: f"{call.name} {i}: {m}")
            assert_within_budget(a, b, c, f"{call.name} {i}", torch.float32)
