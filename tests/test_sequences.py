"""Where sequences lie: packed with any lengths, padded batches and caches, and nothing at all."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layouts import PACKED, PADDED, S, agrees_with_reference, call_with, packed_layout, padded_layout, tensors

from fsa_compile.ops import compressed, compression, selected, selection, window
from fsa_compile.ops.dispatch import implementation
from fsa_compile.testing.calls import STAGES, Call, results, run, upstream_of
from fsa_compile.testing.inputs import cumulative

ATTENTION = tuple(name for name in STAGES if name not in ("mean_compress", "nsa_attention"))
fsa = torch.ops.fsa
KEYS = ("k", "v")


@pytest.fixture(autouse=True)
def memory_that_nobody_wrote_is_nan() -> Iterator[None]:
    """Not what happens to lie there, which is often the right result of the test before."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def check(call: Call) -> None:
    """Results and gradients are the reference's; select_blocks' are its ids."""
    if call.name != "select_blocks":
        return agrees_with_reference(call, call.op())
    double = call.to(torch.float64)
    assert torch.equal(fsa.select_blocks(*call.args, **call.options), double.reference()(*double.args, **call.options))
    return None


@pytest.mark.parametrize("name", [*STAGES, "select_blocks"])
@pytest.mark.parametrize("seq_len,seq_len_k,bounds_q,bounds_k", PACKED)
def test_packed(
    device: str, name: str, seq_len: int, seq_len_k: int, bounds_q: tuple[int, ...], bounds_k: tuple[int, ...] | None
) -> None:
    """Lengths in any relation, buffers longer than what is in them; what is said to lie outside is not there."""
    layout = packed_layout(bounds_q, bounds_k, device)
    check(call_with(name, tensors(1, seq_len, seq_len_k, device, packed=True), seq_len_k, **layout))


@pytest.mark.parametrize("name", ATTENTION)
def test_rows_of_no_sequence_are_zeros(device: str, name: str) -> None:
    """Output 0, lse -inf, gradients 0, whatever they hold."""
    x = tensors(1, 64, 64, device, packed=True)
    for rows in (slice(0, 7), slice(50, 64)):
        for y in (x.q, x.k, x.v):
            y[:, rows] = torch.nan
    layout = {"cu_seqlens_q": torch.tensor((7, 20, 50), dtype=torch.int32, device=device)}
    call = call_with(name, x, 64, **layout)
    outs, grads = run(call.op(), call, [torch.ones_like(x.q), torch.ones_like(x.lse)])
    for y in (*outs, *grads):
        assert not y.isnan().any()
    outside = [*range(7), *range(50, 64)]
    assert not outs[0][:, outside].any()
    assert (outs[1][:, outside] == -torch.inf).all()
    for grad in grads if name != "compressed_attention" else grads[:1]:
        assert not grad[:, outside].any()


@pytest.mark.parametrize("name", [*STAGES, "select_blocks"])
@pytest.mark.parametrize("seq_len,seq_len_k,used,left", PADDED)
def test_padded(device: str, name: str, seq_len: int, seq_len_k: int, used: Any, left: Any) -> None:
    check(call_with(name, tensors(3, seq_len, seq_len_k, device), seq_len_k, **padded_layout(used, left, device)))


@pytest.mark.parametrize("name", [*STAGES, "select_blocks"])
@pytest.mark.parametrize("seq_len,seq_len_k,used,left", PADDED)
@pytest.mark.parametrize("scale", [1.0, 2048.0])
def test_padded_is_each_sequence_alone(
    device: str, name: str, seq_len: int, seq_len_k: int, used: Any, left: Any, scale: float
) -> None:
    """Bit for bit in any one loop order, which may else depend on the lengths; what lies outside is never read."""
    one_order = {"loop_order": "fsa"} if name in ("selected_attention", "nsa_attention") else {}
    x = tensors(3, seq_len, seq_len_k, device)
    x.q[1] *= scale  # the others' bits do not depend on it
    ends = [seq_len_k] * 3 if used is None else [min(max(n, 0), seq_len_k) for n in used]
    starts = [0] * 3 if left is None else [min(max(n, 0), seq_len_k) for n in left]
    lengths = [max(0, end - start) for start, end in zip(starts, ends, strict=True)]
    for b in range(3):
        for y in (x.k, x.v):
            y[b, : starts[b]] = torch.nan
            y[b, starts[b] + lengths[b] :] = torch.nan
    call = call_with(name, x, seq_len_k, **padded_layout(used, left, device), **one_order)
    if name == "select_blocks":
        whole = results(call.op()(*call.args, **call.options))
    else:
        generator = torch.Generator().manual_seed(1)
        like = results(call.op()(*call.args, **call.options))
        upstream = [torch.randn(y.shape, generator=generator).to(device) for y in like]
        outs, grads = run(call.op(), call, upstream)
        whole = (*outs, *grads)
        assert not any(y.isnan().any() for y in whole)
    for b, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        count = max(0, (length - S.kernel_size) // S.kernel_stride + 1)
        cut = {n: getattr(x, n)[b : b + 1, start : start + length].clone() for n in KEYS}
        cut |= {n: getattr(x, n)[b : b + 1, :count].clone() for n in ("k_cmp", "v_cmp")}
        cut |= {n: getattr(x, n)[b : b + 1].clone() for n in ("q", "lse", "block_indices")}
        one = SimpleNamespace(**cut, gates=[g[b : b + 1].clone() for g in x.gates])
        alone = call_with(name, one, length, **one_order)
        if name == "select_blocks":
            assert torch.equal(fsa.select_blocks(*alone.args, **alone.options), whole[0][b : b + 1])
            continue
        parts = [g[b : b + 1] for g in upstream]
        if name == "mean_compress":
            parts = [g[:, :count] for g in parts]
        outs, grads = run(alone.op(), alone, parts)
        grads_of_keys = grads[0] if name == "mean_compress" else None
        for have, want in zip([y[b : b + 1] for y in whole], (*outs, *grads), strict=True):
            if have.shape[1] == want.shape[1]:
                assert torch.equal(have, want)
                continue
            # what is compressed begins at row 0, as a result and as an argument; a key at its row
            compressed_rows = want.shape[1] == count and "compress" in name
            first = 0 if compressed_rows and want is not grads_of_keys else start
            assert torch.equal(have[:, first : first + want.shape[1]], want)
            assert not have[:, :first].any()
            assert not have[:, first + want.shape[1] :].any()


@given(
    lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=4),
    more=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    name=st.sampled_from([*STAGES, "select_blocks"]),
)
def test_any_packing(device: str, lengths: list[tuple[int, int]], more: tuple[int, int], name: str) -> None:
    total, total_k = (sum(n) + m for n, m in zip(zip(*lengths, strict=True), more, strict=True))
    layout = {
        key: cumulative(n, device)
        for key, n in zip(("cu_seqlens_q", "cu_seqlens_k"), zip(*lengths, strict=True), strict=True)
    }
    check(call_with(name, tensors(1, total, total_k, device, packed=True), total_k, **layout))


