"""Block selection as it is registered: what it may choose, and what it has to."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fsa_compile.ops import reference
from fsa_compile.testing.calls import Call, selection_of
from fsa_compile.testing.inputs import make_inputs
from fsa_compile.testing.specs import NAMED, SPECS, Spec
from fsa_compile.testing.strategies import specs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
fsa = torch.ops.fsa


def check_selection(call: Call, spec: Spec, tolerance: float) -> None:
    """The forced blocks and those with the highest scores, where scores nearer than `tolerance` count as equal."""
    have = fsa.select_blocks(*call.args, **call.options).cpu()
    assert have.dtype == torch.int32
    assert have.is_contiguous()
    q, k_cmp, lse = (x.detach().cpu().double() for x in call.args)
    lengths, start, start_k = spec.lengths or (spec.seq_len,), 0, 0
    for length in lengths:
        length_k = length + spec.extra_keys
        rows = slice(start, start + length)
        first = start_k // spec.kernel_stride
        cols = slice(first, first + max(0, (length_k - spec.kernel_size) // spec.kernel_stride + 1))
        start, start_k = rows.stop, start_k + length_k
        if not length:
            continue
        options = {**spec.windows, "block_size": spec.block_size, "scale": spec.scale, "seq_len_k": length_k}
        score = reference.block_scores(q[:, rows], k_cmp[:, cols], lse[:, rows], **options)  # type: ignore[arg-type]
        block = torch.arange(score.shape[-1])
        current = ((torch.arange(length) + spec.extra_keys) // spec.block_size)[:, None, None]
        causal = (block <= current).expand_as(score)
        forced = causal & ((block < spec.init_blocks) | (block > current - spec.local_blocks))
        ids = have[:, rows].long()
        chosen = torch.zeros(*score.shape[:-1], score.shape[-1] + 1, dtype=torch.long)
        chosen = chosen.scatter_add(-1, torch.where(ids < 0, score.shape[-1], ids), torch.ones_like(ids))[..., :-1]
        assert chosen.max() <= 1, "a block id repeats"
        chosen = chosen.bool()
        assert not (chosen & ~causal).any(), "a block in the future"
        assert (chosen | ~forced).all(), "a forced block is missing"
        assert torch.equal(chosen.sum(-1), causal.sum(-1).clamp(max=spec.num_selected)), "too few or too many blocks"
        filled = torch.where(ids < 0, score.shape[-1], ids)
        assert torch.equal(filled, filled.sort(-1).values), "not ascending with -1 at the end"
        lowest = score.masked_fill(~chosen | forced, torch.inf).amin(-1)
        highest = score.masked_fill(chosen | ~causal, -torch.inf).amax(-1)
        assert (lowest >= highest - tolerance).all(), (
            f"a score of {float((highest - lowest).max()):.3g} more is left out"
        )


@given(spec=specs(), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 5))
def test_select_blocks_on_any_spec(device: str, spec: Spec, dtype: torch.dtype, seed: int) -> None:
    call = selection_of(make_inputs(spec, device, dtype, seed=seed))
    check_selection(call, spec, 1e-4 * spec.gqa_group_size if dtype == torch.float32 else 2e-2 * spec.gqa_group_size)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_select_blocks_on_named_specs(device: str, spec: Spec) -> None:
    check_selection(selection_of(make_inputs(spec, device)), spec, 1e-4 * spec.gqa_group_size)


@pytest.mark.parametrize("name", ["plain", "packed", "decode_some", "defaults", "odd_dims", "more_places_than_blocks"])
def test_select_blocks_sends_ties_to_the_lower_id(device: str, name: str) -> None:
    """Zero queries: all visible compressed tokens are equally probable, and inner blocks tie exactly."""
    spec = NAMED[name]
    x = make_inputs(spec, device)
    call = selection_of(x, torch.zeros_like(x.q))
    have = fsa.select_blocks(*call.args, **call.options)
    assert torch.equal(have, reference.select_blocks(*call.args, **call.options))
