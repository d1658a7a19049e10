"""Masks that are made outside of the checkpointed function that attends."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from corpus import BLOCK, NEAR_MISSES, POSITIVES, Program, make_inputs
from corpus.near_misses import chosen_tokens
from corpus.positives import causal
from test_recognition import Captured, _clean, assert_same, block_attention, results, run, some
from torch import Tensor, fx
from torch._inductor import config
from torch.utils.checkpoint import checkpoint

import fsa_compile
from fsa_compile import lowering
from fsa_compile.lowering.recognise import recognise_graph

__all__ = ["_clean"]

_sdpa = F.scaled_dot_product_attention


def checkpointed(fn: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    return checkpoint(fn, *args, use_reentrant=False, **kwargs)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return _sdpa(q, k, v, mask, enable_gqa=True)


def weigh(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return (q @ k.mT * 0.25).masked_fill(~mask, -math.inf).softmax(-1) @ v


def mask_of(q: Tensor, k: Tensor, ids: Tensor) -> Tensor:
    t = q.shape[2]
    return (chosen_tokens(ids, t) & causal(t)).repeat_interleave(q.shape[1] // k.shape[1], 1)


def check(fn: Callable[..., Tensor], training: bool = True, lengths: tuple[int, ...] = ()) -> Captured:
    return run(Program("", fn, empty_rows=False), training, lengths)


def calls_the_operator(programs: dict[str, Program]) -> dict[str, Program]:
    """Those that call SDPA once."""
    found = {name: x for name, x in programs.items() if "sdpa" in x.fn.__code__.co_names or "sdpa" in name}
    return {name: x for name, x in found.items() if not x.selects}  # that rests on the topk, which is outside


@pytest.fixture
def sdpa_under_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every program of the corpus checkpoint its attention, and nothing else."""

    def call(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *rest: Any, **options: Any) -> Tensor:
        return checkpoint(
            lambda q, k, v, m: _sdpa(q, k, v, m, *rest, **options), q, k, v, attn_mask, use_reentrant=False
        )

    monkeypatch.setattr(F, "scaled_dot_product_attention", call)


@pytest.mark.usefixtures("sdpa_under_checkpoint")
@some(calls_the_operator(POSITIVES), by_default=4, slow=1)
def test_positive_whose_attention_is_checkpointed(name: str) -> None:
    backend = run(POSITIVES[name], True)
    assert [site.matched for site in backend.sites] == [True], backend.sites
    assert backend.found.count(POSITIVES[name].op) == 1


@pytest.mark.usefixtures("sdpa_under_checkpoint")
@some(calls_the_operator(NEAR_MISSES), by_default=4, slow=1)
def test_near_miss_whose_attention_is_checkpointed(name: str) -> None:
    backend = run(NEAR_MISSES[name], True)
    assert backend.calls == 0
    assert [site.matched for site in backend.sites] == [False], backend.sites


@pytest.mark.parametrize("function", [attend, weigh])
@pytest.mark.parametrize("lengths", [(), (72, 100)], ids=["static", "dynamic"])
def test_layers_that_share_a_mask(function: Callable[..., Tensor], lengths: tuple[int, ...]) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        mask = mask_of(q, k, ids)
        for _ in range(2):
            q = q + checkpointed(function, q, k, v, mask)
        return q

    backend = check(fn, True, lengths)
    assert backend.calls == 2
    assert [site.matched for site in backend.sites] == [True, True], backend.sites


