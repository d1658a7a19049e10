"""The Triton kernels of the selected branch, both loop orders, forward and backward.

On a GPU (`-m gpu`) as they are; without one in Triton's interpreter, where `test_interpreter.py` runs this file with
`TRITON_INTERPRET=1`. bf16 is left to the GPU: the interpreter's matrix product does not know it.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_runs import DEVICE, DTYPES, INTERPRETED, kernels
from selected_orders import ORDERS, in_order, one_order_of_summation  # noqa: F401
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fsa_compile.ops import options
from fsa_compile.ops.options import Layout
from fsa_compile.ops.selected import orders
from fsa_compile.ops.selected.block_lists import block_lists
from fsa_compile.templates.attention_delta import ATTENTION_DELTA
from fsa_compile.templates.row_weights import ROW_WEIGHTS
from fsa_compile.templates.selected import KERNELS
from fsa_compile.testing.budget import Budget, draws, relative_error
from fsa_compile.testing.calls import Call, call_of, run, upstream_of
from fsa_compile.testing.inputs import make_inputs
from fsa_compile.testing.specs import Spec
from fsa_compile.testing.strategies import specs
from fsa_compile.tiling import ENTRIES_PER_TILE

EXAMPLES = settings(max_examples=3 if INTERPRETED else 40)


def check(order: str, spec: Spec, dtype: torch.dtype, seed: int = 0, large_logits: bool = False) -> None:
    """Results and gradients within SPEC's error budget, over draws enough to tell."""
    budgets = [Budget(f"{order} {name} of {spec}, {dtype}", dtype) for name in ("out", "lse", "dq", "dk", "dv")]
    inputs = make_inputs(spec, DEVICE, dtype, seed=seed)
    most = 1 if INTERPRETED else 64
    for draw in range(draws(inputs.q, inputs.k, inputs.v, most=most, large_logits=large_logits)):
        call = call_of("selected_attention", make_inputs(spec, DEVICE, dtype, seed=seed + 100 * draw))
        upstream = upstream_of(call)
        have, have_grads = run(in_order(order), call, upstream)
        want, want_grads = run(call.reference(), call.to(torch.float64), upstream)
        eager, eager_grads = run(call.reference(), call, upstream)
        assert all(h.is_contiguous() for h in have)
        assert all(h.dtype == dtype for h in have_grads)
        triples = zip([*have, *have_grads], [*want, *want_grads], [*eager, *eager_grads], strict=True)
        for budget, triple in zip(budgets, triples, strict=True):
            budget.add(*triple)
    for budget in budgets:
        budget.check()


@kernels
@pytest.mark.parametrize("order", ORDERS)
@EXAMPLES
@given(spec=specs(max_seq_len=40 if INTERPRETED else 400), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 5))
@example(spec=Spec(seq_len=1, num_kv_heads=1, gqa_group_size=1), dtype=torch.float32, seed=0)
@example(
    spec=Spec(seq_len=20, num_kv_heads=1, block_size=128, extra_keys=130, num_selected=2), dtype=torch.float32, seed=0
)
@example(
    spec=Spec(seq_len=20, num_kv_heads=1, block_size=256, extra_keys=300, num_selected=2), dtype=torch.float16, seed=0
)
@example(
    spec=Spec(seq_len=40, gqa_group_size=17, num_kv_heads=1, head_dim=20, head_dim_v=36), dtype=torch.float16, seed=0
)
@example(spec=Spec(lengths=(0, 17, 1, 30), extra_keys=9, strides="sliced"), dtype=torch.float32, seed=1)
def test_against_reference(order: str, spec: Spec, dtype: torch.dtype, seed: int) -> None:
    check(order, spec, dtype, seed)


