"""What `torch.compile` would make of a model: its attention sites, the loop order of each and why, its graph breaks."""

from __future__ import annotations

import os
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from . import cost, debug
from .lowering import Site
from .lowering.switch import is_enabled, is_switched_on
from .lowering.where import frames_of, innermost, where_of
from .ops.operators import OPERATORS
from .ops.schema import bound_arguments
from .ops.selected.choice import choose

__all__ = ["Explanation", "GraphBreak", "Site", "explain"]

_ONE_WAY = "its kernels run in one loop order"
_NOT_NSA = "dense attention, not NSA"
_EXPLANATION = re.compile(r"^\s*Explanation: (.*)$", re.MULTILINE)
_WRAPPED = re.compile(r": got ([A-Za-z_.]+\(.*\))$", re.MULTILINE)

# Nodes of a dynamo graph are named by the function, whatever module re-exports it.
_DENSE = {"scaled_dot_product_attention", "multi_head_attention_forward", "flex_attention"}
_SOFTMAX = {"softmax", "_softmax"}
_MATMUL = {"matmul", "bmm", "baddbmm", "einsum", "__matmul__"}
_HOPS = 6  # dropout, casts, reshapes between a softmax and its matmul


@dataclass(frozen=True)
class GraphBreak:
    """Where `torch.compile` had to leave the graph, and why."""

    reason: str
    where: str | None  # "file:line"

    def __str__(self) -> str:
        return f"{self.where or 'unknown place'}: {self.reason}"


@dataclass(frozen=True)
class Explanation:
    """What `explain` found. `print` it, or read the fields.

    sites: every attention found, in the order of the graphs. NSA sites (`op` starts with `"fsa::"`) have `where`,
        `stages` (the operators they consist of) and, with a selected branch, `loop_order` and `costs` (predicted
        seconds by loop order) of the forward and, where the result requires grad, `backward_order` and
        `backward_costs`, whether or not they are `matched`; dense ones are never matched. The lists that a forward
        shares with its backward count to the backward.
    graph_breaks: one for each place where the graph broke.
    num_graphs: graphs that were captured.
    errors: what failed while explaining; empty if all went well.
    """

    sites: list[Site] = field(default_factory=list)
    graph_breaks: list[GraphBreak] = field(default_factory=list)
    num_graphs: int = 0
    errors: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join(_report(self))

    __repr__ = __str__


