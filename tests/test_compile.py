"""torch.compile end to end: no graph breaks, few recompilations, a slot that is shared."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass

import fsa_compile
from fsa_compile import cost, lowering
from fsa_compile.lowering import PASS, _inductor, install
from fsa_compile.testing.inputs import Inputs, make_inputs
from fsa_compile.testing.specs import Spec


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    """Every test starts with nothing compiled and only our pass in the slot."""

    def reset() -> None:
        torch._dynamo.reset()
        setattr(config, _inductor.SLOT, None)
        lowering.enable()
        install._warned.clear()

    reset()
    yield
    reset()


def attention(x: Inputs, loop_order: str = "auto") -> Tensor:
    s = x.spec
    options = {**s.windows, **s.selection, **x.packed, "window_size": s.window_size, "loop_order": loop_order}
    return fsa_compile.nsa_attention(x.q, x.k, x.v, *x.gates, **options)


def gradients(fn: Callable[[Inputs], Tensor], x: Inputs) -> tuple[Tensor, ...]:
    out = fn(x)
    weight = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out).to(out.dtype)
    return (out, *torch.autograd.grad((out * weight).sum(), (x.q, x.k, x.v, *x.gates)))


def assert_like(got: Any, want: Any, tolerance: float) -> None:
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g.isinf(), w.isinf())
        g, w = (x.double().masked_fill(x.isinf(), 0) for x in (g, w))
        error = (g - w).norm() / w.norm().clamp(min=1e-12)
        assert error <= tolerance, float(error)


TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


# ---- on any device ----


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_compiled_is_eager(training: bool, dynamic: bool, device: str) -> None:
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(attention, fullgraph=True, dynamic=dynamic, backend=counter)
    lengths = (96, 144, 201) if dynamic else (96, 96)
    for i, seq_len in enumerate(lengths):
        x = make_inputs(Spec(seq_len=seq_len), device, requires_grad=training, seed=i)
        if training:
            assert_like(gradients(compiled, x), gradients(attention, x), 1e-5)
        else:
            assert_like([compiled(x)], [attention(x)], 1e-5)
    assert counter.frame_count == 1


def test_lengths_that_turn_out_dynamic_recompile_once(device: str) -> None:
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(attention, fullgraph=True, backend=counter)
    for seq_len in (96, 144, 201, 320, 97):
        x = make_inputs(Spec(seq_len=seq_len), device)
        assert_like([compiled(x)], [attention(x)], 1e-5)
    assert counter.frame_count == 2


def test_packed_sequences_compile(device: str) -> None:
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend=counter)
    for lengths in ((37, 5, 64), (20, 71, 1)):
        x = make_inputs(Spec(lengths=lengths), device, requires_grad=True)
        x = Inputs(**{**vars(x), "spec": Spec(lengths=(71, 71, 71))})  # constant max_seqlen
        assert_like(gradients(compiled, x), gradients(attention, x), 1e-5)
    assert counter.frame_count <= 2


def test_bad_input_says_the_same_compiled(device: str) -> None:
    x = make_inputs(Spec(), device)

    def call() -> Tensor:
        return fsa_compile.selected_attention(x.q[:, :, :3], x.k, x.v, x.block_indices, block_size=16)[0]

    with pytest.raises(ValueError) as eager:
        call()
    with pytest.raises(Exception) as compiled:  # Dynamo wraps it
        torch.compile(call, fullgraph=True)()
    assert str(eager.value) in str(compiled.value)


def test_disabled_compiles_to_the_operator(device: str) -> None:
    fsa_compile.disable()
    assert not fsa_compile.is_enabled()
    x = make_inputs(Spec(), device)
    with lowering.collect_sites() as sites:
        got = torch.compile(attention, fullgraph=True)(x)
    assert not sites
    assert_like([got], [attention(x)], 1e-5)


def test_sites_say_where(device: str) -> None:
    x = make_inputs(Spec(), device)
    with config.patch(force_disable_caches=True), lowering.collect_sites() as sites:
        torch.compile(attention, fullgraph=True)(x)
    line = attention.__code__.co_firstlineno
    assert all(site.where in [f"{__file__}:{line + i}" for i in range(1, 4)] for site in sites)
    assert all(site.matched == (device == "cuda") for site in sites)
    (site,) = [site for site in sites if site.op == "fsa::selected_attention"]
    assert set(site.costs) == (set(cost.LOOP_ORDERS) if site.matched else set())


# ---- the slot ----


class Other(CustomGraphPass):
    def __init__(self, uuid: str | None = "other") -> None:
        self.calls = 0
        self._uuid = uuid

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.calls += 1

    def uuid(self) -> str | None:
        return self._uuid


def put(value: Any) -> None:
    setattr(config, _inductor.SLOT, value)


def output(q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor) -> Tensor:
    """Of one operator and nothing else, which leaves a C++ compiler nothing to do."""
    return fsa_compile.selected_attention(q, k, v, block_indices, block_size=16)[0]


def compile_once(**options: Any) -> list[Any]:
    """The sites that were met."""
    x = make_inputs(Spec(seq_len=33))
    args = (x.q, x.k, x.v, x.block_indices)
    with config.patch(force_disable_caches=True), lowering.collect_sites() as sites:
        assert_like([torch.compile(output, fullgraph=True, **options)(*args)], [output(*args)], 1e-5)
    return sites


def test_import_puts_the_pass_in_the_slot() -> None:
    assert fsa_compile.is_enabled()
    assert _inductor.slot_passes() == (PASS,)


def test_a_pass_that_was_there_first_runs_too() -> None:
    fsa_compile.disable()
    other = Other()
    put(other)
    fsa_compile.enable()
    fsa_compile.enable()  # once is enough
    assert len(compile_once()) == 1
    assert other.calls == 1
    fsa_compile.disable()
    assert _inductor.slot_passes() == (other,)


def test_a_pass_that_came_later_runs_too() -> None:
    other = Other()
    put(other)
    assert not fsa_compile.is_enabled()
    fsa_compile.enable()
    assert fsa_compile.is_enabled()
    assert len(compile_once()) == 1
    assert other.calls == 1


def test_a_list_is_extended() -> None:
    if not _inductor.slot_takes_sequence():
        pytest.skip("before torch 2.13 the slot holds one pass, never a list")
    first, second = Other("a"), Other("b")
    put([first, second])
    fsa_compile.enable()
    assert _inductor.slot_passes() == (first, second, PASS)
    fsa_compile.disable()
    assert _inductor.slot_passes() == (first, second)


def test_a_chain_has_a_uuid_only_if_all_have() -> None:
    assert install.PassChain(Other("a"), PASS).uuid() == ("a", PASS.uuid())
    assert install.PassChain(Other(None), PASS).uuid() is None
    assert install.PassChain(lambda graph: None, PASS).uuid() is None


def test_uuid_follows_what_changes_the_code() -> None:
    before = PASS.uuid()
    fsa_compile.debug.validate(True)
    validating = PASS.uuid()
    fsa_compile.debug.validate(False)
    fsa_compile.disable()
    off = PASS.uuid()
    assert len({before, validating, off}) == 3
    fsa_compile.enable()
    assert PASS.uuid() == before


def test_a_slot_replaced_by_options_is_noticed() -> None:
    with pytest.warns(UserWarning, match="holds Other instead of its pass"):
        compile_once(options={_inductor.SLOT: Other()})


def test_a_slot_that_is_ours_is_not_warned_about() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*instead of its pass.*")
        compile_once()


def test_another_thread_sees_the_pass() -> None:
    seen: list[Any] = []
    thread = threading.Thread(target=lambda: seen.append((_inductor.slot_passes(), fsa_compile.is_enabled())))
    thread.start()
    thread.join()
    assert seen == [((PASS,), True)]


# ---- on a GPU only ----

_LONG = Spec(seq_len=700, num_kv_heads=2, gqa_group_size=4, head_dim=64, head_dim_v=64, block_size=64, num_selected=6,
             kernel_size=32, kernel_stride=16, local_blocks=2, window_size=128, batch=2)  # fmt: skip


def emitted(fn: Callable[..., Any], *args: Any) -> tuple[Any, str]:
    """What ``fn``, which calls compiled functions, returns, and the code that was emitted for them."""
    from torch._inductor.utils import run_and_get_code

    with config.patch(force_disable_caches=True):
        result, codes = run_and_get_code(fn, *args)
    return result, "\n".join(codes)


_MAIN = {"fsa": "merge_partials_tile", "nsa": "selected_fwd_query_outer_tile", "tile": "selected_fwd_union_tile"}
_MAIN["mixed"] = _MAIN["fsa"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("order", list(cost.LOOP_ORDERS))
def test_gpu_training_in_every_order(order: str, dtype: torch.dtype) -> None:
    x = make_inputs(_LONG, "cuda", dtype, requires_grad=True)

    def fn(x: Inputs) -> Tensor:
        return attention(x, order)

    got, code = emitted(gradients, torch.compile(fn, fullgraph=True), x)
    assert _MAIN[order] in code
    assert "torch.ops.fsa.selected_attention" not in code
    assert_like(got, gradients(fn, x), TOLERANCE[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("order", list(cost.LOOP_ORDERS))
def test_gpu_gates_are_in_the_epilogue(order: str, dynamic: bool) -> None:
    x = make_inputs(replace(_LONG, num_kv_heads=1, gqa_group_size=16), "cuda", torch.bfloat16)
    o_cmp, o_swa = torch.randn_like(x.q), torch.randn_like(x.q)

    def fn(q, k, v, block_indices, o_cmp, o_swa, g_cmp, g_slc, g_swa):
        out, _ = fsa_compile.selected_attention(q, k, v, block_indices, block_size=64, loop_order=order)
        sum_ = g_cmp.sigmoid().unsqueeze(-1) * o_cmp + g_slc.sigmoid().unsqueeze(-1) * out
        return sum_ + g_swa.sigmoid().unsqueeze(-1) * o_swa

    args = (x.q, x.k, x.v, x.block_indices, o_cmp, o_swa, *x.gates)
    got, code = emitted(torch.compile(fn, fullgraph=True, dynamic=dynamic), *args)
    kernels = [k for k in code.split("async_compile.triton(")[1:] if _MAIN[order] in k.split("async_compile")[0]]
    assert len(kernels) == 1
    fused = 0 if order == "nsa" else 3  # see Kernel.fuses_epilogue
    assert kernels[0].split("''', device_str")[0].count("tl.sigmoid(") == fused
    assert_like([got], [fn(*args)], TOLERANCE[torch.bfloat16])


@pytest.mark.gpu
@pytest.mark.parametrize("order", list(cost.LOOP_ORDERS))
def test_gpu_cuda_graphs(order: str) -> None:
    def fn(q, k, v, block_indices):
        return fsa_compile.selected_attention(q, k, v, block_indices, block_size=64, loop_order=order)

    compiled = torch.compile(fn, fullgraph=True, mode="reduce-overhead")
    torch._dynamo.utils.counters.clear()
    for seed in range(4):
        x = make_inputs(_LONG, "cuda", torch.bfloat16, seed=seed)
        args = (x.q, x.k, x.v, x.block_indices)
        torch.compiler.cudagraph_mark_step_begin()
        assert_like([t.clone() for t in compiled(*args)], fn(*args), TOLERANCE[torch.bfloat16])
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.gpu
@pytest.mark.parametrize("order", list(cost.LOOP_ORDERS))
def test_gpu_max_autotune(order: str) -> None:
    x = make_inputs(_LONG, "cuda", torch.bfloat16, requires_grad=True)

    def fn(x: Inputs) -> Tensor:
        return attention(x, order)

    compiled = torch.compile(fn, fullgraph=True, mode="max-autotune-no-cudagraphs")
    assert_like(gradients(compiled, x), gradients(fn, x), TOLERANCE[torch.bfloat16])


@pytest.mark.gpu
@pytest.mark.parametrize("order", list(cost.LOOP_ORDERS))
def test_gpu_max_autotune_packed(order: str) -> None:
    spec = replace(_LONG, lengths=(300, 50, 411))
    x = make_inputs(spec, "cuda", torch.bfloat16, requires_grad=True)

    def fn(x: Inputs) -> Tensor:
        return attention(x, order)

    compiled = torch.compile(fn, fullgraph=True, mode="max-autotune-no-cudagraphs")
    assert_like(gradients(compiled, x), gradients(fn, x), TOLERANCE[torch.bfloat16])