EMPTY = (
    pytest.param(0, 40, 40, {}, id="no_batch"),
    pytest.param(2, 0, 40, {}, id="no_queries"),
    pytest.param(2, 0, 0, {}, id="no_length"),
    pytest.param(2, 5, 0, {}, id="no_keys"),
    pytest.param(1, 0, 0, {"cu_seqlens_q": (0, 0, 0)}, id="nothing_packed"),
    pytest.param(2, 5, 9, {"seqused_k": (0, 0)}, id="an_empty_cache"),
    pytest.param(0, 5, 9, {"seqused_k": ()}, id="no_cache"),
)


@pytest.mark.parametrize("name", [*STAGES, "select_blocks"])
@pytest.mark.parametrize("batch,seq_len,seq_len_k,layout", EMPTY)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_empty(
    device: str, batch: int, seq_len: int, seq_len_k: int, layout: dict[str, Any], name: str, compiled: bool
) -> None:
    """Empty results, or those of rows that see nothing, and gradients of zeros."""
    if name == "mean_compress" and seq_len_k and batch and not layout:
        pytest.skip("has no queries, and here keys")
    given = {key: torch.tensor(x, dtype=torch.int32, device=device) for key, x in layout.items()}
    call = call_with(
        name, tensors(batch, seq_len, seq_len_k, device, packed="cu_seqlens_q" in layout), seq_len_k, **given
    )
    op = call.op()
    if compiled:
        torch._dynamo.reset()
        op = torch.compile(op, fullgraph=True)
    if name == "select_blocks":
        assert (op(*call.args, **call.options) == -1).all()
        return
    with torch.no_grad():
        shapes = [y.shape for y in results(call.op()(*call.args, **call.options))]
    outs, grads = run(op, call, [torch.ones(shape, device=device) for shape in shapes])
    assert not outs[0].any()
    assert all((lse == -torch.inf).all() for lse in outs[1:])
    assert [g.shape for g in grads] == [y.shape for y in call.floating]
    assert not any(g.any() for g in grads)


@pytest.mark.parametrize("name", [*STAGES, "select_blocks"])
def test_more_queries_than_keys_in_a_batch(device: str, name: str) -> None:
    check(call_with(name, tensors(2, 50, 27, device), 27))


@pytest.mark.parametrize("name", [*ATTENTION, "mean_compress", "select_blocks"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_portable(name: str, layout: str) -> None:
    """What a GPU runs where no kernel is: it tells sequences apart by masks, and runs on any device."""
    modules = (compressed, compression, selected, selection, window)
    portable = {n: implementation(n, getattr(m.portable, n)) for m in modules for n in m.portable.__all__}
    if layout == "padded":
        call = call_with(name, tensors(3, 33, 70, "cpu"), 70, **padded_layout((70, 60, 35), (2, 50, 5), "cpu"))
    else:
        given = packed_layout((5, 30, 30, 50), (13, 40, 50, 77), "cpu")
        call = call_with(name, tensors(1, 64, 90, "cpu", packed=True), 90, **given)
    forward = f"{name}_forward" if name in ATTENTION else name
    have = results(portable[forward](*call.args, **call.options))
    want = results(getattr(fsa, forward)(*call.args, **call.options))
    kept = want
    if name in ATTENTION:  # how the log-sum-exp is cut in two is each one's own
        have, want = ((out, shift / 4 + log_sum) for out, shift, log_sum in (have, want))
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b)
    if name == "select_blocks":
        return
    upstream = upstream_of(call)
    args = (*upstream, *call.args, *kept) if name in ATTENTION else upstream
    more = {} if name in ATTENTION else {"seq_len": call.floating[0].shape[1]}
    have = results(portable[f"{name}_backward"](*args, **call.options, **more))
    want = results(getattr(fsa, f"{name}_backward")(*args, **call.options, **more))
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
