"""Plain PyTorch that is selected attention is replaced, what only looks like it is not, and results stay as they are.

The graphs that the pass leaves run without the compiler's backend here, which is what takes long; `test_whole_compiler`
and the slow tests go all the way.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from corpus import BLOCK, NEAR_MISSES, POSITIVES, Program, make_inputs
from corpus.near_misses import chosen_tokens
from corpus.positives import causal
from torch import Tensor, fx
from torch._inductor import config
from torch.utils.checkpoint import checkpoint

import fsa_compile
from fsa_compile import lowering
from fsa_compile.lowering import Site, _inductor, install
from fsa_compile.lowering.recognise import recognise_graph

_ATTENTION = ("selected_attention", "compressed_attention", "sliding_window_attention")


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    def reset() -> None:
        torch._dynamo.reset()
        for slot in (_inductor.SLOT, _inductor.PRE_GRAD_SLOT):
            setattr(config, slot, None)
        fsa_compile.enable()
        install._warned.clear()

    reset()
    yield
    reset()


class Captured:
    """A backend that runs the pass and then the graph as it is."""

    def __init__(self) -> None:
        self.sites: list[Site] = []
        self.found: list[str] = []  # operators in all graphs

    @property
    def calls(self) -> int:
        """Of the attention operators."""
        return sum(name in _ATTENTION for name in self.found)

    @property
    def selections(self) -> int:
        return self.found.count("select_blocks")

    def __call__(self, gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        for module in gm.modules():
            if isinstance(module, fx.GraphModule):
                self.sites += recognise_graph(module.graph)
                module.graph.lint()
                module.recompile()
                names = (str(node.target).split(".") for node in module.graph.nodes)
                self.found += [name[1] for name in names if name[0] == "fsa"]
        return gm.forward


def results(fn: Callable[..., Tensor], x: list[Tensor], training: bool) -> list[Tensor]:
    out = fn(*x)
    if not training:
        return [out]
    weight = torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype)
    return [out, *torch.autograd.grad((out * weight).sum(), x[:3])]


def assert_same(got: list[Tensor], want: list[Tensor], tolerance: float = 1e-5) -> None:
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype
        assert g.shape == w.shape
        assert torch.equal(g.isnan(), w.isnan())
        torch.testing.assert_close(g.nan_to_num(), w.nan_to_num(), atol=tolerance, rtol=tolerance)


def run(program: Program, training: bool, lengths: tuple[int, ...] = (), batch: int = 2) -> Captured:
    """Compile the program and compare it with itself; `lengths` are dynamic."""
    backend = Captured()
    compiled = torch.compile(program.fn, backend=backend, fullgraph=True)
    for i, length in enumerate(lengths or (program.length,)):
        x = make_inputs(program, length, requires_grad=training, seed=i, batch=batch)
        if lengths:
            for one in x:
                torch._dynamo.maybe_mark_dynamic(one, 2 if program.layout == "bhtd" else 1)
        assert_same(results(compiled, x, training), results(program.fn, x, training))
    return backend


def both_ways(programs: dict[str, Program], by_default: bool) -> pytest.MarkDecorator:
    """Each program in inference and in training, whose graphs are the same: but for one in six, one of the two where
    the slow tests run.
    """
    params = []
    for i, name in enumerate(programs):
        for training in (False, True):
            marks = () if training == by_default or i % 6 == 0 else pytest.mark.slow
            params.append(
                pytest.param(name, training, marks=marks, id=f"{name}-{'training' if training else 'inference'}")
            )
    return pytest.mark.parametrize(("name", "training"), params)


def some(programs: dict[str, Program], by_default: int, slow: int) -> pytest.MarkDecorator:
    """One in `by_default` of the programs, and one in `slow` where the slow tests run: dynamic sizes take long."""
    names = [(name, i % by_default == 0) for i, name in enumerate(programs) if i % slow == 0]
    params = [pytest.param(name, marks=() if default else pytest.mark.slow) for name, default in names]
    return pytest.mark.parametrize("name", params)


def test_the_corpus_is_large() -> None:
    assert len(POSITIVES) >= 30
    assert len(NEAR_MISSES) >= 40


@both_ways(POSITIVES, by_default=True)  # gradients besides what inference gives
def test_positive(name: str, training: bool) -> None:
    backend = run(POSITIVES[name], training)
    assert [site.matched for site in backend.sites] == [True], backend.sites
    assert backend.found.count(POSITIVES[name].op) == 1
    assert backend.selections == POSITIVES[name].selects, backend.sites[0].reason


@some(POSITIVES, by_default=12, slow=3)
def test_positive_of_dynamic_length(name: str) -> None:
    program = POSITIVES[name]
    odd = program.length % BLOCK and program.length <= 120  # others are of whole blocks, or longer
    backend = run(program, True, (72, 100) if odd else (program.length, program.length + 32))
    assert [site.matched for site in backend.sites] == [not program.static_only] * len(backend.sites), backend.sites
    assert program.static_only or program.specialises or len(backend.sites) == 1  # one compilation for both lengths


@both_ways(NEAR_MISSES, by_default=False)  # what is left as it was has the gradients that it had
def test_near_miss(name: str, training: bool) -> None:
    program = NEAR_MISSES[name]
    backend = run(program, training)
    assert not any(site.matched for site in backend.sites), backend.sites
    assert backend.calls == 0
    assert backend.sites
    for site in backend.sites:
        assert re.search("|".join(map(re.escape, program.reason.split("|"))), site.reason), site.reason
        assert site.where is not None
        assert f"{program.fn.__module__.split('.')[-1]}.py" in site.where


@some(NEAR_MISSES, by_default=24, slow=6)
def test_near_miss_of_dynamic_length(name: str) -> None:
    backend = run(NEAR_MISSES[name], True, (72, 80))
    assert not any(site.matched for site in backend.sites), backend.sites


@some(POSITIVES, by_default=6, slow=1)
def test_one_sequence(name: str) -> None:
    """Axes of size 1 have no index."""
    assert all(site.matched for site in run(POSITIVES[name], False, batch=1).sites)


# ---- in company ----


def block_attention(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    t, g = q.shape[2], q.shape[1] // k.shape[1]
    mask = (chosen_tokens(ids, t) & causal(t)).repeat_interleave(g, 1)
    scores = (q @ k.repeat_interleave(g, 1).mT) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return weights.to(v.dtype) @ v.repeat_interleave(g, 1)


class Block(torch.nn.Module):
    """A transformer's attention that selects blocks by the means of their keys."""

    def __init__(self, heads: int = 4, heads_k: int = 2, dim: int = 16) -> None:
        super().__init__()
        self.shape = heads, heads_k, dim
        width = heads * dim
        self.norm = torch.nn.LayerNorm(width)
        self.q, self.k, self.v = (torch.nn.Linear(width, n * dim, bias=False) for n in (heads, heads_k, heads_k))
        self.out = torch.nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        heads, heads_k, dim = self.shape
        b, t, _ = x.shape
        h = self.norm(x)
        q = self.q(h).view(b, t, heads, dim).transpose(1, 2)
        k, v = (f(h).view(b, t, heads_k, dim).transpose(1, 2) for f in (self.k, self.v))
        means = k.unflatten(2, (-1, BLOCK)).mean(3)
        scores = q.unflatten(1, (heads_k, -1)).sum(2) @ means.mT
        own, block = torch.arange(t, device=x.device)[:, None] // BLOCK, torch.arange(t // BLOCK, device=x.device)
        scores = scores.masked_fill(block > own, float("-inf")).masked_fill(block == own, float("inf"))
        ids = scores.topk(2, dim=-1).indices
        out = block_attention(q, k, v, ids)
        return x + self.out(out.transpose(1, 2).reshape(b, t, -1))


