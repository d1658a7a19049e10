"""Programs that were recognised, compiled for a GPU that is not here, in the modes of `torch.compile`.

What the pass leaves is given to Inductor with each mode's options. Nothing is run: times of candidates are made up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_lowering import called_operators, templates_of
from test_recognition import _clean
from torch import Tensor, fx
from torch._inductor import list_mode_options
from torch._inductor.select_algorithm import AlgorithmSelectorCache

from fsa_compile import lowering
from fsa_compile.lowering import benchmark_inputs
from fsa_compile.lowering.recognise import recognise_graph
from fsa_compile.testing.fake_gpu import Harness, pretend_h200

__all__ = ["_clean"]

BLOCK, LENGTH, WINDOW, STRIDE = 64, 2048, 512, 16


def past(t: int, device: Any) -> tuple[Tensor, Tensor]:
    return torch.arange(t, device=device).unsqueeze(1), torch.arange(t, device=device)


def selected(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    i, j = past(q.shape[2], q.device)
    chosen = torch.zeros(*ids.shape[:-1], LENGTH // BLOCK, dtype=torch.bool, device=q.device).scatter_(-1, ids, True)
    mask = (chosen.repeat_interleave(BLOCK, -1) & (i >= j)).repeat_interleave(q.shape[1] // k.shape[1], 1)
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).sin()


def window(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    i, j = past(q.shape[2], q.device)
    return F.scaled_dot_product_attention(q, k, v, (i >= j) & (i - j < WINDOW), enable_gqa=True).sin() + ids.sum()


def compressed(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    k, v = (x.unflatten(2, (-1, STRIDE)).mean(3) for x in (k, v))
    i, j = past(q.shape[2], q.device)[0], torch.arange(k.shape[2], device=q.device)
    seen = j * STRIDE + (STRIDE - 1) <= i
    return F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True).sin() + ids.sum()


PROGRAMS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "selected_attention": (selected, "fwd_union"),
    "sliding_window_attention": (window, "forward"),
    "compressed_attention": (compressed, "forward"),
}


def recognised(harness: Harness, fn: Callable[..., Tensor]) -> tuple[fx.GraphModule, list[Tensor]]:
    """The graph that the pass leaves of a program, and its inputs."""
    given = {"q": harness.tensor(1, 8, LENGTH, 64), "k": harness.tensor(1, 2, LENGTH, 64)}
    given |= {"v": harness.tensor(1, 2, LENGTH, 64), "ids": harness.tensor(1, 2, LENGTH, 8, dtype=torch.int64)}
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        (site,) = recognise_graph(gm.graph)
        assert site.matched, site.reason
        gm.recompile()
        graphs.append(gm)
        return lambda *args: [node.meta["example_value"] for node in gm.graph.output_node().args[0]]

    with pretend_h200(), torch.no_grad():
        torch.compile(fn, backend=backend, fullgraph=True)(*given.values())
    (gm,) = graphs
    names = [node.name.removeprefix("l_").rstrip("_") for node in gm.graph.find_nodes(op="placeholder")]
    return gm, [given[name] for name in names]


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_modes_for_a_gpu(monkeypatch: pytest.MonkeyPatch, name: str, mode: str) -> None:
    timed: list[str] = []

    def benchmark(cls: type, choice: Any, *_: Any) -> float:
        timed.append(choice.name)
        return float(len(timed))

    def block_indices(self: Any) -> Tensor:
        shape = [benchmark_inputs._hint(size) for size in self.plan.inputs["block_indices"].tensor.shape]
        return torch.zeros(shape, dtype=torch.int32, device=self.device)

    monkeypatch.setattr(AlgorithmSelectorCache, "benchmark_choice", classmethod(benchmark))
    monkeypatch.setattr(benchmark_inputs._Made, "block_indices", property(block_indices))
    fn, template = PROGRAMS[name]
    harness = Harness()
    gm, inputs = recognised(harness, fn)
    with lowering.collect_sites() as sites:
        code = harness.emit(lambda *x: gm(*x)[0], *inputs, **list_mode_options(mode), force_disable_caches=True)
    assert [(site.op, site.matched) for site in sites] == [(f"fsa::{name}", True)]
    assert template in templates_of(code)
    assert not called_operators(code), "an operator is called as it is"
    assert "device='cpu'" not in code, "a graph could not be captured"
    assert "item()" not in code
    assert bool(timed) == (mode == "max-autotune"), timed
