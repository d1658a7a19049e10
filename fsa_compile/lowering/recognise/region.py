"""The part of a pre-grad graph that an attention is made of, cut out and traced to functional ATen.

A pre-grad graph has in-place operators and views. What is cut out holds every write to the storages that it makes, in
order; a tensor from outside must not be written to between its use in there and the attention.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.experimental.proxy_tensor import make_fx

from .evaluate import NotUnderstood
from .shapes import ShapesOnly, refuse_strides
from .vmaps import BATCHED, Levels, is_batched, is_level
from .writes import function_name, storage_of, tensor, written

__all__ = [
    "BLOCKWISE",
    "WRITTEN",
    "Graph",
    "Region",
    "allowed",
    "guard_at_most",
    "guard_equal",
    "guard_not_empty",
    "trace",
]

# By name, whether a function, a method or an operator. Products of two tensors are left out but for the attention's
# own; so are `detach`, which is not what it holds, and whatever draws random numbers.
_MOVES = """
    view reshape expand expand_as view_as reshape_as permute transpose swapaxes swapdims movedim moveaxis t mT T
    unsqueeze squeeze flatten unflatten contiguous clone repeat tile repeat_interleave getitem narrow select
    flip roll index_select gather take_along_dim unbind split chunk tensor_split cat concat stack hstack pad diff
    rearrange broadcast_to adjoint getattr __getitem__ dropout
    slice alias index lift_fresh_copy mask_of_flex_attention
"""
_MAKES = """
    zeros ones full empty arange zeros_like ones_like full_like new_zeros new_ones new_full tensor scalar_tensor
    tril triu one_hot meshgrid eye
"""
_POINTWISE = """
    to type type_as float half bfloat16 double bool int long lt le gt ge eq ne __eq__ __ne__ __lt__ __le__
    __gt__ __ge__ less less_equal greater greater_equal not_equal and_ or_ xor inv invert not_ logical_and
    logical_or logical_not logical_xor bitwise_and bitwise_or bitwise_not bitwise_right_shift rshift __and__
    __or__ __invert__ __rshift__ where masked_fill abs clamp clamp_min clamp_max clip minimum maximum add sub rsub
    subtract neg floordiv floor_divide remainder mod mul truediv div divide multiply isin __add__ __radd__
    __sub__ __rsub__ __mul__ __rmul__ __truediv__ __floordiv__ __mod__ nan_to_num
"""
_REDUCES = "any all sum amax max cumsum"
_WRITES = """
    scatter scatter_add scatter_reduce index_put index_fill scatter_ scatter_add_ scatter_reduce_ index_put_
    index_fill_ setitem fill_ zero_ masked_fill_ logical_and_ logical_or_ logical_not_ bitwise_and_ bitwise_or_
    iand ior mul_ div_ add_ sub_ imul iadd isub itruediv tril_ triu_ copy_ __iand__ __ior__
