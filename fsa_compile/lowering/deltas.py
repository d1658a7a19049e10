"""After expansion: what backwards want of their forwards' outputs is taken at once, so that nobody keeps the outputs.

A backward reads ``out`` only for ``delta = rowsum(grad_out * out)``, and so do the gradients of gates. The gradients of
all branches of a gated sum are there before the first of their backwards runs; but each delta stood before its own
backward, and the other branches' outputs waited through the first one, which takes the most memory: 2 GiB at 131,072
tokens, 32 heads of 128. Now all deltas are taken first, by the kernel that has the gates' gradients.

The product of gradient and gate that a later backward reads would be made there as well, and wait in the outputs'
place: ``fsa::_apart`` makes it where it is read, by a kernel of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ..ops.schema import define, fake, impl
from . import _inductor

__all__ = ["take_deltas_early"]

# What makes the gradient of a gated branch, last step first.
_PRODUCTS = (torch.ops.prims.convert_element_type.default, torch.ops.aten._to_copy.default, torch.ops.aten.mul.Tensor)


def take_deltas_early(graph: fx.Graph) -> None:
    """Move each delta that waits for another one to where its inputs are."""
    place = {n: i for i, n in enumerate(graph.nodes)}
    deltas = [n for n in graph.nodes if n.target is torch.ops.fsa._attention_delta.default]
    for delta in deltas:
        delta.args = tuple(map(_source, delta.args))
        grad_out, out = delta.args[0], delta.args[2]
        last = max(delta.all_input_nodes, key=place.__getitem__)
        if not any(place[last] < place[other] < place[delta] for other in deltas):
            continue
        readers = [n for n in grad_out.users if n is not delta]
        if grad_out.target not in _PRODUCTS or any(place[n] < place[delta] for n in readers):
            continue  # it is in memory anyhow
        if out.meta["val"].dtype == torch.float32:
            continue  # a kernel that reads the gradient from memory (see emit.py)
        last.append(delta)
        if readers:
            with graph.inserting_before(min(readers, key=place.__getitem__)):
                apart = graph.call_function(torch.ops.fsa._apart.default, (grad_out,))
            apart.meta = dict(grad_out.meta)
            for reader in readers:
                reader.replace_input_with(grad_out, apart)


def _source(x: Any) -> Any:
    """What autograd saved, for which the joint graph has an alias where it is read."""
    while isinstance(x, fx.Node) and x.target is torch.ops.aten.alias.default:
        x = x.args[0]
    return x


def lower_apart(x: Any) -> Any:
    """A buffer that its kernel makes and nothing else."""
    box = _inductor.realize(x, contiguous=False)
    _inductor.forbid_fusion(box)
    return _inductor.boxed(box)


define("_apart(Tensor x) -> Tensor")
fake("_apart", torch.empty_like)
impl("_apart", Tensor.clone, "CUDA", "CPU")
