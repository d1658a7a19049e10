"""The kernels of the selected branch wherever sequences lie, and calls that are cut in parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_runs import DEVICE, INTERPRETED, kernels
from layouts import PACKED, PADDED, S, agrees_with_reference, call_with, packed_layout, padded_layout, tensors
from selected_orders import ORDERS, in_order, one_order_of_summation  # noqa: F401

from fsa_compile.ops.selected import chunks, orders
from fsa_compile.testing.calls import run, upstream_of


def some(cases: tuple[Any, ...], *ids: str) -> list[Any]:
    """All of the layouts on a GPU, some in the interpreter."""
    return [case for case in cases if case.id in ids or not INTERPRETED]


@kernels
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "seq_len,seq_len_k,bounds_q,bounds_k",
    some(PACKED, "more_queries_than_keys", "heads_and_tails_of_two_lengths", "past_the_end", "nothing_but_a_head"),
)
def test_packed(order: str, seq_len: int, seq_len_k: int, bounds_q: Any, bounds_k: Any) -> None:
    """Lengths in any relation, and rows before the first and after the last sequence."""
    layout = packed_layout(bounds_q, bounds_k, DEVICE)
    call = call_with("selected_attention", tensors(1, seq_len, seq_len_k, DEVICE), seq_len_k, **layout)
    agrees_with_reference(call, in_order(order))


@kernels
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("seq_len,seq_len_k,used,left", some(PADDED, "any", "both"))
def test_padded(order: str, seq_len: int, seq_len_k: int, used: Any, left: Any) -> None:
    """Rows before the first key see nothing."""
    layout = padded_layout(used, left, DEVICE)
    call = call_with("selected_attention", tensors(3, seq_len, seq_len_k, DEVICE), seq_len_k, **layout)
    agrees_with_reference(call, in_order(order))


@kernels
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(("heads_at_once", "cut"), [(4, (2, 1, 1)), (2, (2, 2, 1)), (1, (2, 2, 2))])
def test_cut_in_parts(
    monkeypatch: pytest.MonkeyPatch, packed: bool, heads_at_once: int, cut: tuple[int, int, int]
) -> None:
    """A workspace of so many query heads: batch rows, key/value heads and the group take turns; results stay."""
    rows, seq_len, capacity = (1, 43, 61) if packed else (2, 21, 40)
    bounds = ((0, 20, 43), (0, 31, 61)) if packed else ((40, 33), (3, 11))
    layout = (packed_layout if packed else padded_layout)(*bounds, DEVICE)
    x = tensors(rows, seq_len, capacity, DEVICE, packed=packed)
    call = call_with("selected_attention", x, capacity, **layout)
    upstream = upstream_of(call)
    want, want_grads = run(in_order("fsa"), call, upstream)
    head = seq_len * S.num_selected * S.head_dim * x.q.itemsize
    monkeypatch.setattr(chunks, "WORKSPACE", heads_at_once * head)
    parts = chunks.chunks(x.q, x.k, S.head_dim, S.num_selected)
    batch, kv_heads, group = cut
    assert [len(parts), len(parts[0]), len(parts[0][0])] == [1 if packed else batch, kv_heads, group]
    if not packed or kv_heads * group > 1:
        monkeypatch.setattr(orders, "joined", lambda _: pytest.fail("parts are written where they belong, not copied"))
    have, have_grads = run(in_order("fsa"), call, upstream)
    same = 3 if group > 1 else 5  # dk and dv are sums over the group, in another order if it is cut
    pairs = list(zip((*have, *have_grads), (*want, *want_grads), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs[:same])
    for a, b in pairs[same:]:
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