"""
_ATTENTION = frozenset("softmax matmul bmm baddbmm einsum __matmul__ __rmatmul__".split())
_ALLOWED = frozenset(" ".join((_MOVES, _MAKES, _POINTWISE, _REDUCES, _WRITES)).split()) | _ATTENTION
_POOLS = frozenset("unfold mean avg_pool1d avg_pool2d max_pool1d max_pool2d".split())
_FLOAT_PRODUCTS = frozenset(("mul", "multiply", "__mul__", "__rmul__", "truediv", "div", "divide", "__truediv__"))
# One of these has to be there for a mask to be made of block ids.
BLOCKWISE = frozenset(
    "scatter scatter_ scatter_add scatter_add_ scatter_reduce scatter_reduce_ index_put index_put_ setitem one_hot any "
    "isin amax max sum".split()
)
_HORIZONS = frozenset("lt le gt ge less less_equal greater greater_equal tril triu abs".split())
_NAMED: dict[str, Callable[..., Any]] = {
    "ior": lambda a, b: a.copy_(torch.bitwise_or(a, b)),
    "iand": lambda a, b: a.copy_(torch.bitwise_and(a, b)),
}
_MOST_NODES = 400
WRITTEN = "a part of it is written to in place in a way that is not looked through"


@dataclass
class Graph:
    """A pre-grad graph with what its nodes write."""

    graph: fx.Graph
    order: dict[fx.Node, int] = field(default_factory=dict)
    writes: dict[int, list[fx.Node]] = field(default_factory=dict)  # by storage
    autocast: list[tuple[int, int, tuple[Any, ...]]] = field(default_factory=list)
    unknown_writes: list[fx.Node] = field(default_factory=list)
    grad_modes: dict[fx.Node, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        open_: dict[fx.Node, int] = {}
        grad_mode: Any = None  # of the caller
        for i, node in enumerate(self.graph.nodes):
            self.order[node] = i
            name = function_name(node)
            if name == "_set_grad_enabled":
                grad_mode = node.args[0]
            self.grad_modes[node] = grad_mode
            if "inference_mode" in name:
                self.unknown_writes.append(node)
            if name == "_enter_autocast":
                open_[node] = i
            elif name == "_exit_autocast" and node.args[0] in open_:
                enter: Any = node.args[0]
                self.autocast.append((open_.pop(enter), i, enter.args))
            for target in written(node):
                storage = storage_of(target)
                if storage is None:
                    self.unknown_writes.append(node)
                else:
                    self.writes.setdefault(storage, []).append(node)
        self.autocast += [(i, len(self.order), node.args) for node, i in open_.items()]
        self.autocast.sort(key=lambda one: one[0])  # the innermost counts: it is entered last

    def autocast_around(self, node: fx.Node) -> list[tuple[int, int, tuple[Any, ...]]]:
        return [(begin, end, args) for begin, end, args in self.autocast if begin < self.order[node] < end]

    def is_written(self, node: fx.Node) -> bool:
        """Whether anything writes to the tensor that a node gives."""
        storage = storage_of(node)
        return storage is None or bool(self.writes.get(storage)) or bool(self.unknown_writes)

    def region(self, anchor: fx.Node, pooling: bool = False) -> Region:
        """The region that ends in `anchor`, which comes last of its nodes.

        Args:
            anchor: its end.
            pooling: whether what pools is looked through, up to a product or a softmax: not how keys are compressed.
        """
        return self._cut(anchor, [anchor], pooling)

    def behind(self, call: fx.Node, operands: list[fx.Node]) -> Region:
        """What operands of a call are made of, as they are when it is made."""
        return self._cut(call, operands)

    def behind_tables(self, call: fx.Node, operands: list[fx.Node]) -> Region:
        """The same of operands that `vmap` may have made, with its levels: enough to run it, not to look into it."""
        region = self._cut(call, operands, may_be_run=_may_be_run)
        levels = [node for node in self.order if is_level(node) and self.order[node] < self.order[call]]
        region.nodes = sorted((*region.nodes, *levels), key=self.order.__getitem__)
        sizes = (x for node in levels for x in node.all_input_nodes)
        region.inputs = list(dict.fromkeys((*region.inputs, *(x for x in sizes if x not in region.nodes))))
        return region

    def _cut(
        self,
        anchor: fx.Node,
        roots: list[fx.Node],
        pooling: bool = False,
        may_be_run: Callable[[fx.Node], bool] | None = None,
    ) -> Region:
        may_be_looked_into = allowed if may_be_run is None else may_be_run
        last, outside = self.order[anchor], roots != [anchor]
        if any(self.order[node] < last for node in self.unknown_writes):
            raise NotUnderstood("something before it writes to a tensor that cannot be told")
        inside: set[fx.Node] = set()
        cut = False
        pending, around = [(node, pooling) for node in roots], self.autocast_around(anchor)
        while pending:
            node, pools = pending.pop()
            pools = pools and function_name(node) not in _ATTENTION
            if node in inside or (node is not anchor and not may_be_looked_into(node) and not (pools and _pools(node))):
                continue
            if self.grad_modes[node] != self.grad_modes[anchor] and _needs_grad(node):
                continue  # made again at the anchor, it would have a gradient
            if outside and getattr(tensor(node), "requires_grad", False):
                continue
            if self.autocast_around(node) != around:
                continue
            touched = {storage_of(node), *map(storage_of, written(node))} - {None}
            if node is not anchor and any(
                self.order[w] < last and not (may_be_looked_into(w) and self.autocast_around(w) == around)
                for storage in touched
                for w in self.writes.get(storage, ())  # type: ignore[arg-type]
            ):
                cut = cut or not _needs_grad(node)
                continue  # as it is after the write
            inside.add(node)
            if len(inside) > _MOST_NODES:
                raise NotUnderstood("the computation around it is too large to be looked into")
            pending += [(x, pools) for x in node.all_input_nodes]
            for storage in touched:
                pending += [
                    (w, pools)
                    for w in self.writes.get(storage, ())  # type: ignore[arg-type]
                    if self.order[w] < last
                ]
        nodes = sorted(inside, key=self.order.__getitem__)
        self._refuse_other_writes(nodes, last)
        inputs: dict[fx.Node, None] = {}
        first_use: dict[int, int] = {}
        for node in nodes:
            for source in node.all_input_nodes:
                if source not in inside:
                    inputs[source] = None
                    storage = storage_of(source)
                    if storage is not None:
                        first_use.setdefault(storage, self.order[node])
        for storage, use in first_use.items():
            if any(use <= self.order[w] < last for w in self.writes.get(storage, ())):
                raise NotUnderstood("one of its inputs is written to in place before it")
        if any(is_batched(tensor(x)) for x in inputs):
            raise NotUnderstood("a part of it is made under torch.vmap in a way that is not looked through")
        context = [args for _, _, args in self.autocast_around(anchor)]
        return Region(nodes, list(inputs), context, cut)

    def _refuse_other_writes(self, nodes: list[fx.Node], last: int) -> None:
        """A write that was left out would be forgotten, but where it comes before all that is looked at."""
        inside, seen = set(nodes), set[int | None]()
        for node in nodes:
            for storage in {storage_of(node), *map(storage_of, written(node))} - seen:
                seen.add(storage)
                writes = self.writes.get(storage, ()) if storage is not None else ()
                if any(self.order[node] < self.order[w] < last and w not in inside for w in writes):
                    raise NotUnderstood(WRITTEN)


@dataclass
class Region:
    """Nodes in order, the last of them the attention, and the nodes that they take from outside."""

    nodes: list[fx.Node]
    inputs: list[fx.Node]
    autocast: list[tuple[Any, ...]]
    is_cut: bool = False  # a mask, as it seems, ends where something writes to it that is not looked through

    def names(self) -> set[str]:
        return {function_name(node) for node in self.nodes}

    def horizons(self) -> frozenset[fx.Node]:
        """Where positions are compared: what a causal mask, a window or a mask of compressed keys is made of."""
        positional: set[fx.Node] = set()
        for node in self.nodes:
            name = function_name(node)
            sources = [] if name.endswith("_like") or name.startswith("new_") else node.all_input_nodes
            if all(x in positional or tensor(x) is None for x in sources):
                positional.add(node)
        return frozenset(node for node in positional if function_name(node).strip("_") in _HORIZONS)

    def may_be_a_band(self) -> bool:
        """Whether its mask may be more than causal: cheap, as it is asked of every attention."""
        found = self.horizons()
        shapes = [x.shape[-2:] for x in map(tensor, found) if x is not None and x.dim() >= 2]
        return len(found) > 1 or any(_size(a) != _size(b) for a, b in shapes)


def _size(n: Any) -> Any:
    """A size without asking whether it is another, which would be a guard."""
    return n if isinstance(n, int) else n.node.expr


def allowed(node: fx.Node) -> bool:
    """Whether a node may be looked into."""
    name = function_name(node)
    if name in ("size", "getattr") and isinstance(node.meta.get("example_value"), torch.Size):
        return True
    if name in ("setitem", "__setitem__"):
        return tensor(node.args[0]) is not None
    if name not in _ALLOWED or tensor(node) is None:
        # of what gives several tensors or a size, the giver is not looked into
        return False
    if name in ("getitem", "getattr") and tensor(node.args[0]) is None:
        return False
    if name in _FLOAT_PRODUCTS:
        tensors = [t for t in map(tensor, node.all_input_nodes) if t is not None]
        return sum(t.is_floating_point() and t.dim() > 0 for t in tensors) < 2 or _is_mask_like(node)
    if name == "getattr":
        return node.args[1] in ("T", "mT")
    return node.op in ("call_function", "call_method")


def _may_be_run(node: fx.Node) -> bool:
    """Whether a node may be part of how block tables are made: of those made under `vmap`, any that gives a tensor."""
    found = tensor(node)
    random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    made = is_batched(found) or function_name(node) in BATCHED | {"argsort"}
    return allowed(node) or (node.op in ("call_function", "call_method") and made and not random)


def _pools(node: fx.Node) -> bool:
    return function_name(node) in _POOLS and tensor(node) is not None


def _needs_grad(node: fx.Node) -> bool:
    return any(t.requires_grad for t in map(tensor, (node, *node.all_input_nodes)) if t is not None)


def _is_mask_like(node: fx.Node) -> bool:
    """A product of two masks that are held as numbers: neither carries a gradient."""
    return not _needs_grad(node)


def trace(
    region: Region,
    results: Iterable[fx.Node],
    fake_mode: Any,
    more: Callable[[dict[fx.Node, Any]], list[Any]] | None = None,
    mode: contextlib.AbstractContextManager[Any] | None = None,
) -> fx.GraphModule:
    """The region as functional ATen: a graph of `inputs` that gives `results`, each with its fake value in `val`.

    Args:
        region: what is traced.
        results: of its nodes and inputs, those wanted.
        fake_mode: that it was captured with.
        more: makes further results of what all nodes gave.
        mode: in which all of it is run.
    """
    wanted = list(results)

    def run(*values: Any) -> Any:
        known: dict[fx.Node, Any] = dict(zip(region.inputs, values, strict=True))
        with mode or contextlib.nullcontext():
            with Levels() as levels:
                for node in region.nodes:
                    if node not in known:
                        known[node] = _run(node, known, levels)
            return [known[node] for node in wanted] + (more(known) if more is not None else [])

    fn: Callable[..., Any] = torch.func.functionalize(run, remove="mutations")
    values = []
    for node in region.inputs:
        value = node.meta.get("example_value", node.meta.get("val"))
        if not isinstance(value, (torch.Tensor, torch.SymInt, int)):
            raise NotUnderstood(f"{node.name}, which goes into it, is a {type(value).__name__}")
        values.append(value.detach() if isinstance(value, torch.Tensor) else value)
    # With the Python dispatcher: in torch 2.11 the C++ decomposition of `matmul` makes constants of dynamic sizes.
    with _autocast(region.autocast), enable_python_dispatcher(), fake_mode, ShapesOnly(), torch.no_grad():
        traced = make_fx(fn, tracing_mode="real")(*values)
    refuse_strides(traced)
    _guard_scattered_rows(traced)
    return traced


def _run(node: fx.Node, known: dict[fx.Node, Any], levels: Levels) -> Any:
    args: Any = fx.node.map_arg(node.args, known.__getitem__)
    kwargs: Any = fx.node.map_arg(node.kwargs, known.__getitem__)
    if (found := levels.call(node, args)) is not NotImplemented:
        return found
    if function_name(node).strip("_") in _NAMED:  # these have no functional form of their own
        return _NAMED[function_name(node).strip("_")](*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _guard_scattered_rows(traced: fx.GraphModule) -> None:
    """A scatter may write a part of the rows; that it writes all of them is a guard where sizes are dynamic."""
    for node in traced.graph.nodes:
        if str(node.target).startswith("aten.scatter"):
            base, dim, at = (x.meta["val"] if isinstance(x, fx.Node) else x for x in node.args[:3])
            for d in range(at.dim()):
                if d != dim % at.dim():
                    guard_equal(at.shape[d], base.shape[d])


def guard_equal(a: Any, b: Any) -> None:
    """A guard that two sizes are equal, if they are."""
    if isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt) and a.node.expr != b.node.expr:
        if a.node.has_hint() and b.node.has_hint() and a.node.hint == b.node.hint:
            bool(a == b)


def guard_at_most(a: Any, b: Any) -> bool:
    """A guard that a size is not more than another, if it is not; whether it is there."""
    hints = [n.node.hint if isinstance(n, torch.SymInt) and n.node.has_hint() else n for n in (a, b)]
    return all(isinstance(n, int) for n in hints) and hints[0] <= hints[1] and bool(a <= b)


def guard_not_empty(size: Any) -> None:
    """A guard that a size is not 0, which what is known of an axis takes for granted."""
    if isinstance(size, torch.SymInt) and size.node.has_hint() and size.node.hint > 0:
        bool(size > 0)


def _autocast(context: list[tuple[Any, ...]]) -> Any:
    stack = contextlib.ExitStack()
    for device_type, dtype, enabled, cache in context:
        stack.enter_context(torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=cache))
    return stack
