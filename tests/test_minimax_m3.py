"""MiniMax-M3's text model from transformers, as it is: attention and indexer of its sparse layers are replaced."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_recognition import Captured
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

import fsa_compile
from fsa_compile.lowering.recognise import recognise_graph

pytest.importorskip("transformers", minversion="5.17")

from transformers.models.minimax_m3_vl.configuration_minimax_m3_vl import MiniMaxM3VLTextConfig
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLTextModel

_BLOCK, _LENGTH, _SPARSE = 16, 72, 2


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make_model(attention: str, **options: Any) -> torch.nn.Module:
    """A dense layer and two sparse ones; what its experts compute is not of interest here."""
    torch.manual_seed(0)
    layers = _SPARSE + 1
    sizes = {
        "vocab_size": 64, "hidden_size": 64, "num_hidden_layers": layers, "max_position_embeddings": 512,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rotary_dim": 8,
        "dense_intermediate_size": 32, "index_n_heads": 2, "index_head_dim": 16, "index_block_size": _BLOCK,
        "index_topk_blocks": 3, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    kinds = {
        "layer_types": ["full_attention"] + ["minimax_m3_sparse"] * _SPARSE,
        "mlp_layer_types": ["dense"] * layers,
        "attn_implementation": attention,
    }
    return MiniMaxM3VLTextModel(MiniMaxM3VLTextConfig(**{**sizes, **kinds, **options}))


def results(fn: Callable[..., Any], model: torch.nn.Module, training: bool, **inputs: Any) -> list[Tensor]:
    """The output and, in training, the gradients of all parameters; the indexer's have none."""
    model.zero_grad()
    with torch.set_grad_enabled(training):
        out = fn(**inputs).last_hidden_state
    if not training:
        return [out]
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def check(model: torch.nn.Module, training: bool, *calls: dict[str, Any]) -> Captured:
    """Compile, compare with the model itself, and look at what became of its attention."""
    model.train(training)
    backend = Captured()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for inputs in calls:
        got, want = results(compiled, model, training, **inputs), results(model, model, training, **inputs)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, atol=1e-5 * float(w.abs().max()), rtol=1e-4)
    return backend


def assert_replaced(backend: Captured, compilations: int = 1) -> None:
    expected = ([False] + [True] * _SPARSE) * compilations
    assert [site.matched for site in backend.sites] == expected, backend.sites
    assert "dense attention" in backend.sites[0].reason
    assert (backend.calls, backend.selections) == (_SPARSE * compilations, _SPARSE * compilations)


def tokens(length: int = _LENGTH, batch: int = 2) -> Tensor:
    return torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(length))


attentions = pytest.mark.parametrize("attention", ["sdpa", "eager"])


# Four of the eight ways show every pair of what they differ in; the others are slow.
WAYS = [
    pytest.param(
        attention, training, cache,
        marks=pytest.mark.slow if (attention == "eager") ^ training ^ cache else (),
        id="-".join([attention, "training" if training else "inference", "cache" if cache else "no_cache"]),
    )
    for attention in ("sdpa", "eager") for training in (False, True) for cache in (False, True)
]  # fmt: skip


@pytest.mark.parametrize(("attention", "training", "cache"), WAYS)
def test_every_sparse_layer_is_replaced(attention: str, training: bool, cache: bool) -> None:
    assert_replaced(check(make_model(attention), training, {"input_ids": tokens(), "use_cache": cache}))


@pytest.mark.slow
@attentions
def test_of_dynamic_length(attention: str) -> None:
    calls = [{"input_ids": tokens(length), "use_cache": False} for length in (72, 100, 160, 112)]
    for inputs in calls:
        torch._dynamo.mark_dynamic(inputs["input_ids"], 1)
    # The model itself asks whether there is anything to pad: lengths of whole blocks are compiled apart from others.
    assert_replaced(check(make_model(attention), True, *calls), compilations=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"index_local_blocks": 2}, {"index_topk_blocks": 16}, {"index_block_size": 32}, {"num_attention_heads": 8}],
    ids=lambda options: next(iter(options)),
)
def test_of_other_sizes(options: dict[str, int]) -> None:
    assert_replaced(check(make_model("sdpa", **options), True, {"input_ids": tokens(80, batch=1)}))


@attentions
def test_checkpointed_layers_are_replaced(attention: str) -> None:
    """The causal mask and the positions are made outside of them."""
    model = make_model(attention)
    model.gradient_checkpointing_enable()
    assert_replaced(check(model, True, {"input_ids": tokens(), "use_cache": False}))


def test_bfloat16_and_autocast() -> None:
    for model, enabled in ((make_model("eager").bfloat16(), False), (make_model("sdpa"), True)):
        torch._dynamo.reset()
        backend = Captured()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            torch.compile(model, backend=backend, fullgraph=True)(input_ids=tokens())
        assert_replaced(backend)


def test_what_may_leave_a_query_without_a_key_stays() -> None:
    padded = torch.ones(2, _LENGTH, dtype=torch.long)
    padded[0, :20] = 0
    cases = {
        "padding mask": (make_model("eager"), {"attention_mask": padded}),
        "own block is not scored +inf": (make_model("eager", index_local_blocks=0), {}),
        "blocks of the future|not causal": (make_model("sdpa"), {"position_ids": torch.arange(_LENGTH)[None]}),
    }
    for words, (model, inputs) in cases.items():
        torch._dynamo.reset()
        backend = check(model, False, {"input_ids": tokens(), **inputs})
        assert backend.calls == 0
        assert re.search(words.replace("+", r"\+"), backend.sites[1].reason), backend.sites[1].reason


def test_dense_token_scores_are_never_made() -> None:
    """In the graphs that a compiler gets, forward and backward, past autograd: of the dense layer only."""
    shapes: list[tuple[int, ...]] = []

    def collect(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        for node in gm.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, Tensor) and value.dim() >= 3:
                shapes.append(tuple(value.shape))
        return gm.forward

    def backend(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        recognise_graph(gm.graph)
        gm.recompile()
        return aot_autograd(fw_compiler=collect)(gm, example_inputs)

    model = make_model("sdpa", layer_types=["minimax_m3_sparse"] * (_SPARSE + 1))
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    results(compiled, model, True, input_ids=tokens(), use_cache=True)
    assert len(shapes) > 100
    assert not [shape for shape in shapes if sum(size in (_LENGTH, 80) for size in shape) > 1]


def test_explain_names_what_was_found() -> None:
    report = str(fsa_compile.explain(make_model("sdpa"), input_ids=tokens()))
    assert "fsa::selected_attention" in report
    assert "fsa::select_blocks" in report
    assert "dense attention" in report
