"""What the pass makes of a graph and what Inductor emits for it, without a GPU."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sympy
import torch
import triton
from programs import backward, gated
from torch import Tensor

import fsa_compile
from fsa_compile import cost, lowering
from fsa_compile.lowering import _inductor, emit, expand
from fsa_compile.ops.selected import orders
from fsa_compile.testing.fake_gpu import Harness, pretend_h200

fsa = torch.ops.fsa
ORDERS = tuple(cost.LOOP_ORDERS)
FORWARD_TEMPLATES = {
    "fsa": ["fwd_kv_outer", "merge_partials"],
    "nsa": ["fwd_query_outer"],
    "tile": ["unions", "fwd_union"],
    "mixed": ["unions", "fwd_union", "fwd_kv_outer", "merge_partials"],
}
BACKWARD_TEMPLATES = {
    "fsa": ["bwd_kv_outer", "sum_partials", "reduce_tiles"],
    "nsa": ["bwd_kv_outer", "bwd_query_outer", "reduce_tiles"],
    "tile": ["bwd_kv_outer", "unions", "bwd_union", "reduce_tiles"],
    "mixed": ["bwd_kv_outer", "sum_partials", "reduce_tiles"],
}


@pytest.fixture(autouse=True)
def _enabled() -> Iterator[None]:
    lowering.enable()
    yield
    lowering.enable()


def kernels_of(code: str) -> dict[str, str]:
    """Sources of the emitted kernels by name."""
    return dict(re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", code, flags=re.DOTALL))


def templates_of(code: str) -> list[str]:
    """The package's templates in the emitted code, in order."""
    # A template names what its kernel's own module names.
    found = [re.findall(r"from fsa_compile\.templates\.\w+\.(\w+) import", x) for x in kernels_of(code).values()]
    return [names[0] for names in ([n for n in one if n != "sizes"] for one in found) if names]


def called_operators(code: str) -> set[str]:
    return set(re.findall(r"torch\.ops\.fsa\.(\w+)\.default\(", code))


def fakes(
    harness: Harness, *, dynamic: bool = False, packed: bool = False, seq_len: int = 1024, group: int = 4, dim: int = 64
) -> list[Tensor]:
    """q, k, v, block_indices, two tensors like the output, three like the gates, cu_seqlens."""
    axes = (1,) if dynamic else ()

    def rows(heads: int, *rest: int, **kw: Any) -> Tensor:
        return harness.tensor(1, seq_len, heads, *rest, dynamic=axes, **kw)

    heads = 2 * group
    tensors = [rows(heads, dim), rows(2, dim), rows(2, dim), rows(2, 16, dtype=torch.int32)]
    tensors += [rows(heads, dim), rows(heads, dim), rows(heads), rows(heads), rows(heads)]
    return tensors + ([harness.tensor(5, dtype=torch.int32)] if packed else [])


def backward_order(tensors: list[Tensor]) -> list[Tensor]:
    """The same tensors as ``backward``'s function takes them."""
    q, k, v, block_indices, out, grad, gate, rows, grad_rows, *cu_seqlens = tensors
    with rows.fake_mode:  # type: ignore[attr-defined]
        shift, log_sum, grad_log_sum = rows.float(), rows.float() * 2, grad_rows.float()
    return [q, k, v, block_indices, out, shift, log_sum, grad, grad_log_sum, gate, *cu_seqlens]


# ---- the emitted code ----


@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("order", ORDERS)
def test_forward_is_templates_with_the_gates_in_the_last_one(
    monkeypatch: pytest.MonkeyPatch, order: str, dynamic: bool, packed: bool
) -> None:
    monkeypatch.setattr(_inductor, "forbid_fusion", lambda x: None)
    harness = Harness()
    code = harness.emit(gated(order), *fakes(harness, dynamic=dynamic, packed=packed))
    assert templates_of(code) == FORWARD_TEMPLATES[order]
    kernels = list(kernels_of(code).values())
    assert len(kernels) == len(FORWARD_TEMPLATES[order]), "the gates have a kernel of their own"
    assert kernels[-1].count("sigmoid") == 3
    assert called_operators(code) <= {"_block_lists"}
    _assert_no_size_is_fixed(harness)
    if dynamic:
        assert "ks0" in kernels[-1]
        assert "'ks0': 'i64'" in kernels[-1], "strides are products of lengths and may pass 2**31"


