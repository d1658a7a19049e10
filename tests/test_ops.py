"""Every operator as it is registered, against the float64 reference."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import fsa_compile
from fsa_compile.ops import reference, schema
from fsa_compile.testing.budget import Budget, draws, relative_error
from fsa_compile.testing.calls import (
    STAGES,
    Call,
    backward_call,
    call_of,
    forward_call,
    results,
    run,
    selection_of,
    upstream_of,
)
from fsa_compile.testing.inputs import make_inputs
from fsa_compile.testing.specs import NAMED, SPECS, Spec
from fsa_compile.testing.strategies import specs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ATTENTION = tuple(name for name in STAGES if name not in ("mean_compress", "nsa_attention"))
fsa = torch.ops.fsa


def check_against_reference(
    name: str, spec: Spec, device: str, dtype: torch.dtype, seed: int = 0, large_logits: bool = False
) -> None:
    """Results, their layout, and every gradient, within SPEC's error budget over draws enough to tell."""
    budgets: dict[str, Budget] = {}
    call = call_of(name, make_inputs(spec, device, dtype, seed=seed))
    upstream = upstream_of(call)
    for draw in range(draws(*call.floating, large_logits=large_logits)):
        call = call_of(name, make_inputs(spec, device, dtype, seed=seed + 100 * draw))
        have, have_grads = run(call.op(), call, upstream)
        want, want_grads = run(call.reference(), call.to(torch.float64), upstream)
        eager, eager_grads = run(call.reference(), call, upstream)
        assert [h.dtype for h in have] == [dtype, torch.float32][: len(have)]
        assert all(h.is_contiguous() for h in have)
        assert all(h.dtype == dtype for h in have_grads)
        names = [f"result {i}" for i in range(len(have))] + [f"gradient {i}" for i in range(len(have_grads))]
        triples = zip([*have, *have_grads], [*want, *want_grads], [*eager, *eager_grads], strict=True)
        for what, triple in zip(names, triples, strict=True):
            budgets.setdefault(what, Budget(f"{name} {what} of {spec}, {dtype}", dtype)).add(*triple)
    for budget in budgets.values():
        budget.check()


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_named_specs(device: str, spec: Spec, name: str) -> None:
    for dtype in DTYPES:
        check_against_reference(name, spec, device, dtype)


@pytest.mark.parametrize("name", STAGES)
@given(spec=specs(), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 5))
def test_any_spec(device: str, name: str, spec: Spec, dtype: torch.dtype, seed: int) -> None:
    check_against_reference(name, spec, device, dtype, seed)


class Count(TorchDispatchMode):
    """How often each operator ran."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ran[func] += 1
        return func(*args, **(kwargs or {}))


def test_windows_of_one_token_are_the_tokens(device: str) -> None:
    spec = Spec(kernel_size=1, kernel_stride=1)
    check_against_reference("nsa_attention", spec, device, torch.float32)
    for packed in (False, True):
        call = call_of("nsa_attention", make_inputs(replace(spec, lengths=(60, 30) if packed else None), device))
        with Count() as count:
            run(call.op(), call, upstream_of(call))
        assert count.ran[fsa.mean_compress.default] == (2 if packed else 0)  # packed: rows of no sequence are zeros


def everything(call: Call, upstream: list[Tensor]) -> list[Tensor]:
    """Results and gradients of the operator."""
    outs, grads = run(call.op(), call, upstream)
    return [*outs, *grads]


@pytest.mark.parametrize("name", ["plain", "packed", "decode_some", "packed_more_keys", "defaults", "only_forced"])
def test_nsa_attention_selects_its_own_blocks(device: str, name: str) -> None:
    """With and without the compressed branch in the sum, the blocks are those of the stages called one by one."""
    spec = NAMED[name]
    x = make_inputs(spec, device)
    options = {**spec.windows, **spec.selection, **x.packed, "window_size": spec.window_size}
    k_cmp, v_cmp = (fsa.mean_compress(y, **spec.windows, cu_seqlens=x.cu_seqlens) for y in (x.k, x.v))
    compressed: dict[str, Any] = {**spec.windows, **x.packed, "seq_len_k": spec.seq_len_k}
    _, lse = fsa.compressed_attention(x.q, k_cmp, v_cmp, **compressed)
    blocks = fsa.select_blocks(x.q, k_cmp, lse, **compressed, **spec.selection)
    for gates in (
        x.gates,
        (None, x.g_slc, x.g_swa),
        (x.g_cmp, None, None),
        (None, None, None),
        (x.g_cmp, None, x.g_swa),
    ):
        own = fsa.nsa_attention(x.q, x.k, x.v, *gates, **options)
        told = fsa.nsa_attention(x.q, x.k, x.v, *gates, **options, block_indices=blocks)
        torch.testing.assert_close(own, told, rtol=0, atol=0)
        want = reference.nsa_attention(
            *(None if y is None else y.double() for y in (x.q, x.k, x.v, *gates)), **options, block_indices=blocks
        )
        torch.testing.assert_close(own.double(), want, rtol=1e-4, atol=1e-5)
    off = fsa.nsa_attention(x.q, x.k, x.v, *x.gates, **{**options, "window_size": 0})
    torch.testing.assert_close(off, fsa.nsa_attention(x.q, x.k, x.v, x.g_cmp, x.g_slc, None, **options))


def test_gates_keep_nothing_wider_than_the_branches(device: str) -> None:
    """A branch's output widened to float32 would be kept beside itself: 2 GiB of 8 at 128K tokens and 32 heads."""
    x = make_inputs(Spec(seq_len=80), device, dtype=torch.bfloat16)
    kept: list[Tensor] = []

    def keep(y: Tensor) -> Tensor:
        kept.append(y)
        return y

    leaves = [y.detach().requires_grad_() for y in (x.q, x.k, x.v, *x.gates)]
    options = {**Spec().windows, **Spec().selection, "window_size": 16}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda y: y):
        out = fsa.nsa_attention(*leaves, **options)
    assert out.requires_grad
    branches = [y for y in kept if y.shape == out.shape]
    assert len(branches) >= 3
    assert all(y.dtype == torch.bfloat16 for y in branches)


