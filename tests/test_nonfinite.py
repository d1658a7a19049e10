"""A NaN or an infinity reaches the rows that see it, and no others: forward and backward, of every stage."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fsa_compile.ops import compressed, selected, selection, window
from fsa_compile.ops.dispatch import implementation
from fsa_compile.testing.calls import Call, call_of, selection_of, upstream_of
from fsa_compile.testing.inputs import make_inputs
from fsa_compile.testing.specs import Spec

ATTENTION = ("compressed_attention", "selected_attention", "sliding_window_attention")
fsa = torch.ops.fsa
portable = SimpleNamespace(
    **{
        name: implementation(name, getattr(m, name))
        for m in (compressed.portable, selected.portable, selection.portable, window.portable)
        for name in m.__all__
    }
)
SPECS = (
    Spec(name="plain", seq_len=331, window_size=70, blocks="local"),
    Spec(name="more_keys", seq_len=75, extra_keys=122, window_size=40, blocks="local"),
    Spec(name="packed", lengths=(40, 90, 150), window_size=33, blocks="local"),
)
# Rows of k and v, or of what is compressed from them: the last one, and as many as a block has.
PLACES = {"last": 1, "block": 16}


def clean_rows(call: Call, spec: Spec, first: int) -> Tensor:
    """[T]: rows that see none of the keys from row `first` on, told by what moves when those keys move."""
    moved = [x.clone() for x in call.floating]
    for x in moved[1:]:
        x[:, first:] += 1.0
    double = call.to(torch.float64)
    a = double.reference()(*double.args, **call.options)
    b = double.reference()(*(x.double() for x in moved), *call.others, **call.options)
    return (a[0] == b[0]).flatten(2).all(-1)[0] & (a[1] == b[1]).all(-1)[0]


@pytest.mark.parametrize("module", [fsa, portable], ids=["operator", "portable"])
@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", ["k", "v", "both"])
def test_hidden_keys(name: str, spec: Spec, place: str, value: float, which: str, module: Any) -> None:
    call = call_of(name, make_inputs(spec))
    everyone = torch.zeros(spec.seq_len, dtype=torch.bool)
    first = int(reached_keys(call, everyone).nonzero()[-1]) + 1 - PLACES[place]
    clean = clean_rows(call, spec, first)
    assert clean.any()
    assert not clean.all()
    dirty = [x.clone() for x in call.floating]
    for x in {"k": dirty[1:2], "v": dirty[2:], "both": dirty[1:]}[which]:
        x[:, first:] = value
    forward, backward = getattr(module, f"{name}_forward"), getattr(module, f"{name}_backward")
    want = forward(*call.args, **call.options)
    have = forward(*dirty, *call.others, **call.options)
    same(have, want, clean)
    if value != value:
        assert have[0][:, ~clean].isnan().flatten(2).any(-1).all(), "who sees a NaN returns it"
    upstream = upstream_of(call)
    grads = backward(*upstream, *dirty, *call.others, *have, **call.options)
    wanted = backward(*upstream, *call.args, *want, **call.options)
    torch.testing.assert_close(grads[0][:, clean], wanted[0][:, clean])
    reach = reached_keys(call, clean)
    for a, b in zip(grads[1:], wanted[1:], strict=True):
        torch.testing.assert_close(a[:, ~reach], b[:, ~reach])


def same(have: tuple[Tensor, ...], want: tuple[Tensor, ...], rows: Tensor) -> None:
    """Outputs and log-sum-exps, at head dim 16."""
    for a, b in zip(have, want, strict=True):
        assert not (a[:, rows].isnan() | b[:, rows].isnan()).any()
    torch.testing.assert_close(have[0][:, rows], want[0][:, rows])
    lse, wanted = (shift / 4 + log_sum for _, shift, log_sum in (have, want))
    torch.testing.assert_close(lse[:, rows], wanted[:, rows])


def reached_keys(call: Call, clean: Tensor) -> Tensor:
    """[N]: keys that a row which is not clean sees, told by their values' gradients."""
    q, k, v = (x.double() for x in call.floating)
    v = torch.zeros_like(v).requires_grad_()
    out, _ = call.reference()(torch.zeros_like(q), torch.zeros_like(k), v, *call.others, **call.options)
    (grad,) = torch.autograd.grad(out[:, ~clean].sum(), v)
    return grad.flatten(2).any(-1)[0]