@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("order", ORDERS)
def test_backward_is_templates(order: str, dynamic: bool, packed: bool) -> None:
    harness = Harness()
    code = harness.emit(backward(order), *backward_order(fakes(harness, dynamic=dynamic, packed=packed)))
    assert sorted(templates_of(code)) == sorted(BACKWARD_TEMPLATES[order])
    assert called_operators(code) <= {"_block_lists"}
    _assert_no_size_is_fixed(harness)


def _assert_no_size_is_fixed(harness: Harness) -> None:
    """Nothing is specialised on a length; Inductor's own bounds for 32-bit indexing are far away."""
    env = harness.mode.shape_env
    assert not env.replacements
    for guard in env.guards:
        for length in (64, 1000, 131072):
            assert guard.expr.subs(dict.fromkeys(guard.expr.free_symbols, length)) == sympy.true, guard.expr


@pytest.mark.parametrize(("seq_len", "group"), [(65536, 1), (2048, 16), (1024, 1)])
def test_auto_emits_the_order_that_the_cost_model_chooses(seq_len: int, group: int) -> None:
    harness = Harness()
    tensors = fakes(harness, seq_len=seq_len, group=group, dim=128)
    with lowering.collect_sites() as sites:
        code = harness.emit(gated("auto"), *tensors)
    problem = cost.Problem(1, seq_len, seq_len, 2, group, 128, 128, 64, 16, 2, cost.LIKELY_AGREEMENT)
    choice = cost.choose(problem, cost.DEVICES["H200"])
    assert templates_of(code) == FORWARD_TEMPLATES[choice.order]
    assert [(s.matched, s.loop_order, s.costs) for s in sites] == [(True, choice.order, choice.costs)]


def test_a_long_call_is_cut_in_parts_that_share_a_workspace() -> None:
    """Four parts of half a group each: views of q, one set of lists, one buffer of partials."""
    harness = Harness()
    code = harness.emit(gated("fsa"), *fakes(harness, seq_len=65536, group=16, dim=128))
    call = code[code.index("def call(") :]
    assert call.count("torch.ops.fsa._block_lists.default(") == 1
    assert len(re.findall(r"empty_strided_cuda\(\(8388608, 128\)", call)) == 1  # 2 GiB
    assert templates_of(code).count("fwd_kv_outer") == 4  # each reads q, k and v from elsewhere


def test_auto_takes_each_order_somewhere() -> None:
    sizes = ((65536, 65536, 0.0), (65536, 65536, 0.5), (2048, 2048, 0.0), (1, 65536, 0.0))
    problems = (cost.Problem(1, t, k, 2, 4, 128, 128, 64, 16, 2, agreement) for t, k, agreement in sizes)
    assert {cost.choose(problem, cost.DEVICES["H200"]).order for problem in problems} == set(cost.LOOP_ORDERS)


@pytest.mark.parametrize("order", ORDERS)
def test_a_reader_of_lse_is_not_fused_into_the_kernel_that_writes_it(order: str) -> None:
    def fn(q, k, v, block_indices):
        out, lse = fsa.selected_attention(q, k, v, block_indices, loop_order=order)
        return out * lse.unsqueeze(-1)

    harness = Harness()
    code = harness.emit(fn, *fakes(harness)[:4])
    assert templates_of(code) == FORWARD_TEMPLATES[order]
    assert len(kernels_of(code)) == len(FORWARD_TEMPLATES[order]) + 1


@pytest.mark.parametrize(
    ("order", "group", "fused"), [("nsa", 4, False), ("nsa", 16, False), ("fsa", 1, True), ("fsa", 4, True)]
)
def test_gates_are_fused_where_that_measured_faster(order: str, group: int, fused: bool) -> None:
    harness = Harness()
    code = harness.emit(gated(order), *fakes(harness, group=group))
    assert templates_of(code) == FORWARD_TEMPLATES[order]
    counts = [kernel.count("sigmoid") for kernel in kernels_of(code).values()]
    assert counts == [0] * (len(FORWARD_TEMPLATES[order]) - fused) + [3]


