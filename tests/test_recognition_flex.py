"""FlexAttention whose mask_mod reads block ids becomes an operator where its block tables are those of the mask_mod.

On the CPU it has no backward, and results are compared with what it gives without a compiler, which takes no notice of
block tables: near misses that differ in them are told by what is said of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from corpus import BLOCK, Program, make_inputs
from corpus.flex import (
    FLEX_NEAR_MISSES,
    FLEX_POSITIVES,
    attend,
    flex_of_compared_ids,
    flex_of_scattered_blocks,
    of_blocks,
    scattered,
)
from corpus.positives import causal
from test_recognition import Captured, _clean, assert_same, results, run, some
from torch import Tensor, fx
from torch._inductor import config
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

import fsa_compile
from fsa_compile import lowering
from fsa_compile.lowering.recognise import flex, recognise_graph
from fsa_compile.lowering.recognise.evaluate import NotUnderstood

assert _clean  # a fixture that is used by all tests here

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
LENGTHS = 72, 100


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", FLEX_POSITIVES)
def test_positive(name: str) -> None:
    backend = run(FLEX_POSITIVES[name], False)
    assert [site.matched for site in backend.sites] == [True], backend.sites
    assert backend.found.count(FLEX_POSITIVES[name].op) == 1


@pytest.mark.parametrize("name", FLEX_NEAR_MISSES)
def test_near_miss(name: str) -> None:
    program = FLEX_NEAR_MISSES[name]
    backend = run(program, False)
    assert [(site.op, site.matched) for site in backend.sites] == [("flex_attention", False)]
    assert backend.calls == 0
    (site,) = backend.sites
    assert re.search("|".join(map(re.escape, program.reason.split("|"))), site.reason), site.reason
    assert site.where is not None
    assert "corpus/flex.py" in site.where


@some(FLEX_POSITIVES, by_default=6, slow=1)
def test_positive_of_dynamic_length(name: str) -> None:
    program = FLEX_POSITIVES[name]
    backend = run(program, False, LENGTHS)
    assert [site.matched for site in backend.sites] == [not program.static_only] * len(backend.sites), backend.sites
    assert program.static_only or len(backend.sites) == 1  # one compilation for both lengths


@some(FLEX_NEAR_MISSES, by_default=9, slow=2)
def test_near_miss_of_dynamic_length(name: str) -> None:
    assert not any(site.matched for site in run(FLEX_NEAR_MISSES[name], False, LENGTHS).sites)


@some(FLEX_POSITIVES, by_default=6, slow=2)
def test_one_sequence(name: str) -> None:
    assert all(site.matched for site in run(FLEX_POSITIVES[name], False, batch=1).sites)


def test_rows_without_a_key_are_zero() -> None:
    x = make_inputs(Program("", flex_of_scattered_blocks), 72, requires_grad=False, seed=3)
    backend = Captured()
    got = torch.compile(flex_of_scattered_blocks, backend=backend, fullgraph=True)(*x)
    want = flex_of_scattered_blocks(*x)
    empty = (want == 0).all(-1)
    assert backend.calls == 1
    assert empty.any()
    assert not empty.all()
    assert not got[empty].any()


def test_a_block_mask_from_outside_is_told_what_to_do() -> None:
    q, k, v, ids = make_inputs(Program("", flex_of_scattered_blocks), 72, requires_grad=False)
    mask_mod = of_blocks(scattered(ids, 72), 2)
    made = create_block_mask(mask_mod, 2, 4, 72, 72, device="cpu", BLOCK_SIZE=32)

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, block_mask=made, enable_gqa=True)

    backend = Captured()
    got = torch.compile(fn, backend=backend, fullgraph=True)(q, k, v)
    torch.testing.assert_close(got, fn(q, k, v))
    (site,) = backend.sites
    assert not site.matched
    assert "call create_block_mask inside of it" in site.reason
    (site,) = fsa_compile.explain(fn, q, k, v).sites
    assert "call create_block_mask inside of it" in site.reason


def test_explain_shows_what_was_recognised() -> None:
    x = make_inputs(Program("", flex_of_scattered_blocks), 72, requires_grad=False)
    (site,) = fsa_compile.explain(flex_of_scattered_blocks, *x).sites
    assert site.op == "fsa::selected_attention"
    assert site.where is not None
    assert "corpus/flex.py" in site.where


def test_two_layers_share_a_block_mask() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        mask_mod = of_blocks(scattered(ids, q.shape[2]), 2)
        made = create_block_mask(mask_mod, 2, 4, q.shape[2], q.shape[2], device=q.device, BLOCK_SIZE=32)
        first = flex_attention(q, k, v, block_mask=made, enable_gqa=True)
        return flex_attention(q, k, first[:, ::2], block_mask=made, enable_gqa=True)

    x = make_inputs(Program("", fn), 72, requires_grad=False)
    backend = Captured()
    got = torch.compile(fn, backend=backend, fullgraph=True)(*x)
    assert backend.calls == 2, backend.sites
    torch.testing.assert_close(got, fn(*x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lower", [False, True])
def test_autocast(lower: bool) -> None:
    """Operands that autocast casts, and under bfloat16 operands that it need not."""

    def fn(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return flex_of_scattered_blocks(q, k, v, ids)

    x = [
        one.bfloat16() if lower and one.is_floating_point() else one
        for one in make_inputs(Program("", fn), 72, requires_grad=False)
    ]
    backend = Captured()
    got, want = torch.compile(fn, backend=backend, fullgraph=True)(*x), fn(*x)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got.float(), want.float(), atol=2e-2, rtol=2e-2)
    assert backend.calls == 1, backend.sites


@pytest.mark.parametrize("what", ["blocks", "window", "other ids"])
def test_a_block_mask_of_outside_of_a_checkpoint(what: str) -> None:
    """Made once, in the compiled function; inside of what is checkpointed, the compiler itself refuses to make one."""

    def fn(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        t, selected = q.shape[2], scattered(ids, q.shape[2])
        mask_mod = (lambda b, h, i, j: (i >= j) & (i - j < 20)) if what == "window" else of_blocks(selected, 2)
        made = create_block_mask(mask_mod, 2, 4, t, t, device=q.device, BLOCK_SIZE=32)
        if what == "other ids":
            made.mask_mod = of_blocks(selected.roll(1, 0), 2)

        def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return flex_attention(2 * q, k, v, block_mask=made, enable_gqa=True)

        return checkpoint(layer, q, k, checkpoint(layer, q, k, v, use_reentrant=False)[:, ::2], use_reentrant=False)

    x = make_inputs(Program("", fn), 72, requires_grad=False)
    backend = Captured()
    got = torch.compile(fn, backend=backend, fullgraph=True)(*x)
    torch.testing.assert_close(got, fn(*x), atol=1e-5, rtol=1e-5)
    assert backend.calls == (0 if what == "other ids" else 2), backend.sites
    if what == "other ids":
        assert all("what create_block_mask makes of its mask_mod" in site.reason for site in backend.sites[-2:])


def test_what_goes_wrong_inside_leaves_vmap_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("broken on purpose")

    def graph_of(backend: Callable[..., Any]) -> None:
        x = make_inputs(Program("", flex_of_scattered_blocks), 72, requires_grad=False)
        torch.compile(flex_of_scattered_blocks, backend=backend, fullgraph=True)(*x)

    before: list[str] = []
    after: list[str] = []

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        before.append(str(gm.graph))
        (site,) = recognise_graph(gm.graph)
        after.append(str(gm.graph))
        assert "broken on purpose" in site.reason
        assert torch._C._functorch.maybe_current_level() is None
        return gm.forward

    for name in ("create_block_mask", "create_mask", "_numbered"):
        torch._dynamo.reset()
        with monkeypatch.context() as patch:
            patch.setattr(flex, name, broken)
            graph_of(backend)
    assert before == after
    assert len(before) == 3


@pytest.mark.parametrize("name", ["flex_of_scattered_blocks", "flex_of_token_mask", "flex_of_window"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_training(name: str, dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured as a device shows it that has a backward; gradients are those of the mask without FlexAttention."""
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda q, k, v: None)

    def reference(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        t = q.shape[2]
        i = torch.arange(t)
        mask = i[:, None] >= i
        chosen = scattered(ids, t).repeat_interleave(BLOCK, -1)[..., :t].repeat_interleave(2, 1)
        mask = mask & (i[:, None] - i < 20) if name == "flex_of_window" else mask & chosen
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)

    backend = Captured()
    with torch.enable_grad():
        compiled = torch.compile(FLEX_POSITIVES[name].fn, backend=backend, fullgraph=True)
        for length in LENGTHS if dynamic else LENGTHS[:1]:
            x = make_inputs(FLEX_POSITIVES[name], length, requires_grad=True)
            for one in x if dynamic else ():
                torch._dynamo.maybe_mark_dynamic(one, 2)
            assert_same(results(compiled, x, True), results(reference, x, True))
    assert [site.matched for site in backend.sites] == [True], backend.sites


