"""What is special to the CPU implementations and to the chunked plain PyTorch that CUDA uses for the same stages."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fsa_compile.ops import attend, compressed, reference, selected, selection, window
from fsa_compile.ops.dispatch import implementation
from fsa_compile.testing.budget import Budget, assert_within_budget
from fsa_compile.testing.calls import Call, backward_call, call_of, forward_call, run, selection_of, upstream_of
from fsa_compile.testing.inputs import make_inputs
from fsa_compile.testing.specs import Spec

ATTENTION = ("compressed_attention", "selected_attention", "sliding_window_attention")
fsa = torch.ops.fsa


def behind_the_checks(form: str) -> SimpleNamespace:
    """The implementations of all stages in one form, "portable" or "cpu", called as the operators are."""
    modules = (getattr(stage, form) for stage in (compressed, selected, selection, window))
    return SimpleNamespace(**{name: implementation(name, getattr(m, name)) for m in modules for name in m.__all__})


portable = behind_the_checks("portable")  # what a GPU falls back to; it runs on any device
IMPLEMENTATIONS = (
    *(pytest.param(name, fsa, id=name) for name in ATTENTION),
    *(pytest.param(name, portable, id=f"masked-{name}") for name in ATTENTION),
)

# Sizes of which no chunk, tile or block is a divisor, so that every loop ends in a ragged piece.
SIZES = (
    Spec(name="ragged", seq_len=331, gqa_group_size=3, head_dim_v=24, window_size=70),
    Spec(name="batch", batch=2, seq_len=150, window_size=33),
    Spec(name="more_keys", batch=2, seq_len=75, extra_keys=122, window_size=40),
    Spec(name="packed", lengths=(3, 0, 150, 41, 90), window_size=33),
    Spec(name="packed_more_keys", lengths=(9, 130, 2), extra_keys=37, window_size=33),
)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Budgets so small that these sizes cross many borders."""
    monkeypatch.setattr(attend, "_SCORE_BYTES", {"cpu": 4 * 6 * 100 * 5})
    monkeypatch.setattr(attend, "_MAX_ROWS", 50)
    monkeypatch.setattr(window.cpu, "_WINDOW_ROWS", 24)
    monkeypatch.setattr(selected.cpu, "_PARTS_BYTES", 1)
    monkeypatch.setattr(selected.cpu, "_TILES_BYTES", 1)


def check(call: Call, module: Any = fsa) -> tuple[Tensor, Tensor, Tensor]:
    """Forward and backward in `module` against the float64 reference; returns the forward's results."""
    upstream = upstream_of(call)
    want, want_grads = run(call.reference(), call.to(torch.float64), upstream)
    eager, eager_grads = run(call.reference(), call, upstream)
    results = getattr(module, f"{call.name}_forward")(*call.args, **call.options)
    out, shift, log_sum = results
    scale = call.options["scale"] or call.args[0].shape[-1] ** -0.5
    assert shift.isfinite().all()
    for i, triple in enumerate(zip((out, scale * shift + log_sum), want, eager, strict=True)):
        assert_within_budget(*triple, f"{call.name} result {i}", call.args[0].dtype)
    grads = getattr(module, f"{call.name}_backward")(*upstream, *call.args, *results, **call.options)
    for i, triple in enumerate(zip(grads, want_grads, eager_grads, strict=True)):
        assert_within_budget(*triple, f"{call.name} gradient {i}")
    return results


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("spec", SIZES, ids=str)
def test_chunk_borders(spec: Spec, name: str) -> None:
    check(call_of(name, make_inputs(spec)))


@pytest.mark.parametrize("small", (False, True))
@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("spec", SIZES, ids=str)
def test_masked_chunks(spec: Spec, name: str, small: bool, request: pytest.FixtureRequest) -> None:
    """The path of CUDA, which tells packed sequences apart by masks; it runs on any device."""
    if small:
        request.getfixturevalue("small_chunks")
    check(call_of(name, make_inputs(spec)), portable)


# Powers of two, by which plain PyTorch scales without rounding: which of two near ties wins is then no matter of luck.
LARGE = (
    Spec(name="many_rows", scale=2048.0, seq_len=600),
    Spec(name="wide_heads", scale=2048.0, seq_len=40, head_dim=64, head_dim_v=64),
    Spec(name="large_queries", logits=1e4, seq_len=600),
    Spec(name="packed_large", scale=2048.0, lengths=(40, 0, 161)),
    Spec(name="more_keys_large", scale=2048.0, seq_len=75, extra_keys=122),
)


