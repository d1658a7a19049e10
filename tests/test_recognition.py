"""Plain PyTorch that is selected attention is replaced, what only looks like it is not, and results stay as they are.

The graphs that the pass leaves run without the compiler's backend here, which is what takes long; `test_whole_compiler`
and the slow tests go all the way.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._inductor import config
from torch.utils.checkpoint import checkpoint

import fsa_compile
from fsa_compile import lowering
from fsa_compile.lowering import Site, _inductor, install
from fsa_compile.lowering.recognise import recognise_graph

from corpus import BLOCK, NEAR_MISSES, POSITIVES, Program, make_inputs
from corpus.near_misses import chosen_tokens
from corpus.positives import causal

_OP = torch.ops.fsa.selected_attention.default


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
        self.calls = 0  # of the operator, in all graphs

    def __call__(self, gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        for module in gm.modules():
            if isinstance(module, fx.GraphModule):
                self.sites += recognise_graph(module.graph)
                module.graph.lint()
                module.recompile()
                self.calls += sum(node.target is _OP for node in module.graph.nodes)
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
                torch._dynamo.mark_dynamic(one, 2 if program.layout == "bhtd" else 1)
        assert_same(results(compiled, x, training), results(program.fn, x, training))
    return backend


training = pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
positives = pytest.mark.parametrize("name", POSITIVES)
near_misses = pytest.mark.parametrize("name", NEAR_MISSES)


def test_the_corpus_is_large() -> None:
    assert len(POSITIVES) >= 25
    assert len(NEAR_MISSES) >= 40


@training
@positives
def test_positive(name: str, training: bool) -> None:
    backend = run(POSITIVES[name], training)
    assert [site.matched for site in backend.sites] == [True], backend.sites
    assert backend.calls == 1


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if i % 6 == 0 else pytest.mark.slow) for i, n in enumerate(POSITIVES)]
)
def test_positive_of_dynamic_length(name: str) -> None:
    program = POSITIVES[name]
    backend = run(program, True, (72, 100))
    assert [site.matched for site in backend.sites] == [not program.static_only] * len(backend.sites), backend.sites
    assert len(backend.sites) == (2 if program.static_only else 1)  # one compilation for both lengths


@training
@near_misses
def test_near_miss(name: str, training: bool) -> None:
    program = NEAR_MISSES[name]
    backend = run(program, training)
    assert not any(site.matched for site in backend.sites), backend.sites
    assert backend.calls == 0
    assert backend.sites
    for site in backend.sites:
        assert re.search("|".join(map(re.escape, program.reason.split("|"))), site.reason), site.reason
        assert site.where is not None
        assert "near_misses.py" in site.where


@pytest.mark.slow
@near_misses
def test_near_miss_of_dynamic_length(name: str) -> None:
    backend = run(NEAR_MISSES[name], True, (72, 80))
    assert not any(site.matched for site in backend.sites), backend.sites


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if i % 6 == 1 else pytest.mark.slow) for i, n in enumerate(POSITIVES)]
)
def test_one_sequence(name: str) -> None:
    """Axes of size 1 have no index."""
    assert all(site.matched for site in run(POSITIVES[name], False, batch=1).sites)