def test_views_of_one_projection_are_read_where_they_lie() -> None:
    def fn(qkv, block_indices):
        qkv = qkv * 2  # a buffer of Inductor's own
        q, k, v = qkv.split((8, 2, 2), dim=2)
        return fsa.selected_attention_forward(q, k, v, block_indices, loop_order="nsa")

    harness = Harness()
    qkv, block_indices = harness.tensor(2, 512, 12, 64), harness.tensor(2, 512, 2, 16, dtype=torch.int32)
    code = harness.emit(fn, qkv, block_indices)
    kernels = list(kernels_of(code).values())
    assert len(kernels) == 2, "a copy was made"
    assert re.search(r"k_ptr = arg_\w+ \+ 512\n", kernels[1])
    assert f"({512 * 12 * 64}, {12 * 64}, 64)" in kernels[1]


def test_an_innermost_stride_other_than_one_is_copied() -> None:
    def fn(q, k, v, block_indices):
        q = torch.ops.aten.slice(q, 3, 0, None, 2)
        return fsa.selected_attention_forward(q, k, v, block_indices, loop_order="nsa")

    harness = Harness()
    _, k, v, block_indices = fakes(harness)[:4]
    wide = harness.tensor(1, 1024, 8, 128)
    code = harness.emit(fn, wide, k, v, block_indices)
    assert templates_of(code) == ["fwd_query_outer"]
    assert len(kernels_of(code)) == 2


@pytest.mark.parametrize("make", [gated, backward], ids=["forward", "backward"])
@pytest.mark.parametrize("order", ORDERS)
def test_emitted_kernels_compile_for_sm_90(order: str, make: Callable[..., Any]) -> None:
    """The shells, dynamic sizes and fused epilogue included, go through Triton's compiler."""
    from triton.compiler import ASTSource

    harness = Harness()
    tensors = fakes(harness, dynamic=True, packed=order == "fsa", group=16)
    code = harness.emit(make(order), *(tensors if make is gated else backward_order(tensors)))
    for name, source in kernels_of(code).items():
        if "triton_heuristics.template" not in source:
            continue
        types = eval(re.search(r"'signature': (\{.*?\})", source).group(1))  # type: ignore[union-attr]
        warps = int(re.search(r"num_warps=(\d+)", source).group(1))  # type: ignore[union-attr]
        source = re.sub(r"@triton_heuristics\.\w+\(.*?\n\)\n@triton\.jit", "@triton.jit", source, flags=re.DOTALL)
        fn = _load(name, source)
        with pretend_h200():
            target = triton.runtime.driver.active.get_current_target()
            compiled = triton.compile(ASTSource(fn, types, {}, {}), target=target, options={"num_warps": warps})
        assert compiled.asm["cubin"]


def _load(name: str, source: str) -> Any:
    from torch._inductor.codecache import PyCodeCache

    return getattr(PyCodeCache.load(source), name)


# ---- the pass ----


def test_disabled_the_operator_stays() -> None:
    lowering.disable()
    harness = Harness()
    with lowering.collect_sites() as sites:
        code = harness.emit(gated("nsa"), *fakes(harness))
    assert called_operators(code) == {"selected_attention_forward"}
    assert not templates_of(code)
    assert not sites


def test_validating_the_operator_stays() -> None:
    fsa_compile.debug.validate(True)
    try:
        harness = Harness()
        with lowering.collect_sites() as sites:
            code = harness.emit(gated("nsa"), *fakes(harness))
    finally:
        fsa_compile.debug.validate(False)
    assert called_operators(code) == {"selected_attention_forward"}
    assert not sites[0].matched
    assert "validates" in sites[0].reason


def test_forward_and_backward_share_lists_and_order() -> None:
    def fn(q, k, v, block_indices, grad, cu_seqlens):
        options = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
        results = fsa.selected_attention_forward(q, k, v, block_indices, **options)
        return results[0], *fsa.selected_attention_backward(grad, None, q, k, v, block_indices, *results, **options)

    harness = Harness()
    q, k, v, block_indices, grad, *_, cu_seqlens = fakes(harness, packed=True, group=1, seq_len=32768)
    with lowering.collect_sites() as sites:
        harness.emit(fn, q, k, v, block_indices, grad, cu_seqlens)
    assert harness.graph is not None
    targets = [str(n.target) for n in harness.graph.nodes]
    assert targets.count("fsa._block_lists.default") == 1
    problem = cost.Problem(1, 32768, 32768, 2, 1, 64, 64, 64, 16, 2, cost.LIKELY_AGREEMENT)
    choices = [cost.choose(problem, cost.DEVICES["H200"], **how) for how in ({"training": True}, {"backward": True})]
    assert [s.loop_order for s in sites] == [choice.order for choice in choices] == ["fsa", "fsa"]
    assert [s.costs for s in sites] == [choice.costs for choice in choices]