# float16's own range leaves plain PyTorch nothing to compare with where the queries are large.
@pytest.mark.parametrize(
    "spec,dtype",
    [
        (s, d)
        for s in LARGE
        for d in (torch.float32, torch.float16, torch.bfloat16)
        if (s.logits, d) != (1e4, torch.float16)
    ],
    ids=str,
)
@pytest.mark.parametrize("name,module", IMPLEMENTATIONS)
def test_large_logits(spec: Spec, name: str, module: Any, dtype: torch.dtype) -> None:
    """Logits of 1e4 and more, both signs: float32 resolves them to 5e-4, which the gradients must not be off by."""
    _, shift, log_sum = check(call_of(name, make_inputs(spec, dtype=dtype)), module)
    assert shift.any()
    assert log_sum[log_sum.isfinite()].abs().max() < 8  # nothing of the logits' size is left to it


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("dtype,logits", ((torch.float32, 3.0), (torch.float16, 64.0), (torch.bfloat16, 64.0)), ids=str)
def test_moderate_logits(name: str, dtype: torch.dtype, logits: float) -> None:
    """In one pass, in float32. Scaling by 128**-0.5 rounds: forward and backward have to do it alike."""
    spec = Spec(logits=logits, seq_len=300, head_dim=128, head_dim_v=128)
    _, shift, _ = check(call_of(name, make_inputs(spec, dtype=dtype)))
    assert not shift.any()


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("factor", (3.0, 4.0, 5.0, 6.0, 7.0))
def test_logits_about_where_float64_begins(name: str, factor: float) -> None:
    """One row of two keys, many times: a log-sum-exp is resolved well enough on both sides of the border."""
    spec = Spec(seq_len=1, extra_keys=1, num_kv_heads=1, gqa_group_size=1, kernel_size=1, kernel_stride=1)
    budgets: dict[int, Budget] = {}
    for seed in range(64):
        x = make_inputs(spec, seed=seed)
        x.q.mul_(factor)
        x.k.mul_(factor)
        call = call_of(name, x)
        upstream = upstream_of(call)
        runs = [
            run(call.op(), call, upstream),
            run(call.reference(), call.to(torch.float64), upstream),
            run(call.reference(), call, upstream),
        ]
        for i, triple in enumerate(zip(*([*outs, *grads] for outs, grads in runs), strict=True)):
            budgets.setdefault(i, Budget(f"{name} {i}", torch.float32)).add(*triple)
    for budget in budgets.values():
        budget.check()


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("spec", (Spec(name="alone", seq_len=150), SIZES[2], SIZES[3]), ids=str)
def test_large_and_small_logits(spec: Spec, name: str) -> None:
    """Rows of both, and rows that see no key."""
    x = make_inputs(spec)
    x.q[:, 1::3] *= 1e-2
    x.q[:, 2::3] *= 4096.0
    x.block_indices[:, 30:33] = -1
    out, shift, log_sum = check(call_of(name, x))
    nothing = log_sum == -torch.inf
    assert nothing.any() == (name == "selected_attention" or (name == "compressed_attention" and not spec.extra_keys))
    assert not out[nothing].any()
    assert not shift[nothing].any()
    assert shift[:, 2::3][~nothing[:, 2::3]].all()


@pytest.mark.parametrize("small", (False, True))
@pytest.mark.parametrize("implementation", (portable.select_blocks, fsa.select_blocks), ids=("masked", "cpu"))
@pytest.mark.parametrize("spec", SIZES, ids=str)
def test_selection_across_chunks(spec: Spec, implementation: Any, small: bool, request: pytest.FixtureRequest) -> None:
    if small:
        request.getfixturevalue("small_chunks")
    call = selection_of(make_inputs(spec))
    want = reference.select_blocks(*(x.double() for x in call.args), **call.options)
    assert torch.equal(implementation(*call.args, **call.options), want)


@pytest.mark.parametrize("spec", SIZES, ids=str)
def test_mean_compress_in_steps(spec: Spec) -> None:
    x = make_inputs(spec)
    call = call_of("mean_compress", x)
    upstream = upstream_of(call)
    want, want_grads = run(call.reference(), call.to(torch.float64), upstream)
    have, have_grads = run(call.op(), call, upstream)
    assert_within_budget(have[0], want[0], want[0].float())
    assert_within_budget(have_grads[0], want_grads[0], want_grads[0].float())


