"""What looking at an attention takes, where lengths are dynamic, which is slowest."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from corpus import POSITIVES, make_inputs
from corpus.flex import FLEX_POSITIVES
from test_recognition import _clean
from torch import fx

from fsa_compile.lowering.recognise import recognise_graph

__all__ = ["_clean"]

_MOST = 0.75  # seconds of a processor, the least of some runs: at most 0.65 where others keep the cores busy
_SLOWEST = ("long_einsum_grouped", "definition_by_weights", "indexer_of_sums", "long_flex", "flex_with_own_block")


@pytest.mark.slow
@pytest.mark.parametrize("name", _SLOWEST)
def test_a_site_takes_less_than_a_second(name: str) -> None:
    program = {**POSITIVES, **FLEX_POSITIVES}[name]
    training = name in POSITIVES
    times: list[float] = []

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        start = time.process_time()
        sites = recognise_graph(gm.graph)
        if sites:  # a mask_mod's graph has none
            times.append(time.process_time() - start)
            assert [site.matched for site in sites] == [True]
        gm.recompile()
        return gm.forward

    for _ in range(4):
        torch._dynamo.reset()
        x = make_inputs(program, program.length, requires_grad=training)
        for one in x:
            torch._dynamo.maybe_mark_dynamic(one, 2 if program.layout == "bhtd" else 1)
        with torch.set_grad_enabled(training):
            torch.compile(program.fn, backend=backend, fullgraph=True)(*x)
    assert len(times) == 4
    assert min(times) < _MOST, times