@pytest.mark.gpu
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "spec",
    [
        Spec(seq_len=2000, head_dim=128, head_dim_v=128, block_size=64, num_selected=16, gqa_group_size=group)
        for group in (1, 4, 16)
    ]
    + [
        Spec(seq_len=700, head_dim=256, head_dim_v=192, block_size=64, num_selected=6),
        Spec(seq_len=900, head_dim=64, head_dim_v=128, block_size=256, num_selected=3, strides="transposed"),
        Spec(lengths=(500, 3, 1200), extra_keys=300, head_dim=64, head_dim_v=64, block_size=64, num_selected=8),
    ],
    ids=str,
)
def test_real_sizes(order: str, dtype: torch.dtype, spec: Spec) -> None:
    check(order, spec, dtype)


@kernels
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_logits(order: str, dtype: torch.dtype) -> None:
    """At logits of 1e4 float32 resolves a log-sum-exp to 1e-3, which neither results nor gradients may show."""
    plain = Spec(seq_len=40, num_kv_heads=1)
    check(order, replace(plain, logits=1e4 if dtype != torch.float16 else 3e3), dtype, large_logits=True)
    check(order, replace(plain, scale=2048.0), dtype, large_logits=True)


@kernels
@pytest.mark.parametrize("order", ORDERS)
def test_ids_that_name_no_block_contribute_nothing(order: str) -> None:
    """Out of range or in the future, they read nothing outside the tensors (poisoned here) and change no bit."""
    spec = Spec(seq_len=24, num_kv_heads=1, block_size=16, num_selected=2)
    inputs = make_inputs(spec, DEVICE)
    padded = torch.full((1, 200, spec.num_kv_heads, spec.head_dim), float("nan"), device=DEVICE)
    padded[:, 70:94] = inputs.k
    k = padded[:, 70:94]
    current = (torch.arange(24, device=DEVICE) // 16)[:, None, None]
    none = torch.full_like(inputs.block_indices[..., :1], -1)
    strange = [
        current + 1,
        torch.full_like(current, 1000),
        torch.full_like(current, 2**31 - 1),
        torch.full_like(current, -7),
    ]
    plain = torch.cat([none, inputs.block_indices] + [none] * 3, -1)
    odd = torch.cat(
        [strange[0].expand_as(none[0])[None], inputs.block_indices] + [x.expand_as(none) for x in strange[1:]], -1
    ).int()
    call = Call("selected_attention", (inputs.q, k, inputs.v), (), {"block_size": 16, "scale": None})
    upstream = [torch.ones_like(inputs.q), None]
    results = []
    for block_indices in (plain, odd):
        outs, grads = run(lambda *args, b=block_indices, **kw: in_order(order)(*args, b, **kw), call, upstream)
        results.append([*outs, *grads])
    for h, w in zip(*results, strict=True):
        assert not h.isnan().any()
        assert torch.equal(h, w)


@kernels
@pytest.mark.parametrize("order", ORDERS)
def test_rows_without_a_block(order: str) -> None:
    inputs = make_inputs(Spec(seq_len=40), DEVICE)
    block_indices = torch.full_like(inputs.block_indices, -1)
    block_indices[:, 20:, 0, 2] = 0
    q, k, v = (x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    out, lse = in_order(order)(q, k, v, block_indices, block_size=16, scale=None)
    alone = torch.ones(40, 4, dtype=torch.bool, device=DEVICE)
    alone[20:, :2] = False
    assert (out[0][alone] == 0).all()
    assert (lse[0][alone] == -torch.inf).all()
    assert lse[0][~alone].isfinite().all()
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][0][alone] == 0).all()