def test_blocks_that_are_expanded_inside() -> None:
    def inside(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, past: Tensor) -> Tensor:
        mask = chosen.repeat_interleave(BLOCK, -1)[..., : q.shape[2]] & past
        return attend(q, k, v, mask.repeat_interleave(2, 1))

    def fn(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        t = q.shape[2]
        chosen = torch.zeros(*ids.shape[:-1], -(-t // BLOCK), dtype=torch.bool)
        chosen.scatter_(-1, ids, True)
        return checkpointed(inside, q, k, v, chosen, causal(t))

    assert check(fn).calls == 1


def test_writes_before_and_after() -> None:
    """What counts is what the mask holds when it is given."""

    def fn(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        mask = mask_of(q, k, ids).clone()
        first = checkpointed(attend, q, k, v, mask)
        mask[..., 0] = True
        return first + checkpointed(attend, q, k, v, mask)

    backend = Captured()
    x = make_inputs(Program("", fn), 72, requires_grad=False)
    assert_same(results(torch.compile(fn, backend=backend, fullgraph=True), x, False), results(fn, x, False))
    assert [site.matched for site in backend.sites] == [True, False], backend.sites


def test_ids_that_are_written_to_in_between_stay() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        ids = ids.sin().abs().long()
        mask = mask_of(q, k, ids)
        ids.add_(1)
        return checkpointed(attend, q, k, v, mask) + ids.sum()

    check(fn)


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_masks_that_are_not_what_they_seem(rate: float) -> None:
    """A bias with a gradient, and one that is dropped: inputs stay inputs, and random numbers are drawn once."""

    def biased(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
        return attend(q, k, v, torch.where(mask, bias, -math.inf))

    def fn(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        bias = F.dropout(q.sum((1, 3)), rate)[:, None, :, None] * 0.1
        return checkpointed(biased, q, k, v, mask_of(q, k, ids) | torch.eye(q.shape[2], dtype=torch.bool), bias)

    assert check(fn).calls == 0


def test_one_body_under_autocast() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        mask = mask_of(q, k, ids)
        with torch.autocast("cpu", torch.bfloat16):
            return checkpointed(attend, q, k, v, mask).float()

    x = make_inputs(Program("", fn), 72, requires_grad=True)
    got, want = (results(f, x, True) for f in (torch.compile(fn, backend=Captured(), fullgraph=True), fn))
    assert_same(got, want, 5e-2)


def test_a_body_that_is_not_replaced_is_as_before() -> None:
    def wrong(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return (q @ k.repeat_interleave(2, 1).mT).masked_fill(~mask, -1e9).softmax(-1) @ v.repeat_interleave(2, 1)

    def fn(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        return checkpointed(wrong, q, k, v, mask_of(q, k, ids))

    graphs: list[list[str]] = []

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        inner = [m for m in gm.modules() if isinstance(m, fx.GraphModule)]
        graphs.append([str(m.graph) for m in inner])
        (site,) = [site for m in inner for site in recognise_graph(m.graph)]
        assert "-1e+09" in site.reason  # not that its mask is an input
        graphs.append([str(m.graph) for m in inner])
        return gm.forward

    torch.compile(fn, backend=backend, fullgraph=True)(*make_inputs(Program("", fn), 72, requires_grad=True))
    assert len(graphs[0]) == 2
    assert graphs[0] == graphs[1]


def test_what_is_said_is_said_once() -> None:
    """The compiler shows the graph of what is checkpointed first, where its mask is an input."""

    def fn(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        return checkpointed(attend, q, k, v, mask_of(q, k, ids))

    x = make_inputs(Program("", fn), 72, requires_grad=True)
    with config.patch(force_disable_caches=True), lowering.collect_sites() as sites:
        assert_same(results(torch.compile(fn, fullgraph=True), x, True), results(fn, x, True))
    (site,) = [site for site in sites if not site.op.startswith("fsa::")]
    assert site.matched
    (site,) = fsa_compile.explain(fn, *x).sites
    assert site.op == "fsa::selected_attention"


def test_what_goes_wrong_outside_leaves_the_graph_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from fsa_compile.lowering.recognise import checkpoints

    def broken(*args: Any) -> Any:
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(checkpoints, "Graph", broken)

    def fn(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        return checkpointed(block_attention, q, k, v, ids) + checkpointed(attend, q, k, v, mask_of(q, k, ids))

    backend = check(fn)
    assert sorted(site.matched for site in backend.sites) == [False, True]  # the first needs nothing from outside
