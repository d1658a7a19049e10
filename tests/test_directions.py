"""A forward and its backward have a loop order each, in the model, in compiled graphs and in the report."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import fsa_compile
from fsa_compile import cost, lowering
from fsa_compile.calibrate import report
from fsa_compile.calibrate.grid import Measurement
from fsa_compile.ops.selected import choice as choice_module
from fsa_compile.testing.fake_gpu import Harness

explain = importlib.import_module("fsa_compile.explain").explain
fsa = torch.ops.fsa

H100 = cost.DEVICES["H100"]
# Measured there: 0.86 ms in query tiles for 1.31, and backward 1.78 with keys outside for 2.04.
PROBLEM = cost.Problem(1, 8192, 8192, 4, 8, 128, 128, 64, 16, 2, cost.LIKELY_AGREEMENT)
FORWARD = {"training": True}
BACKWARD = {"backward": True}


@pytest.fixture(autouse=True)
def _on_an_h100(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(choice_module, "device_of", lambda tensor: H100)
    lowering.enable()
    yield
    lowering.enable()


# ---------------------------------------------------------------------------------------------------------- the model


def test_the_best_of_each_is_chosen() -> None:
    assert [cost.choose(PROBLEM, H100, **how).order for how in ({}, FORWARD, BACKWARD)] == ["tile", "tile", "fsa"]


def test_a_trained_forward_leaves_the_lists_to_its_backward() -> None:
    for order in cost.LOOP_ORDERS:
        passes = cost.breakdown(PROBLEM, H100, order)
        lists = {p.direction: p.seconds for p in passes if p.name == "lists"}
        assert ("forward" in lists, "backward" in lists) == (order == "fsa", True)
        alone, trained = (cost.choose(PROBLEM, H100, **how).costs[order] for how in ({}, FORWARD))
        assert trained == pytest.approx(alone - lists.get("forward", 0.0))
        assert cost.seconds(PROBLEM, H100)[order, "trained forward"] == trained


def test_what_it_leaves_is_what_every_backward_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by name: beside an order whose backward does without lists, nobody's are for nothing."""
    fsa, nsa = cost.ORDERS["fsa"], cost.ORDERS["nsa"]
    assert [p.name for p in set(fsa.forward) - set(fsa.passes("trained forward"))] == ["lists"]
    without = replace(nsa, backward=tuple(p for p in nsa.backward if p.name != "lists"))
    monkeypatch.setitem(cost.ORDERS, "nsa", without)
    assert fsa.passes("trained forward") == fsa.forward


def test_choices_are_judged_by_direction() -> None:
    times = {("fsa", "forward"): 9.0, ("tile", "forward"): 7.0, ("fsa", "backward"): 8.0, ("tile", "backward"): 9.0}
    lists = {("", "lists"): 3.0}

    def judged(times: dict[tuple[str, str], float]) -> dict[str, report.Judgement]:
        measured = [Measurement(PROBLEM, True, *key, ms / 1e3) for key, ms in times.items()]
        return {j.stage: j for j in report.judge(H100, measured)}

    found = judged(times | lists)
    assert {s: (j.chosen, j.best) for s, j in found.items()} == {
        "forward": ("tile", "tile"), "trained forward": ("tile", "fsa"), "backward": ("fsa", "fsa")
    }  # fmt: skip
    assert found["trained forward"].times == pytest.approx({"fsa": 6e-3, "tile": 7e-3})
    assert found["trained forward"].slower == pytest.approx(1 / 6)
    # Without a time of theirs nothing is taken off.
    assert judged(times)["trained forward"].times == found["forward"].times


# --------------------------------------------------------------------------------------------------------- the graph