def test_equal_scores_take_the_lower_blocks() -> None:
    """Queries of zeros score all blocks alike but the first and last: not a matter of how top-k breaks ties."""
    seq_len, block_size = 1500, 16
    q, k_cmp = torch.zeros(1, seq_len, 4, 8), torch.zeros(1, (seq_len - 8) // 4 + 1, 2, 8)
    _, lse = fsa.compressed_attention(q, k_cmp, k_cmp, kernel_size=8, kernel_stride=4)
    options = {"block_size": block_size, "kernel_size": 8, "kernel_stride": 4, "num_selected": 6}
    have = fsa.select_blocks(q, k_cmp, lse, init_blocks=1, local_blocks=2, **options)
    current = torch.arange(seq_len) // block_size
    late = current >= 6
    expected = torch.stack([torch.full_like(current, i) for i in range(4)] + [current - 1, current], -1)
    assert torch.equal(have[0, late], expected[late, None].expand(-1, 2, -1).int())


def test_packed_sequences_are_computed_as_if_alone() -> None:
    """Forward and backward; not bit for bit, as a product's rounding may depend on how its operands are aligned."""
    spec = Spec(lengths=(37, 0, 90, 1, 52), gqa_group_size=3)
    x = make_inputs(spec)
    for name in ATTENTION:
        call = call_of(name, x)
        forward, backward = getattr(fsa, f"{name}_forward"), getattr(fsa, f"{name}_backward")
        results = forward(*call.args, **call.options)
        upstream = results[0], results[2]
        grads = backward(*upstream, *call.args, *results, **call.options)
        start = 0
        for length in spec.lengths or ():
            rows = slice(start, start + length)
            start += length
            if length == 0:
                continue
            first = rows.start // spec.kernel_stride
            cols = rows if name != "compressed_attention" else slice(first, first + max(0, (length - 8) // 4 + 1))
            args = (call.args[0][:, rows], *(y[:, cols] for y in call.args[1:3]), *(y[:, rows] for y in call.args[3:]))
            drop = ("cu_seqlens_q", "max_seqlen_q", "seq_len_k")
            options = {key: value for key, value in call.options.items() if key not in drop}
            alone = forward(*args, **options)
            for a, b in zip(alone, results, strict=True):
                torch.testing.assert_close(a, b[:, rows])
            grads_alone = backward(alone[0], alone[2], *args, *alone, **options)
            for a, b, part in zip(grads_alone, grads, (rows, cols, cols), strict=True):
                torch.testing.assert_close(a, b[:, part])


@pytest.mark.parametrize("name", ATTENTION)
def test_same_bits_twice(name: str) -> None:
    call = call_of(name, make_inputs(Spec(seq_len=400, gqa_group_size=4)))
    upstream = upstream_of(call)
    first, second = (run(call.op(), call, upstream) for _ in range(2))
    for a, b in zip([*first[0], *first[1]], [*second[0], *second[1]], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ATTENTION)
def test_nan_stays_in_its_row(name: str) -> None:
    """Rows share tiles and tables of parts: what one query has must not leak into another."""
    call = call_of(name, make_inputs(Spec(seq_len=200)))
    clean = call.op()(*call.args, **call.options)
    q = call.args[0].clone()
    rows = torch.tensor([0, 63, 150])
    q[:, rows] = torch.nan
    dirty = call.op()(q, *call.args[1:], **call.options)
    others = torch.ones(200, dtype=torch.bool).index_fill(0, rows, False)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a[:, others], b[:, others])
    assert dirty[0][:, 150].isnan().all()


def test_ids_that_are_no_past_block_add_nothing() -> None:
    spec = Spec(seq_len=100, extra_keys=13)
    x = make_inputs(spec)
    position = torch.arange(100) + 13
    blocks = x.block_indices
    future = (position // spec.block_size)[:, None, None] + 1
    for wild in (future.expand_as(blocks), torch.full_like(blocks, 2**31 - 1), torch.full_like(blocks, -7)):
        have = fsa.selected_attention(x.q, x.k, x.v, torch.where(blocks < 0, wild, blocks).int(), block_size=16)
        want = fsa.selected_attention(x.q, x.k, x.v, blocks, block_size=16)
        assert all(torch.equal(a, b) for a, b in zip(have, want, strict=True))


@pytest.mark.parametrize("name,module", IMPLEMENTATIONS)
def test_a_row_without_keys_has_no_gradient(name: str, module: Any) -> None:
    """Not even when an infinite gradient of its log_sum comes back, as that of `log_sum ** 2` would be."""
    call = call_of(name, make_inputs(Spec(seq_len=50, kernel_size=32)))
    results = getattr(module, f"{name}_forward")(*call.args, **call.options)
    out, _, log_sum = results
    grads = getattr(module, f"{name}_backward")(torch.ones_like(out), 2 * log_sum, *call.args, *results, **call.options)
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[0][log_sum == -torch.inf] == 0).all()


class _Largest(TorchDispatchMode):
    """Remembers the most elements in a tensor that an operator returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))])
        return out


@pytest.mark.parametrize("masked", (False, True), ids=("cpu", "masked"))
def test_memory_is_linear_in_the_length(masked: bool) -> None:
    """No tensor of any stage, forward or backward, grows faster than the length or has a side per query and per key."""

    module = portable if masked else behind_the_checks("cpu")

    def largest(seq_len: int) -> int:
        spec = Spec(seq_len=seq_len, num_kv_heads=1, gqa_group_size=2, window_size=64, block_size=32, blocks="local")
        x = make_inputs(spec)
        calls = [selection_of(x)]
        for name in ATTENTION:
            call = call_of(name, x)
            upstream = [torch.ones_like(y) for y in call.op()(*call.args, **call.options)]
            calls += [forward_call(call), backward_call(call, upstream)]
        with _Largest() as mode:
            for call in calls:
                getattr(module, call.name)(*call.args, **call.options)
        return mode.numel

    small, big = largest(2048), largest(8192)
    assert big <= 4.5 * max(small, (4 << 20) // 4)
    assert big < 8192 * 8192 // 16
