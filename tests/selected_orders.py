"""Each loop order of the selected branch as tests call it, by itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from kernel_runs import INTERPRETED, round_sums_once
from torch import Tensor

from fsa_compile import cost
from fsa_compile.ops import options
from fsa_compile.ops.options import Layout
from fsa_compile.ops.selected import orders

ORDERS = tuple(cost.LOOP_ORDERS)


@pytest.fixture(autouse=True, scope="module")
def one_order_of_summation() -> Iterator[None]:
    """The interpreter's matrix product is a BLAS's, which rounds `q @ k.T` and `k @ q.T` differently.

    A GPU does not, and the backward counts on it: at logits of 1e4 the last bit of a score is a thousandth of its
    probability. Sums in float64, rounded once, do not depend on an order.
    """
    if not INTERPRETED:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        round_sums_once(patch)
        yield


class Selected(torch.autograd.Function):
    """The implementations of `ops.selected.orders`, as the operators run them."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, options: options.Selected, layout: Layout
    ) -> Any:
        ctx.options, ctx.layout = options, layout
        out, shift, log_sum = orders.selected_attention_forward(q, k, v, block_indices, options, layout)
        ctx.save_for_backward(q, k, v, block_indices, out, shift, log_sum)
        ctx.set_materialize_grads(False)
        return out, log_sum + options.scale * shift

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:
        args = (grad_out, grad_lse, *ctx.saved_tensors)
        return *orders.selected_attention_backward(*args, ctx.options, ctx.layout), None, None, None


def in_order(order: str) -> Any:
    def fn(
        q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, *, block_size: int, scale: Any = None, **given: Any
    ) -> Any:
        scale = q.shape[3] ** -0.5 if scale is None else scale
        return Selected.apply(q, k, v, block_indices, options.Selected(block_size, scale, order), Layout(**given))

    return fn
