"""NSA's branches that were written in plain PyTorch, found before autograd and replaced by the operators.

`anchors` finds attention, `region` cuts out and traces what it is made of, `evaluate` and `values` say what an element
of a traced node is, `flex` makes a call with a mask of FlexAttention (run again with the levels of `vmaps`), `scores`
takes an attention apart, `prove` decides by `selection` and `bands`, `rewrite` replaces, with `lists` of block ids that
may be a top-k (`ranking`).
"""

from __future__ import annotations

from .anchors import preview, recognise_graph

__all__ = ["preview", "recognise_graph"]
