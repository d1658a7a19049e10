"""The reference against the specification spelt out in loops, and against what must hold of it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fsa_compile.ops import reference
from fsa_compile.testing.inputs import Inputs, make_inputs
from fsa_compile.testing.specs import NAMED, SPECS, Spec

BATCHED = [spec for spec in SPECS if spec.lengths is None and spec.seq_len_k < 130]
PACKED = [spec for spec in SPECS if spec.lengths is not None]


def spelt_out_attention(logits: list[float], values: list[Tensor]) -> tuple[Tensor, float]:
    """Softmax attention of one row over what it sees."""
    if not logits:
        return torch.zeros_like(values[0]) if values else torch.zeros(0), -math.inf
    highest = max(logits)
    weights = [math.exp(x - highest) for x in logits]
    total = sum(weights)
    out = sum((w / total * v for w, v in zip(weights, values, strict=True)), torch.zeros_like(values[0]))
    return out, highest + math.log(total)


def rows(x: Inputs) -> list[tuple[int, int, int, int, int]]:
    """(batch, row, query head, key head, position) of every row."""
    s = x.spec
    return [
        (b, t, h, h // s.gqa_group_size, t + s.extra_keys)
        for b in range(s.batch)
        for t in range(s.seq_len)
        for h in range(s.num_q_heads)
    ]


def logits_of(x: Inputs, k: Tensor) -> Tensor:
    """[batch, query head, row, key], a query head beside the key head it reads."""
    scale = x.spec.head_dim**-0.5 if x.spec.scale is None else x.spec.scale
    heads = torch.arange(x.spec.num_q_heads) // x.spec.gqa_group_size
    return torch.einsum("bthd,bkhd->bhtk", x.q, k[:, :, heads]) * scale


def assert_rows(actual: tuple[Tensor, Tensor], x: Inputs, logits: Tensor, v: Tensor, visible: list[list[int]]) -> None:
    out, lse = actual
    for (b, t, h, hk, _), keys in zip(rows(x), visible, strict=True):
        want, want_lse = spelt_out_attention([float(logits[b, h, t, i]) for i in keys], [v[b, i, hk] for i in keys])
        torch.testing.assert_close(out[b, t, h], want if keys else torch.zeros_like(out[b, t, h]))
        assert float(lse[b, t, h]) == pytest.approx(want_lse, rel=1e-12, abs=1e-12)


def compressed(x: Inputs) -> tuple[Tensor, Tensor]:
    s = x.spec
    return tuple(reference.mean_compress(y, cu_seqlens=x.cu_seqlens, **s.windows) for y in (x.k, x.v))  # type: ignore[return-value]


@pytest.mark.parametrize("spec", BATCHED, ids=str)
def test_stages_match_the_specification_spelt_out(spec: Spec) -> None:
    x = make_inputs(spec, dtype=torch.float64)
    s, length = spec, spec.seq_len_k

    k_cmp, v_cmp = compressed(x)
    num_compressed = max(0, (length - s.kernel_size) // s.kernel_stride + 1)
    assert k_cmp.shape == (s.batch, num_compressed, s.num_kv_heads, s.head_dim)
    for i in range(num_compressed):
        window = x.k[:, i * s.kernel_stride : i * s.kernel_stride + s.kernel_size]
        torch.testing.assert_close(k_cmp[:, i], window.mean(1))

    visible = [
        [i for i in range(num_compressed) if i * s.kernel_stride + s.kernel_size - 1 <= pos] for *_, pos in rows(x)
    ]
    o_cmp, lse = reference.compressed_attention(x.q, k_cmp, v_cmp, seq_len_k=length, scale=s.scale, **s.windows)
    logits = logits_of(x, k_cmp)
    assert_rows((o_cmp, lse), x, logits, v_cmp, visible)

    chosen = reference.select_blocks(x.q, k_cmp, lse, seq_len_k=length, scale=s.scale, **s.windows, **s.selection)
    assert chosen.dtype == torch.int32
    steps, overlap = s.block_size // s.kernel_stride, s.kernel_size // s.kernel_stride
    for b in range(s.batch):
        for t in range(s.seq_len):
            for hk in range(s.num_kv_heads):
                p = [0.0] * num_compressed
                for h in range(hk * s.gqa_group_size, (hk + 1) * s.gqa_group_size):
                    for i in visible[(b * s.seq_len + t) * s.num_q_heads + h]:
                        p[i] += math.exp(float(logits[b, h, t, i]) - float(lse[b, t, h]))
                current = (t + s.extra_keys) // s.block_size
                forced = {j for j in range(current + 1) if j < s.init_blocks or j > current - s.local_blocks}
                score = {}
                for j in range(current + 1):
                    terms = [steps * j - (overlap - 1) + m + n for m in range(steps) for n in range(overlap)]
                    score[j] = sum(p[i] for i in terms if 0 <= i < num_compressed)
                rest = sorted(set(score) - forced, key=lambda j: (-score[j], j))
                want = sorted([*forced, *rest[: s.num_selected - len(forced)]])
                have = [j for j in chosen[b, t, hk].tolist() if j >= 0]
                assert chosen[b, t, hk].tolist() == have + [-1] * (s.num_selected - len(have)), "ascending, then -1"
                assert len(have) == len(want)
                assert forced <= set(have)
                # Scores that differ by rounding may swap.
                assert sum(score[j] for j in have) == pytest.approx(sum(score[j] for j in want), rel=1e-12, abs=1e-300)

    logits = logits_of(x, x.k)
    visible = [
        [i for i in range(pos + 1) if i // s.block_size in x.block_indices[b, t, hk].tolist()]
        for b, t, _, hk, pos in rows(x)
    ]
    assert_rows(
        reference.selected_attention(x.q, x.k, x.v, x.block_indices, block_size=s.block_size, scale=s.scale),
        x, logits, x.v, visible,
    )  # fmt: skip
    visible = [list(range(max(0, pos - s.window_size + 1), pos + 1)) for *_, pos in rows(x)]
    assert_rows(
        reference.sliding_window_attention(x.q, x.k, x.v, window_size=s.window_size, scale=s.scale),
        x, logits, x.v, visible,
    )  # fmt: skip


def test_default_blocks_weigh_their_windows_1_2_2_2_1() -> None:
    """With one query that sees everything equally, the scores of inner blocks are 8 probabilities."""
    length = 64 * 5
    q, k = torch.zeros(1, 1, 1, 16, dtype=torch.float64), torch.zeros(1, length, 1, 16, dtype=torch.float64)
    k_cmp = reference.mean_compress(k)
    _, lse = reference.compressed_attention(q, k_cmp, k_cmp, seq_len_k=length)
    uniform = 1 / k_cmp.shape[1]
    # One compressed token at a time: what it adds to each block.
    for i, want in ((7, {1: 1, 2: 1}), (8, {2: 2}), (9, {2: 2}), (10, {2: 2}), (11, {2: 1, 3: 1}), (0, {0: 2})):
        bump = k_cmp.clone()
        bump[:, i] = 1.0
        q_ = torch.full_like(q, math.log(2) / 16)  # doubles token i's weight
        score = reference.block_scores(q_, bump, lse, seq_len_k=length, scale=1.0)
        base = reference.block_scores(q, k_cmp, lse, seq_len_k=length, scale=1.0)
        added = (score - base)[0, 0, 0] / uniform
        assert {j: round(w) for j, w in enumerate(added.tolist()) if abs(w) > 1e-9} == want
    assert base[0, 0, 0, 2] == pytest.approx(8 * uniform)


def test_selection_uses_every_head_of_the_group() -> None:
    """Heads that each prefer another block: the group's choice depends on all of them."""
    spec = Spec(seq_len=128, num_kv_heads=1, gqa_group_size=3, num_selected=3)
    x = make_inputs(spec, dtype=torch.float64)
    k_cmp, v_cmp = compressed(x)
    chosen = []
    for heads in ([0, 1, 2], [1, 0, 2], [0, 1, 1]):
        q = x.q[:, :, heads]
        _, lse = reference.compressed_attention(q, k_cmp, v_cmp, **spec.windows)
        chosen.append(reference.select_blocks(q, k_cmp, lse, **spec.windows, **spec.selection))
    assert torch.equal(chosen[0], chosen[1]), "the order of the heads does not matter"
    assert not torch.equal(chosen[0], chosen[2]), "the last head does"


