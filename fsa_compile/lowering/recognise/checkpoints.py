"""Bodies of checkpointed functions, with what their inputs are made of outside.

A function under `torch.utils.checkpoint` is a graph of its own, in which a mask that was made before is but an input.
While such a body is looked into, what its inputs are made of is copied into it, so that a mask is seen as if it had
been made there. Afterwards everything else uses the inputs again, and all is taken out that no replacement uses: of
the copies nothing as a rule, and of the inputs those, such as block ids, that the body had no need of before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from torch import fx

from .region import Graph, allowed
from .writes import function_name, tensor

__all__ = ["BodyOf", "bodies", "with_what_is_outside"]

BodyOf = Callable[[fx.Graph, str], fx.Graph | None]  # the graph that is an attribute of a graph's module

_CHECKPOINT = "tag_activation_checkpoint"


def bodies(graph: fx.Graph, body_of: BodyOf) -> Iterator[tuple[fx.Node, fx.Graph]]:
    """The calls of checkpointed functions, with their graphs; none that is called twice."""
    calls = [node for node in graph.nodes if function_name(node) == _CHECKPOINT]
    found: list[tuple[fx.Node, fx.Graph]] = []
    for call in calls:
        attribute = call.args[0] if call.args else None
        body = body_of(graph, str(attribute.target)) if isinstance(attribute, fx.Node) else None
        if body is not None:
            found.append((call, body))
    named = [body_of(graph, str(node.target)) for node in graph.nodes if node.op == "get_attr" for _ in node.users]
    for call, body in found:
        if sum(one is body for one in named) == 1:
            yield call, body


@contextlib.contextmanager
def with_what_is_outside(outer: Graph, call: fx.Node, body: fx.Graph) -> Iterator[dict[fx.Node, fx.Node]]:
    """Inside, the body holds what its inputs are made of; gives the originals of these copies.

    There are none where no input has anything behind it that may be looked into.
    """
    added = _Added(outer, call, body)
    try:
        yield added.originals
    finally:
        added.take_out()


class _Added:
    """What was put into a body, and into the operands of its call."""

    def __init__(self, outer: Graph, call: fx.Node, body: fx.Graph) -> None:
        self.call = call
        self.originals: dict[fx.Node, fx.Node] = {}
        self.lifted: dict[fx.Node, fx.Node] = {}  # the copy of what an input is
        self.inputs: list[fx.Node] = []  # new ones, whose operands are the call's last
        given, operands = body.find_nodes(op="placeholder"), call.args[1:]
        if len(given) != len(operands):
            return
        inside = Graph(body)
        lifted = {
            x: operand
            for x, operand in zip(given, operands, strict=True)
            if isinstance(operand, fx.Node) and _may_be_a_mask(x, operand) and not inside.is_written(x)
        }
        region = outer.behind(call, list(lifted.values()))
        if not region.nodes or "dropout" in region.names():
            return  # a copy would draw other numbers
        known: dict[fx.Node, fx.Node] = {
            operand: x for x, operand in zip(given, operands, strict=True) if isinstance(operand, fx.Node)
        }
        start = next(node for node in body.nodes if node.op != "placeholder")
        with body.inserting_before(start):
            for source in region.inputs:
                if source not in known:
                    known[source] = body.placeholder(f"{source.name}_of_outside")
                    known[source].meta.update(
                        {name: source.meta[name] for name in ("example_value", "val") if name in source.meta}
                    )
                    self.inputs.append(known[source])
                    call.args = (*call.args, source)
            for node in region.nodes:
                known[node] = copy = body.node_copy(node, known.__getitem__)
                self.originals[copy] = node
        for x, operand in lifted.items():
            self.lifted[x] = known[operand]
            x.replace_all_uses_with(known[operand])

    def take_out(self) -> None:
        copies = self.originals
        for x, copy in self.lifted.items():
            copy.replace_all_uses_with(x, delete_user_cb=lambda user: user not in copies)
        if all(user in copies for copy in copies for user in copy.users):
            for copy in reversed(copies):
                copy.graph.erase_node(copy)
        operands = list(self.call.args)
        first = len(operands) - len(self.inputs)
        kept = [operand for x, operand in zip(self.inputs, operands[first:], strict=True) if x.users]
        for x in self.inputs:
            if not x.users:
                x.graph.erase_node(x)
        self.call.args = (*operands[:first], *kept)


def _may_be_a_mask(x: fx.Node, operand: fx.Node) -> bool:
    found = tensor(x)
    return found is not None and not found.requires_grad and allowed(operand) and bool(x.users)