@pytest.mark.parametrize("module", [fsa, portable], ids=["operator", "portable"])
@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", ["q", "grad_out"])
def test_rows_do_not_reach_keys_that_they_do_not_see(
    name: str, spec: Spec, value: float, which: str, module: Any
) -> None:
    """A query, or an upstream gradient, that is not finite: nothing of it in other rows or in keys after it."""
    call = call_of(name, make_inputs(spec))
    rows = torch.zeros(spec.seq_len, dtype=torch.bool)
    rows[[0, 33, 64]] = True
    reach = reached_keys(call, ~rows)
    upstream = upstream_of(call)
    forward, backward = getattr(module, f"{name}_forward"), getattr(module, f"{name}_backward")
    want = forward(*call.args, **call.options)
    wanted = backward(*upstream, *call.args, *want, **call.options)
    q = call.floating[0]
    if which == "q":
        q = q.clone()
        q[:, rows] = value
    else:
        upstream[0][:, rows] = value
    have = forward(q, *call.args[1:], **call.options)
    same(have, want, ~rows)
    if which == "q":
        seeing = rows & (want[2][0] > -torch.inf).all(-1)
        assert have[0][:, seeing].isnan().all(), "its own NaN a row returns"
        assert (have[1] + have[2])[:, seeing].isnan().all()
    grads = backward(*upstream, q, *call.args[1:], *have, **call.options)
    torch.testing.assert_close(grads[0][:, ~rows], wanted[0][:, ~rows])
    for a, b in zip(grads[1:], wanted[1:], strict=True):
        torch.testing.assert_close(a[:, ~reach], b[:, ~reach])


@pytest.mark.parametrize("module", [fsa, portable], ids=["operator", "portable"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("pool,with_lse", [("overlap", True), ("max", True), ("max", False)])
def test_selection(spec: Spec, place: str, value: float, pool: str, with_lse: bool, module: Any) -> None:
    call = selection_of(make_inputs(spec))
    q, k_cmp = call.floating
    lse = call.others[0] if with_lse else None
    first = k_cmp.shape[1] - PLACES[place]
    dirty = k_cmp.clone()
    dirty[:, first:] = value
    probe = Call("compressed_attention", (q, k_cmp, k_cmp), (), call.options)
    names = ("block_size", "num_selected", "init_blocks", "local_blocks")
    probe = Call(probe.name, probe.floating, (), {k: v for k, v in call.options.items() if k not in names})
    clean = clean_rows(probe, spec, first)
    want = module.select_blocks(q, k_cmp, lse, **call.options, pool=pool)
    have = module.select_blocks(q, dirty, lse, **call.options, pool=pool)
    assert torch.equal(have[:, clean], want[:, clean])
    assert ((have == -1) == (want == -1)).all(), "as many blocks, whatever they are"


def test_mean(device: str) -> None:
    """Only the windows that a token is in."""
    for spec in SPECS:
        x = make_inputs(spec, device)
        call = call_of("mean_compress", x)
        want = call.op()(*call.args, **call.options)
        k = x.k.clone()
        k[:, spec.seq_len_k // 2] = torch.nan
        have = call.op()(k, **call.options)
        dirty = have.isnan().flatten(2).any(-1)[0]
        assert 1 <= int(dirty.sum()) <= spec.kernel_size // spec.kernel_stride
        assert torch.equal(have[:, ~dirty], want[:, ~dirty])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seq_len", [1, 33, 40])
@pytest.mark.parametrize("name", ATTENTION)
def test_rows_that_see_nothing_else(name: str, seq_len: int, dtype: torch.dtype) -> None:
    """Of every score of a row a NaN: a NaN, and not the 0 of a row without keys."""
    call = call_of(
        name, make_inputs(Spec(seq_len=seq_len, kernel_size=32, kernel_stride=16, blocks="local"), dtype=dtype)
    )
    want = call.op()(*call.args, **call.options)
    sees = (want[1][0] > -torch.inf).all(-1)
    k = torch.full_like(call.args[1], torch.nan)
    out, lse = call.op()(call.args[0], k, *call.args[2:], **call.options)
    assert out[:, sees].isnan().all()
    assert lse[:, sees].isnan().all()
    assert not out[:, ~sees].any()


def test_the_case_that_was_reported() -> None:
    """2000 tokens, a NaN in the last key, a window of 64: one row sees it."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2000, 2, 16) for _ in range(3))
    want, _ = fsa.sliding_window_attention(q, k, v, window_size=64)
    k[:, 1999] = torch.nan
    have, _ = fsa.sliding_window_attention(q, k, v, window_size=64)
    assert have.isnan().flatten(2).any(-1)[0].nonzero().flatten().tolist() == [1999]
    torch.testing.assert_close(have[:, :1999], want[:, :1999])
