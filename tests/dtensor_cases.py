"""What the tests of DTensors run in each of two processes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import fsa_compile
from fsa_compile.testing.calls import STAGES, Call, call_of, run, selection_of, upstream_of
from fsa_compile.testing.inputs import Inputs, make_inputs
from fsa_compile.testing.specs import NAMED, Spec

fsa = torch.ops.fsa
BATCH, HEADS = Shard(0), Shard(2)
SPECS = {
    "batch": Spec(batch=2, seq_len=50),
    "padded": Spec(batch=2, seq_len=20, extra_keys=40),
    "uneven": NAMED["batch_of_three"],
    "one_row": Spec(seq_len=40),
    "packed": NAMED["packed"],
    "packed_more_keys": NAMED["packed_more_keys"],
}
OPTIONS: dict[str, Any] = {
    "block_size": 16, "num_selected": 4, "kernel_size": 8, "kernel_stride": 4, "window_size": 20, "local_blocks": 1,
}  # fmt: skip


@functools.cache
def mesh_of(*shape: int) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp")[-len(shape) :])


def spread(x: Any, *placements: Any) -> Any:
    """A tensor of heads as a DTensor; what tells lengths stays plain, and so does what is no tensor."""
    if not isinstance(x, Tensor) or x.ndim < 3:
        return x
    return distribute_tensor(x, mesh_of(2) if len(placements) == 1 else mesh_of(2, 1), placements)


def spread_call(call: Call, placement: Any) -> Call:
    floating, others = (tuple(spread(x, placement) for x in xs) for xs in (call.floating, call.others))
    return Call(call.name, floating, others, {name: spread(x, placement) for name, x in call.options.items()})


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def assert_same_bits(have: list[Tensor], want: list[Tensor], placement: Any) -> None:
    for a, b in zip(have, want, strict=True):
        assert isinstance(a, DTensor)
        assert a.placements == (placement,)
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
        assert torch.equal(a.full_tensor(), b)


def inputs_of(name: str) -> Inputs:
    return make_inputs(SPECS[name])


def calls_of(name: str) -> list[Call]:
    """Of every stage; of the whole also with a selection of its own."""
    x = inputs_of(name)
    calls = [call_of(stage, x) for stage in STAGES]
    calls.append(replace(calls[-1], options={**calls[-1].options, "block_indices": None}))
    if name == "padded":
        lies = {"used": torch.tensor([60, 31], dtype=torch.int32), "left": torch.tensor([0, 7], dtype=torch.int32)}
        calls = [replace(c, options={**c.options, **padding_of(c, **lies)}) for c in calls]
    return calls


def padding_of(call: Call, used: Any, left: Any) -> dict[str, Any]:
    end = "" if call.name == "mean_compress" else "_k"
    return {f"seqused{end}": used, f"leftpad{end}": left}


def qkv(*placements: Any, name: str = "batch") -> list[Tensor]:
    """q, k, v, placed as told, the last one as all that follow."""
    x = inputs_of(name)
    told = [*placements, *[placements[-1]] * 3]
    return [spread(y, *(p if isinstance(p, tuple) else (p,))) for y, p in zip((x.q, x.k, x.v), told, strict=False)]


@contextlib.contextmanager
def no_collectives(compiled: bool = False) -> Iterator[None]:
    """CommDebugMode does not work on compiled code, and the profiler sees it."""
    if not compiled:
        with CommDebugMode() as seen:
            yield
        assert seen.get_total_counts() == 0, seen.get_comm_counts()
        return
    with torch.profiler.profile() as profile:
        yield
    found = [event.key for event in profile.key_averages() if event.key.startswith(("c10d::", "gloo:"))]
    assert not found, found


def case_stages(name: str, placement: Any) -> None:
    for call in calls_of(name):
        upstream = upstream_of(call) if name != "padded" else run_upstream(call)
        outs, grads = run(call.op(), call, upstream)
        call, upstream = spread_call(call, placement), [spread(g, placement) for g in upstream]
        with no_collectives():
            have_outs, have_grads = run(call.op(), call, upstream)
        assert_same_bits([*have_outs, *have_grads], [*outs, *grads], placement)


def run_upstream(call: Call) -> list[Tensor]:
    """Upstream gradients without the reference, which does not know of padding."""
    with torch.no_grad():
        outs = call.op()(*call.args, **call.options)
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(o.shape, generator=generator) for o in (outs if isinstance(outs, tuple) else (outs,))]


def case_selection(name: str, placement: Any) -> None:
    call = selection_of(inputs_of(name))
    want = call.op()(*call.args, **call.options)
    call = spread_call(call, placement)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), no_collectives():
            have = call.op()(*call.args, **call.options)
        assert_same_bits([have], [want], placement)


def case_inference_mode(name: str, placement: Any) -> None:
    """The dispatcher takes another way there: composites arrive whole, and no autograd kernel runs."""
    for call in calls_of(name):
        want = call.op()(*call.args, **call.options)
        call = spread_call(call, placement)
        with torch.inference_mode(), no_collectives():
            have = call.op()(*call.args, **call.options)
        pairs = zip(*((x if isinstance(x, tuple) else (x,)) for x in (have, want)), strict=True)
        for a, b in pairs:
            assert_same_bits([a], [b], placement)


def case_lengths_as_dtensors() -> None:
    """Per batch row, sharded with the batch or replicated beside it; and the bounds, replicated."""
    used = torch.tensor([50, 31], dtype=torch.int32)
    want = fsa_compile.nsa_attention(*qkv_plain(), seqused_k=used, **OPTIONS)
    for placement in (BATCH, Replicate()):
        given = distribute_tensor(used, mesh_of(2), [placement])
        qkv_ = qkv(BATCH)
        with no_collectives():
            have = fsa_compile.nsa_attention(*qkv_, seqused_k=given, **OPTIONS)
        assert_same_bits([have], [want], BATCH)
    x = inputs_of("packed")
    want = fsa_compile.nsa_attention(x.q, x.k, x.v, cu_seqlens_q=x.cu_seqlens_q, **OPTIONS)
    bounds = distribute_tensor(x.cu_seqlens_q, mesh_of(2), [Replicate()])  # type: ignore[arg-type]
    have = fsa_compile.nsa_attention(*qkv(HEADS, name="packed"), cu_seqlens_q=bounds, **OPTIONS)
    assert_same_bits([have], [want], HEADS)


def qkv_plain() -> list[Tensor]:
    x = inputs_of("batch")
    return [x.q, x.k, x.v]


def case_some_replicated(sharded: int) -> None:
    """What is replicated beside something sharded takes part as it is cut: that needs no collective."""
    leaves = [x.detach().requires_grad_() for x in qkv_plain()]
    want = fsa_compile.nsa_attention(*leaves, **OPTIONS)
    grads = torch.autograd.grad(want.sum(), leaves)
    placed = qkv(*(HEADS if i == sharded else Replicate() for i in range(3)))
    with no_collectives():
        leaves = [x.detach().requires_grad_() for x in placed]
        have = fsa_compile.nsa_attention(*leaves, **OPTIONS)
        have_grads = torch.autograd.grad(have, leaves, torch.ones_like(have))
    assert_same_bits([have, *have_grads], [want, *grads], HEADS)


def case_one_upstream_gradient(name: str) -> None:
    """Of the log-sum-exp only: that of the output is missing."""
    call = call_of(name, inputs_of("batch"))
    _, grads = run(call.op(), call, [None, torch.ones(2, 50, 4)])
    call = spread_call(call, HEADS)
    upstream = spread(torch.ones(2, 50, 4), HEADS)
    with no_collectives():
        _, have = run(call.op(), call, [None, upstream])
    used = [i for i, x in enumerate(have) if not (whole(x) == 0).all()]  # v has none, and no placement either
    assert len(used) >= 2
    assert_same_bits([have[i] for i in used], [grads[i] for i in used], HEADS)


def spread_gradient(grad: Tensor, placement: Any) -> DTensor:
    """Of each process a half, which is exact, where it is a sum over them."""
    if placement == Partial():
        return DTensor.from_local(grad / 2, mesh_of(2), [placement], run_check=False)
    return spread(grad, placement)


def case_misplaced_gradient(placement: Any, collectives: int) -> None:
    """An upstream gradient goes to where its result lies; the caller could not have sent it there."""
    call = call_of("sliding_window_attention", inputs_of("batch"))
    grad = upstream_of(call)[0]
    _, want = run(call.op(), call, [grad, None])
    call = spread_call(call, HEADS)
    upstream = spread_gradient(grad, placement)
    leaves = [x.detach().requires_grad_() for x in call.floating]
    out = call.op()(*leaves, **call.options)[0]
    with CommDebugMode() as seen:
        have = torch.autograd.grad(out, leaves, upstream)
    assert seen.get_total_counts() == collectives
    assert_same_bits(list(have), want, HEADS)


def case_gradient_of_the_mean(placement: Any) -> None:
    """Its backward has nothing but the gradient to go by."""
    x = inputs_of("batch").k.detach().requires_grad_()
    out = fsa_compile.mean_compress(x)
    (want,) = torch.autograd.grad(out, x, torch.ones_like(out))
    leaf = spread(x.detach(), HEADS).requires_grad_()
    out = fsa_compile.mean_compress(leaf)
    (have,) = torch.autograd.grad(out, leaf, spread_gradient(torch.ones(out.shape), placement))
    assert_same_bits([have], [want], placement if placement == HEADS else Replicate())


def case_two_mesh_dimensions() -> None:
    call = calls_of("batch")[-1]
    upstream = upstream_of(call)
    outs, grads = run(call.op(), call, upstream)
    for placements in ((BATCH, HEADS), (HEADS, HEADS), (Replicate(), BATCH)):
        there = [spread(x, *placements) for x in (*call.floating, *upstream)]
        with no_collectives():
            have, have_grads = run(call.op(), replace(call, floating=tuple(there[:-1])), there[-1:])
        for a, b in zip([*have, *have_grads], [*outs, *grads], strict=True):
            assert a.placements == placements
            assert torch.equal(whole(a), b)


def case_a_mesh_of_others() -> None:
    """A process outside the mesh goes through the same program and computes nothing."""
    mesh = DeviceMesh("cpu", [0])
    x = inputs_of("batch")
    there = [distribute_tensor(y, mesh, [HEADS]).requires_grad_() for y in (x.q, x.k, x.v)]
    out = fsa_compile.nsa_attention(*there, **OPTIONS)
    out.sum().backward()
    assert (out.shape, out.dtype) == (x.q.shape, x.q.dtype)
    if dist.get_rank() == 0:
        assert torch.equal(out.to_local(), fsa_compile.nsa_attention(*qkv_plain(), **OPTIONS))
    else:
        assert out.to_local().numel() == 0


def nsa(*inputs: Tensor, **more: Any) -> Tensor:
    return fsa_compile.nsa_attention(*inputs, **OPTIONS, **more)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "sequence": (
        lambda: nsa(*qkv(Replicate(), Shard(1), Replicate())),
        r"fsa::nsa_attention: k is sharded along seq_len_k over mesh dimension 0 \('tp'\), but an operator does not "
        r"communicate, so it should be Replicate\(\) or Shard\(0\), the batch or Shard\(2\), the heads: redistribute",
    ),
    "sequence_of_the_mean": (
        lambda: fsa_compile.mean_compress(qkv(Shard(1))[1]),
        "fsa::mean_compress: x is sharded along seq_len over mesh dimension 0",
    ),
    "selected_blocks": (
        lambda: fsa_compile.selected_attention(
            *qkv(HEADS), spread(inputs_of("batch").block_indices, Shard(3)), block_size=16
        ),
        "fsa::selected_attention: block_indices is sharded along num_selected",
    ),
    "head_dim": (lambda: nsa(*qkv(Replicate(), Replicate(), Shard(-1))), "v is sharded along head_dim_v over"),
    "partial": (
        lambda: nsa(
            *qkv(Replicate())[:2], DTensor.from_local(inputs_of("batch").v, mesh_of(2), [Partial()], run_check=False)
        ),
        r"fsa::nsa_attention: v is P\(sum\) over mesh dimension 0|v is Partial\(sum\) over mesh dimension 0",
    ),
    "a_gate": (
        lambda: nsa(*qkv(HEADS), spread(inputs_of("batch").g_cmp, Shard(1))),
        "fsa::nsa_attention: g_cmp is sharded along seq_len over",
    ),
    "disagreeing": (
        lambda: nsa(*qkv(BATCH, HEADS)),
        "q is sharded along the batch and k along the heads, but they should agree",
    ),
    "plain": (
        lambda: nsa(qkv(HEADS)[0], inputs_of("batch").k, qkv(HEADS)[2]),
        "fsa::nsa_attention: k is a plain tensor, but it should be a DTensor, as q is",
    ),
    "plain_query": (
        lambda: fsa_compile.sliding_window_attention(inputs_of("batch").q, *qkv(HEADS)[1:], window_size=4),
        "fsa::sliding_window_attention: q is a plain tensor, but it should be a DTensor, as k is",
    ),
    "packed_batch": (
        lambda: nsa(*qkv(BATCH, name="packed"), cu_seqlens_q=inputs_of("packed").cu_seqlens_q),
        "cu_seqlens_q is given and the batch is sharded, but packed sequences have a batch of 1: shard the heads",
    ),
    "sharded_bounds": (
        lambda: nsa(
            *qkv(HEADS, name="packed"),
            cu_seqlens_q=distribute_tensor(inputs_of("packed").cu_seqlens_q, mesh_of(2), [BATCH]),  # type: ignore[arg-type]
        ),
        r"cu_seqlens_q is sharded along num_seqs \+ 1 over .* should be Replicate\(\): redistribute it first",
    ),
    "too_few_heads": (
        lambda: nsa(*qkv(HEADS, Replicate(), name="uneven")),
        "the heads are sharded over 2 devices and num_kv_heads is 1, but it should be a multiple of that",
    ),
    "another_mesh": (
        lambda: nsa(*qkv(Replicate(), (Replicate(), Replicate()))),
        r"fsa::nsa_attention: k is on DeviceMesh.*, but it should be on DeviceMesh.*, where q is",
    ),
    "order": (
        lambda: nsa(*qkv((Replicate(), BATCH), (BATCH, BATCH))),
        r"q is placed as \(Replicate\(\), Shard\(dim=0\)\), but the others want \(Shard\(dim=0\), Shard\(dim=0\)\)",
    ),
    "shape": (
        lambda: fsa_compile.mean_compress(spread(inputs_of("batch").k[0], Shard(1))),
        r"fsa::mean_compress: x has 3 dimensions, shape \(50, 2, 16\), but it should have 4",
    ),
}


def case_refused(name: str, inference: bool) -> None:
    call, message = REFUSED[name]
    with torch.inference_mode(inference), pytest.raises(ValueError, match=message):
        call()


def case_refused_while_compiling() -> None:
    torch._dynamo.reset()
    q, k, v = qkv(HEADS, Shard(1), HEADS)
    with pytest.raises(Exception, match="fsa::nsa_attention: k is sharded along seq_len_k over mesh dimension 0"):
        torch.compile(nsa, fullgraph=True)(q, k, v)


@contextlib.contextmanager
def compiled_anew() -> Iterator[list[Any]]:
    """The sites met: what the other process, or another case, has compiled never meets the pass of this one."""
    import torch._inductor.config as inductor

    torch._dynamo.reset()
    with inductor.patch(force_disable_caches=True), fsa_compile.lowering.collect_sites() as sites:
        yield sites


@functools.cache
def compiled_in_one_process(name: str, selected_only: bool) -> tuple[Any, ...]:
    """A call, its upstream gradients, its results and the operators that the pass met."""
    with_blocks, call = calls_of(name)[-2:]
    if selected_only:
        call = replace(with_blocks, floating=with_blocks.floating[:3])
    upstream = upstream_of(call) if name != "padded" else run_upstream(call)
    op = call.op()
    with compiled_anew() as sites:
        outs, grads = run(torch.compile(lambda *a, **o: op(*a, **o), fullgraph=True), call, upstream)
    return call, upstream, [*outs, *grads], [site.op for site in sites]


def case_compiled(name: str, placement: Any, selected_only: bool) -> None:
    """Against one process that compiles too; the pass meets each device's operators."""
    call, upstream, want, want_sites = compiled_in_one_process(name, selected_only)
    op = call.op()
    call, upstream = spread_call(call, placement), [spread(g, placement) for g in upstream]
    compiled = torch.compile(lambda *a, **o: op(*a, **o), fullgraph=True)
    with compiled_anew() as sites:
        outs, grads = run(compiled, call, upstream)
    assert sites
    assert [site.op for site in sites] == want_sites
    assert_same_bits([*outs, *grads], want, placement)
    with no_collectives(compiled=True):
        run(compiled, call, upstream)
