"""What is traced with results of which only shape, dtype and device are right: they are, and nothing else is asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from corpus import POSITIVES, make_inputs
from test_recognition import _clean
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fsa_compile.lowering.recognise import recognise_graph, region, shapes
from fsa_compile.lowering.recognise.evaluate import NotUnderstood

__all__ = ["_clean"]

_CALLS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "compared": lambda x, i: [x < 1, x.le(x[:1]), i >= i.T[0, 0], x.float().gt(0.5), i == i[:, None]],
    "truth": lambda x, i: [~(x > 0), (x > 0) & (i > 1), torch.logical_or(i, x), (x > 0).logical_not(), (i > 0) ^ True],
    "bits": lambda x, i: [i & 3, i | i, ~i, i >> 1, i.__rshift__(2)],
    "arithmetic": lambda x, i: [x + i, i + 1, i + 1.5, x * 2, 3 - i, -x, torch.add(x, x, alpha=2), i * True],
    "widths": lambda x, i: [x.half() + x, x.half() * 2.0, i.int() + i, i.int() + 1, (i > 0) + 1, (i > 0) * (x > 0)],
    "integers": lambda x, i: [i // 3, i % 3, i // i, x // 2, i.abs(), x.abs(), i.to(torch.uint8) // 3],
    "filled": lambda x, i: [x.masked_fill(i > 0, 0.0), i.masked_fill(i > 0, 7), x.masked_fill((i > 0)[:1], 1)],
    "chosen": lambda x, i: [torch.where(i > 0, x, 0.0), torch.where(i > 0, i, 0), torch.where(i > 0, x, i)],
    "cast": lambda x, i: [x.half(), i.to(torch.int32), x.to(i), (x > 0).float(), x.to("cpu", torch.float64)],
    "triangles": lambda x, i: [x.tril(), x.triu(1), x.clone(), x.contiguous(), x.T.clone()],
    "views": lambda x, i: [x.flatten(), x.view(-1, 1), x[:, None], x.permute(1, 0), x.transpose(-1, 0), x[0], x[-1]],
    "expanded": lambda x, i: [x[:, None].expand(-1, 3, -1), x.expand(2, *x.shape), x[:, :1].expand(x.shape)],
    "taken apart": lambda x, i: [x.unflatten(1, (2, 3)), x.T.reshape(-1), x.repeat_interleave(2, 1), x.repeat(2, 3)],
    "reduced": lambda x, i: [(x > 0).any(1), (x > 0).any(0, keepdim=True), x.sum(-1), x.sum((0, 1)), i.int().sum(0)],
    "sums": lambda x, i: [x.sum(0, dtype=torch.float64), x.half().sum(1), (i > 0).sum(1, keepdim=True), x.amax(1)],
    "sorted": lambda x, i: [*x.sort(), *i.sort(0, descending=True), *x.half().sort(stable=True, dim=1)],
    "indexed": lambda x, i: [x[i[:, 0] % 2, i[:, 1] % 2], x[i % 2, i[:, :1] % 2], x[i[:, 0] % 2], x[:, i[0] % 2]],
    "run": lambda x, i: [x[:, 1:4], torch.arange(x.shape[0]) + i[:, 0], x.softmax(1), torch.cat([x, x], 1), x @ x.T],
}  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", _CALLS)
def test_results_are_of_the_same_shape_and_dtype(name: str, dynamic: bool) -> None:
    fn = _CALLS[name]
    x, i = torch.randn(4, 6), torch.randint(1, 4, (4, 6))
    want = fn(x, i)
    with FakeTensorMode(shape_env=ShapeEnv() if dynamic else None) as mode:
        fakes = [mode.from_tensor(one, static_shapes=not dynamic) for one in (x, i)]
        with shapes.ShapesOnly():
            traced = make_fx(lambda *args: fn(*args), tracing_mode="real")(*fakes)
    (output,) = traced.graph.find_nodes(op="output")
    found: Any = output.args[0]
    assert len(found) == len(want)
    for one, of in zip(found, want, strict=True):
        value = one.meta["val"]
        assert [int(n) for n in value.shape] == list(of.shape), one
        assert (value.dtype, value.device) == (of.dtype, of.device), one


def test_a_graph_computes_what_the_program_does() -> None:
    """Its operators are the program's, on tensors that lie in memory as they do."""

    def fn(x: Tensor, i: Tensor) -> Tensor:
        spread = torch.where(i.T < 2, x.T, 0.0)[:, None].expand(-1, 2, -1).reshape(12, 4)
        return spread.masked_fill(spread > 1, -1.0).T.contiguous().view(-1)

    x, i = torch.randn(4, 6), torch.randint(1, 4, (4, 6))
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        fakes = [mode.from_tensor(one, static_shapes=True) for one in (x, i)]
        with shapes.ShapesOnly():
            traced = make_fx(fn, tracing_mode="real")(*fakes)
    for node in traced.graph.nodes:
        if node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default
    traced.recompile()
    assert torch.equal(traced(x, i), fn(x, i))


def test_nothing_is_made_of_strides() -> None:
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        x = mode.from_tensor(torch.randn(4, 6))
        with shapes.ShapesOnly():
            traced = make_fx(lambda x: x.T.clone().as_strided((2, 2), (1, 2)), tracing_mode="real")(x)
    with pytest.raises(NotUnderstood, match="lie in memory"):
        shapes.refuse_strides(traced)


@pytest.mark.parametrize("asked", ["stride", "storage_offset", "is_contiguous", "as_strided"])
def test_a_mask_mod_that_asks_for_strides_is_told(asked: str) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_method(asked, (x,)))
    assert shapes.reads_strides(graph)
    assert not shapes.reads_strides(fx.symbolic_trace(lambda x: x.T.size(0) + x.contiguous()).graph)


def test_no_operator_of_a_program_is_run_for_its_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    """With dynamic sizes each takes milliseconds."""
    ran: list[str] = []

    class Counting(shapes.ShapesOnly):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            with _Noting(ran):
                return super().__torch_dispatch__(func, types, args, kwargs)

    monkeypatch.setattr(region, "ShapesOnly", Counting)
    program = POSITIVES["definition_of_nsa"]

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        assert [site.matched for site in recognise_graph(gm.graph)] == [True]
        gm.recompile()
        return gm.forward

    x = make_inputs(program, program.length, requires_grad=False)
    for one in x:
        torch._dynamo.maybe_mark_dynamic(one, 2)
    with torch.no_grad():
        torch.compile(program.fn, backend=backend, fullgraph=True)(*x)
    assert ran
    costly = {"aten.add", "aten.view", "aten.expand", "aten.masked_fill", "aten.le", "aten.gt", "aten.bitwise_and"}
    assert not costly & set(ran)


class _Noting(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self, ran: list[str]) -> None:
        super().__init__()
        self.ran = ran

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ran.append(str(func).rsplit(".", 1)[0])
        return func(*args, **(kwargs or {}))
