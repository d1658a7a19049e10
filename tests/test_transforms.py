"""`torch.func` over the operators, forward mode, nested tensors, and tensors where numbers are meant."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

import fsa_compile
from fsa_compile.testing.calls import STAGES, Call, call_of, results, selection_of
from fsa_compile.testing.inputs import make_inputs
from fsa_compile.testing.specs import NAMED, Spec

fsa = torch.ops.fsa
SMALL = Spec(seq_len=40, batch=2)
SPECS = (SMALL, NAMED["packed"], Spec(scale=-0.5, seq_len=40))


def first_result(call: Call) -> Callable[..., Tensor]:
    return lambda *floating: results(call.op()(*floating, *call.others, **call.options))[0]


def loss_of(call: Call) -> Callable[..., Tensor]:
    """Of all results, those that are infinite left out."""

    def loss(*floating: Tensor) -> Tensor:
        outs = results(call.op()(*floating, *call.others, **call.options))
        return sum((o.masked_fill(o.isinf(), 0).square().sum() for o in outs), torch.zeros((), device=outs[0].device))

    return loss


def gradients(call: Call) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in call.floating]
    return torch.autograd.grad(loss_of(call)(*leaves), leaves)


def everywhere(call: Call) -> tuple[int, ...]:
    return tuple(range(len(call.floating)))


def backend_for(name: str, spec: Spec) -> str:
    """All is traced; the one that holds all stages is compiled as well."""
    return "inductor" if name == "nsa_attention" and spec is SMALL else "aot_eager"


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_grad(device: str, name: str, spec: Spec, compiled: bool) -> None:
    call = call_of(name, make_inputs(spec, device))
    fn = torch.func.grad(loss_of(call), argnums=everywhere(call))
    if compiled:
        torch._dynamo.reset()
        fn = torch.compile(fn, fullgraph=True, backend=backend_for(name, spec))
    for have, want in zip(fn(*call.floating), gradients(call), strict=True):
        torch.testing.assert_close(have, want)


@pytest.mark.parametrize("name", STAGES)
def test_vjp_and_jacrev(device: str, name: str) -> None:
    call = call_of(name, make_inputs(SMALL, device))
    _, pull = torch.func.vjp(loss_of(call), *call.floating)
    for have, want in zip(pull(torch.ones((), device=device)), gradients(call), strict=True):
        torch.testing.assert_close(have, want)
    fn = first_result(call)
    row = fn(*call.floating)[0, -1, 0, :3]
    jacobian = torch.func.jacrev(lambda x: fn(x, *call.floating[1:])[0, -1, 0, :3])(call.floating[0])
    assert jacobian.shape == (*row.shape, *call.floating[0].shape)
    leaf = call.floating[0].detach().requires_grad_()
    rows = fn(leaf, *call.floating[1:])[0, -1, 0, :3]
    for i, have in enumerate(jacobian):
        (want,) = torch.autograd.grad(rows[i], leaf, retain_graph=True)
        torch.testing.assert_close(have, want)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("spec", [SMALL, NAMED["packed"]], ids=str)
def test_gradient_of_each(device: str, name: str, spec: Spec, compiled: bool) -> None:
    """vmap of grad: what is mapped joins the batch, and no rule is missing."""
    calls = [call_of(name, make_inputs(spec, device, seed=seed)) for seed in range(3)]
    calls = [Call(name, c.floating, calls[0].others, calls[0].options) for c in calls]
    stacked = [torch.stack(x) for x in zip(*(c.floating for c in calls), strict=True)]
    fn = torch.func.vmap(torch.func.grad(loss_of(calls[0]), argnums=everywhere(calls[0])))
    if compiled:
        torch._dynamo.reset()
        fn = torch.compile(fn, fullgraph=True, backend=backend_for(name, spec))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*batching rule")
        have = fn(*stacked)
    for i, call in enumerate(calls):
        for grad, want in zip(have, gradients(call), strict=True):
            torch.testing.assert_close(grad[i], want, rtol=1e-4, atol=1e-5)


def test_mapped_over_some_arguments(device: str) -> None:
    """Over queries and lengths of a padded batch, keys the same; and the selection."""
    x = make_inputs(SMALL, device)
    q = torch.stack([x.q, 2 * x.q], 1)  # mapped over dim 1
    used = torch.tensor([[40, 13], [7, 30]], dtype=torch.int32, device=device)

    def attend(q: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
        return fsa.sliding_window_attention(q, x.k, x.v, window_size=9, seqused_k=used)

    have = torch.func.vmap(attend, in_dims=(1, 0))(q, used)
    for i in range(2):
        for a, b in zip(have, attend(q[:, i], used[i]), strict=True):
            torch.testing.assert_close(a[i], b)
    call = selection_of(x)

    def select(q: Tensor) -> Tensor:
        return call.op()(q, *call.args[1:], **call.options)

    assert torch.equal(torch.func.vmap(select, in_dims=1)(q), torch.stack([select(q[:, i]) for i in range(2)]))


def test_functional_call(device: str) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = torch.nn.Linear(16, 16, device=device)

        def forward(self, x: Any) -> Tensor:
            q = self.project(x.q)
            return fsa_compile.nsa_attention(q, x.k, x.v, *x.gates, block_indices=x.block_indices, block_size=16)

    model, x = Model(), make_inputs(SMALL, device)
    parameters = dict(model.named_parameters())
    have = torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).square().sum())(parameters)
    want = torch.autograd.grad(model(x).square().sum(), list(parameters.values()))
    for a, b in zip(have.values(), want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", STAGES)
def test_forward_mode_is_refused(device: str, name: str) -> None:
    """Not answered with zeros: jvp, jacfwd, dual numbers, and compiled."""
    call = call_of(name, make_inputs(SMALL, device))
    fn, floating = first_result(call), call.floating
    message = f"fsa::{name} has no forward-mode derivative"
    tangents = tuple(torch.ones_like(x) for x in floating)

    def jvp(*x: Tensor) -> Any:
        return torch.func.jvp(fn, x, tangents)

    with pytest.raises(NotImplementedError, match=message):
        jvp(*floating)
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jacfwd(fn)(*floating)
    for i in range(len(floating)):
        with forward_ad.dual_level():
            dual = [forward_ad.make_dual(x, torch.ones_like(x)) if j == i else x for j, x in enumerate(floating)]
            with pytest.raises(NotImplementedError, match=message):
                fn(*dual)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=message):
        torch.compile(jvp, fullgraph=True)(*floating)


def test_inside_a_dual_level_without_tangents(device: str) -> None:
    call = call_of("nsa_attention", make_inputs(SMALL, device))
    want = first_result(call)(*call.floating)
    with forward_ad.dual_level():
        assert torch.equal(first_result(call)(*call.floating), want)


@pytest.mark.parametrize("name", [*STAGES, "select_blocks"])
def test_nested_tensors_are_refused(name: str) -> None:
    """In words that name the argument and the packed form."""
    x = torch.nested.nested_tensor([torch.randn(5, 2, 16), torch.randn(7, 2, 16)], layout=torch.jagged)
    blocks = torch.zeros(2, 7, 2, 1, dtype=torch.int32)
    inputs = {
        "mean_compress": (x,),
        "nsa_attention": (x, x, x),
        "selected_attention": (x, x, x, blocks),
        "select_blocks": (x, x, torch.zeros(2, 7, 2)),
    }.get(name, (x, x, x))
    options = {"window_size": 4} if name == "sliding_window_attention" else {}
    first = "x" if name == "mean_compress" else "q"
    message = rf"fsa::{name}: {first} is a nested tensor.*{first}\.values\(\)\[None\] with cu_seqlens"

    def call_it(*inputs: Tensor) -> Any:
        return getattr(fsa_compile, name)(*inputs, **options)

    with pytest.raises(ValueError, match=message):
        call_it(*inputs)
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        call_it(*inputs)
    with torch.inference_mode(), pytest.raises(ValueError, match=message):
        call_it(*inputs)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=message):
        torch.compile(call_it)(*inputs)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_length_that_only_the_device_knows(device: str, compiled: bool) -> None:
    """A bound that is a tensor is no bound, eagerly and compiled."""
    x = make_inputs(NAMED["packed"], device)
    lengths = x.cu_seqlens_q.diff()  # type: ignore[union-attr]

    def call_it(bound: Any) -> Tensor:
        return fsa_compile.nsa_attention(
            x.q, x.k, x.v, *x.gates, **x.spec.windows, **x.spec.selection, cu_seqlens_q=x.cu_seqlens_q,
            max_seqlen_q=bound, max_seqlen_k=bound,
        )  # fmt: skip

    if compiled:  # with the same kernels on both sides, and the gates in their epilogue
        torch._dynamo.reset()
        call_it = torch.compile(call_it, fullgraph=True)
    want = call_it(None)
    assert torch.equal(call_it(lengths.max()), want)


@pytest.mark.parametrize("which", ["q", "k", "v", "g_cmp", "g_slc", "g_swa"])
def test_results_are_contiguous_whatever_the_strides(device: str, which: str) -> None:
    x = make_inputs(SMALL, device)
    given = {name: getattr(x, name) for name in ("q", "k", "v", "g_cmp", "g_slc", "g_swa")}
    given[which] = given[which].transpose(1, 2).contiguous().transpose(1, 2)
    for dropped in ((), ("g_cmp",), ("g_cmp", "g_swa")):
        arguments = {name: y for name, y in given.items() if name not in dropped}
        out = fsa_compile.nsa_attention(**arguments, block_indices=x.block_indices, block_size=16)
        assert out.is_contiguous()
        out.view(-1)
