"""`nsa_attention` out of its stages, and the attention stages out of their forwards.

They are CompositeImplicitAutograd, as ATen's scaled_dot_product_attention is: the dispatcher replaces the call by
operators whose backwards exist, and by plain pointwise operators for the gates and the log-sum-exp, which a compiler
can fuse into their neighbours or leave out.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .forward_mode import refuse_tangents
from .options import Layout, Nsa
from .schema import ATTENTION_OPS, LIB, impl

fsa = torch.ops.fsa
_KEYS = ("CompositeImplicitAutograd", "FuncTorchBatchedDecomposition")


class _Attended(NamedTuple):
    """What a forward returns; `scale` is the one that its `shift` is meant with."""

    out: Tensor
    shift: Tensor
    log_sum: Tensor
    scale: float

    @classmethod
    def by(cls, forward: Any, q: Tensor, *inputs: Tensor, scale: float | None = None, **options: Any) -> _Attended:
        """Call a forward, which wants a positive scale: with any other, the maximum of `q @ k` is not the logits'."""
        if scale is not None and scale <= 0:
            q, scale = (q * 0, 1.0) if scale == 0 else (-q, -scale)
        out, shift, log_sum = forward(q, *inputs, scale=scale, **options)
        return cls(out, shift, log_sum, q.shape[3] ** -0.5 if scale is None else scale)

    @property
    def lse(self) -> Tensor:
        """The log-sum-exp. Without a visible key log_sum is -inf, and shift finite."""
        return torch.add(self.log_sum, self.shift, alpha=self.scale)


def _stage(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """A public attention operator: its forward's output, and the log-sum-exp in one number."""
    forward = getattr(fsa, f"{name}_forward").default

    def stage(*inputs: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        attended = _Attended.by(forward, *inputs, **options)
        return attended.out, attended.lse

    return stage


def nsa_attention(
    q: Tensor, k: Tensor, v: Tensor, g_cmp: Tensor | None, g_slc: Tensor | None, g_swa: Tensor | None, options: Nsa,
    layout: Layout,
) -> Tensor:  # fmt: skip
    """All four stages and the gates."""
    with _one_node(q):
        return _nsa_attention(q, k, v, g_cmp, g_slc, g_swa, options, layout)


def _one_node(q: Tensor) -> Any:
    """While a graph is exported the whole stays one node, so sizes inside are nobody's but its own."""
    env = getattr(getattr(q, "fake_mode", None), "shape_env", None) if torch.compiler.is_exporting() else None
    return contextlib.nullcontext() if env is None else env.ignore_fresh_unbacked_symbols()


def _nsa_attention(
    q: Tensor, k: Tensor, v: Tensor, g_cmp: Tensor | None, g_slc: Tensor | None, g_swa: Tensor | None, options: Nsa,
    layout: Layout,
) -> Tensor:  # fmt: skip
    refuse_tangents("nsa_attention", q, k, v, g_cmp, g_slc, g_swa, options.k_cmp, options.v_cmp)
    dtensor = sys.modules.get(f"{__package__}.dtensor")
    if dtensor is not None:  # errors name the arguments of the whole
        given = {"q": q, "k": k, "v": v, "g_cmp": g_cmp, "g_slc": g_slc, "g_swa": g_swa}
        dtensor.plan("nsa_attention", given | options._asdict() | layout._asdict())
    k_cmp, v_cmp, block_indices = options[:3]
    lies: dict[str, Any] = {"scale": options.scale, **layout._asdict()}
    windows: dict[str, Any] = {"kernel_size": options.kernel_size, "kernel_stride": options.kernel_stride}
    keys: dict[str, Any] = {"cu_seqlens": layout.packed_keys}
    keys |= {"seqused": layout.seqused_k, "leftpad": layout.leftpad_k, **windows}
    compressed: dict[str, Any] = {**windows, **lies, "seq_len_k": k.shape[1]}

    o_cmp = lse = None
    if g_cmp is not None:
        if k_cmp is None:
            k_cmp = compress(k, **keys)
        if v_cmp is None:
            v_cmp = compress(v, **keys)
        o_cmp, lse = fsa.compressed_attention.default(q, k_cmp, v_cmp, **compressed)
    if block_indices is None:
        with torch.no_grad():
            q_, k_ = q.detach(), (k if k_cmp is None else k_cmp).detach()
            if k_cmp is None:
                k_ = compress(k_, **keys)
            if lse is None:
                # Only the log-sum-exp is wanted: one column of anything will do for the values.
                _, lse = fsa.compressed_attention.default(q_, k_, k_[..., :1], **compressed)
            names = ("block_size", "num_selected", "init_blocks", "local_blocks")
            selection = {name: getattr(options, name) for name in names}
            block_indices = fsa.select_blocks.default(q_, k_, lse.detach(), **selection, **compressed)
    selected_forward, sliding_forward = fsa.selected_attention_forward, fsa.sliding_window_attention_forward
    blocks: dict[str, Any] = {"block_size": options.block_size, "loop_order": options.loop_order}
    o_swa = None
    if g_swa is not None and options.window_size > 0:
        o_swa = _Attended.by(sliding_forward.default, q, k, v, window_size=options.window_size, **lies).out
    # Last, so that its backward is first: what that takes is not added to gradients that wait for their sum.
    o_slc = _Attended.by(selected_forward.default, q, k, v, block_indices, **blocks, **lies).out
    if g_cmp is None and g_slc is None and (g_swa is None or options.window_size == 0):
        return o_slc
    # The sum of the branches is rounded once, to the dtype of the result.
    total = _gated(g_slc, o_slc)
    if o_cmp is not None:
        total = total + _gated(g_cmp, o_cmp)
    if o_swa is not None:
        total = total + _gated(g_swa, o_swa)
    return total.to(q.dtype).contiguous()


def compress(x: Tensor, **options: Any) -> Tensor:
    """`mean_compress`; `x` itself where each token is a window of its own and sequences start where they lie."""
    one_each = options["kernel_size"] == options["kernel_stride"] == 1
    if one_each and all(options[name] is None for name in ("cu_seqlens", "seqused", "leftpad")):
        return x
    return fsa.mean_compress.default(x, **options)


def _gated(gate: Tensor | None, out: Tensor) -> Tensor:
    # The product widens `out` by itself: widened before, a compiled training step kept that for its backward as well.
    return out.to(torch.float32) if gate is None else gate.to(torch.float32).unsqueeze(-1) * out


for _key in _KEYS:
    impl("nsa_attention", nsa_attention, _key)
    for _name in ATTENTION_OPS:
        LIB.impl(_name, _stage(_name), _key)
