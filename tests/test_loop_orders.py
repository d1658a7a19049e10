"""Loop orders are a table: one more is its entries, and everything that chooses, explains or expands goes along."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from programs import gated
from torch import Tensor
from torch._subclasses import FakeTensorMode

import fsa_compile
from fsa_compile import cost, lowering
from fsa_compile.cost import choice as choices
from fsa_compile.ops.selected import choice as choice_module
from fsa_compile.ops.selected import orders
from fsa_compile.testing.fake_gpu import Harness

explain_module = importlib.import_module("fsa_compile.explain")

PROBLEM = cost.Problem(1, 65536, 65536, 4, 4, 128, 128, 64, 16, 2)
H200 = cost.DEVICES["H200"]


def forget() -> None:
    for cached in (choices._totals, choices._terms, choices.choose):
        cached.cache_clear()


@pytest.fixture(params=[0.5, 2.0], ids=["fast", "slow"])
def half(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[float]:
    """A third order, "third": the query-outer one at so many times the price."""
    nsa = cost.ORDERS["nsa"]

    def dearer(p):  # a pass
        return replace(p, flops=p.flops * request.param, l2_bytes=p.l2_bytes * request.param)

    third = replace(nsa, forward=tuple(map(dearer, nsa.forward)), backward=tuple(map(dearer, nsa.backward)))
    monkeypatch.setitem(cost.LOOP_ORDERS, "third", "query-outer once more")
    monkeypatch.setitem(cost.ORDERS, "third", third)
    monkeypatch.setitem(orders.ORDERS, "third", orders.ORDERS["nsa"])
    forget()
    yield request.param
    monkeypatch.undo()
    forget()


def test_every_order_has_a_price_and_a_way_to_run() -> None:
    assert set(cost.LOOP_ORDERS) == set(cost.ORDERS) == set(orders.ORDERS)


def test_the_choice_is_among_all(half: float) -> None:
    for group in (1, 4, 16):
        choice = cost.choose(replace(PROBLEM, gqa_group_size=group), H200)
        assert set(choice.costs) == set(cost.LOOP_ORDERS)
        assert choice.order == min(choice.costs, key=choice.costs.__getitem__)
        others = [seconds for order, seconds in choice.costs.items() if order != choice.order]
        assert choice.speedup == min(others) / choice.costs[choice.order]
    large = cost.choose(replace(PROBLEM, gqa_group_size=32), H200)
    assert (large.order == "third") == (half < 1)
    assert ("query-outer once more" in large.reason) == (half < 1)
    assert cost.breakdown(PROBLEM, H200, "third")[0].name == "query-outer"


def test_an_order_that_does_not_fit_gives_way_to_the_best_that_does(half: float) -> None:
    small = replace(H200, memory=4e9, name="small")
    choice = cost.choose(replace(PROBLEM, seq_len=1 << 19, gqa_group_size=1), small)
    assert "fsa would need" in choice.reason
    assert choice.order == min(("nsa", "tile", "third"), key=choice.costs.__getitem__)


def test_explain_has_a_column_for_it(half: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def selected(q: Tensor, k: Tensor, block_indices: Tensor) -> Tensor:
        return fsa_compile.selected_attention(q, k, k, block_indices, loop_order="third")[0]

    monkeypatch.setattr(choice_module, "device_of", lambda tensor: H200)
    with torch.no_grad(), FakeTensorMode():
        q, k = (torch.empty(1, 65536, heads, 128, dtype=torch.bfloat16, device="cuda") for heads in (16, 4))
        blocks = torch.empty(1, 65536, 4, 16, dtype=torch.int32, device="cuda")
        result = explain_module.explain(selected, q, k, blocks)
    (site,) = result.sites
    assert (site.loop_order, set(site.costs)) == ("third", set(cost.LOOP_ORDERS))
    assert ", third: predicted times" in str(result)


def test_the_pass_expands_it(half: float) -> None:
    harness = Harness()
    q, k = (harness.tensor(1, 1024, heads, 64) for heads in (8, 2))
    blocks = harness.tensor(1, 1024, 2, 16, dtype=torch.int32)
    gate = harness.tensor(1, 1024, 8)
    with lowering.collect_sites() as sites:
        code = harness.emit(gated("third"), q, k, k, blocks, q, q, gate, gate, gate)
    assert [(site.matched, site.loop_order) for site in sites] == [(True, "third")]
    assert "fwd_query_outer" in code