def module_results(fn: Any, model: torch.nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    out = fn(x)
    out.float().square().mean().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    "how", ["plain", "autocast", "autocast inside", "no autocast inside", "checkpoint", "bfloat16"]
)
def test_a_model_is_recognised(how: str) -> None:
    torch.manual_seed(0)
    model = Block()
    x = torch.randn(2, 64, 64)
    if how == "bfloat16":
        model, x = model.bfloat16(), x.bfloat16()

    def call(x: Tensor) -> Tensor:
        if how == "checkpoint":
            return checkpoint(model, x, use_reentrant=False)
        if how == "autocast inside":
            with torch.autocast("cpu", torch.bfloat16):
                return model(x)
        if how == "no autocast inside":
            with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
                return model(x)
        return model(x)

    backend = Captured()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        compiled = torch.compile(call, backend=backend, fullgraph=True)
        got, want = module_results(compiled, model, x), module_results(call, model, x)
    assert [site.matched for site in backend.sites] == [True], backend.sites
    assert backend.calls == 1
    exact = how in ("plain", "no autocast inside", "checkpoint")
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype
        error = (g.float() - w.float()).norm() / w.float().norm().clamp(min=1e-6)
        assert error < (1e-5 if exact else 2e-2), error


def test_rows_without_a_key_stay_nan() -> None:
    """As a softmax gives it: the row, and the gradients of all that it multiplies."""
    program = POSITIVES["softmax_additive"]
    x = make_inputs(program, 72, requires_grad=True, seed=3)
    want = results(program.fn, x, True)
    assert all(one.isnan().any() for one in want)
    assert not all(one.isnan().all() for one in want)
    assert_same(results(torch.compile(program.fn, backend=Captured(), fullgraph=True), x, True), want)