def test_nsa_attention_takes_compressed_tokens(device: str) -> None:
    """Own k_cmp and v_cmp are what is attended to and selected by, and get the gradients."""
    spec = Spec(seq_len=80)
    x = make_inputs(spec, device)
    generator = torch.Generator(device).manual_seed(5)
    num_compressed = (80 - spec.kernel_size) // spec.kernel_stride + 1
    k_cmp, v_cmp = (torch.randn(1, num_compressed, 2, 16, device=device, generator=generator) for _ in range(2))
    options = {**spec.windows, **spec.selection, "window_size": spec.window_size}
    leaves = [y.detach().requires_grad_() for y in (x.q, x.k, x.v, k_cmp, v_cmp)]
    out = fsa.nsa_attention(*leaves[:3], *x.gates, k_cmp=leaves[3], v_cmp=leaves[4], **options)
    double = [y.detach().double().requires_grad_() for y in leaves]
    want = reference.nsa_attention(
        *double[:3], *(g.double() for g in x.gates), k_cmp=double[3], v_cmp=double[4], **options
    )
    torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-5)
    have_grads = torch.autograd.grad(out.square().sum(), leaves)
    for have, ref in zip(have_grads, torch.autograd.grad(want.square().sum(), double), strict=True):
        assert relative_error(have, ref) < 1e-5
    # Without the compressed branch in the sum only the selection reads k_cmp: no gradient.
    out = fsa.nsa_attention(*leaves[:3], None, x.g_slc, None, k_cmp=leaves[3], **options)
    assert torch.autograd.grad(out.sum(), leaves[3], allow_unused=True) == (None,)


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("spec", [NAMED["plain"], NAMED["packed"], NAMED["decode_some"]], ids=str)
def test_either_result_alone_is_differentiable(device: str, name: str, spec: Spec) -> None:
    call = call_of(name, make_inputs(spec, device))
    out, lse = upstream_of(call)
    for upstream in ([out, None], [None, lse]):
        _, have = run(call.op(), call, upstream)
        _, want = run(call.reference(), call.to(torch.float64), upstream)
        for h, w in zip(have, want, strict=True):
            torch.testing.assert_close(h.double(), w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", STAGES)
def test_expanded_upstream_gradient(device: str, name: str) -> None:
    """`out.sum()` sends back a gradient with strides of 0."""
    call = call_of(name, make_inputs(NAMED["odd_dims"], device))
    leaves = [x.detach().requires_grad_() for x in call.floating]
    out = results(call.op()(*leaves, *call.others, **call.options))[0]
    have = torch.autograd.grad(out.sum(), leaves)
    _, want = run(call.reference(), call.to(torch.float64), [torch.ones_like(out), None][: 1 + (name in ATTENTION)])
    for h, w in zip(have, want, strict=True):
        torch.testing.assert_close(h.double(), w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("spec", [Spec(scale=2048.0, seq_len=150), Spec(scale=2048.0, lengths=(40, 61))], ids=str)
def test_large_logits(device: str, spec: Spec, name: str, dtype: torch.dtype) -> None:
    """Logits of +-1e4 and more: every row has its own maximum, so nothing overflows and the answers are right.

    By a power of two plain PyTorch scales without rounding; else which of two near ties wins is a matter of luck.
    """
    call = call_of(name, make_inputs(spec, device, dtype))
    _, lse = call.reference()(*call.to(torch.float64).args, **call.options)
    assert lse[lse.isfinite()].abs().max() > 1e4
    check_against_reference(name, spec, device, dtype, large_logits=True)


@pytest.mark.parametrize("name", [*ATTENTION, "nsa_attention"])
@pytest.mark.parametrize("scale", [-0.5, 0.0, -2048.0])
def test_scales_that_are_not_positive(device: str, scale: float, name: str) -> None:
    check_against_reference(name, Spec(seq_len=60, scale=scale), device, torch.float32, large_logits=scale < -1)


@pytest.mark.parametrize("name", [*STAGES, "select_blocks"])
@pytest.mark.parametrize("spec", [NAMED["defaults"], NAMED["packed"]], ids=str)
def test_same_bits_twice(device: str, name: str, spec: Spec) -> None:
    x = make_inputs(spec, device, torch.bfloat16)
    if name == "select_blocks":
        call = selection_of(x)
        assert torch.equal(*(call.op()(*call.args, **call.options) for _ in range(2)))
        return
    call = call_of(name, x)
    upstream = upstream_of(call)
    first, second = (everything(call, upstream) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["selected_attention"])
def test_unusable_block_ids_contribute_nothing(device: str, name: str) -> None:
    """Ids out of range and in the future, unvalidated: they read nothing outside the tensors and change nothing."""
    for spec in (Spec(seq_len=90, blocks="random"), Spec(lengths=(40, 33), extra_keys=5)):
        x = make_inputs(spec, device)
        call = call_of(name, x)
        junk = torch.tensor([10**6, -7, 2**31 - 1, 40], dtype=torch.int32, device=device)
        noisy = Call(name, call.floating, (torch.where(x.block_indices < 0, junk, x.block_indices),), call.options)
        assert not torch.equal(noisy.others[0], x.block_indices)
        upstream = upstream_of(call)
        for a, b in zip(everything(call, upstream), everything(noisy, upstream), strict=True):
            torch.testing.assert_close(a, b)


def opcheck_calls(spec: Spec, device: str) -> list[Call]:
    """One call of every operator of the namespace's public surface."""
    x = make_inputs(spec, device)
    calls = []
    for name in STAGES:
        call = call_of(name, x)
        call = Call(name, tuple(y.detach().requires_grad_() for y in call.floating), call.others, call.options)
        calls.append(call)
        if name in ATTENTION:
            calls.append(forward_call(call))
        if name != "nsa_attention":
            calls.append(backward_call(call_of(name, x), upstream_of(call)))
    options = {key: value for key, value in calls[-1].options.items() if key != "block_indices"}
    nsa = calls[-1]
    assert nsa.name == "nsa_attention"
    return [*calls, selection_of(x), Call(nsa.name, nsa.floating, (), options)]


@pytest.mark.parametrize("spec", [NAMED["plain"], NAMED["packed"], NAMED["decode_some"]], ids=str)
def test_opcheck(device: str, spec: Spec) -> None:
    calls = opcheck_calls(spec, device)
    assert {call.name for call in calls} == set(schema.SEMANTIC_OPS)
    for call in calls:
        torch.library.opcheck(getattr(fsa, call.name).default, call.args, call.options)


@pytest.mark.parametrize("name", STAGES)
def test_autocast(device: str, name: str) -> None:
    """float32 inputs are cast as a matmul's are; lse and gates stay as they are; gradients come in float32."""
    call = call_of(name, make_inputs(NAMED["plain"], device))
    leaves = [x.detach().requires_grad_() for x in call.floating]
    with torch.autocast(device, torch.bfloat16):
        have = results(call.op()(*leaves, *call.others, **call.options))
    data = 3 if name == "nsa_attention" else len(leaves)  # behind them are the gates
    cast = [x.detach().bfloat16() if i < data else x.detach() for i, x in enumerate(leaves)]
    want = results(call.op()(*cast, *call.others, **call.options))
    assert have[0].dtype == torch.bfloat16
    assert all(lse.dtype == torch.float32 for lse in have[1:])
    for h, w in zip(have, want, strict=True):
        torch.testing.assert_close(h, w, rtol=0, atol=0)
    grads = torch.autograd.grad(have[0].float().square().sum(), leaves)
    assert all(grad.dtype == torch.float32 and grad.any() for grad in grads)


def test_autocast_selection(device: str) -> None:
    call = selection_of(make_inputs(NAMED["plain"], device))
    with torch.autocast(device, torch.bfloat16):
        have = call.op()(*call.args, **call.options)
    assert torch.equal(have, call.op()(*call.to(torch.bfloat16).args, **call.options))


@pytest.mark.parametrize("name", [name for name in STAGES if name != "nsa_attention"])
def test_backward_is_not_differentiable_again(device: str, name: str) -> None:
    call = call_of(name, make_inputs(NAMED["plain"], device))
    leaves = [x.detach().requires_grad_() for x in call.floating]
    out = results(call.op()(*leaves, *call.others, **call.options))[0]
    upstream = torch.ones_like(out, requires_grad=True)
    grads = torch.autograd.grad(out, leaves, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match=f"fsa::{name}_backward is not differentiable"):
        grads[0].sum().backward()


def test_no_graph_where_none_is_wanted(device: str) -> None:
    x = make_inputs(NAMED["plain"], device, requires_grad=True)
    call = call_of("nsa_attention", x)
    with torch.no_grad():
        assert not call.op()(*call.args, **call.options).requires_grad
    with torch.inference_mode():
        assert call.op()(*call.args, **call.options).is_inference()
    selection = selection_of(x)
    assert not fsa.select_blocks(x.q, *selection.args[1:], **selection.options).requires_grad


def test_selective_checkpointing_sees_one_node(device: str) -> None:
    """The selected branch is saved rather than computed again, by naming its operator."""
    x = make_inputs(NAMED["plain"], device, requires_grad=True)
    call = call_of("nsa_attention", x)
    leaves = [y.detach().requires_grad_() for y in call.floating]

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        saved = op == fsa.selected_attention_forward.default
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    with Count() as count:
        out = checkpoint(partial(call.op(), **call.options), *leaves, use_reentrant=False, context_fn=contexts)
        have = torch.autograd.grad(out.square().sum(), leaves)
    want = torch.autograd.grad(call.op()(*leaves, **call.options).square().sum(), leaves)
    for h, w in zip(have, want, strict=True):
        assert torch.equal(h, w)
    assert count.ran[fsa.selected_attention_forward.default] == 1
    assert count.ran[fsa.sliding_window_attention_forward.default] == 2


def test_only_some_inputs_want_gradients(device: str) -> None:
    call = call_of("selected_attention", make_inputs(NAMED["plain"], device))
    q, k, v = (x.detach() for x in call.floating)
    out, _ = call.op()(q, k.requires_grad_(), v, *call.others, **call.options)
    out.sum().backward()
    assert k.grad is not None
    assert q.grad is None


@pytest.mark.parametrize("name", STAGES)
def test_one_compilation_for_all_lengths(device: str, name: str) -> None:
    """The fake kernels guard on nothing but what an operator needs: dynamic lengths do not recompile."""
    torch._dynamo.reset()
    counter = CompileCounter()

    def call_it(floating: list[Tensor], others: list[Tensor], options: dict[str, Any]) -> Any:
        return getattr(torch.ops.fsa, name)(*floating, *others, **options)

    compiled = torch.compile(call_it, backend=counter, fullgraph=True)
    for length in (50, 77, 113, 64):
        call = call_of(name, make_inputs(Spec(seq_len=length, batch=2), device))
        args = (list(call.floating), list(call.others), call.options)
        if counter.frame_count == 0:
            for x in (*call.floating, *call.others, *call.options.values()):
                if isinstance(x, Tensor) and name != "compressed_attention":
                    torch._dynamo.mark_dynamic(x, 1)
        compiled(*args)
    # Without marks the first length is static; k_cmp's length is not marked, as it follows from q's.
    assert counter.frame_count <= (2 if name == "compressed_attention" else 1)


def test_public_functions_are_the_operators(device: str) -> None:
    x = make_inputs(NAMED["plain"], device)
    for name in (*STAGES, "select_blocks"):
        call = selection_of(x) if name == "select_blocks" else call_of(name, x)
        have = results(getattr(fsa_compile, name)(*call.args, **call.options))
        for a, b in zip(have, results(call.op()(*call.args, **call.options)), strict=True):
            assert torch.equal(a, b)
