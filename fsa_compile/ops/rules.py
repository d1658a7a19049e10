"""How a semantic operator runs on a GPU: a rule per operator, registered by its stage.

The eager operator runs a rule's sequence of internal operators, and the lowering traces the same sequence into the
graph, so that the two cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .. import cost
from . import schema

__all__ = ["RULES", "Rule", "Runs", "call_of", "register", "take_runs"]

# cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k: what every internal operator takes to tell the runs of a call.
Runs = tuple["Tensor | None", "Tensor | None", "Tensor | None", "Tensor | None"]


@dataclass(frozen=True)
class Rule:
    """One operator's.

    op: name of the semantic operator.
    sequence: ``sequence(order, **call)`` runs it; ``call`` is what ``call_of`` makes of the arguments.
    choose: ``choose(arguments, training=..., backward=...)``, the loop order for arguments that may be fake; None where
        there is one way only.
    shared: the arguments that a forward and its backward have in common, and with them the choice.
    """

    op: str
    sequence: Callable[..., Any]
    choose: Callable[..., cost.Choice] | None = None
    shared: tuple[str, ...] = ()

    @property
    def is_backward(self) -> bool:
        """Whether it is a backward."""
        return self.op.endswith("_backward")


RULES: dict[str, Rule] = {}


def register(*rules: Rule) -> None:
    """Make the rules known, and what they say the operators' implementation on CUDA."""
    for rule in rules:
        RULES[rule.op] = rule
        schema.impl(rule.op, _eager(rule), "CUDA")


def _eager(rule: Rule) -> Callable[..., Any]:
    """What the operator runs, with its own signature."""
    names, parts = [], []
    for p in schema.signature(rule.op).parameters.values():
        if p.kind is p.KEYWORD_ONLY and "*" not in parts:
            parts.append("*")
        names.append(p.name)
        parts.append(p.name if p.default is p.empty else f"{p.name}={p.default!r}")
    arguments = ", ".join(f"{name!r}: {name}" for name in names)
    namespace: dict[str, Any] = {"run": run, "rule": rule}
    exec(f"def {rule.op}({', '.join(parts)}):\n    return run(rule, {{{arguments}}})", namespace)
    return namespace[rule.op]


def call_of(arguments: dict[str, Any], head_dim: Any) -> dict[str, Any]:
    """An operator's arguments as sequences take them: the runs as one tuple, the scale a number, hints left out."""
    call = dict(arguments)
    for hint in ("max_seqlen_q", "max_seqlen_k", "loop_order"):
        call.pop(hint, None)
    if "cu_seqlens_q" in call:
        call["runs"] = take_runs(call)
    if "scale" in call and call["scale"] is None:
        call["scale"] = int(head_dim) ** -0.5
    return call


def take_runs(call: dict[str, Any]) -> Runs:
    """Take the four arguments that tell the runs of a call out of its arguments."""
    packed_q, packed_k = call.pop("cu_seqlens_q"), call.pop("cu_seqlens_k")
    return (
        packed_q,
        packed_q if packed_k is None else packed_k,  # packed keys lie as the queries do unless it is said otherwise
        call.pop("seqused_k", None),
        call.pop("leftpad_k", None),
    )


def run(rule: Rule, arguments: dict[str, Any]) -> Any:
    """Run a rule on real tensors."""
    order = None
    if rule.choose is not None:
        order = rule.choose(arguments, backward=rule.is_backward).order
    head_dim = arguments["q"].shape[3] if "q" in arguments else None
    return rule.sequence(order, **call_of(arguments, head_dim))