@functools.cache
def in_every_block(order: str, of: str = "", first: int = 0, value: float = 0.0) -> tuple[list[Tensor], list[Tensor]]:
    """Results and gradients of 40 queries that select every block, keys or values from `first` on being `value`."""
    inputs = make_inputs(Spec(seq_len=40, num_kv_heads=1, block_size=16, num_selected=3), DEVICE)
    current = torch.arange(40, device=DEVICE) // 16
    ids = torch.arange(3, device=DEVICE)[None].expand(40, -1)
    block_indices = ids.masked_fill(ids > current[:, None], -1)[None, :, None].int().contiguous()
    upstream = [torch.ones(*inputs.q.shape[:3], inputs.v.shape[3], device=DEVICE), None]
    given = {"k": inputs.k.clone(), "v": inputs.v.clone()}
    if of:
        given[of][:, first:] = value
    call = Call("selected_attention", (inputs.q, *given.values()), (), {"block_size": 16, "scale": None})
    return run(lambda *args, **kw: in_order(order)(*args, block_indices, **kw), call, upstream)


@kernels
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("first", [39, 32], ids=["last key", "last block"])
@pytest.mark.parametrize("of", ["k", "v"])
def test_what_is_not_finite_reaches_only_the_rows_that_see_it(order: str, value: float, first: int, of: str) -> None:
    """The others, of the same block too, keep every bit of their output, statistics and gradient."""
    outs, grads = in_every_block(order)
    spoiled, spoiled_grads = in_every_block(order, of, first, value)
    for clean, other in zip([*outs, grads[0]], [*spoiled, spoiled_grads[0]], strict=True):
        assert torch.equal(clean[:, :first], other[:, :first])
    if of == "v" or value != value:  # an infinite key may have a weight of 0
        assert not spoiled[0][:, first:].isfinite().all(-1).any()


@kernels
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_query_that_is_not_finite_is_one_rows_affair(order: str, value: float) -> None:
    """Its output, lse and gradient are NaN, not those of a row without keys; others' keep every bit."""
    x = make_inputs(Spec(seq_len=40, blocks="local"), DEVICE)
    q = x.q.clone()
    q[:, 33, 1] = value
    found = []
    for queries in (q.requires_grad_(), x.q.clone().requires_grad_()):
        out, lse = in_order(order)(queries, x.k, x.v, x.block_indices, block_size=16)
        found.append((out, lse, *torch.autograd.grad(out.sum(), queries)))
    others = torch.ones_like(x.q[..., 0], dtype=torch.bool)
    others[0, 33, 1] = False
    for spoiled, clean in zip(*found, strict=True):
        assert spoiled[0, 33, 1].isnan().all()
        assert torch.equal(spoiled[others], clean[others])


@kernels
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["q", "grad_out"])
def test_a_row_that_is_not_finite_leaves_later_keys_alone(order: str, value: float, which: str) -> None:
    """Those of its own block that it does not see keep every bit of dk and dv; those that it sees are NaN."""
    x = make_inputs(Spec(seq_len=40, blocks="local"), DEVICE)
    grads = []
    for spoiled in (True, False):
        q, k, v = (t.clone().requires_grad_() for t in (x.q, x.k, x.v))
        grad_out = torch.ones(*q.shape[:3], v.shape[3], device=DEVICE)
        if spoiled:
            (q.data if which == "q" else grad_out)[:, 35] = value
        out = in_order(order)(q, k, v, x.block_indices, block_size=16)[0]
        grads.append(torch.autograd.grad(out, (k, v), grad_out))
    for have, want in zip(*grads, strict=True):
        assert torch.equal(have[:, 36:], want[:, 36:])
        assert want[:, 32:].ne(0).any(-1).all()
    assert grads[0][0][:, 32:36].isnan().all(), "dk"
    assert not grads[0][1][:, 32:36].isfinite().any(), "dv"


@kernels
@pytest.mark.parametrize("order", ORDERS)
def test_values_that_are_not_finite_are_not_in_their_own_gradient(order: str) -> None:
    """dv is of weights and upstream gradients: rows that see a NaN among values leave every bit of it."""
    x = make_inputs(Spec(seq_len=40, blocks="local"), DEVICE)
    spoiled = x.v.clone()
    spoiled[:, 33] = float("nan")
    found = []
    for values in (spoiled.requires_grad_(), x.v.clone().requires_grad_()):
        out = in_order(order)(x.q, x.k, values, x.block_indices, block_size=16)[0]
        found += torch.autograd.grad(out, values, torch.ones_like(out))
    assert torch.equal(*found)


