"""FlexAttention: a call with the mask that its `mask_mod` is, if its block tables are provably made of that.

`flex_attention` applies the `mask_mod` in the blocks that its tables list as partial, nothing in those that they list
as full, and hides all others. So it is attention with the mask that `mask_mod` is, element by element, only if the
tables are what `create_block_mask` makes of it. That is proven by making them again: both are traced, and must be the
same operators of the same tensors.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.nn.attention.flex_attention import create_block_mask, create_mask
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .evaluate import NotUnderstood
from .region import Graph, Region, _autocast, guard_equal, trace
from .shapes import reads_strides
from .writes import function_name, tensor

__all__ = ["MASK", "Flex", "Outside", "bound_flex", "key_of", "require_tables_of_mask_mod", "with_mask"]

MASK = "mask_of_flex_attention"

_COMPARISONS = frozenset("lt le gt ge less less_equal greater greater_equal abs".split())
_NO_BLOCKS = 1 << 30  # a block size: there is one block, as there is no BlockMask
_NUM_TABLES = 8
_OUTSIDE = (
    "its BlockMask is made outside of the compiled function, where its block tables are not known: call "
    "create_block_mask inside of it, with the ids as its input"
)
_BY_HAND = (
    "its BlockMask is not provably what create_block_mask makes of its mask_mod: block tables decide where the "
    "mask_mod counts, so make them with create_block_mask, of the same mask_mod and tensors"
)


@dataclass
class Flex:
    """A call of `flex_attention`, taken apart."""

    node: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    scale: float
    mask_mod: fx.GraphModule
    buffers: tuple[Any, ...]  # that the mask_mod takes besides its four indices
    lengths: tuple[Any, Any]  # that its BlockMask was made for
    tables: tuple[Any, ...]
    block_size: tuple[Any, Any]
    outputs: list[fx.Node]  # that take its first result


@dataclass
class Outside:
    """Of a call in the body of a checkpointed function: the graph around that, and what the body's nodes are there."""

    graph: Graph
    call: fx.Node  # of the checkpointed function
    nodes: dict[fx.Node, Any]

    def of(self, some: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(self.nodes.get(x, x) if isinstance(x, fx.Node) else x for x in some)


def key_of(x: Flex, outside: Outside | None) -> frozenset[fx.Node]:
    """The same for the layers that share a BlockMask."""
    some = (*x.tables, *x.buffers)
    return frozenset(n for n in (some if outside is None else outside.of(some)) if isinstance(n, fx.Node))


def bound_flex(node: fx.Node) -> Flex:
    """The call's parts; raises `NotUnderstood` where they alone tell that it is not to be replaced."""
    q, k, v, score_mod, tables, scale, _, _, mask_buffers = _arguments(node)
    outputs = [user for user in node.users if function_name(user) == "getitem" and user.args[1] == 0]
    if any(user not in outputs and (user.users or function_name(user) != "getitem") for user in node.users):
        raise NotUnderstood("its log-sum-exp or its maximum is used too")
    module = node.graph.owning_module
    mask_mod, score = (getattr(module, str(getattr(x, "target", "")), None) for x in (tables[-1], score_mod))
    if not isinstance(mask_mod, fx.GraphModule) or not isinstance(score, fx.GraphModule):
        raise NotUnderstood("its mask_mod was not captured")
    if reads_strides(mask_mod.graph):
        raise NotUnderstood("its mask_mod depends on how tensors lie in memory")
    if isinstance(tables[-2], int) and tables[-2] >= _NO_BLOCKS:
        raise NotUnderstood("dense attention, not NSA: it has no block_mask")
    compared = sum(function_name(x).strip("_") in _COMPARISONS for x in mask_mod.graph.nodes)
    if compared < 2 and not any(isinstance(x, fx.Node) and tensor(x) is not None for x in mask_buffers):
        raise NotUnderstood("dense attention, not NSA: nothing in its mask_mod is made of block ids, nor is it a band")
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise NotUnderstood("its scale is not a constant")
    scale *= _factor(score)
    found = Flex(
        node, q, k, v, scale, mask_mod, tuple(mask_buffers), (tables[0], tables[1]),
        tuple(tables[2 : 2 + _NUM_TABLES]), (tables[-3], tables[-2]), outputs,
    )  # fmt: skip
    _require_sizes(found)
    return found


def _arguments(node: fx.Node) -> list[Any]:
    names = (
        "query", "key", "value", "score_mod", "block_mask", "scale", "kernel_options", "score_mod_other_buffers",
        "mask_mod_other_buffers",
    )  # fmt: skip
    found: dict[str, Any] = dict.fromkeys(names, ())
    found.update(zip(names, node.args, strict=False))
    found.update(node.kwargs)
    tables = found["block_mask"]
    if not isinstance(tables, tuple) or len(tables) < _NUM_TABLES + 5 or not isinstance(tables[-1], fx.Node):
        raise NotUnderstood("its block_mask is not laid out as is known of this release of PyTorch")
    if not all(isinstance(found[name], fx.Node) and tensor(found[name]) is not None for name in names[:3]):
        raise NotUnderstood("its operands are constants")
    return list(found.values())


def _factor(score_mod: fx.GraphModule) -> float:
    """What a score_mod multiplies scores by, if it does nothing else."""
    given = score_mod.graph.find_nodes(op="placeholder")
    (output,) = score_mod.graph.find_nodes(op="output")
    x: Any = output.args[0]
    x = x[0] if isinstance(x, (tuple, list)) and len(x) == 1 else x
    by = 1.0
    while isinstance(x, fx.Node) and x is not given[0]:
        name, args = function_name(x), x.args
        if name == "mul" and len(args) == 2 and isinstance(args[0], (int, float)):
            args = args[::-1]
        number = args[1] if name in ("mul", "truediv", "div") and len(args) == 2 and not x.kwargs else None
        if not isinstance(number, (int, float)) or isinstance(number, bool) or number <= 0:
            break
        by = by * number if name == "mul" else by / number
        x = args[0]
    if x is not given[0]:
        raise NotUnderstood("its score_mod changes scores other than by a positive constant: leave it out")
    return by


def _require_sizes(x: Flex) -> None:
    """Sizes that `flex_attention` itself requires, and which axes the tables share."""
    q, k, v = (tensor(one) for one in (x.q, x.k, x.v))
    assert q is not None
    assert k is not None
    assert v is not None
    if any(one.dim() != 4 for one in (q, k, v)):
        raise NotUnderstood("its operands do not have four axes")
    lengths = [n.meta.get("example_value") if isinstance(n, fx.Node) else n for n in x.lengths]
    pairs = [(lengths[0], q.shape[2]), (lengths[1], k.shape[2]), (k.shape[2], v.shape[2])]
    for a, b in (*pairs, (q.shape[0], k.shape[0]), (k.shape[0], v.shape[0])):
        guard_equal(a, b)
        if not _is(a, b):
            raise NotUnderstood(f"its operands or its BlockMask are not of one batch or length: {a} and {b}")
    table = tensor(x.tables[0])
    if table is None or table.dim() != 3:
        raise NotUnderstood(_BY_HAND)
    indices = x.mask_mod.graph.find_nodes(op="placeholder")[:2]
    for n, of, index, name in zip(table.shape, q.shape, indices, ("batch", "head"), strict=False):
        read = any(function_name(user) not in ("new_ones", "new_zeros") for user in index.users)  # as `and_masks` does
        if _is(n, of) or (_is(n, 1) and not read):
            continue
        raise NotUnderstood(
            f"its BlockMask has {n} of {of} on the {name} axis, which its mask_mod depends on: give create_block_mask "
            "the numbers of sequences and of query heads"
        )


def _is(a: Any, b: Any) -> bool:
    """Equality that needs no guard."""
    a, b = (n.node.expr if isinstance(n, torch.SymInt) else n for n in (a, b))
    return bool(a == b)


def _refuse_autocast(x: Flex, graph: Graph) -> None:
    """Whether autocast casts its operands differs between releases of PyTorch; it does those of the operators."""
    out = x.node.meta["example_value"][0]
    with _autocast([args for _, _, args in graph.autocast_around(x.node)]):
        casts = torch.is_autocast_enabled(out.device.type)
        dtype = torch.get_autocast_dtype(out.device.type) if casts else out.dtype
    operands = [one.dtype for one in map(tensor, (x.q, x.k, x.v)) if one is not None]
    if out.dtype != dtype or (not casts and set(operands) != {dtype}):
        raise NotUnderstood(f"it is computed in {out.dtype} of {operands[0]}, under autocast to {dtype}")


# ---- the mask ----


class _Indexing(TorchFunctionMode):
    """Indexing by tensors as the compiler shows it, which asks for no numbers and is no function of autograd."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__:
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            if all(isinstance(place, torch.Tensor) for place in places):
                return torch.ops.aten.index(args[0], list(places))
        return func(*args, **(kwargs or {}))


def _mask_mod(x: Flex, buffers: tuple[Any, ...]) -> Callable[..., Any]:
    def mask_mod(b: Any, h: Any, i: Any, j: Any) -> Any:
        with _Indexing():
            return x.mask_mod(b, h, i, j, *buffers)

    return mask_mod


def with_mask(graph: fx.Graph, x: Flex, fake_mode: Any) -> tuple[fx.Node, fx.Node]:
    """A mask and `scaled_dot_product_attention` with it before the call; nothing uses them."""

    def mask(q: torch.Tensor, k: torch.Tensor, *buffers: Any) -> torch.Tensor:
        (batch, heads, length, _), length_k = q.shape, k.shape[2]
        # Sizes are ints or symbolic ones, either of which it takes.
        return create_mask(_mask_mod(x, buffers), batch, heads, length, length_k, q.device)

    mask.__name__ = MASK
    mask_args = (x.q, x.k, *x.buffers)
    q, k = tensor(x.q), tensor(x.k)
    assert q is not None
    assert k is not None
    with fake_mode:  # whether it is a truth value is seen where it is traced
        value = torch.empty(*q.shape[:3], k.shape[2], dtype=torch.bool, device=q.device)
    with graph.inserting_before(x.node):
        made = graph.call_function(mask, mask_args)
        options: dict[str, Any] = {"scale": x.scale, "enable_gqa": not _is(q.shape[1], k.shape[1])}
        call = graph.call_function(F.scaled_dot_product_attention, (x.q, x.k, x.v, made), options)
    made.meta["example_value"] = value
    call.meta.update(x.node.meta)
    call.meta["example_value"] = x.node.meta["example_value"][0]
    return made, call


# ---- the tables ----


def require_tables_of_mask_mod(graph: Graph, x: Flex, outside: Outside | None, fake_mode: Any) -> None:
    """That the tables are those of `create_block_mask`; raises `NotUnderstood` where that is not proven."""
    _refuse_autocast(x, graph)
    anchor = x.node
    tables, buffers, sizes = x.tables, x.buffers, (*x.lengths, *x.block_size)
    if outside is not None and any(_is_given(n) or n in outside.nodes for n in tables):
        graph, anchor = outside.graph, outside.call
        tables, buffers, sizes = map(outside.of, (tables, buffers, sizes))
    if any(_is_given(one) for one in tables):
        raise NotUnderstood(_OUTSIDE)
    if any(isinstance(n, fx.Node) and n not in graph.order for n in (*tables, *buffers, *sizes)):
        raise NotUnderstood("a part of its BlockMask is made inside of a checkpointed function and a part outside")
    given = [one for one in tables if isinstance(one, fx.Node)]
    wanted = [*given, *(one for one in buffers if isinstance(one, fx.Node))]
    region = graph.behind_tables(anchor, wanted)
    others = (n for n in (*wanted, *sizes) if isinstance(n, fx.Node) and n not in region.nodes)
    region = Region(region.nodes, list(dict.fromkeys((*region.inputs, *others))), region.autocast)

    def again(known: dict[fx.Node, Any]) -> list[Any]:
        table = known[given[0]]
        length, length_k, *block_size = (known[n] if isinstance(n, fx.Node) else n for n in sizes)
        mask_mod = _mask_mod(x, tuple(known[n] if isinstance(n, fx.Node) else n for n in buffers))
        options: dict[str, Any] = {} if x.tables[2] is not None else {"separate_full_blocks": False}
        if any(name not in inspect.signature(create_block_mask).parameters for name in options):
            raise NotUnderstood(_BY_HAND)
        made = create_block_mask(
            mask_mod, table.shape[0], table.shape[1], length, length_k, table.device, tuple(block_size), **options
        ).as_tuple()[2 : 2 + _NUM_TABLES]
        if [one is None for one in made] != [one is None for one in tables]:
            raise NotUnderstood(_BY_HAND)
        return [one for one in made if one is not None]

    traced = trace(region, given, fake_mode, again, _Once())
    (output,) = traced.graph.find_nodes(op="output")
    numbers = _numbered(traced.graph)
    results: Any = output.args[0]
    if any(_mutates(n) for n in traced.graph.nodes):
        raise NotUnderstood("its block tables are written to in a way that is not looked through")
    if [numbers[n] for n in results[: len(given)]] != [numbers[n] for n in results[len(given) :]]:
        raise NotUnderstood(_BY_HAND)


def _is_given(x: Any) -> bool:
    return isinstance(x, fx.Node) and x.op in ("placeholder", "get_attr")


def _mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _is_function(target: Any) -> bool:
    """Whether it gives the same for the same operands."""
    if target is operator.getitem:
        return True
    known = isinstance(target, torch._ops.OpOverload) and target.namespace == "aten"
    return known and "empty" not in str(target) and torch.Tag.nondeterministic_seeded not in target.tags


class _Once(TorchDispatchMode):
    """What was computed of the same operands is not computed again: most of the second of two equal computations.

    With dynamic sizes, a fake tensor's operators take milliseconds each. Equal results are one tensor, so that nothing
    may be written to: it is for what `functionalize` makes of a program.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[Any, Any] = {}
        self._numbers: dict[int, tuple[int, Any]] = {}  # by identity, with the tensors, which have to live on

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            raise NotUnderstood(f"{func} is not functional")
        if not _is_function(func):
            return func(*args, **kwargs)
        key = str(func), _plain(args, self), _plain(kwargs, self)
        if key not in self._known:
            self._known[key] = func(*args, **kwargs)
        elif any(result.alias_info for result in func._schema.returns):
            return self._another(self._known[key], func(*args, **kwargs))
        return self._known[key]

    def _another(self, known: Any, found: Any) -> Any:
        """The result of an operator that gives views, which have to be new ones; they count as those known."""
        for old, new in zip(pytree.tree_leaves(known), pytree.tree_leaves(found), strict=True):
            self._numbers[id(new)] = self[old], new
        return found

    def __getitem__(self, x: torch.Tensor) -> int:
        return self._numbers.setdefault(id(x), (len(self._numbers), x))[0]


def _numbered(graph: fx.Graph) -> dict[fx.Node, Any]:
    """A number for each node, the same for two that are the same operator of the same operands."""
    numbers: dict[fx.Node, Any] = {}
    seen: dict[Any, int] = {}
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, (torch.SymInt, torch.SymBool, torch.SymFloat)):
            numbers[node] = ("size", str(value.node.expr))
            continue
        key: Any = ("itself", node.name)
        if _is_function(node.target):
            key = (str(node.target), _plain(node.args, numbers), _plain(node.kwargs, numbers))
        numbers[node] = seen.setdefault(key, len(seen))
    return numbers


def _plain(x: Any, numbers: Any) -> Any:
    """Arguments as something that can be compared, numbers of different types not being one."""
    if isinstance(x, (fx.Node, torch.Tensor)):
        found = numbers[x]
        return found if isinstance(found, tuple) else ("node", found)
    if isinstance(x, (tuple, list)):
        return tuple(_plain(one, numbers) for one in x)
    if isinstance(x, dict):
        return tuple((name, _plain(x[name], numbers)) for name in sorted(x))
    if isinstance(x, torch.SymInt):
        return "size", str(x.node.expr)
    return type(x).__name__, str(x)
