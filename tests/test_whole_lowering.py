"""The whole of NSA as Inductor emits it: which kernels, and how many."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import fsa_compile
from fsa_compile import lowering
from fsa_compile.testing.fake_gpu import Harness

STAGES = ["mean_compress"] * 2 + ["compressed_attention", "select_blocks", "sliding_window_attention"]
STAGES += ["selected_attention"]


def inputs(harness: Harness, dynamic: bool, seq_len: int = 4096, group: int = 4) -> list[Tensor]:
    """q, k, v and three gates before their sigmoid."""

    def rows(heads: int, *rest: int) -> Tensor:
        return harness.tensor(1, seq_len, heads, *rest, dynamic=(1,) if dynamic else ())

    return [rows(2 * group, 64), rows(2, 64), rows(2, 64), *(rows(2 * group) for _ in range(3))]


def emitted(code: str) -> list[tuple[str, str]]:
    """Module and source of every kernel: a template's module, or "pointwise"."""
    found = []
    for source in re.findall(r"async_compile\.triton\('\w+', '''(.*?)'''", code, flags=re.DOTALL):
        modules = re.findall(r"from fsa_compile\.templates\.(\w+)\.\w+ import", source)
        found.append((modules[0] if modules else "pointwise", source))
    return found


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("order", ["fsa", "nsa"])
def test_a_forward_is_one_kernel_a_stage_with_the_gates_in_the_last(order: str, dynamic: bool) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, *gates: Tensor) -> Tensor:
        return fsa_compile.nsa_attention(q, k, v, *(g.sigmoid() for g in gates), loop_order=order)

    harness = Harness()
    with lowering.collect_sites() as sites:
        code = harness.emit(fn, *inputs(harness, dynamic))
    assert [site.op.removeprefix("fsa::") for site in sites] == STAGES
    assert all(site.matched for site in sites)
    kernels = emitted(code)
    # the gates are in the merge of partials, else by themselves; mean compression is one kernel launched twice; the
    # log-sum-exp is made of its two numbers
    rest = ["banded", "selected", "selected" if order == "fsa" else "pointwise"]
    assert [name for name, _ in kernels] == ["compression", "banded", "pointwise", "selection", *rest]
    assert [source.count("sigmoid") for _, source in kernels] == [0] * (len(kernels) - 1) + [3]
    assert len(re.findall(r"\.run\(", code)) == len(kernels) + 1
    called = set(re.findall(r"torch\.ops\.fsa\.(\w+)\.default\(", code))
    assert called == ({"_block_lists"} if order == "fsa" else set())


@pytest.mark.parametrize("name", ["compressed_attention", "sliding_window_attention"])
def test_without_a_key_there_is_nothing_to_launch(name: str) -> None:
    options: dict[str, Any] = {"seq_len_k": 20} if name == "compressed_attention" else {"window_size": 8}

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return getattr(torch.ops.fsa, f"{name}_forward")(q, k, v, **options)

    harness = Harness()
    q, k = harness.tensor(1, 20, 8, 64), harness.tensor(1, 0, 2, 64)
    code = harness.emit(fn, q, k, k)
    assert "fsa_compile.templates.banded.forward" not in code
    assert "torch.ops.fsa" not in code


BACKWARD: dict[str, tuple[Any, list[str]]] = {
    "compressed_attention": ({"seq_len_k": 4096}, ["banded"] * 3),  # the sum of splits is one kernel launched twice
    "sliding_window_attention": ({"window_size": 512}, ["banded", "banded"]),
}


@pytest.mark.parametrize("name", BACKWARD)
def test_a_backward_is_kernels(name: str) -> None:
    options, want = BACKWARD[name]

    def fn(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> Any:
        op = getattr(torch.ops.fsa, f"{name}_forward")
        results = op(q, k, v, **options)
        return getattr(torch.ops.fsa, f"{name}_backward")(grad, None, q, k, v, *results, **options)

    harness = Harness()
    q, k, v, *_ = inputs(harness, False)
    if name == "compressed_attention":
        k, v = harness.tensor(1, 255, 2, 64), harness.tensor(1, 255, 2, 64)
    code = harness.emit(fn, q, k, v, harness.tensor(1, 4096, 8, 64))
    names = [kernel for kernel, _ in emitted(code)]
    assert [n for n in names if n != "pointwise"] == ["banded", *want]
    assert not re.findall(r"torch\.ops\.fsa\.(\w+)\.default\(", code)


class Exported(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, *gates: Tensor) -> Tensor:
        return fsa_compile.nsa_attention(q, k, v, *gates)


def test_an_exported_compression_needs_no_size_of_its_own() -> None:
    """The number of compressed tokens, which an exported program leaves open, is told by the kernel's input."""
    harness = Harness()
    length = torch.export.Dim("T", min=2, max=4096)
    shapes = ({1: length}, {1: length}, {1: length}, ({1: length},) * 3)
    code = harness.emit_exported(Exported(), *inputs(harness, False), dynamic_shapes=shapes)
    assert "compression" in [name for name, _ in emitted(code)]
    assert not re.search(r"\bu\d+\b", re.sub("#.*", "", code))