@pytest.mark.parametrize("asked", ["auto", *cost.LOOP_ORDERS])
def test_a_graph_has_both(asked: str) -> None:
    """The kernels of one order's forward and of another's backward, unless one is asked for."""

    def fn(q: Tensor, k: Tensor, block_indices: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        results = fsa.selected_attention_forward(q, k, k, block_indices, loop_order=asked)
        tensors = (q, k, k, block_indices, *results)
        return results[0], *fsa.selected_attention_backward(grad, None, *tensors, loop_order=asked)

    harness = Harness()
    q, k, grad = (harness.tensor(1, 8192, heads, 128) for heads in (32, 4, 32))
    with lowering.collect_sites() as sites:
        harness.emit(fn, q, k, harness.tensor(1, 8192, 4, 16, dtype=torch.int32), grad)
    assert harness.graph is not None
    made = {str(n.target) for n in harness.graph.nodes}
    forward, backward = ("tile", "fsa") if asked == "auto" else (asked, asked)
    assert [s.loop_order for s in sites] == [forward, backward]
    kernels = {"nsa": ["query_outer"], "fsa": ["kv_outer"], "tile": ["union"], "mixed": ["union", "kv_outer"]}
    of_forward = {f"fsa._selected_fwd_{kernel}.default" for kernel in kernels[forward]}
    assert {name for name in made if "_selected_fwd" in name} == of_forward
    of_backward = {f"fsa._selected_bwd_{kernels[order][-1]}.default" for order in ("fsa", backward)}
    assert {name for name in made if "_selected_bwd" in name} == of_backward
    assert any("_sum_partials" in name for name in made) == (backward in ("fsa", "mixed"))


# -------------------------------------------------------------------------------------------------------- the report


def selected(q: Tensor, k: Tensor, block_indices: Tensor, order: str = "auto") -> Tensor:
    return fsa_compile.selected_attention(q, k, k, block_indices, block_size=16, loop_order=order)[0]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, ...]:
    """Arguments that can be run here, and that are taken for ``PROBLEM``'s."""
    monkeypatch.setattr(choice_module, "problem_of", lambda *args: PROBLEM)
    blocks = torch.zeros(1, 48, 1, 2, dtype=torch.int32)
    return torch.randn(1, 48, 2, 16, requires_grad=True), torch.randn(1, 48, 1, 16), blocks


def test_a_trained_site_shows_both(small: tuple[Tensor, ...]) -> None:
    found = explain(selected, *small)
    (site,) = found.sites
    choices = [cost.choose(PROBLEM, H100, **how) for how in (FORWARD, BACKWARD)]
    assert (site.loop_order, site.backward_order) == ("tile", "fsa")
    assert [site.costs, site.backward_costs] == [choice.costs for choice in choices]
    assert site.reason.endswith("; ".join(choice.reason for choice in choices))
    assert "tile (query-tile) forward of a training step is predicted at" in site.reason
    assert "fsa (KV-outer) backward is predicted at" in site.reason
    text = str(found).splitlines()
    first = next(i for i, line in enumerate(text) if "fsa::selected_attention" in line)
    for line, order, choice in zip(text[first:], ("forward tile", "backward fsa"), choices, strict=False):
        before, after = line.split(order)
        times = [cost.format_seconds(choice.costs[name]) for name in cost.LOOP_ORDERS]
        assert after.split() == [*" ".join(times).split(), f"{choice.speedup:.1f}x"]
        assert bool(before.strip()) == (order == "forward tile")
    assert any("the lists that both may use are counted to the backward" in line for line in text)


def test_a_site_that_is_not_trained_shows_one(small: tuple[Tensor, ...]) -> None:
    with torch.no_grad():
        found = explain(selected, *small)
    (site,) = found.sites
    assert (site.loop_order, site.backward_order, site.backward_costs) == ("tile", None, {})
    assert site.costs == cost.choose(PROBLEM, H100).costs
    assert "backward" not in str(found)


def test_an_order_that_is_asked_for_is_that_of_both(small: tuple[Tensor, ...]) -> None:
    (site,) = explain(selected, *small, order="nsa").sites
    assert (site.loop_order, site.backward_order) == ("nsa", "nsa")
    assert site.reason.count('loop_order="nsa" was asked for') == 2