@kernels
@pytest.mark.parametrize("order", ORDERS)
def test_deterministic(order: str) -> None:
    spec = (
        Spec(seq_len=20)
        if INTERPRETED
        else Spec(seq_len=3000, head_dim=64, head_dim_v=64, block_size=64, num_selected=8)
    )
    call = call_of("selected_attention", make_inputs(spec, DEVICE, torch.float16))
    upstream = upstream_of(call)
    first, second = (run(in_order(order), call, upstream) for _ in range(2))
    assert all(torch.equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True))


@kernels
@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
def test_opcheck_of_the_internal_operators(packed: bool) -> None:
    """Schema and fake kernel of every operator that fixes a loop order; some results are not written throughout."""
    x = make_inputs(Spec(seq_len=20, num_kv_heads=1, lengths=(5, 15) if packed else None), DEVICE)
    checked = set()

    class Check(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if op.namespace == "fsa":
                torch.library.opcheck(op, args, kwargs, test_utils=("test_schema", "test_faketensor"))
                checked.add(op._schema.name)
            return op(*args, **(kwargs or {}))

    for order in ORDERS:
        with Check(), torch.no_grad():
            how = (options.Selected(16, 0.25, order), Layout(x.cu_seqlens_q))
            results = orders.selected_attention_forward(x.q, x.k, x.v, x.block_indices, *how)
            grads = (results[0], results[2])
            orders.selected_attention_backward(*grads, x.q, x.k, x.v, x.block_indices, *results, *how)
    with Check():
        block_lists(x.block_indices, x.cu_seqlens_q, None, None, None, seq_len_k=20, block_size=16)
    shared = (ATTENTION_DELTA, ROW_WEIGHTS)
    assert checked == {f"fsa::_{kernel.name}" for kernel in (*shared, *KERNELS)} | {"fsa::_block_lists"}


@kernels
def test_lists_refuse_more_entries_than_they_number() -> None:
    many = torch.zeros(1, dtype=torch.int32, device=DEVICE).expand(1, 2**20, 16, 128)  # one number in memory
    with pytest.raises(NotImplementedError, match="2147483648 selections"):
        torch.ops.fsa._block_lists(many, None, None, None, None, seq_len_k=2**20, block_size=64)


@kernels
@given(spec=specs())
def test_lists_hold_every_visible_entry_once_in_order(spec: Spec) -> None:
    x = make_inputs(spec, DEVICE)
    seqs = (x.cu_seqlens_q, x.cu_seqlens_k, None, None)
    entries, tile_list, tile_offsets, list_offsets = torch.ops.fsa._block_lists(
        x.block_indices, *seqs, seq_len_k=x.k.shape[1], block_size=spec.block_size
    )
    lengths = spec.lengths or (spec.seq_len,) * spec.batch
    want: dict[int, list[int]] = {}
    num_blocks = (len(list_offsets) - 1) // spec.num_kv_heads
    row, first_key = 0, 0
    for i, length in enumerate(lengths):
        length_k = length + spec.extra_keys
        # packed, a run's blocks are numbered from where its keys start, one further for every run before
        base = first_key // spec.block_size + i + 1 if spec.lengths else i * -(-length_k // spec.block_size)
        for t in range(length):
            for hk in range(spec.num_kv_heads):
                for slot, block in enumerate(
                    x.block_indices.view(-1, spec.num_kv_heads, spec.num_selected)[row, hk].tolist()
                ):
                    if 0 <= block <= (t + spec.extra_keys) // spec.block_size:
                        entry = (row * spec.num_kv_heads + hk) * spec.num_selected + slot
                        want.setdefault(hk * num_blocks + base + block, []).append(entry)
            row += 1
        first_key += length_k
    have = {i: entries[a:b].tolist() for i, (a, b) in enumerate(itertools.pairwise(list_offsets)) if a < b}
    assert have == want
    tiles = {i: -(-len(e) // ENTRIES_PER_TILE) for i, e in want.items()}
    flat = [i for i in sorted(tiles) for _ in range(tiles[i])]
    assert tile_list.tolist() == flat + [-1] * (len(tile_list) - len(flat))
    assert [tile_offsets[i + 1] - tile_offsets[i] for i in sorted(tiles)] == [tiles[i] for i in sorted(tiles)]


@pytest.mark.gpu
@pytest.mark.parametrize("order", ORDERS)
def test_more_than_2_31_elements(order: str, much_memory: None) -> None:
    """q alone has 2.3e9 elements; the last rows, whose offsets do not fit 32 bits, against the reference."""
    seq_len, heads, dim = 140_000, 64, 256
    generator = torch.Generator("cuda").manual_seed(0)
    q = torch.empty(1, seq_len, heads, dim, device="cuda", dtype=torch.bfloat16).normal_(generator=generator)
    k, v = (torch.randn(1, seq_len, 1, dim, device="cuda", generator=generator).bfloat16() for _ in range(2))
    current = torch.arange(seq_len, device="cuda") // 64
    block_indices = torch.stack([current * 0, current], -1)[None, :, None].int()
    block_indices[..., 1].masked_fill_(block_indices[..., 1] == 0, -1)
    assert q.numel() > 2**31
    how = (options.Selected(64, dim**-0.5, order), Layout())
    out, shift, log_sum = orders.selected_attention_forward(q, k, v, block_indices, *how)
    first, last = 64 * (seq_len // 64) - 64, seq_len
    keys = torch.cat([torch.arange(64, device="cuda"), torch.arange(first, last, device="cuda")])
    visible = keys <= torch.arange(first, last, device="cuda")[:, None]
    own = (keys // 64 == 0) | (keys // 64 == torch.arange(first, last, device="cuda")[:, None] // 64)
    scores = torch.einsum("thd,kd->htk", q[0, first:].double(), k[0, keys, 0].double()) * dim**-0.5
    p = scores.masked_fill(~(visible & own), -torch.inf)
    want = torch.einsum("htk,kd->thd", p.softmax(-1), v[0, keys, 0].double())
    assert relative_error(out[0, first:], want) < 4e-3
    assert relative_error((log_sum + shift * dim**-0.5)[0, first:], p.logsumexp(-1).T) < 1e-4
    del scores, p, want
    grad_out = torch.zeros_like(out)
    grad_out[:, -1] = 1
    results = (out, shift, log_sum)
    dq, _, dv = orders.selected_attention_backward(grad_out, None, q, k, v, block_indices, *results, *how)
    assert (dq[:, :-1] == 0).all()
    assert dq[:, -1].abs().sum() > 0
    assert abs(float(dv.float().sum()) / (heads * dim) - 1) < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("order", ORDERS)
def test_cuda_graph(order: str) -> None:
    """Forward and backward are captured and replayed on other inputs: nothing in them waits for the device."""
    spec = Spec(seq_len=1500, head_dim=64, head_dim_v=64, block_size=64, num_selected=8)
    inputs, others = (make_inputs(spec, "cuda", torch.bfloat16, seed=seed) for seed in (0, 1))
    static = [x.clone() for x in (inputs.q, inputs.k, inputs.v, inputs.block_indices)]
    options = {"block_size": 64, "loop_order": order}
    fsa = torch.ops.fsa

    def step() -> tuple[Tensor, ...]:
        results = fsa.selected_attention_forward(*static, **options)
        return *results, *fsa.selected_attention_backward(results[0], None, *static, *results, **options)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for x, y in zip(static, (others.q, others.k, others.v, others.block_indices), strict=True):
        x.copy_(y)
    graph.replay()
    have = [x.clone() for x in captured]
    assert all(torch.equal(h, w) for h, w in zip(have, step(), strict=True))
