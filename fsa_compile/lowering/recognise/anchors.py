"""Pre-grad pass: attention with a mask, or a softmax between two products, becomes an operator if proven.

Nothing here may break a user's model or change its meaning: what is not understood stays as it is, whatever goes wrong.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import disable_fake_tensor_cache

from ..sites import Site, report, retract
from ..switch import is_recognising
from ..where import where_of
from . import lookups, values  # their rules register themselves
from .build import Builder
from .checkpoints import BodyOf, bodies, with_what_is_outside
from .evaluate import Evaluator, NotUnderstood
from .flex import MASK, Flex, Outside, bound_flex, key_of, require_tables_of_mask_mod, with_mask
from .prove import prove
from .region import BLOCKWISE, WRITTEN, Graph, Region, guard_equal, trace
from .rewrite import rewrite
from .scores import Pieces, of_call, of_term
from .writes import function_name, tensor

__all__ = ["preview", "recognise_graph"]

log = logging.getLogger(__name__)
assert lookups, values

_CALL = "scaled_dot_product_attention"
_FLEX = "flex_attention"
_SOFTMAX = "softmax, then matmul"
_PRODUCTS = frozenset(("matmul", "bmm", "einsum", "__matmul__", "baddbmm"))
_BETWEEN = frozenset(
    "to type type_as float half bfloat16 double dropout view reshape unflatten flatten permute transpose expand "
    "contiguous unsqueeze squeeze clone nan_to_num masked_fill where mul getitem".split()
)
_HOPS = 6
_Refused = dict[frozenset[fx.Node], str]  # why, by where a mask compares positions
# What was said of a call or softmax, and whether it was seen with what its checkpointed function is given.
_told: weakref.WeakKeyDictionary[fx.Graph, dict[fx.Node, tuple[Site, bool]]] = weakref.WeakKeyDictionary()


def recognise_graph(graph: fx.Graph) -> list[Site]:
    """Replace the attention of `graph` that is provably selected attention, and say what became of each.

    Checkpointed functions in it, whose graphs the compiler shows on their own too, are looked into with what they are
    given; what was said of them without it is taken back.
    """
    sites = []
    for where, source, site in _recognised(graph, _attribute, {}, {}):
        told = _told.setdefault(where, {})
        before, with_inputs = told.get(source, (None, False))
        if where is graph and with_inputs:
            continue
        if before is not None:
            retract(before)
        told[source] = site, where is not graph
        log.info("%s", site)
        report(site)
        sites.append(site)
    return sites


def preview(module: fx.GraphModule) -> Iterator[tuple[fx.Graph, dict[fx.Node, str]]]:
    """Copies of a module's graphs as the pass would leave them, and why each call or softmax that is left was left."""
    graphs: dict[str, fx.Graph] = {}
    for path, one in module.named_modules():
        if isinstance(one, fx.GraphModule):
            graphs[path] = fx.Graph(one)
            graphs[path].output(graphs[path].graph_copy(one.graph, {}))
    paths = {graph: path for path, graph in graphs.items()}
    reasons: dict[fx.Node, str] = {}
    for graph in graphs.values() if is_recognising() else ():
        for _, source, site in _recognised(
            graph, lambda of, name: graphs.get(f"{paths[of]}.{name}".strip(".")), {}, {}
        ):
            if not site.matched:
                reasons.setdefault(source, site.reason)
    for graph in graphs.values():
        yield graph, reasons


def _attribute(graph: fx.Graph, name: str) -> fx.Graph | None:
    found = getattr(graph.owning_module, name, None)
    return found.graph if isinstance(found, fx.GraphModule) else None