def explain(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Explanation:
    """Capture `fn(*args, **kwargs)` as `torch.compile` would and say what becomes of its attention.

    The captured graphs run eagerly, so `fn` is called once for real: side effects such as running statistics of a
    batch norm happen (the state of the random generators is put back). Nothing is compiled, on no device. The
    predicted choices are the lowering's: the same cost model, for the forward and, where the result requires grad, for
    the backward.

    Dynamo is reset before and after, as `torch._dynamo.explain` does: functions that are compiled already are captured
    again at their next call, and then mostly found in Inductor's cache.

    Args:
        fn: a function or module, compiled by `torch.compile` or not.
        args, kwargs: what it is called with. Put tensors on the device that the question is about.

    Returns:
        an `Explanation`. Never raises because of the model: what failed is in `.errors`.
    """
    sites: list[Site] = []
    breaks: list[GraphBreak] = []
    errors: list[str] = []
    num_graphs = 0

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        nonlocal num_graphs
        num_graphs += 1
        try:
            sites.extend(_sites(gm))
            breaks.extend(_graph_break(gm))
        except Exception as error:
            errors.append(f"reading a captured graph: {_message(error)}")
        return gm.forward

    torch._dynamo.reset()
    counted = _counted_breaks()
    try:
        with torch.random.fork_rng(devices=_cuda_in_use()):
            torch.compile(_uncompiled(fn), backend=backend)(*args, **kwargs)
    except Exception as error:
        errors.append(f"calling {_name(fn)}: {_message(error)}")
    finally:
        # A break before a frame's first operation leaves no graph that could tell of it.
        told = {b.reason for b in breaks}
        breaks += [GraphBreak(r, None) for r in map(_summary, _counted_breaks() - counted) if r not in told]
        torch._dynamo.reset()
    if not num_graphs and not errors:
        errors.append(
            f"torch.compile captured nothing of {_name(fn)}: is it switched off, or is there no tensor in it?"
        )
    return Explanation(sites, breaks, num_graphs, errors)


# ---------------------------------------------------------------------------------------------------------- capture


def _uncompiled(fn: Any) -> Any:
    """The function or module that `torch.compile` was given."""
    for name in ("_orig_mod", "_torchdynamo_orig_callable"):
        fn = getattr(fn, name, fn)
    return fn


def _cuda_in_use() -> list[int]:
    return [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []


def _counted_breaks() -> Counter[str]:
    from torch._dynamo.utils import counters

    return Counter(counters["graph_break"])


def _graph_break(gm: fx.GraphModule) -> Iterator[GraphBreak]:
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is not None and getattr(reason, "graph_break", False):
        frames = [(f.filename, f.lineno) for f in reason.user_stack]
        yield GraphBreak(_summary(str(reason.reason)), innermost(frames))


def _first_line(text: str) -> str:
    return text.strip().split("\n", 1)[0]


def _summary(reason: str) -> str:
    """Dynamo's headline and explanation of a break, without its hints."""
    explanation = _EXPLANATION.search(reason)
    return _first_line(reason) + (f". {explanation.group(1)}" if explanation else "")


def _message(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error)
    # Dynamo wraps what an operator's checks raise on fake tensors and adds the user's frames.
    wrapped = _WRAPPED.search(text)
    if wrapped is None:
        return f"{type(error).__name__}: {_first_line(text) or 'no message'}"
    return f"{wrapped.group(1)} at {_short(innermost(frames_of(text)))}"


def _name(fn: Any) -> str:
    fn = _uncompiled(fn)
    return getattr(fn, "__qualname__", None) or type(fn).__qualname__


# ------------------------------------------------------------------------------------------------------------ sites


def _sites(gm: fx.GraphModule) -> Iterator[Site]:
    """Sites of a graph and of the bodies of its higher-order operators (checkpointed regions, loops)."""
    from .lowering import recognise  # imports sympy

    for graph, reasons in recognise.preview(gm):
        for node in graph.nodes:
            name = _function(node)
            if name.startswith("fsa::"):
                yield _nsa_site(node, name)
            elif name in _DENSE or (name in _SOFTMAX and _feeds_matmul(node)):
                shown = name if name in _DENSE else "softmax, then matmul"
                reason = reasons.get(node, _NOT_NSA)
                yield Site(shown, False, None, reason=reason, where=where_of(node))


def _function(node: fx.Node) -> str:
    """Name of what a node calls; `fsa::name` for an operator of ours."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return ""
    if isinstance(node.target, torch._ops.OpOverload):
        name = node.target._schema.name
    elif isinstance(node.target, torch._ops.OpOverloadPacket):
        name = str(node.target._qualified_op_name)
    else:
        return getattr(node.target, "__name__", "")
    return name if name.startswith("fsa::") else name.split("::")[-1]


def _feeds_matmul(softmax: fx.Node) -> bool:
    reached, frontier = {softmax}, {softmax}
    for _ in range(_HOPS):
        frontier = {user for node in frontier for user in node.users} - reached
        if any(_function(node) in _MATMUL for node in frontier):
            return True
        reached |= frontier
    return False


def _nsa_site(node: fx.Node, name: str) -> Site:
    where = where_of(node)
    try:
        calls, out = _leaf_calls(node)
        forward, backward = _choices(calls, training=out.requires_grad)
    except Exception as error:
        return Site(name, False, None, reason=f"could not be read: {_message(error)}", where=where)
    obstacle = _obstacle(out.device.type)
    reasons = [choice.reason for choice in (forward, backward) if choice] or ([] if obstacle else [_ONE_WAY])
    reason = "; ".join(filter(None, (obstacle, *reasons)))
    stages = tuple(op.removesuffix("_forward") for op, _ in calls)
    (order, costs), then = ((c.order, dict(c.costs)) if c else (None, {}) for c in (forward, backward))
    return Site(name, not obstacle, order, costs, reason, where, stages, *then)


class _Recorder(TorchDispatchMode):
    """Collects the calls of semantic operators that are not made of others, arguments by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("fsa::")
        if func.namespace == "fsa" and name in OPERATORS and not OPERATORS[name].is_composite:
            self.calls.append((name, bound_arguments(func, args, kwargs or {})))
        return func(*args, **kwargs or {})


def _leaf_calls(node: fx.Node) -> tuple[list[tuple[str, dict[str, Any]]], torch.Tensor]:
    """The operators that a public one consists of, in order, called on its fake tensors; and its first result."""

    def value(x: fx.Node) -> Any:
        return x.meta["example_value"]

    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
    first = next(x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor))
    result = node.meta["example_value"]
    out = result if isinstance(result, torch.Tensor) else result[0]
    recorder = _Recorder()
    with torch.no_grad(), first.fake_mode, recorder:  # type: ignore[attr-defined]
        # The result's dtype tells what autocast made of the inputs.
        if out.is_floating_point() and out.dtype != first.dtype:
            with torch.autocast(first.device.type, out.dtype):
                node.target(*args, **kwargs)  # type: ignore[operator]
        else:
            node.target(*args, **kwargs)  # type: ignore[operator]
    return recorder.calls, out


def _choices(calls: list[tuple[str, dict[str, Any]]], *, training: bool) -> tuple[cost.Choice | None, ...]:
    """The lowering's for the one of the calls that has loop orders: of its forward and, in training, its backward."""
    given = next((arguments for _, arguments in calls if "loop_order" in arguments), None)
    if given is None:
        return None, None
    return choose(given, training=training), choose(given, backward=True) if training else None


def _obstacle(device_type: str) -> str:
    """Why the lowering would leave a site alone; empty if it would not."""
    if device_type != "cuda":
        return f"runs on {device_type}, where the operator is called as it is"
    if not is_switched_on():
        return "the lowering is switched off (fsa_compile.enable() switches it on)"
    if not is_enabled():
        return "another pass has taken the place of fsa_compile's (call fsa_compile.enable() again)"
    if debug.is_validating():
        return "fsa_compile.debug validates values, which only the eager operator does"
    return ""


# ----------------------------------------------------------------------------------------------------------- report

_WIDTH = 110
_WORDS = ("", "where", "operator", "calls", "lowered", "order")


def _report(e: Explanation) -> Iterator[str]:
    nsa = [s for s in e.sites if s.op.startswith("fsa::")]
    dense = [s for s in e.sites if not s.op.startswith("fsa::")]
    lowered = sum(s.matched for s in nsa)
    yield (
        f"fsa_compile: {_count(len(nsa), 'NSA site')}, {lowered} lowered to kernels; "
        f"{_count(e.num_graphs, 'graph')}, {_count(len(e.graph_breaks), 'graph break')}"
    )
    if nsa:
        alike = _alike(nsa)
        yield ""
        orders = [order for order in cost.LOOP_ORDERS if any(order in s.costs for s in nsa)]
        head = (*_WORDS, *orders, "gain")
        yield from _table([head, *(row for i, (s, n) in enumerate(alike, 1) for row in _rows(i, s, n, orders))])
        if orders:
            yield f"  Under {', '.join(orders)}: predicted times of the selected branch in these loop orders."
        if any(s.backward_costs for s in nsa):
            yield "  Each direction has its own; the lists that both may use are counted to the backward."
        yield ""
        yield "Why"
        yield from _numbered(s.reason for s, _ in alike)
        yield ""
        yield "Stages, each lowered where the site is"
        yield from _numbered(", ".join(f"{op}{_times(n)}" for op, n in Counter(s.stages).items()) for s, _ in alike)
    if dense:
        yield ""
        yield "Other attention, left alone"
        yield from _numbered(f"{_short(s.where)}  {s.op}{_times(n)}: {s.reason}" for s, n in _alike(dense))
    yield ""
    if e.graph_breaks:
        yield "Graph breaks"
        yield from _numbered(f"{_short(b.where)}  {b.reason}" for b in e.graph_breaks)
    else:
        yield "Graph breaks: none"
    if e.errors:
        yield ""
        yield "Could not be explained"
        yield from _numbered(e.errors)


def _alike(sites: Sequence[Site]) -> list[tuple[Site, int]]:
    """Sites that differ in nothing, as the layers of a model, once each and how many they are."""
    counts: dict[str, tuple[Site, int]] = {}
    for site in sites:
        _, n = counts.get(repr(site), (site, 0))
        counts[repr(site)] = (site, n + 1)
    return list(counts.values())


def _times(n: int) -> str:
    return f" ({n} times)" if n > 1 else ""


def _rows(number: int, site: Site, calls: int, orders: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """A site's, with a second one for the backward of a trained site, which says nothing again."""
    about = (str(number), _short(site.where), site.op, str(calls), "yes" if site.matched else "no")
    trained = site.backward_order is not None
    yield *about, *_priced("forward " if trained else "", site.loop_order, site.costs, orders)
    if trained:
        yield *("" for _ in about), *_priced("backward ", site.backward_order, site.backward_costs, orders)


def _priced(direction: str, order: str | None, costs: dict[str, float], orders: Sequence[str]) -> tuple[str, ...]:
    times = (cost.format_seconds(costs[o]) if o in costs else "-" for o in orders)
    speedup = f"{costs[cost.best_other(costs, order)] / costs[order]:.1f}x" if order and costs else "-"
    return f"{direction}{order}" if order else "-", *times, speedup


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for i, row in enumerate(rows):
        cells = [
            c.ljust(w) if j < len(_WORDS) else c.rjust(w) for j, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        yield ("  " + "  ".join(cells)).rstrip()
        if i == 0:
            yield "  " + "  ".join("-" * w for w in widths)


def _numbered(texts: Any) -> Iterator[str]:
    for i, text in enumerate(texts, 1):
        yield from textwrap.wrap(text, _WIDTH, initial_indent=f"  {i}  ", subsequent_indent="     ") or [f"  {i}"]


def _short(where: str | None) -> str:
    """A place relative to the working directory if it is in there, else its last two parts."""
    if where is None:
        return "?"
    relative = os.path.relpath(where)
    return os.sep.join(where.split(os.sep)[-2:]) if relative.startswith(os.pardir) else relative


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"
