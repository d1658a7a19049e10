"""Programs from `torch.export`, and other packages' passes in the same slot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from corpus import POSITIVES, Program, make_inputs
from test_recognition import _clean, assert_same, block_attention
from torch import Tensor, fx
from torch._inductor import config

import fsa_compile
from fsa_compile import lowering
from fsa_compile.lowering import _inductor
from fsa_compile.lowering.recognise import recognise_graph

__all__ = ["_clean"]

EXPORTED = [name for name, x in POSITIVES.items() if "scatter" in name or x.op != "selected_attention"]


@pytest.mark.parametrize("name", EXPORTED)
def test_an_exported_program_is_recognised(name: str) -> None:
    """Its graph has ATen's operators, and fake values under another name."""
    program = POSITIVES[name]
    x = make_inputs(program, program.length, requires_grad=False)

    class Model(torch.nn.Module):
        def forward(self, *args: Tensor) -> Tensor:
            return program.fn(*args)

    with torch.no_grad():
        gm = torch.export.export(Model(), tuple(x)).module()
        assert isinstance(gm, fx.GraphModule)
        sites = recognise_graph(gm.graph)
        gm.recompile()
        assert [site.matched for site in sites] == [True], sites
        assert_same([gm(*x)], [program.fn(*x)])


@pytest.mark.slow
def test_ahead_of_time(tmp_path: Path) -> None:
    x = make_inputs(Program("", block_attention), 72, requires_grad=False)

    class Model(torch.nn.Module):
        def forward(self, *args: Tensor) -> Tensor:
            return block_attention(*args)

    with torch.no_grad(), lowering.collect_sites() as sites:
        program = torch.export.export(Model(), tuple(x))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    assert {site.op: site.matched for site in sites}["softmax, then matmul"]
    assert_same([torch._inductor.aoti_load_package(path)(*x)], [block_attention(*x)])


class Other(_inductor.CustomGraphPass):
    """Another package's pass, perhaps around one that was there."""

    def __init__(self, inner: Any = None) -> None:
        self.inner, self.calls = inner, 0

    def __call__(self, graph: fx.Graph) -> None:
        self.calls += 1
        if self.inner is not None:
            self.inner(graph)

    def uuid(self) -> str:
        return "other"


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "around", "in a list"])
def test_the_slot_is_shared(when: str, recwarn: pytest.WarningsRecorder) -> None:
    other = Other(lowering.PRE_GRAD_PASS if when == "around" else None)
    if when == "in a list" and not _inductor.slot_takes_sequence():
        pytest.skip("the slot holds one pass")
    setattr(config, _inductor.PRE_GRAD_SLOT, [lowering.PRE_GRAD_PASS, other] if "list" in when else other)
    if when == "before":
        fsa_compile.enable()  # behind what is there, be it that it was overwritten
    x = make_inputs(Program("", block_attention), 72, requires_grad=False)
    with config.patch(force_disable_caches=True), lowering.collect_sites() as sites:
        torch.compile(block_attention, fullgraph=True)(*x)
    assert other.calls == 1
    assert any(site.matched for site in sites)
    assert not [w for w in recwarn if "is not recognised" in str(w.message)]


@pytest.mark.slow
def test_a_replaced_slot_is_reported() -> None:
    x = make_inputs(Program("", block_attention), 72, requires_grad=False)
    compiled = torch.compile(block_attention, fullgraph=True, options={_inductor.PRE_GRAD_SLOT: lambda graph: None})
    with config.patch(force_disable_caches=True), pytest.warns(UserWarning, match="is not recognised"):
        compiled(*x)
