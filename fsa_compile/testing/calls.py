"""How to call each operator on the inputs of a spec, and what any implementation returns, with its gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops import reference
from .inputs import Inputs

STAGES = ("mean_compress", "compressed_attention", "selected_attention", "sliding_window_attention", "nsa_attention")


@dataclass(frozen=True)
class Call:
    """Arguments of one operator: floating ones first, which are differentiated, then the others, then keywords."""

    name: str
    floating: tuple[Tensor, ...]
    others: tuple[Tensor, ...]
    options: dict[str, Any]

    @property
    def args(self) -> tuple[Tensor, ...]:
        return *self.floating, *self.others

    def to(self, dtype: torch.dtype) -> Call:
        return Call(self.name, tuple(x.detach().to(dtype) for x in self.floating), self.others, self.options)

    def op(self) -> Callable[..., Any]:
        return getattr(torch.ops.fsa, self.name)

    def reference(self) -> Callable[..., Any]:
        return getattr(reference, self.name)


def compressed(x: Inputs) -> tuple[Tensor, Tensor]:
    """k_cmp and v_cmp in the inputs' dtype, the values near the mean's."""
    double = [
        reference.mean_compress(y.detach().double(), cu_seqlens=x.cu_seqlens, **x.spec.windows) for y in (x.k, x.v)
    ]
    k_cmp, v_cmp = (y.to(x.q.dtype) for y in double)
    return k_cmp, v_cmp


def call_of(name: str, x: Inputs) -> Call:
    """A call of operator `name` on `x`. nsa_attention is given its blocks, as selection jumps."""
    s = x.spec
    if name == "mean_compress":
        return Call(name, (x.k,), (), {**s.windows, "cu_seqlens": x.cu_seqlens})
    if name == "compressed_attention":
        return Call(name, (x.q, *compressed(x)), (), {**s.windows, **x.packed, "seq_len_k": s.seq_len_k})
    if name == "selected_attention":
        return Call(name, (x.q, x.k, x.v), (x.block_indices,), {**x.packed, "block_size": s.block_size})
    if name == "sliding_window_attention":
        return Call(name, (x.q, x.k, x.v), (), {**x.packed, "window_size": s.window_size})
    assert name == "nsa_attention"
    options = {**s.windows, **s.selection, **x.packed, "window_size": s.window_size, "block_indices": x.block_indices}
    return Call(name, (x.q, x.k, x.v, *x.gates), (), options)


def selection_of(x: Inputs, q: Tensor | None = None) -> Call:
    """A call of select_blocks, on the log-sum-exp that belongs to it."""
    q = x.q if q is None else q
    k_cmp, _ = compressed(x)
    options = {**x.spec.windows, **x.packed, "seq_len_k": x.spec.seq_len_k}
    _, lse = reference.compressed_attention(q.double(), k_cmp.double(), k_cmp.double()[..., :1], **options)
    return Call("select_blocks", (q.detach(), k_cmp), (lse.float(),), {**options, **x.spec.selection})


def results(value: Any) -> tuple[Tensor, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def run(fn: Callable[..., Any], call: Call, upstream: Sequence[Tensor | None]) -> tuple[list[Tensor], list[Tensor]]:
    """Results, and gradients of the floating arguments for these upstream ones (None: that result is unused)."""
    leaves = [x.detach().requires_grad_() for x in call.floating]
    outs = results(fn(*leaves, *call.others, **call.options))
    used = [(o, g.to(o.dtype)) for o, g in zip(outs, upstream, strict=True) if g is not None]
    grads = torch.autograd.grad(
        [o for o, _ in used], leaves, [g for _, g in used], allow_unused=True, materialize_grads=True
    )
    return [o.detach() for o in outs], list(grads)


def upstream_of(call: Call, seed: int = 1) -> list[Tensor]:
    """Random upstream gradients for the results of `call`."""
    with torch.no_grad():
        outs = results(call.reference()(*call.args, **call.options))
    generator = torch.Generator(outs[0].device).manual_seed(seed)
    return [torch.randn(o.shape, device=o.device, generator=generator).to(o.dtype) for o in outs]


def forward_call(call: Call) -> Call:
    """The call of the operator that a public attention stage is made of."""
    return Call(f"{call.name}_forward", call.floating, call.others, call.options)


def backward_call(call: Call, upstream: Sequence[Tensor | None]) -> Call:
    """The call of the backward operator that differentiates `call`."""
    if call.name == "mean_compress":
        (grad,) = upstream
        assert grad is not None
        return Call(f"{call.name}_backward", (grad,), (), {**call.options, "seq_len": call.floating[0].shape[1]})
    with torch.no_grad():
        outs = forward_call(call).op()(*call.args, **call.options)
    return Call(f"{call.name}_backward", (*upstream, *call.args, *outs), (), call.options)  # type: ignore[arg-type]
