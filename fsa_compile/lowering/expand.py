"""Joint-graph pass: a semantic operator becomes the loop-order operators that the cost model chose.

The sequence of operators that eager CUDA runs is traced on the node's fake tensors and takes the node's place, so
that eager and compiled code cannot drift apart. Equal nodes are made once: forward and backward share the per-block
lists. No length is guarded, and nothing here may break a user's model: whatever is not understood stays as it is.
"""

from __future__ import annotations

import functools
import logging
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from .. import cost, debug
from ..ops.dispatch import implementation
from ..ops.rules import RULES, Rule
from ..ops.schema import bound_arguments
from .deltas import take_deltas_early
from .sites import Site, report
from .where import where_of

__all__ = ["expand_graph", "semantic_operators"]

log = logging.getLogger(__name__)

# Facts about the replaced call itself, wrong for the calls that replace it.
_OWN_META = frozenset(("val", "tensor_meta", "eager_input_vals", "example_value", "unbacked_bindings"))
_MADE = "fsa_compile"
_MUST_KEEP = frozenset(("MUST_SAVE", "PREFER_SAVE"))


def expand_graph(graph: fx.Graph) -> None:
    """Replace the semantic operators of ``graph`` that run on CUDA."""
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "fsa":
            _spell_out(node)
    rules = _rules()
    nodes = [n for n in graph.nodes if n.op == "call_function" and n.target in rules]
    if not nodes:
        return
    expansion = _Expansion(graph, rules)
    for node in nodes:
        try:
            site = expansion.replace(node)
        except Exception as error:
            log.warning("%s stays as it is: %s: %s", node.target, type(error).__name__, error, exc_info=True)
            site = _site(node, False, reason=f"not lowered: {type(error).__name__}: {error}")
        log.info("%s", site)
        report(site)
    try:
        take_deltas_early(graph)
    except Exception as error:
        log.warning("deltas stay where they are: %s: %s", type(error).__name__, error, exc_info=True)


def _rules() -> dict[Any, Rule]:
    """Each semantic operator that a rule says how to run."""
    return {getattr(torch.ops.fsa, name).default: rule for name, rule in RULES.items()}


def semantic_operators() -> tuple[torch._ops.OpOverload, ...]:
    """The operators that the pass replaces."""
    return tuple(_rules())


def _site(node: fx.Node, matched: bool, choice: cost.Choice | None = None, reason: str = "") -> Site:
    return Site(
        op=str(node.target._schema.name).removesuffix("_forward"),  # type: ignore[union-attr]
        matched=matched,
        loop_order=choice.order if choice else None,
        costs=dict(choice.costs) if choice else {},
        reason=choice.reason if choice else reason,
        where=where_of(node),
    )


def _bound(node: fx.Node) -> dict[str, Any]:
    return bound_arguments(node.target, node.args, node.kwargs)  # type: ignore[arg-type]


def _identity(rule: Rule, bound: dict[str, Any]) -> tuple[Any, ...]:
    """What a forward and its backward have in common."""
    return (rule.op.rsplit("_", 1)[0], *(bound.get(name) for name in rule.shared))


def _spell_out(node: fx.Node) -> None:
    """Give a call the numbers that it leaves to their defaults.

    Tracing drops a keyword that has its default's value, and up to torch 2.13 AOTInductor miscounts the integers of a
    call that lacks one (pytorch/pytorch#194261).
    """
    schema = node.target._schema  # type: ignore[union-attr]
    defaults = {a.name: a.default_value for a in schema.arguments if a.kwarg_only and isinstance(a.default_value, int)}
    node.kwargs = {**defaults, **node.kwargs}


def _value(x: Any) -> Any:
    return x.meta["val"] if isinstance(x, fx.Node) else x


@functools.cache
def _implementation(rule: Rule) -> Callable[..., Any]:
    """A rule's implementation with the operator's own arguments."""
    return implementation(rule.op, rule.fn, values=False)


def _equate(old: Any, new: Any) -> None:
    """Sizes that were the operator's own, as an exported compression has them, are now told by those of its inputs."""
    for a, b in zip(pytree.tree_leaves(old), pytree.tree_leaves(new), strict=True):
        for have, want in zip(a.shape, b.shape, strict=True):
            torch._check(have == want)