def test_ties_go_to_the_lower_block_id() -> None:
    spec = Spec(seq_len=200, num_selected=5)
    x = make_inputs(spec, dtype=torch.float64)
    k_cmp, _ = compressed(x)
    q = torch.zeros_like(x.q)
    _, lse = reference.compressed_attention(q, k_cmp, k_cmp, **spec.windows)
    chosen = reference.select_blocks(q, k_cmp, lse, **spec.windows, **spec.selection)
    # Equal probabilities: inner blocks tie. Block 0 lacks a term but is forced, as is the newest.
    assert chosen[0, -1, 0].tolist() == [0, 1, 2, 3, 12]


def test_all_blocks_are_dense_causal_attention() -> None:
    spec = Spec(batch=2, seq_len=75, gqa_group_size=3, head_dim_v=24)
    x = make_inputs(spec, dtype=torch.float64)
    blocks = torch.arange(5, dtype=torch.int32).expand(2, 75, 2, 5)
    out, _ = reference.selected_attention(x.q, x.k, x.v, blocks, block_size=16)
    dense = F.scaled_dot_product_attention(
        *(y.transpose(1, 2) for y in (x.q, x.k, x.v)), is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(out, dense.transpose(1, 2))
    wide, _ = reference.sliding_window_attention(x.q, x.k, x.v, window_size=75)
    torch.testing.assert_close(wide, out)


def test_unusable_block_ids_contribute_nothing() -> None:
    x = make_inputs(Spec(seq_len=50, blocks="full"), dtype=torch.float64)
    ids = x.block_indices
    usable = torch.arange(50)[None, :, None, None] // 16 >= ids
    noisy = torch.where(ids < 0, torch.tensor([99, -5, 4, 2**31 - 1], dtype=torch.int32), ids)
    assert not torch.equal(noisy, ids)
    assert usable.all()
    want = reference.selected_attention(x.q, x.k, x.v, ids, block_size=16)
    have = reference.selected_attention(x.q, x.k, x.v, noisy, block_size=16)
    torch.testing.assert_close(have, want, rtol=0, atol=0)


@pytest.mark.parametrize("spec", PACKED, ids=str)
def test_packed_is_each_sequence_on_its_own(spec: Spec) -> None:
    x = make_inputs(spec, dtype=torch.float64)
    whole = reference.nsa_attention(
        x.q, x.k, x.v, *x.gates, **x.packed, window_size=spec.window_size, **spec.windows, **spec.selection
    )
    start = start_k = 0
    for length in spec.lengths or ():
        r, c = slice(start, start + length), slice(start_k, start_k + length + spec.extra_keys)
        start, start_k = r.stop, c.stop
        part = reference.nsa_attention(
            x.q[:, r], x.k[:, c], x.v[:, c], *(g[:, r] for g in x.gates), window_size=spec.window_size, **spec.windows,
            **spec.selection,
        )  # fmt: skip
        torch.testing.assert_close(whole[:, r], part)


@pytest.mark.parametrize("name", ["plain", "odd_dims", "stride_is_size"])
def test_fewer_queries_are_the_last_rows(name: str) -> None:
    spec = NAMED[name]
    x = make_inputs(spec, dtype=torch.float64)
    options = {"window_size": spec.window_size, **spec.windows, **spec.selection}
    whole = reference.nsa_attention(x.q, x.k, x.v, *x.gates, **options)
    last = reference.nsa_attention(x.q[:, -9:], x.k, x.v, *(g[:, -9:] for g in x.gates), **options)
    torch.testing.assert_close(last, whole[:, -9:])


@pytest.mark.parametrize("lengths", [None, (3, 0, 18)], ids=["batched", "packed"])
def test_gradients_are_those_of_the_function(lengths: tuple[int, ...] | None) -> None:
    spec = Spec(seq_len=22, num_kv_heads=1, head_dim=3, head_dim_v=2, num_selected=2, lengths=lengths)
    x = make_inputs(spec, dtype=torch.float64, requires_grad=True)
    options = {"window_size": 5, **spec.windows, **spec.selection, **x.packed}
    fixed = {"block_indices": x.block_indices}  # selection is not continuous

    def whole(*args: Tensor) -> Tensor:
        return reference.nsa_attention(*args, **options, **fixed)

    assert torch.autograd.gradcheck(whole, (x.q, x.k, x.v, *x.gates))

    def lse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        _, a = reference.selected_attention(q, k, v, x.block_indices, block_size=16, **x.packed)
        k_cmp = reference.mean_compress(k, cu_seqlens=x.cu_seqlens, **spec.windows)
        _, b = reference.compressed_attention(q, k_cmp, k_cmp, **spec.windows, **x.packed)
        return torch.cat([a, b]).masked_fill(torch.cat([a, b]).isinf(), 0)

    assert torch.autograd.gradcheck(lse, (x.q, x.k, x.v))


def test_branches_and_gates() -> None:
    spec = Spec(seq_len=64)
    x = make_inputs(spec, dtype=torch.float64)
    options = {"window_size": spec.window_size, **spec.windows, **spec.selection}

    def nsa(*gates: Tensor | None, **changed: int) -> Tensor:
        return reference.nsa_attention(x.q, x.k, x.v, *gates, **{**options, **changed})

    one = torch.ones_like(x.g_slc)
    slc = nsa(None, None, None)
    torch.testing.assert_close(nsa(None, one, None), slc)
    cmp = nsa(x.g_cmp, None, None) - slc
    swa = nsa(None, None, x.g_swa) - slc
    torch.testing.assert_close(nsa(*x.gates), cmp + x.g_slc[..., None] * slc + swa)
    torch.testing.assert_close(nsa(x.g_cmp, None, x.g_swa, window_size=0), cmp + slc)
    own = {
        "k_cmp": torch.zeros(1, 15, 2, 16, dtype=torch.float64),
        "v_cmp": torch.ones(1, 15, 2, 16, dtype=torch.float64),
    }
    mean = reference.nsa_attention(x.q, x.k, x.v, one, torch.zeros_like(one), **own, **options)
    torch.testing.assert_close(mean[:, 7:], torch.ones_like(mean[:, 7:]))
    assert not mean[:, :7].any(), "no compressed token ends in the first seven positions"