def test_whole_compiler() -> None:
    x = make_inputs(Program("", flex_of_compared_ids), 72, requires_grad=False)
    with config.patch(force_disable_caches=True), lowering.collect_sites() as sites:
        got = torch.compile(flex_of_compared_ids, fullgraph=True)(*x)
    assert_same([got], [flex_of_compared_ids(*x)])
    found = {site.op: site for site in sites}
    assert found["flex_attention"].matched
    assert "fsa::selected_attention" in found


def test_no_mask_is_left() -> None:
    """Of tokens by tokens, once what nobody uses is gone."""
    from torch._dynamo.backends.common import aot_autograd

    length = 72
    sizes: list[int] = []

    def compiler(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        values = (node.meta.get("val") for node in gm.graph.nodes)
        sizes.extend(x.numel() for x in values if isinstance(x, torch.Tensor))
        return gm.forward

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        inner = Captured()(gm, example_inputs)
        assert inner is not None
        return aot_autograd(fw_compiler=compiler)(gm, example_inputs)

    x = make_inputs(Program("", flex_of_scattered_blocks), length, requires_grad=False)
    got = torch.compile(flex_of_scattered_blocks, backend=backend, fullgraph=True)(*x)
    torch.testing.assert_close(got, flex_of_scattered_blocks(*x), atol=1e-5, rtol=1e-5)
    assert sizes
    assert max(sizes) < 2 * 4 * length * length


def test_many_ids() -> None:
    """A mask_mod that takes a size besides its ids."""

    def fn(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        t, group = q.shape[2], q.shape[1] // k.shape[1]
        selected = scattered(ids, t)
        return attend(q, k, v, lambda b, h, i, j: selected[b, h // group, i, j // 16] & (i >= j) & (j < t))

    backend = run(Program("fn", fn), False, LENGTHS)
    assert [site.matched for site in backend.sites] == [True], backend.sites


@pytest.mark.parametrize("writes", [False, True])
def test_vmap_beside_plain_attention(writes: bool) -> None:
    """What it writes to is told, be it a tensor of its own or the mask."""

    def fn(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        chosen = scattered(ids, q.shape[2])
        if writes:
            torch.vmap(lambda one: one.logical_not_())(chosen)
        ones = torch.vmap(lambda row: torch.zeros_like(row).add_(1))(q)
        mask = chosen.repeat_interleave(BLOCK, -1)[..., : q.shape[2]] & causal(q.shape[2])
        return F.scaled_dot_product_attention(q * ones, k, v, mask.repeat_interleave(2, 1), enable_gqa=True)

    x = make_inputs(Program("", fn), 72, requires_grad=False)
    backend = Captured()
    assert_same([torch.compile(fn, backend=backend, fullgraph=True)(*x)], [fn(*x)])
    assert [site.matched for site in backend.sites] == [not writes], backend.sites


def test_only_the_same_operators_of_the_same_operands_are_computed_once() -> None:
    x, y = torch.ones(3, 4), torch.ones(3, 4)
    with flex._Once():
        assert x.sum(0) is x.sum(0)
        assert x.t().sum(0) is x.t().sum(0)
        assert x.t() is not x.t()  # two views
        different = [
            x.sum(0), x.sum(1), y.sum(0), x.sum(0, keepdim=True), x.t().sum(0), x[1:].sum(0), x[:2].sum(0),
            x.sum(0, dtype=torch.float64), x + 1, x + 1.0, x + True, x.sin(), x.sin().sin(), x.cos(),
        ]  # fmt: skip
        assert len({id(one) for one in different}) == len(different)
        assert x.bernoulli() is not x.bernoulli()
        assert torch.empty(2) is not torch.empty(2)
        with pytest.raises(NotUnderstood, match="not functional"):
            x.add_(1)


def test_what_is_computed_once_may_be_written_to_where_writes_are_functional() -> None:
    def run(x: Tensor, at: Tensor) -> list[Tensor]:
        first, second = x.sum(0), x.sum(0)
        first.add_(1)
        before = x.index_select(0, at)
        at.add_(1)
        x[1, 0] = 5
        return [first, second, before, x.index_select(0, at)]

    def once(x: Tensor, at: Tensor) -> list[Tensor]:
        with flex._Once():
            return run(x, at)

    x, at = torch.ones(3, 4), torch.tensor([0])
    got = torch.func.functionalize(once, remove="mutations")(x.clone(), at.clone())
    for one, expected in zip(got, run(x, at), strict=True):
        assert torch.equal(one, expected)


@pytest.mark.parametrize("enabled", [True, False])
def test_fake_tensors_keep_results_again(enabled: bool) -> None:
    """As they did before, whether a call is replaced or not."""
    found: list[bool] = []

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        mode = next(node.meta["example_value"].fake_mode for node in gm.graph.nodes if node.name.startswith("l_q"))
        with mock.patch.object(mode, "cache_enabled", enabled):
            (site,) = recognise_graph(gm.graph)
            found.append(site.matched)
            assert mode.cache_enabled == enabled
        return gm.forward

    for program in (FLEX_POSITIVES["flex_of_window"], FLEX_NEAR_MISSES["flex_only_causal"]):
        x = make_inputs(program, 72, requires_grad=False)
        torch.compile(program.fn, backend=backend, fullgraph=True)(*x)
    assert found == [True, False]