def _recognised(
    graph: fx.Graph,
    body_of: BodyOf,
    originals: Mapping[fx.Node, fx.Node],
    refused: _Refused,
    outside: Outside | None = None,
) -> Iterator[tuple[fx.Graph, fx.Node, Site]]:
    """Sites, each with its graph and its call or softmax.

    Args:
        graph: what is looked at.
        body_of: finds the graphs of checkpointed functions.
        originals: of nodes that were copied into it.
        refused: what was found already.
        outside: of the body of a checkpointed function.
    """
    state: Graph | None = None
    for anchor, kind, source in list(_anchors(graph)):
        matched, reason = False, ""
        try:
            state = Graph(graph) if state is None else state
            with _without_cache(anchor):
                if kind == _FLEX:
                    state, flex = None, bound_flex(anchor)
                    reason = _replace_flex(graph, flex, refused, outside)
                else:
                    reason = _replace(state, anchor, kind, refused, originals)
            matched, state = True, None
        except NotUnderstood as why:
            reason = str(why)
        except Exception as error:
            log.warning("%s stays as it is: %s: %s", kind, type(error).__name__, error, exc_info=True)
            reason = f"could not be looked into: {type(error).__name__}: {error}"
        yield graph, source, Site(kind, matched, None, reason=reason, where=where_of(source))
    for call, body in bodies(graph, body_of):
        if not any(True for _ in _anchors(body)):
            continue
        try:
            state = Graph(graph) if state is None else state
            with with_what_is_outside(state, call, body) as copied:
                given = dict(zip(body.find_nodes(op="placeholder"), call.args[1:], strict=False))
                around = Outside(state, call, {**given, **copied})
                found = list(_recognised(body, body_of, copied, refused, around)) if copied else []
        except NotUnderstood as why:
            log.debug("what a checkpointed function is given is not looked into: %s", why)
        except Exception as error:
            log.warning("a checkpointed function stays as it is: %s", error, exc_info=True)
        else:
            if any(site.matched for _, _, site in found) and body.owning_module is not None:
                body.owning_module.recompile()
            yield from found


def _without_cache(anchor: fx.Node) -> contextlib.AbstractContextManager[None]:
    """Where fake tensors do not keep what an operator gave: with dynamic sizes that takes longer than to run it.

    What is made here is made once.
    """
    modes = (getattr(tensor(node), "fake_mode", None) for node in (anchor, *anchor.all_input_nodes))
    mode = next((mode for mode in modes if mode is not None), None)
    return contextlib.nullcontext() if mode is None else disable_fake_tensor_cache(mode)


def _anchors(graph: fx.Graph) -> Iterator[tuple[fx.Node, str, fx.Node]]:
    """What may be replaced, its kind, and the call or softmax."""
    for node in graph.nodes:
        name = function_name(node)
        if name == _CALL:
            yield node, _CALL, node
        elif name == _FLEX and node.op == "call_function":
            yield node, _FLEX, node
        elif name == "softmax":
            for product in _products(node):
                yield product, _SOFTMAX, node


def _products(softmax: fx.Node) -> Iterator[fx.Node]:
    """The products that take the probabilities, a few casts and views on."""
    seen: set[fx.Node] = set()
    frontier = [softmax]
    for _ in range(_HOPS):
        following: list[fx.Node] = []
        for node in frontier:
            for user in node.users:
                name = function_name(user)
                if user in seen:
                    continue
                seen.add(user)
                if name in _PRODUCTS:
                    yield user
                elif name in _BETWEEN:
                    following.append(user)
        frontier = following


def _replace_flex(graph: fx.Graph, flex: Flex, refused: _Refused, outside: Outside | None) -> str:
    """Replace one call of `flex_attention`, by way of a call with a mask; raises `NotUnderstood` where it stays."""
    key = key_of(flex, outside)
    if key in refused:  # the same BlockMask, in every layer of a model
        raise NotUnderstood(refused[key])
    fake_mode = getattr(tensor(flex.q), "fake_mode", None)
    if fake_mode is None:
        raise NotUnderstood("its operands were not captured")
    try:
        require_tables_of_mask_mod(Graph(graph), flex, outside, fake_mode)
        mask, call = with_mask(graph, flex, fake_mode)
        try:
            new, words = _replacement(Graph(graph), call, _CALL, {}, {})
        finally:
            graph.erase_node(call)
            graph.erase_node(mask)
    except NotUnderstood as why:
        refused[key] = str(why)
        raise
    for output in flex.outputs:
        output.replace_all_uses_with(new)
    for user in list(flex.node.users):
        graph.erase_node(user)
    graph.erase_node(flex.node)
    return words


def _replace(graph: Graph, anchor: fx.Node, kind: str, refused: _Refused, originals: Mapping[fx.Node, fx.Node]) -> str:
    """Replace one anchor; raises `NotUnderstood` where it stays."""
    new, words = _replacement(graph, anchor, kind, refused, originals)
    anchor.replace_all_uses_with(new)
    anchor.graph.erase_node(anchor)
    return words