def test_a_failing_expansion_leaves_the_operator(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError("broken on purpose")

    monkeypatch.setitem(orders.ORDERS, "nsa", orders.Order(broken, broken))
    harness = Harness()
    with lowering.collect_sites() as sites:
        code = harness.emit(gated("nsa"), *fakes(harness))
    assert called_operators(code) == {"selected_attention_forward"}
    assert not sites[0].matched
    assert "broken on purpose" in sites[0].reason
    assert "broken on purpose" in caplog.text


def test_a_failing_template_calls_the_operator(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError("broken on purpose")

    monkeypatch.setattr(emit, "_template", broken)
    harness = Harness()
    code = harness.emit(gated("fsa"), *fakes(harness))
    assert called_operators(code) == {"_block_lists", "_selected_fwd_kv_outer", "_merge_partials"}
    assert "broken on purpose" in caplog.text


def test_cpu_nodes_stay() -> None:
    graph = torch.fx.Graph()
    mode = Harness().mode
    with mode:
        values = [torch.empty(1, 64, h, 16) for h in (4, 2, 2)] + [torch.empty(1, 64, 2, 4, dtype=torch.int32)]
        nodes = [graph.placeholder(name) for name in "qkvi"]
        for node, value in zip(nodes, values, strict=True):
            node.meta["val"] = value
        call = graph.call_function(fsa.selected_attention_forward.default, tuple(nodes))
        call.meta["val"] = fsa.selected_attention_forward(*values)
    call.meta["stack_trace"] = 'File "/home/user/model.py", line 7, in forward\n    out = attend(x)'
    graph.output(call)
    with lowering.collect_sites() as sites:
        expand.expand_graph(graph)
    assert [n.target for n in graph.nodes if n.op == "call_function"] == [fsa.selected_attention_forward.default]
    assert [(s.op, s.matched, s.where) for s in sites] == [("fsa::selected_attention", False, "/home/user/model.py:7")]
    assert sites[0].reason.startswith("runs on cpu")


def test_replacements_keep_the_facts_about_the_call() -> None:
    harness = Harness()
    q, k, v, block_indices = fakes(harness)[:4]
    graph = torch.fx.Graph()
    nodes = [graph.placeholder(name) for name in "qkvi"]
    for node, value in zip(nodes, (q, k, v, block_indices), strict=True):
        node.meta["val"] = value
    call = graph.call_function(fsa.selected_attention_forward.default, tuple(nodes), {"loop_order": "fsa"})
    with harness.mode:
        call.meta["val"] = fsa.selected_attention_forward(q, k, v, block_indices)
    policy = torch.utils.checkpoint.CheckpointPolicy.MUST_SAVE
    call.meta |= {"stack_trace": 'File "m.py", line 3, in f', "partitioner_tag": "is_forward", "recompute": policy}
    results = [graph.call_function(__import__("operator").getitem, (call, i)) for i in range(3)]
    for result, value in zip(results, call.meta["val"], strict=True):
        result.meta["val"] = value
    graph.output(tuple(results))
    with pretend_h200():
        expand.expand_graph(graph)
    graph.lint()
    made = [n for n in graph.nodes if n.op == "call_function"]
    assert {n.meta["stack_trace"] for n in made} == {'File "m.py", line 3, in f'}
    assert {n.meta["partitioner_tag"] for n in made} == {"is_forward"}
    kept = [n for n in made if n.meta.get("recompute") is policy]
    assert kept == list(next(iter(reversed(graph.nodes))).args[0]), "only the results are to be kept, not the partials"
    assert all(isinstance(n.meta["val"], Tensor) for n in kept)


def test_apart_is_the_identity() -> None:
    x = torch.randn(3, 4).t()
    torch.library.opcheck(torch.ops.fsa._apart.default, (x,), test_utils=("test_schema", "test_faketensor"))
    assert torch.equal(torch.ops.fsa._apart(x), x)
