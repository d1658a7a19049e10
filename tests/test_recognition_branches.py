"""A whole NSA in plain PyTorch, and what only concerns its compressed and sliding-window branches."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from corpus import BLOCK, POSITIVES, make_inputs
from corpus.branch_positives import WINDOW, completed, windows_of
from corpus.positives import causal
from test_recognition import Captured, _clean, assert_same, module_results, results
from torch import Tensor
from torch._inductor import config
from torch.utils.checkpoint import checkpoint

from fsa_compile import lowering
from fsa_compile.testing import handwritten

__all__ = ["_clean"]

_BRANCHES = ["compressed_attention", "selected_attention", "sliding_window_attention"]


class Nsa(torch.nn.Module):
    """The three branches and the gated sum, as somebody writes them who has no package for it."""

    def __init__(self, heads: int = 4, heads_k: int = 2, dim: int = 16) -> None:
        super().__init__()
        self.shape = heads, heads_k, dim
        width = heads * dim
        self.q, self.k, self.v = (torch.nn.Linear(width, n * dim, bias=False) for n in (heads, heads_k, heads_k))
        self.gates, self.out = torch.nn.Linear(width, 3 * heads), torch.nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        heads, heads_k, dim = self.shape
        b, t, _ = x.shape
        q = self.q(x).view(b, t, heads, dim).transpose(1, 2)
        k, v = (f(x).view(b, t, heads_k, dim).transpose(1, 2) for f in (self.k, self.v))
        k_cmp, v_cmp = windows_of(k, BLOCK, BLOCK), windows_of(v, BLOCK, BLOCK)
        k, v, k_cmp, v_cmp = (y.repeat_interleave(heads // heads_k, 1) for y in (k, v, k_cmp, v_cmp))

        seen = completed(t, k_cmp.shape[2], BLOCK, BLOCK)
        p = (q @ k_cmp.mT * dim**-0.5).masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(0.0)
        n = -(-t // BLOCK)
        own, block = torch.arange(t)[:, None] // BLOCK, torch.arange(n)
        scores = torch.nn.functional.pad(p.unflatten(1, (heads_k, -1)).sum(2), (0, n - k_cmp.shape[2]))
        scores = scores.masked_fill(block == own, math.inf).masked_fill(block > own, -math.inf)
        ids = scores.topk(3).indices
        chosen = torch.zeros(b, heads_k, t, n, dtype=torch.bool).scatter(-1, ids, True)
        chosen = chosen.repeat_interleave(BLOCK, -1)[..., :t].repeat_interleave(heads // heads_k, 1)

        def attend(mask: Tensor) -> Tensor:
            return (q @ k.mT * dim**-0.5).masked_fill(~mask, -math.inf).softmax(-1) @ v

        i = torch.arange(t)
        branches = (p @ v_cmp, attend(chosen & causal(t)), attend(causal(t) & (i[:, None] - i < WINDOW)))
        gates = self.gates(x).sigmoid().view(b, t, heads, 3).transpose(1, 2).unsqueeze(-1).unbind(-2)
        out = sum(g * o for g, o in zip(gates, branches, strict=True))
        return x + self.out(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("how", ["plain", "checkpoint", "bfloat16", "dynamic"])
def test_every_branch_of_a_model(how: str) -> None:
    torch.manual_seed(0)
    model, x = Nsa(), torch.randn(2, 72, 64)
    if how == "bfloat16":
        model, x = model.bfloat16(), x.bfloat16()
    if how == "dynamic":
        torch._dynamo.mark_dynamic(x, 1)

    def call(x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=False) if how == "checkpoint" else model(x)

    backend = Captured()
    compiled = torch.compile(call, backend=backend, fullgraph=True)
    got, want = module_results(compiled, model, x), module_results(call, model, x)
    assert [site.matched for site in backend.sites] == [True] * 3, backend.sites
    assert sorted(set(backend.found) & set(_BRANCHES)) == _BRANCHES
    assert "select_blocks" in backend.found, backend.sites
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype
        error = (g.float() - w.float()).norm() / w.float().norm().clamp(min=1e-6)
        assert error < (5e-2 if how == "bfloat16" else 1e-5), error  # where 16 bits rank otherwise


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_every_branch_of_one_function(training: bool) -> None:
    """Windows that are longer than they are far apart, blocks of several of them."""
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(1, 280, heads, 16, generator=generator, requires_grad=training) for heads in (4, 2, 2)]
    gates = torch.rand(1, 280, 4, 3, generator=generator)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return handwritten.whole(q, k, v, gates, block_size=64, num_selected=4, window_size=90)

    backend = Captured()
    assert_same(results(torch.compile(call, backend=backend, fullgraph=True), x, training), results(call, x, training))
    assert [site.matched for site in backend.sites] == [True] * 3, backend.sites
    assert sorted(set(backend.found) & set(_BRANCHES)) == _BRANCHES
    assert "select_blocks" in backend.found, backend.sites


@pytest.mark.parametrize("name", ["compressed_softmax_nan_to_num", "compressed_einsum"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_to_num_hides_every_nan(name: str, value: float) -> None:
    """Probabilities of scores that are not finite are 0 too."""
    program = POSITIVES[name]
    x = make_inputs(program, program.length, requires_grad=False)
    x[0].transpose(1, 2 if program.layout == "bhtd" else 1)[0, 50, 0, 3] = value
    backend = Captured()
    got = torch.compile(program.fn, backend=backend, fullgraph=True)(*x)
    assert backend.calls == 1
    assert_same([got], [program.fn(*x)])


def test_dense_layers_of_one_mask_are_looked_into_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from fsa_compile.lowering.recognise import anchors

    traced: list[Any] = []
    trace = anchors.trace
    monkeypatch.setattr(anchors, "trace", lambda *args: traced.append(args) or trace(*args))

    def dense(x: Tensor) -> Tensor:
        i = torch.arange(x.shape[2])
        mask = (i[:, None] >= i) & (i[:, None] < i + 1000)  # a window that is wider than the keys
        for _ in range(4):
            x = torch.nn.functional.scaled_dot_product_attention(x, x, x, mask[None, None, :, : x.shape[2]])
            x = x.sin()
            x = (x @ x.mT).masked_fill(~mask, -math.inf).softmax(-1) @ x
            x = x.sin()
        return torch.nn.functional.scaled_dot_product_attention(x, x, x, causal(x.shape[2]))

    backend = Captured()
    torch.compile(dense, backend=backend, fullgraph=True)(torch.randn(1, 2, 40, 16))
    assert len(backend.sites) == 9
    assert not any(site.matched for site in backend.sites)
    assert len(traced) == 1


# ---- through the whole compiler ----


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_modes_of_the_compiler(mode: str) -> None:
    torch.manual_seed(0)
    model, x = Nsa(), torch.randn(1, 72, 64)
    with config.patch(force_disable_caches=True), lowering.collect_sites() as sites:
        got = module_results(torch.compile(model, fullgraph=True, mode=mode), model, x)
    assert_same(got, module_results(model, model, x))
    found = [site.op for site in sites]
    assert {f"fsa::{name}" for name in (*_BRANCHES, "select_blocks")} <= set(found), found


_CHILD = """
import json, sys
import torch
import fsa_compile
from torch._dynamo.utils import counters
from corpus.branch_positives import compressed_sdpa

