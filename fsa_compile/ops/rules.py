"""Which semantic operators the lowering opens, and how: a rule per operator, registered by its stage.

A rule's implementation is what eager CUDA runs, and the lowering traces the same one into the graph, so that the two
cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .. import cost
from .options import Layout
from .schema import impl

__all__ = ["RULES", "Rule", "Runs", "kernel_runs", "register"]

# cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k: what every internal operator takes to tell the runs of a call.
Runs = tuple["Tensor | None", "Tensor | None", "Tensor | None", "Tensor | None"]


@dataclass(frozen=True)
class Rule:
    """One operator's.

    op: name of the semantic operator.
    fn: its implementation out of internal operators (see ``dispatch``); ``options.loop_order`` may force an order.
    choose: ``choose(arguments, training=..., backward=...)``, the loop order for arguments by name, which may be fake,
        as ``cost.choose`` has it; None where there is one way only.
    shared: the arguments that a forward and its backward have in common, by which one is known to follow the other.
    """

    op: str
    fn: Callable[..., Any]
    choose: Callable[..., cost.Choice] | None = None
    shared: tuple[str, ...] = ()

    @property
    def is_backward(self) -> bool:
        """Whether it is a backward."""
        return self.op.endswith("_backward")


RULES: dict[str, Rule] = {}


def register(*rules: Rule) -> None:
    """Make the rules known, and their implementations the operators' on CUDA."""
    for rule in rules:
        RULES[rule.op] = rule
        impl(rule.op, rule.fn, "CUDA")


def kernel_runs(layout: Layout) -> Runs:
    """Where the sequences lie, as the internal operators take it."""
    return layout.cu_seqlens_q, layout.packed_keys, layout.seqused_k, layout.leftpad_k