def test_no_gradient_comes_back() -> None:
    """Keys repeated under no_grad, and values cut off, have none although the operands are found behind them."""

    def fn(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        with torch.no_grad():
            frozen = k.transpose(1, 2).contiguous().transpose(1, 2)
        return block_attention(q, frozen, v.detach(), ids) + 0 * (k.sum() + v.sum())

    x = make_inputs(Program("", fn, empty_rows=False), 72, requires_grad=True)
    backend = Captured()
    got = results(torch.compile(fn, backend=backend, fullgraph=True), x, True)
    assert backend.calls == 1
    assert not got[2].any()
    assert not got[3].any()
    assert_same(got, results(fn, x, True))


def test_two_attentions_of_one_mask() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        return block_attention(q, k, block_attention(q, k, v, ids)[:, ::2], ids)

    x = make_inputs(Program("", fn, empty_rows=False), 72, requires_grad=True)
    backend = Captured()
    assert_same(results(torch.compile(fn, backend=backend, fullgraph=True), x, True), results(fn, x, True))
    assert backend.calls == 2


def test_a_graph_without_block_selection_is_not_touched() -> None:
    def fn(x: Tensor) -> Tensor:
        x = x.clone()
        x[..., 0] = 1.0  # a write whose result nobody uses
        y = F.scaled_dot_product_attention(x, x, x, is_causal=True)
        return y + torch.softmax(x @ x.mT, -1) @ x

    graphs: list[tuple[str, str]] = []

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        before = str(gm.graph)
        sites = recognise_graph(gm.graph)
        assert not any(site.matched for site in sites)
        graphs.append((before, str(gm.graph)))
        return gm.forward

    torch.compile(fn, backend=backend)(torch.randn(1, 2, 8, 16))
    assert len(graphs) == 1
    assert graphs[0][0] == graphs[0][1]


def test_what_goes_wrong_inside_leaves_the_graph_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from fsa_compile.lowering.recognise import anchors

    def broken(*args: Any) -> Any:
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(anchors, "prove", broken)
    program = POSITIVES["sdpa_scatter_in_place"]
    backend = run(program, True)
    assert backend.calls == 0
    assert "broken on purpose" in backend.sites[0].reason


def test_a_replacement_that_fails_half_way_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from fsa_compile.lowering.recognise import rewrite

    def broken(*args: Any) -> Any:
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(rewrite, "_as_wanted", broken)
    backend = run(POSITIVES["softmax_masked_fill"], True)
    assert backend.calls == 0
    assert not backend.sites[0].matched


def test_explain_shows_what_was_recognised() -> None:
    x = make_inputs(Program("", block_attention), 72, requires_grad=False)
    (site,) = fsa_compile.explain(block_attention, *x).sites
    assert site.op == "fsa::selected_attention"
    assert site.where is not None
    assert "test_recognition.py" in site.where
    near_miss = NEAR_MISSES["filled_with_minus_1e9"]
    (site,) = fsa_compile.explain(near_miss.fn, *x).sites
    assert (site.op, site.matched) == ("softmax, then matmul", False)
    assert "-1e+09" in site.reason


# ---- through the whole compiler ----


@pytest.mark.parametrize("training", [pytest.param(False, marks=pytest.mark.slow), True])
def test_whole_compiler(training: bool) -> None:
    x = make_inputs(Program("", block_attention), 72, requires_grad=training)
    with config.patch(force_disable_caches=True), lowering.collect_sites() as sites:
        got = results(torch.compile(block_attention, fullgraph=True), x, training)
    assert_same(got, results(block_attention, x, training))
    found = {site.op: site for site in sites}
    assert found["softmax, then matmul"].matched
    assert "fsa::selected_attention" in found  # the joint pass met what the pre-grad pass put there


@pytest.mark.slow
def test_switched_off_nothing_is_looked_at() -> None:
    x = make_inputs(Program("", block_attention), 72, requires_grad=False)
    for off in (lambda: fsa_compile.enable(recognise=False), fsa_compile.disable):
        torch._dynamo.reset()
        off()
        with config.patch(force_disable_caches=True), lowering.collect_sites() as sites:
            torch.compile(block_attention, fullgraph=True)(*x)
        assert not sites
    fsa_compile.enable()
    assert _inductor.slot_passes(_inductor.PRE_GRAD_SLOT) == (lowering.PRE_GRAD_PASS,)