fsa_compile.enable(recognise=sys.argv[1] == "on")
compiled = torch.compile(compressed_sdpa, fullgraph=True)
for length in (72, 100):
    x = [torch.randn(1, heads, length, 16) for heads in (4, 2, 2)]
    for one in x:
        torch._dynamo.mark_dynamic(one, 2)
    torch.testing.assert_close(compiled(*x, None), compressed_sdpa(*x, None))
found = {**counters["inductor"], **counters["aot_autograd"], **counters["stats"]}
print(json.dumps(found))
"""


@pytest.mark.slow
def test_caches_in_a_second_process_with_dynamic_lengths(tmp_path: Path) -> None:
    tests = Path(__file__).parent
    environment = {
        **os.environ, "PYTHONPATH": f"{tests.parent}:{tests}", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
    }  # fmt: skip

    def compiled_anew(recognise: str) -> bool:
        done = subprocess.run(
            [sys.executable, "-c", _CHILD, recognise], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-4000:]
        found = json.loads(done.stdout.splitlines()[-1])
        assert found["unique_graphs"] == 1
        hits = found.get("fxgraph_cache_hit", 0) + found.get("autograd_cache_hit", 0)
        misses = found.get("fxgraph_cache_miss", 0)
        assert bool(hits) != bool(misses), found
        return bool(misses)

    assert compiled_anew("on")
    assert not compiled_anew("on")
    assert compiled_anew("off"), "an option was changed"