def _replacement(
    graph: Graph, anchor: fx.Node, kind: str, refused: _Refused, originals: Mapping[fx.Node, fx.Node]
) -> tuple[fx.Node, str]:
    """What gives what the anchor gives, and words about it; raises `NotUnderstood` where it stays."""
    call = _bound_call(anchor) if kind == _CALL else None
    region = graph.region(anchor)
    compared: frozenset[fx.Node] | None = None
    if not region.names() & (BLOCKWISE | {MASK}):
        compared = frozenset(originals.get(node, node) for node in region.horizons())
        if not region.may_be_a_band():
            dense = "dense attention, not NSA: nothing in its mask is made of block ids, nor is it a band"
            raise NotUnderstood(WRITTEN if region.is_cut else dense)
        if compared in refused:  # the same mask, in every layer of a dense model
            raise NotUnderstood(refused[compared])
    fake_mode = getattr(tensor(anchor), "fake_mode", None)
    if fake_mode is None:
        raise NotUnderstood("its value was not captured")
    ev = Evaluator(getattr(fake_mode.shape_env, "guards", ()))
    try:
        traced, pieces = _pieces(ev, region, anchor, call, fake_mode)
        proof = prove(pieces)
    except NotUnderstood as why:
        if compared is not None:
            refused[compared] = str(why)
        raise
    builder = Builder(ev, anchor, region, traced, fake_mode)
    try:
        return rewrite(proof, builder, graph)
    except BaseException:
        builder.undo()
        raise


def _pieces(
    ev: Evaluator, region: Region, anchor: fx.Node, call: dict[str, Any] | None, fake_mode: Any
) -> tuple[fx.GraphModule, Pieces]:
    if call is not None:
        return _pieces_of_call(ev, region, call, fake_mode)
    traced = trace(region, [anchor], fake_mode)
    (result,) = _results(traced)
    captured = tensor(anchor)
    if captured is None or result.meta["val"].dtype != captured.dtype:
        raise NotUnderstood("it was captured under another autocast")
    return traced, of_term(ev, result)


def _bound_call(node: fx.Node) -> dict[str, Any]:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    call: dict[str, Any] = dict.fromkeys(names)
    call.update(zip(names, node.args, strict=False))
    call.update(node.kwargs)
    if call["attn_mask"] is None:
        raise NotUnderstood("dense attention, not NSA: it has no mask")
    if call["dropout_p"]:
        raise NotUnderstood("it drops out probabilities")
    if call["is_causal"]:
        raise NotUnderstood("it has both a mask and is_causal")
    if call["scale"] is not None and not isinstance(call["scale"], (int, float)):
        raise NotUnderstood("its scale is not a constant")
    if not all(isinstance(call[name], fx.Node) for name in names[:4]):
        raise NotUnderstood("its operands are constants")
    return call


def _pieces_of_call(
    ev: Evaluator, region: Region, call: dict[str, Any], fake_mode: Any
) -> tuple[fx.GraphModule, Pieces]:
    operands = [call[name] for name in ("query", "key", "value", "attn_mask")]
    _require_equal_sizes(operands)
    # The call itself stays out of the trace: what it decomposes into depends on the device.
    inner = Region(region.nodes[:-1], region.inputs, region.autocast)
    traced = trace(inner, operands, fake_mode)
    q, k, v, mask = _results(traced)
    if function_name(operands[3]) == MASK and mask.meta["val"].dtype != torch.bool:
        raise NotUnderstood("its mask_mod does not give a truth value")
    return traced, of_call(ev, q, k, v, mask, call["scale"], bool(call["enable_gqa"]))


def _require_equal_sizes(operands: list[fx.Node]) -> None:
    """Guard what the call itself requires of its operands' sizes, which fake tensors need not have noticed."""
    q, k, v, mask = (x.shape for x in map(tensor, operands) if x is not None)
    pairs: list[tuple[Any, Any]] = [(k[-2], v[-2]), (mask[-2], q[-2]), (mask[-1], k[-2]), (q[0], k[0]), (k[0], v[0])]
    if len(mask) == len(q):
        pairs.append((mask[0], q[0]))
    for a, b in pairs:
        guard_equal(a, b)


def _results(traced: fx.GraphModule) -> list[fx.Node]:
    (output,) = (n for n in traced.graph.nodes if n.op == "output")
    results: Any = output.args[0]
    if not all(isinstance(n, fx.Node) and isinstance(n.meta["val"], torch.Tensor) for n in results):
        raise NotUnderstood("its operands are constants")
    return list(results)
