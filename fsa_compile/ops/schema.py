"""Schemas of the `fsa` operators, and the one way to register what they do.

There is a single `torch.library.Library`; every module that defines or implements an operator goes through it.
`Library.define` and `Library.impl` rather than `torch.library.custom_op`: they cost half as much per call.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from .. import debug
from .checks import CHECKS

__all__ = ["ATTENTION_OPS", "BACKWARD_OPS", "LIB", "SEMANTIC_OPS", "define", "fake", "impl", "signature"]

LIB = torch.library.Library("fsa", "DEF")

_PACK = "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None"
_WINDOWS = "int kernel_size=32, int kernel_stride=16"
_COMPRESSED = f"{_WINDOWS}, SymInt? seq_len_k=None, float? scale=None, {_PACK}"
_SELECTED = f'int block_size=64, float? scale=None, {_PACK}, str loop_order="auto"'
_SLIDING = f"int window_size, float? scale=None, {_PACK}"
_FORCED = "int init_blocks=1, int local_blocks=2"
_OUT_LSE = "(Tensor out, Tensor lse)"
# A row's softmax is `exp(scale * (q @ k - shift) - log_sum)`, its log-sum-exp `scale * shift + log_sum`. One float32
# number would not do: at logits of 1e4 it is off by 5e-4, and so would be every probability that a backward makes of
# it.
_SOFTMAX = "(Tensor out, Tensor shift, Tensor log_sum)"
_GRADS = "Tensor? grad_out, Tensor? grad_log_sum"
_RESULTS = "Tensor out, Tensor shift, Tensor log_sum"

_SCHEMAS = (
    "nsa_attention(Tensor q, Tensor k, Tensor v, Tensor? g_cmp=None, Tensor? g_slc=None, Tensor? g_swa=None, *, "
    "Tensor? k_cmp=None, Tensor? v_cmp=None, Tensor? block_indices=None, int block_size=64, int num_selected=16, "
    f'{_WINDOWS}, {_FORCED}, int window_size=512, float? scale=None, {_PACK}, str loop_order="auto") -> Tensor',
    f"selected_attention(Tensor q, Tensor k, Tensor v, Tensor block_indices, *, {_SELECTED}) -> {_OUT_LSE}",
    f"selected_attention_forward(Tensor q, Tensor k, Tensor v, Tensor block_indices, *, {_SELECTED}) -> {_SOFTMAX}",
    f"selected_attention_backward({_GRADS}, Tensor q, Tensor k, Tensor v, Tensor block_indices, {_RESULTS}, *, "
    f"{_SELECTED}) -> (Tensor dq, Tensor dk, Tensor dv)",
    f"compressed_attention(Tensor q, Tensor k_cmp, Tensor v_cmp, *, {_COMPRESSED}) -> {_OUT_LSE}",
    f"compressed_attention_forward(Tensor q, Tensor k_cmp, Tensor v_cmp, *, {_COMPRESSED}) -> {_SOFTMAX}",
    f"compressed_attention_backward({_GRADS}, Tensor q, Tensor k_cmp, Tensor v_cmp, {_RESULTS}, *, {_COMPRESSED}) -> "
    "(Tensor dq, Tensor dk, Tensor dv)",
    "select_blocks(Tensor q, Tensor k_cmp, Tensor lse, *, int block_size=64, int num_selected=16, "
    f"{_WINDOWS}, {_FORCED}, SymInt? seq_len_k=None, float? scale=None, {_PACK}) -> Tensor",
    f"sliding_window_attention(Tensor q, Tensor k, Tensor v, *, {_SLIDING}) -> {_OUT_LSE}",
    f"sliding_window_attention_forward(Tensor q, Tensor k, Tensor v, *, {_SLIDING}) -> {_SOFTMAX}",
    f"sliding_window_attention_backward({_GRADS}, Tensor q, Tensor k, Tensor v, {_RESULTS}, *, {_SLIDING}) -> "
    "(Tensor dq, Tensor dk, Tensor dv)",
    f"mean_compress(Tensor x, *, {_WINDOWS}, Tensor? cu_seqlens=None) -> Tensor",
    f"mean_compress_backward(Tensor grad_out, *, SymInt seq_len, {_WINDOWS}, Tensor? cu_seqlens=None) -> Tensor",
)

SEMANTIC_OPS = tuple(schema.split("(", 1)[0] for schema in _SCHEMAS)
BACKWARD_OPS = tuple(name for name in SEMANTIC_OPS if name.endswith("_backward"))
# Of these, `<name>` is made of `<name>_forward`, which has the autograd and the kernels.
ATTENTION_OPS = tuple(name.removesuffix("_forward") for name in SEMANTIC_OPS if name.endswith("_forward"))


def define(schema: str) -> None:
    """Define one operator of namespace `fsa`. Nothing here mutates its inputs, so every operator is pt2 compliant."""
    LIB.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def signature(name: str) -> inspect.Signature:
    """The operator's Python signature, as its schema has it."""
    op = getattr(torch.ops.fsa, name).default
    parameters = []
    for a in op._schema.arguments:
        kind = inspect.Parameter.KEYWORD_ONLY if a.kwarg_only else inspect.Parameter.POSITIONAL_OR_KEYWORD
        default = a.default_value if a.has_default_value() else inspect.Parameter.empty
        parameters.append(inspect.Parameter(a.name, kind, default=default))
    return inspect.Signature(parameters)


def _verify_signature(name: str, fn: Callable[..., Any]) -> None:
    """The dispatcher leaves out arguments that equal their default: a wrong default in `fn` would bite unnoticed."""
    want = [(p.name, p.kind, p.default) for p in signature(name).parameters.values()]
    have = [(p.name, p.kind, p.default) for p in inspect.signature(fn).parameters.values()]
    if want != have:
        raise TypeError(f"fsa::{name}: {fn.__module__}.{fn.__qualname__} takes {have}, the schema says {want}")


def impl(name: str, fn: Callable[..., Any], *keys: str) -> None:
    """Register `fn` as what `fsa::name` does on the dispatch keys `keys` ("CPU", "CUDA", ...).

    `fn` has the schema's argument names, kinds and defaults (verified here). For a semantic operator the argument
    checks run before `fn`, and so do the checks of values while `fsa_compile.debug` validates: `fn` itself checks
    nothing.
    """
    _verify_signature(name, fn)
    for key in keys:
        # A composite also runs on fake tensors, which have no values; the operators that it calls check theirs.
        LIB.impl(name, _checked(name, fn, values=not key.startswith("Composite")), key)


def _checked(name: str, fn: Callable[..., Any], *, values: bool) -> Callable[..., Any]:
    if name not in CHECKS:
        return fn
    check = CHECKS[name]
    bind = inspect.signature(fn).bind

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        if values and debug.is_validating():
            bound = bind(*args, **kwargs)
            bound.apply_defaults()
            debug.check_values(name.removesuffix("_forward"), bound.arguments)
        return fn(*args, **kwargs)

    return call


def fake(name: str, fn: Callable[..., Any]) -> None:
    """Register `fn` as the fake kernel of `fsa::name`, behind the argument checks if it is a semantic operator."""
    _verify_signature(name, fn)
    torch.library.register_fake(f"fsa::{name}", _checked(name, fn, values=False), lib=LIB)


for _schema in _SCHEMAS:
    define(_schema)
