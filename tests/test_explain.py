"""explain(): finds the sites, tells the lowering's choice and why a site is left alone, and never raises.

CUDA without a GPU: fake tensors, whose graphs run on no device.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import fsa_compile
from fsa_compile import cost, debug, lowering
from fsa_compile.ops.selected import choice as choice_module

explain_module = importlib.import_module("fsa_compile.explain")
explain = explain_module.explain

HERE = __file__
SMALL = {"block_size": 16, "num_selected": 4, "kernel_size": 16, "kernel_stride": 16, "window_size": 16}


def line_of(fn: Any, offset: int) -> str:
    return f"{HERE}:{fn.__code__.co_firstlineno + offset}"


class Nsa(torch.nn.Module):
    """One NSA layer with gates."""

    def __init__(self, group: int = 2, **options: Any) -> None:
        super().__init__()
        self.options = SMALL | options
        self.proj = torch.nn.Linear(32, 16 * (group + 2))
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.proj(x).unflatten(-1, (self.group + 2, 16))
        q, k, v = qkv.split((self.group, 1, 1), dim=2)
        g = torch.sigmoid(q.mean(-1))
        return fsa_compile.nsa_attention(q, k, v, g, g, g, **self.options)


SITE = line_of(Nsa.forward, 4)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 64, 32)


@pytest.fixture
def fake_cuda() -> Iterator[None]:
    # Without gradients: autograd of fake CUDA tensors aborts the process of a CPU-only build.
    was_enabled = lowering.is_enabled()
    lowering.enable()
    with torch.no_grad(), FakeTensorMode():
        yield
    if was_enabled:
        lowering.enable()
    else:
        lowering.disable()


def cuda_arguments(group: int = 4, seq_len: int = 65536) -> tuple[Tensor, Tensor, Tensor]:
    def make(heads: int) -> Tensor:
        return torch.empty(1, seq_len, heads, 128, device="cuda", dtype=torch.bfloat16)

    return make(4 * group), make(4), torch.empty(1, seq_len, 4, 16, dtype=torch.int32, device="cuda")


def selected(q: Tensor, k: Tensor, block_indices: Tensor, **options: Any) -> Tensor:
    return fsa_compile.selected_attention(q, k, k, block_indices, **options)[0]


SELECTED = line_of(selected, 1)

# ---------------------------------------------------------------------------------------------------------------- sites


def test_cpu_site_has_everything_but_a_match(x: Tensor) -> None:
    result = explain(Nsa(), x)
    (site,) = result.sites
    assert (result.errors, result.graph_breaks, result.num_graphs) == ([], [], 1)
    assert (site.op, site.matched, site.loop_order, site.where) == ("fsa::nsa_attention", False, "fsa", SITE)
    assert site.reason.startswith("runs on cpu, where the operator is called as it is; the CPU path is KV-outer")
    expected = cost.Problem(2, 64, 64, 1, 2, 16, 16, 16, 4, 4, cost.LIKELY_AGREEMENT)
    assert site.costs == cost.choose(expected, cost.DEVICES["cpu"], training=True).costs
    assert site.backward_order == "fsa"
    assert site.backward_costs == cost.choose(expected, cost.DEVICES["cpu"], backward=True).costs


def test_cuda_site_is_matched_with_the_lowerings_choice(fake_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice_module, "device_of", lambda tensor: cost.DEVICES["H200"])
    for group, order in ((1, "fsa"), (32, "tile")):
        arguments = cuda_arguments(group)
        (site,) = explain(selected, *arguments).sites
        problem = cost.Problem(1, 65536, 65536, 4, group, 128, 128, 64, 16, 2, cost.LIKELY_AGREEMENT)
        choice = cost.choose(problem, cost.DEVICES["H200"])
        assert (site.matched, site.loop_order, site.costs, site.reason) == (True, order, choice.costs, choice.reason)
        assert site.where == SELECTED


def test_a_whole_tells_its_stages(fake_cuda: None) -> None:
    q, k, _ = cuda_arguments()
    g = torch.empty(q.shape[:3], dtype=q.dtype, device="cuda")

    def whole(q: Tensor, k: Tensor, g: Tensor) -> Tensor:
        return fsa_compile.nsa_attention(q, k, k, g, g, g)

    (site,) = explain(whole, q, k, g).sites
    rest = ("compressed_attention", "select_blocks", "sliding_window_attention", "selected_attention")
    assert site.stages == ("mean_compress", "mean_compress", *rest)
    assert site.matched
    assert "mean_compress (2 times), compressed_attention, select_blocks," in str(explain(whole, q, k, g))


def test_every_stage_is_a_site_of_its_own(fake_cuda: None) -> None:
    q, k, _ = cuda_arguments()

    def stages(q: Tensor, k: Tensor) -> Tensor:
        k_cmp = fsa_compile.mean_compress(k)
        out, lse = fsa_compile.compressed_attention(q, k_cmp, k_cmp, seq_len_k=k.shape[1])
        blocks = fsa_compile.select_blocks(q, k_cmp, lse, seq_len_k=k.shape[1])
        window = fsa_compile.sliding_window_attention(q, k, k, window_size=512)[0]
        return out + window + selected(q, k, blocks)

    result = explain(stages, q, k)
    assert result.errors == []
    names = ["mean_compress", "compressed_attention", "select_blocks", "sliding_window_attention", "selected_attention"]
    assert [(s.op, s.matched, s.stages) for s in result.sites] == [(f"fsa::{n}", True, (n,)) for n in names]
    assert [s.loop_order is None for s in result.sites] == [True] * 4 + [False]
    assert [s.reason for s in result.sites[:4]] == ["its kernels run in one loop order"] * 4
    assert all(s.where.startswith(HERE) for s in result.sites if s.where)


def test_loop_order_is_taken_from_the_call(fake_cuda: None) -> None:
    for order in cost.LOOP_ORDERS:
        (site,) = explain(selected, *cuda_arguments(), loop_order=order).sites
        assert (site.matched, site.loop_order) == (True, order)
        assert "was asked for" in site.reason


def test_reason_when_the_lowering_is_off(fake_cuda: None) -> None:
    lowering.disable()
    (site,) = explain(selected, *cuda_arguments()).sites
    assert (site.matched, lowering.is_enabled()) == (False, False)
    assert site.reason.startswith("the lowering is switched off (fsa_compile.enable() switches it on); ")
    assert site.loop_order == min(site.costs, key=site.costs.__getitem__)


def test_reason_when_values_are_validated(fake_cuda: None) -> None:
    debug.validate(True)
    try:
        (site,) = explain(selected, *cuda_arguments()).sites
    finally:
        debug.validate(False)
    assert not site.matched
    assert site.reason.startswith("fsa_compile.debug validates values")


def test_reason_when_another_pass_took_the_slot(fake_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explain_module, "is_enabled", lambda: False)
    (site,) = explain(selected, *cuda_arguments()).sites
    assert not site.matched
    assert site.reason.startswith("another pass has taken the place")


def test_operators_called_directly_and_by_overload_are_found(x: Tensor) -> None:
    def two(q: Tensor) -> Tensor:
        a = torch.ops.fsa.nsa_attention(q, q, q, **SMALL)
        return a + torch.ops.fsa.nsa_attention.default(q, q, q, None, a.mean(-1), **SMALL)

    sites = explain(two, x.view(2, 64, 2, 16)).sites
    assert [s.op for s in sites] == ["fsa::nsa_attention"] * 2
    assert [s.where for s in sites] == [line_of(two, 1), line_of(two, 2)]


def test_autocast_counts_the_dtype_that_it_casts_to(x: Tensor) -> None:
    layer = Nsa().requires_grad_(False)

    def cast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    full, half = explain(layer, x).sites[0], explain(cast, x).sites[0]
    expected = cost.Problem(2, 64, 64, 1, 2, 16, 16, 16, 4, 2, cost.LIKELY_AGREEMENT)
    assert half.costs == cost.choose(expected, cost.DEVICES["cpu"]).costs != full.costs


def test_dynamic_lengths_use_their_hint_and_no_guard(x: Tensor) -> None:
    torch._dynamo.mark_dynamic(x, 1)
    static, dynamic = explain(Nsa(), torch.randn(2, 64, 32)), explain(Nsa(), x)
    assert not dynamic.errors
    assert dynamic.sites[0].costs == static.sites[0].costs


def test_checkpointed_layers_are_found(x: Tensor) -> None:
    from torch.utils.checkpoint import checkpoint

    layer = Nsa()
    result = explain(lambda x: checkpoint(layer, x, use_reentrant=False), x)
    assert [s.where for s in result.sites] == [SITE]


def test_a_compiled_model_is_explained_like_the_model(x: Tensor) -> None:
    model = Nsa()
    plain, compiled = explain(model, x), explain(torch.compile(model), x)
    assert plain.sites == compiled.sites
    assert explain(torch.compile(model.forward), x).sites == plain.sites


def test_every_layer_is_a_site(x: Tensor) -> None:
    class Stack(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(Nsa() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + layer(x).flatten(2)
            return x

    result = explain(Stack(), x)
    assert [s.where for s in result.sites] == [SITE] * 3
    assert (result.num_graphs, result.graph_breaks, result.errors) == (1, [], [])
    (row,) = (line for line in str(result).splitlines() if "fsa::nsa_attention" in line)  # one line for all
    assert row.split("fsa::nsa_attention")[1].split()[0] == "3"


# --------------------------------------------------------------------------------------------------- seen, not matched


def test_dense_attention_is_listed_as_left_alone(x: Tensor) -> None:
    def sdpa(x: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    def by_hand(x: Tensor) -> Tensor:
        p = torch.softmax(x @ x.transpose(1, 2), dim=-1)
        return torch.nn.functional.dropout(p, 0.1).to(x.dtype) @ x

    def by_method(x: Tensor) -> Tensor:
        return torch.bmm(x.bmm(x.mT).softmax(-1), x)

    for fn, op, offset in (
        (sdpa, "scaled_dot_product_attention", 1),
        (by_hand, "softmax, then matmul", 1),
        (by_method, "softmax, then matmul", 1),
    ):
        (site,) = explain(fn, x).sites
        assert (site.op, site.matched, site.loop_order, site.costs) == (op, False, None, {})
        assert site.reason.startswith("dense attention, not NSA")
        assert site.where == line_of(fn, offset)


def test_modules_of_torch_are_located_where_the_user_calls_them(x: Tensor) -> None:
    attention = torch.nn.MultiheadAttention(32, 2, batch_first=True)

    def call(x: Tensor) -> Tensor:
        return attention(x, x, x)[0]

    (site,) = explain(call, x).sites
    assert site.where == line_of(call, 1)
    assert site.reason.startswith("dense attention, not NSA")


def test_a_softmax_that_is_no_attention_is_not_listed(x: Tensor) -> None:
    assert explain(lambda x: torch.softmax(x, -1).sum(), x).sites == []


# ------------------------------------------------------------------------------------------------------- graph breaks


def test_graph_breaks_have_a_reason_and_a_place(x: Tensor) -> None:
    layer = Nsa()

    def broken(x: Tensor) -> Tensor:
        y = layer(x)
        torch._dynamo.graph_break()
        return layer(y.flatten(2))

    result = explain(broken, x)
    (only,) = result.graph_breaks
    assert "graph_break" in only.reason
    assert only.where == line_of(broken, 2)
    assert (len(result.sites), result.num_graphs, result.errors) == (2, 2, [])


def test_a_break_before_the_first_operation_is_told_every_time(x: Tensor) -> None:
    def broken(x: Tensor) -> Tensor:
        print(end="")
        return x + 1

    for _ in range(2):
        (only,) = explain(broken, x).graph_breaks
        assert "print" in only.reason


# ------------------------------------------------------------------------------------------------------- never raises


def test_a_bad_argument_is_reported_with_the_operators_own_words(x: Tensor) -> None:
    def bad(q: Tensor) -> Tensor:
        return fsa_compile.nsa_attention(q, q[:, :, :3], q[:, :, :3], **SMALL)

    result = explain(bad, torch.randn(1, 64, 4, 16))
    (error,) = result.errors
    assert "ValueError" in error
    assert "num_q_heads" in error
    assert "test_explain.py:" in error
    assert error in " ".join(str(result).split())


def test_a_model_that_raises_is_reported_with_what_was_found_before(x: Tensor) -> None:
    layer = Nsa()

    def fails(x: Tensor) -> Tensor:
        layer(x)
        torch._dynamo.graph_break()
        raise KeyError("not mine")

    result = explain(fails, x)
    assert len(result.sites) == 1
    assert any("KeyError" in e and "fails" in e for e in result.errors)


def test_a_site_that_cannot_be_read_is_reported(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("cannot size it")

    monkeypatch.setattr(choice_module, "problem_of", broken)
    (site,) = explain(Nsa(), x).sites
    assert (site.matched, site.reason) == (False, "could not be read: RuntimeError: cannot size it")
    assert site.where == SITE


def test_nothing_captured_is_said() -> None:
    (error,) = explain(lambda: 3).errors
    assert "captured nothing" in error


def test_random_state_and_compiled_functions_survive(x: Tensor) -> None:
    compiled = torch.compile(lambda x: x * 2, backend="eager")
    compiled(x)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    explain(lambda x: torch.nn.functional.dropout(x, 0.5), x)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(compiled(x), x * 2)


# ------------------------------------------------------------------------------------------------------------- report


def test_report_is_readable(fake_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice_module, "device_of", lambda tensor: cost.DEVICES["H200"])

    def model(q: Tensor, k: Tensor, block_indices: Tensor) -> Tensor:
        out = selected(q, k, block_indices)
        return out + torch.nn.functional.scaled_dot_product_attention(q, q, q)

    result = explain(model, *cuda_arguments())
    text = str(result)
    assert repr(result) == text
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= 120
    assert text.startswith("fsa_compile: 1 NSA site, 1 lowered to kernels; 1 graph, 0 graph breaks\n")
    (row,) = (line for line in text.splitlines() if "fsa::selected_attention" in line)
    problem = cost.Problem(1, 65536, 65536, 4, 4, 128, 128, 64, 16, 2, cost.LIKELY_AGREEMENT)
    choice = cost.choose(problem, cost.DEVICES["H200"])
    times = [cost.format_seconds(choice.costs[order]) for order in cost.LOOP_ORDERS]
    place = row.split("fsa::")[0].split()
    assert place[0] == "1"
    assert place[1].endswith(SELECTED.rsplit("/", 1)[-1])
    columns = [part.strip() for part in row.split("  ") if part.strip()]
    assert columns[3:] == ["1", "yes", choice.order, *times, f"{choice.speedup:.1f}x"]
    assert choice.reason in " ".join(text.split())
    assert "scaled_dot_product_attention: dense attention, not NSA" in text
    assert text.endswith("Graph breaks: none")


def test_report_lists_breaks_and_unlocated_sites() -> None:
    site = lowering.Site("fsa::nsa_attention", False, None, reason="could not be read: X")
    broken = explain_module.GraphBreak("because", "/somewhere/else/file.py:3")
    text = str(explain_module.Explanation([site], [broken], 2, ["an error"]))
    assert "1 NSA site, 0 lowered to kernels; 2 graphs, 1 graph break\n" in text
    assert "  1  else/file.py:3  because" in text
    assert "could not be read: X" in text
    assert text.endswith("Could not be explained\n  1  an error")
