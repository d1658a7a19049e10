"""The whole of NSA as Inductor emits it: which kernels, and how many."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

import fsa_compile
from fsa_compile import lowering
from fsa_compile.lowering import expand
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


def backward_of_a_gated_sum(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As autograd traces it: gates' gradients and products first, then the last branch; what was saved, by aliases."""
    grad, g_cmp, g_slc, g_swa, q, k, v, k_cmp, v_cmp, blocks, *rest = tensors
    branches = [(rest[i], rest[3 + i], rest[6 + i]) for i in range(3)]
    wide = grad.float()

    def product(gate: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        of_gate = (wide * out).sum(3, keepdim=True).squeeze(-1)
        return of_gate.to(gate.dtype), (wide * gate.float().unsqueeze(-1)).to(out.dtype)

    products = [product(gate, branch[0]) for gate, branch in zip((g_cmp, g_slc, g_swa), branches, strict=True)]
    (dg_cmp, d_cmp), (dg_slc, d_slc), (dg_swa, d_swa) = products
    ops, seq_len = torch.ops.fsa, q.shape[1]

    def saved(branch: tuple[Tensor, ...]) -> list[Tensor]:
        return [torch.ops.aten.alias(x) for x in branch]

    dq, dk, dv = ops.selected_attention_backward(d_slc, None, q, k, v, blocks, *saved(branches[1]), loop_order="fsa")
    of_window = ops.sliding_window_attention_backward(d_swa, None, q, k, v, *saved(branches[2]), window_size=512)
    dq, dk, dv = (a + b for a, b in zip((dq, dk, dv), of_window, strict=True))
    of_cmp = ops.compressed_attention_backward(d_cmp, None, q, k_cmp, v_cmp, *saved(branches[0]), seq_len_k=seq_len)
    of_means = [ops.mean_compress_backward(x, seq_len=seq_len) for x in of_cmp[1:]]
    return dq + of_cmp[0], dk + of_means[0], dv + of_means[1], dg_cmp, dg_slc, dg_swa


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_training_step_keeps_no_output_through_the_first_backward(dtype: torch.dtype) -> None:
    harness = Harness()

    def rows(heads: int, *rest: int, dtype: torch.dtype = dtype, length: int = 4096) -> Tensor:
        return harness.tensor(1, length, heads, *rest, dtype=dtype)

    given = [rows(8, 64), *(rows(8) for _ in range(3)), rows(8, 64), *(rows(2, 64) for _ in range(2))]
    given += [*(rows(2, 64, length=255) for _ in range(2)), rows(2, 16, dtype=torch.int32)]
    outputs, statistics = [rows(8, 64) for _ in range(3)], [rows(8, dtype=torch.float32) for _ in range(6)]
    code = harness.emit(backward_of_a_gated_sum, *given, *outputs, *statistics)
    names = re.findall(r"^(triton_\w+) = async_compile", code, flags=re.MULTILINE)
    modules = dict(zip(names, (module for module, _ in emitted(code)), strict=True))
    call = code[code.index("def call(") :]
    arguments = re.findall(r"(\w+)(?:, )?", next(line for line in call.splitlines() if "= args" in line))
    launches = [(modules[name], args.split(", ")) for name, args in re.findall(r"(triton_\w+)\.run\((.*?)\)", call)]
    where = [i for i, (_, args) in enumerate(launches) if set(arguments[10:13]) & set(args)]
    if dtype == torch.float32:  # deltas are kernels that read products, so that nothing is gained
        assert call.rindex("_attention_delta.default(") > call.index(next(n for n in names if modules[n] == "selected"))
        return
    assert where == [0]
    # pointwise: that one, a product for each of two branches, and three branches' row weights, outside of the stages
    kinds = Counter(module for module, _ in launches)
    assert kinds == {"selected": 4, "banded": 6, "compression": 2, "pointwise": 1 + 2 + 3}, launches


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


def test_deltas_that_cannot_be_moved_break_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(graph: torch.fx.Graph) -> None:
        raise RuntimeError("cannot be moved")

    monkeypatch.setattr(expand, "take_deltas_early", fail)
    harness = Harness()
    code = harness.emit(
        lambda q, k: fsa_compile.sliding_window_attention(q, k, k, window_size=64)[0], *inputs(harness, False)[:2]
    )
    assert [name for name, _ in emitted(code)] == ["banded"]
