"""`select_blocks` with pool="max" and with bare logits: against loops, and the two models it serves."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fsa_compile
from fsa_compile.ops import reference
from fsa_compile.ops.dispatch import implementation
from fsa_compile.ops.selection import portable
from fsa_compile.testing.calls import selection_of
from fsa_compile.testing.inputs import make_inputs
from fsa_compile.testing.specs import NAMED, SPECS, Spec
from fsa_compile.testing.strategies import specs

fsa = torch.ops.fsa
select_portably = implementation("select_blocks", portable.select_blocks)


def spelt_out(q: Tensor, k_cmp: Tensor, lse: Tensor | None, pool: str, s: Spec) -> list[list[list[int]]]:
    """Block ids of every row and key head of batch row 0, in loops."""
    scale = s.head_dim**-0.5 if s.scale is None else s.scale
    length, group = s.seq_len_k, s.gqa_group_size
    chosen = []
    for t in range(s.seq_len):
        position = t + s.extra_keys
        rows = []
        for h in range(s.num_kv_heads):
            weight: dict[int, float] = {}
            for i in range(k_cmp.shape[1]):
                if i * s.kernel_stride + s.kernel_size - 1 <= position:
                    logits = [scale * float(q[0, t, h * group + g] @ k_cmp[0, i, h]) for g in range(group)]
                    if lse is not None:
                        logits = [math.exp(x - float(lse[0, t, h * group + g])) for g, x in enumerate(logits)]
                    weight[i] = sum(logits)
            score = {}
            for j in range(min(position // s.block_size, -(-length // s.block_size) - 1) + 1):
                touching = [
                    i
                    for i in weight
                    if i * s.kernel_stride < (j + 1) * s.block_size
                    and i * s.kernel_stride + s.kernel_size > j * s.block_size
                ]
                assert pool == "max"
                score[j] = max((weight[i] for i in touching), default=-math.inf if lse is None else 0.0)
            current = position // s.block_size
            forced = [j for j in score if j < s.init_blocks or j > current - s.local_blocks]
            free = sorted((j for j in score if j not in forced), key=lambda j, score=score: (-score[j], j))
            ids = sorted(forced + free[: max(0, s.num_selected - len(forced))])
            rows.append(ids + [-1] * (s.num_selected - len(ids)))
        chosen.append(rows)
    return chosen


@pytest.mark.parametrize("with_lse", [True, False], ids=["lse", "logits"])
@pytest.mark.parametrize("name", ["plain", "decode_some", "stride_is_size", "nothing_forced", "only_forced"])
def test_reference_against_loops(name: str, with_lse: bool) -> None:
    spec = NAMED[name]
    call = selection_of(make_inputs(spec))
    q, k_cmp = (x.double() for x in call.floating)
    lse = call.others[0].double() if with_lse else None
    have = reference.select_blocks(q, k_cmp, lse, **call.options, pool="max")
    assert have[0].tolist() == spelt_out(q, k_cmp, lse, "max", spec)


@pytest.mark.parametrize("with_lse", [True, False], ids=["lse", "logits"])
@pytest.mark.parametrize("select", [fsa.select_blocks, select_portably], ids=["operator", "portable"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_against_the_reference(spec: Spec, select: Any, with_lse: bool) -> None:
    call = selection_of(make_inputs(spec))
    lse = call.others[0] if with_lse else None
    have = select(*call.floating, lse, **call.options, pool="max")
    want = reference.select_blocks(
        *(x.double() for x in call.floating), None if lse is None else lse.double(), **call.options, pool="max"
    )
    assert torch.equal(have, want)


@given(spec=specs(), with_lse=st.booleans(), seed=st.integers(0, 5))
def test_any_spec(device: str, spec: Spec, with_lse: bool, seed: int) -> None:
    call = selection_of(make_inputs(spec, device, seed=seed))
    lse = call.others[0] if with_lse else None
    have = fsa.select_blocks(*call.floating, lse, **call.options, pool="max")
    # Of equal scores the ids decide, and products that round otherwise break ties: where they differ, scores are near.
    want = reference.select_blocks(*call.floating, lse, **call.options, pool="max")
    assert (have != want).float().mean() < 0.02
    assert torch.equal(have == -1, want == -1)


def test_negative_scores_and_zeros_of_both_signs() -> None:
    """Logits below 0 order as numbers do; -0.0 and 0.0 tie; blocks with nothing visible come last."""
    scores = [-3.0, -1.0, -2.0, -0.0, 0.0, -1.0, 5.0, -9.0]
    k = torch.zeros(1, len(scores) * 16, 1, 4)
    for j, x in enumerate(scores):
        k[0, j * 16 : (j + 1) * 16, 0, 0] = x
    q = torch.zeros(1, 1, 1, 4)
    q[..., 0] = 1.0
    options = {"block_size": 16, "init_blocks": 0, "local_blocks": 0, "pool": "max", "scale": 1.0, "seq_len_k": 128}
    for count, want in ((1, [6]), (3, [3, 4, 6]), (2, [3, 6]), (5, [1, 3, 4, 5, 6]), (7, [0, 1, 2, 3, 4, 5, 6])):
        have = fsa.select_blocks(q, k, None, kernel_size=1, kernel_stride=1, num_selected=count, **options)
        assert have.flatten().tolist() == want
    # windows of 32: the last 16 tokens end none, so the newest block has no token of its own but one that overlaps it
    k_cmp = fsa_compile.mean_compress(k[:, :24], kernel_size=32, kernel_stride=16)
    have = fsa.select_blocks(
        q, k_cmp, None, kernel_size=32, kernel_stride=16, num_selected=2, **{**options, "seq_len_k": 24}
    )
    assert have.flatten().tolist() == [0, 1], "fewer blocks than places: all of them, seen or not"


def test_minimax_m3(device: str) -> None:
    """An index query per key head, one index key, token by token: the blocks with the largest logit."""
    generator = torch.Generator().manual_seed(0)
    batch, seq_len, heads, dim, block_size, places = 2, 300, 3, 8, 16, 4
    q = torch.randn(batch, seq_len, heads, dim, generator=generator).to(device)
    k = torch.randn(batch, seq_len, 1, dim, generator=generator).to(device)
    have = fsa_compile.select_blocks(
        q, k.expand(-1, -1, heads, -1), None, kernel_size=1, kernel_stride=1, block_size=block_size, init_blocks=0,
        local_blocks=1, num_selected=places, pool="max",
    )  # fmt: skip
    logits = torch.einsum("bthd,bsd->bths", q, k[:, :, 0]) * dim**-0.5
    position = torch.arange(seq_len, device=device)
    logits = logits.masked_fill(position > position[:, None, None], -torch.inf)
    score = torch.nn.functional.pad(logits, (0, -seq_len % block_size), value=-torch.inf)
    score = score.unflatten(-1, (-1, block_size)).amax(-1)
    current = (position // block_size)[:, None, None]
    score = score.masked_fill(torch.arange(score.shape[-1], device=device) == current, torch.inf)
    want = score.topk(places).indices.sort(-1).values
    late = position >= block_size * places
    assert torch.equal(have[:, late].long(), want[:, late])


def test_minicpm4(device: str) -> None:
    """Windows of 32/16 ranked by the softmax over coarser ones of 128/64."""
    x = make_inputs(Spec(seq_len=400, num_kv_heads=2, gqa_group_size=4), device)
    k1 = fsa_compile.mean_compress(x.k)
    k2 = fsa_compile.mean_compress(x.k, kernel_size=128, kernel_stride=64)
    _, lse = fsa_compile.compressed_attention(x.q, k2, k2, kernel_size=128, kernel_stride=64)
    options: dict[str, Any] = {"block_size": 64, "init_blocks": 1, "local_blocks": 2, "num_selected": 4, "pool": "max"}
    have = fsa_compile.select_blocks(x.q, k1, lse, **options)
    assert torch.equal(have, reference.select_blocks(x.q.double(), k1.double(), lse.double(), **options))