class _Expansion:
    def __init__(self, graph: fx.Graph, rules: dict[Any, Rule]) -> None:
        self.graph, self.rules = graph, rules
        self.made: dict[Any, fx.Node] = {}  # equal calls are made once
        backwards = [n for n in graph.nodes if n.op == "call_function" and n.target in rules]
        self.trained = {_identity(rules[n.target], _bound(n)) for n in backwards if rules[n.target].is_backward}

    def replace(self, node: fx.Node) -> Site:
        rule, bound = self.rules[node.target], _bound(node)
        values = pytree.tree_map(_value, bound)
        first = next(x for x in values.values() if isinstance(x, torch.Tensor))
        if first.device.type != "cuda":
            choice = self._choose(rule, bound, values)
            reason = f"runs on {first.device.type}" + (f": {choice.reason}" if choice else "")
            return _site(node, False, reason=reason)
        if debug.is_validating():
            return _site(node, False, reason="fsa_compile.debug validates, which only the eager operator does")
        if len(node.target._schema.returns) > 1 and any(u.target is not operator.getitem for u in node.users):  # type: ignore[union-attr]
            return _site(node, False, reason="its results are used as one tuple")
        choice = self._choose(rule, bound, values)
        from . import emit

        emit.register()
        if choice is not None:
            bound["loop_order"] = choice.order
        traced = _trace(_implementation(rule), bound, first.fake_mode)  # type: ignore[attr-defined]
        if node.meta.get("unbacked_bindings"):
            _equate(node.meta["val"], pytree.tree_map(_value, traced.graph.output_node().args[0]))
        self._inline(node, bound, traced)
        return _site(node, True, choice)

    def _choose(self, rule: Rule, bound: dict[str, Any], values: dict[str, Any]) -> cost.Choice | None:
        """By direction. A forward whose backward is in the graph too leaves it the lists."""
        if rule.choose is None:
            return None
        training = not rule.is_backward and _identity(rule, bound) in self.trained
        return rule.choose(values, training=training, backward=rule.is_backward)

    def _inline(self, node: fx.Node, bound: dict[str, Any], traced: fx.GraphModule) -> None:
        sources = iter([x for x in pytree.tree_leaves(bound) if isinstance(x, fx.Node)])
        env: dict[fx.Node, Any] = {}
        results: Any = ()
        if any(n.op not in ("placeholder", "call_function", "output") for n in traced.graph.nodes):
            raise NotImplementedError("the implementation holds constants or submodules")
        with self.graph.inserting_before(node):
            for n in traced.graph.nodes:
                if n.op == "placeholder":
                    env[n] = next(sources)
                elif n.op == "output":
                    results = fx.node.map_arg(n.args[0], env.__getitem__)
                else:
                    env[n] = self._make(node, n, env)
        if isinstance(results, fx.Node):  # one result, and not a tuple of it
            node.replace_all_uses_with(results)
            results = (results,)
        keep = {n for n in results if isinstance(n, fx.Node)}
        for n in env.values():
            policy = n.meta.get("recompute") if n.op == "call_function" and n.meta.get(_MADE) else None
            if policy is not None and n not in keep and policy.name in _MUST_KEEP:
                del n.meta["recompute"]  # a policy that keeps the operator's results does not ask for its temporaries
        for user in list(node.users):
            user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
            self.graph.erase_node(user)
        self.graph.erase_node(node)

    def _make(self, old: fx.Node, n: fx.Node, env: dict[fx.Node, Any]) -> fx.Node:
        args = fx.node.map_arg(n.args, env.__getitem__)
        kwargs = fx.node.map_arg(n.kwargs, env.__getitem__)
        key = (n.target, *_hashable(args), *_hashable(kwargs)) if _is_pure(n.target) else None
        if key is not None and key in self.made:
            return self.made[key]
        new = self.graph.call_function(n.target, args, kwargs)  # type: ignore[arg-type]
        new.meta = {name: value for name, value in old.meta.items() if name not in _OWN_META}
        new.meta.update({name: n.meta[name] for name in ("val", "tensor_meta") if name in n.meta})
        new.meta[_MADE] = True
        self.made[key if key is not None else new] = new
        return new


def _hashable(x: Any) -> tuple[Any, ...]:
    leaves, spec = pytree.tree_flatten(x)
    return (spec, *((type(leaf), leaf) for leaf in leaves))


def _is_pure(target: Any) -> bool:
    if target is operator.getitem:
        return True
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return target in (operator.add, operator.sub, operator.mul, operator.floordiv)
    return torch.Tag.nondeterministic_seeded not in target.tags and not target._schema.name.startswith("aten::empty")


def _trace(fn: Callable[..., Any], bound: dict[str, Any], fake_mode: Any) -> fx.GraphModule:
    """``fn(**bound)`` as a graph whose placeholders are the nodes in ``bound``, in order."""
    leaves, spec = pytree.tree_flatten(bound)
    where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, fx.Node)]

    def call(*values: Any) -> Any:
        filled = list(leaves)
        for i, value in zip(where, values, strict=True):
            filled[i] = value
        return fn(**pytree.tree_unflatten(filled, spec))

    with fake_mode, torch.no_grad():
        return make_fx(call, tracing_mode="real")(*(leaves[i].meta["val"] for i in where))
