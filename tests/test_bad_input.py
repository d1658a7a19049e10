"""Each wrong input is refused with an error that names it: eagerly, under torch.compile, and on fake tensors."""

# ruff: noqa: E501  (a case is a line)

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fsa_compile
from fsa_compile import debug
from fsa_compile.ops import schema
from fsa_compile.ops.operators import OPERATORS
from fsa_compile.testing.calls import Call, backward_call, call_of, forward_call, run, selection_of, upstream_of
from fsa_compile.testing.inputs import make_inputs
from fsa_compile.testing.specs import NAMED, Spec

fsa = torch.ops.fsa
BATCH = Spec(batch=2, seq_len=40)
PACKED = NAMED["packed"]


@dataclass(frozen=True)
class Bad:
    """One thing wrong with a good call: `change` gets the arguments by name and edits them."""

    name: str
    op: str
    change: Callable[[dict[str, Any]], None]
    error: type[Exception]
    message: str
    spec: Spec = BATCH


def put(**changed: Any) -> Callable[[dict[str, Any]], None]:
    """Set arguments; a function is applied to the argument that was there."""

    def change(arguments: dict[str, Any]) -> None:
        for name, value in changed.items():
            arguments[name] = value(arguments[name]) if callable(value) else value

    return change


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(*shape, dtype=dtype)


def cu(*bounds: int) -> Tensor:
    return torch.tensor(bounds, dtype=torch.int32)


SELECTED, COMPRESSED, SLIDING = "selected_attention", "compressed_attention", "sliding_window_attention"
NSA, SELECT, MEAN = "nsa_attention", "select_blocks", "mean_compress"
V, T = ValueError, TypeError

BAD = (
    # rank
    Bad("q_rank", SELECTED, put(q=lambda q: q[0]), V,
        r"fsa::selected_attention: q has 3 dimensions, shape \(40, 4, 16\), but it should have 4: \[batch, seq_len, num_q_heads, head_dim\]"),
    Bad("v_rank", NSA, put(v=lambda v: v[..., None]), V, r"fsa::nsa_attention: v has 5 dimensions.*should have 4"),
    Bad("x_rank", MEAN, put(x=lambda x: x[..., 0]), V, r"fsa::mean_compress: x has 3 dimensions"),
    Bad("gate_rank", NSA, put(g_swa=lambda g: g[..., None]), V, r"g_swa has 4 dimensions.*should have 3: \[batch=2, seq_len=40, num_q_heads=4\]"),
    Bad("blocks_rank", SELECTED, put(block_indices=lambda b: b[..., 0]), V, r"block_indices has 3 dimensions.*num_kv_heads=2, num_selected\]"),
    Bad("cu_seqlens_rank", SELECTED, put(cu_seqlens_q=lambda c: c[None]), V, r"cu_seqlens_q has 2 dimensions.*\[num_seqs \+ 1\]", PACKED),
    # dtype
    Bad("k_dtype", SELECTED, put(k=lambda k: k.half()), T, r"selected_attention: k is torch.float16, but it should be torch.float32, the dtype of q"),
    Bad("v_dtype", SLIDING, put(v=lambda v: v.bfloat16()), T, r"v is torch.bfloat16, but it should be torch.float32"),
    Bad("k_cmp_dtype", COMPRESSED, put(k_cmp=lambda k: k.half()), T, r"k_cmp is torch.float16"),
    Bad("double", NSA, put(q=lambda q: q.double()), T, r"q is torch.float64, but it should be bfloat16, float16 or float32"),
    Bad("integers", MEAN, put(x=lambda x: x.int()), T, r"x is torch.int32, but it should be bfloat16, float16 or float32"),
    Bad("gate_dtype", NSA, put(g_cmp=lambda g: g.int()), T, r"g_cmp is torch.int32, but it should be a floating dtype"),
    Bad("blocks_dtype", SELECTED, put(block_indices=lambda b: b.long()), T, r"block_indices is torch.int64, but it should be torch.int32"),
    Bad("lse_dtype", SELECT, put(lse=lambda x: x.half()), T, r"lse is torch.float16, but it should be torch.float32"),
    Bad("cu_seqlens_dtype", NSA, put(cu_seqlens_q=lambda c: c.long()), T, r"cu_seqlens_q is torch.int64, but it should be torch.int32", PACKED),
    Bad("cu_seqlens_k_dtype", SLIDING, put(cu_seqlens_k=lambda c: c.float()), T, r"cu_seqlens_k is torch.float32", NAMED["packed_more_keys"]),
    # sizes
    Bad("heads", SELECTED, put(q=lambda q: q[:, :, :3]), V, r"num_q_heads is 3 and num_kv_heads is 2, but num_q_heads should be a multiple"),
    Bad("v_heads", SLIDING, put(v=lambda v: v[:, :, :1]), V, r"v has shape \(2, 40, 1, 16\), but it should be \[batch=2, seq_len_k=40, num_kv_heads=2, head_dim_v\] \(num_kv_heads is 1, not 2\)"),
    Bad("head_dim", NSA, put(k=lambda k: k[..., :8]), V, r"k has shape \(2, 40, 2, 8\), but it should be .*head_dim=16\]"),
    Bad("batch", SELECTED, put(k=lambda k: k[:1]), V, r"k has shape \(1, 40, 2, 16\).*batch is 1, not 2"),
    Bad("v_length", SELECTED, put(v=lambda v: v[:, :39]), V, r"v has shape.*seq_len_k is 39, not 40"),
    Bad("no_blocks", SELECTED, put(block_indices=lambda b: b[..., :0]), V, r"num_selected is 0, but it should be at least 1"),
    Bad("no_heads", SLIDING, put(k=lambda k: k[:, :, :0], v=lambda v: v[:, :, :0]), V, r"num_kv_heads is 0, but it should be at least 1"),
    Bad("wide", SLIDING, put(q=ones(2, 40, 4, 257), k=ones(2, 40, 2, 257)), V, r"head_dim is 257, but it should be at most 256"),
    Bad("wide_values", SELECTED, put(v=ones(2, 40, 2, 300)), V, r"head_dim_v is 300, but it should be at most 256"),
    Bad("gate_shape", NSA, put(g_slc=lambda g: g[..., :2]), V, r"g_slc has shape \(2, 40, 2\), but it should be \[batch=2, seq_len=40, num_q_heads=4\]"),
    Bad("blocks_heads", SELECTED, put(block_indices=lambda b: b[:, :, :1]), V, r"block_indices has shape \(2, 40, 1, 4\), but it should be .*num_kv_heads=2"),
    Bad("blocks_rows", NSA, put(block_indices=lambda b: b[:, :-1]), V, r"nsa_attention: block_indices has shape \(2, 39, 2, 4\)"),
    Bad("k_cmp_length", COMPRESSED, put(k_cmp=lambda k: k[:, :-1]), V, r"k_cmp has shape \(2, 8, 2, 16\), but it should be \[batch=2, num_compressed=9,"),
    Bad("k_cmp_packed", COMPRESSED, put(k_cmp=lambda k: k[:, :-1]), V, r"k_cmp has shape.*num_compressed=29", PACKED),
    Bad("v_cmp_shape", COMPRESSED, put(v_cmp=lambda v: v[:, :, :1]), V, r"v_cmp has shape"),
    Bad("own_k_cmp", NSA, put(k_cmp=ones(2, 5, 2, 16), v_cmp=ones(2, 5, 2, 16)), V, r"nsa_attention: k_cmp has shape \(2, 5, 2, 16\).*num_compressed=9"),
    Bad("lse_shape", SELECT, put(lse=lambda x: x[:, :, :1]), V, r"select_blocks: lse has shape \(2, 40, 1\), but it should be \[batch=2, seq_len=40, num_q_heads=4\]"),
    Bad("v_cmp_alone", NSA, put(v_cmp=ones(2, 9, 2, 16)), V, r"v_cmp is given without k_cmp"),
    Bad("k_cmp_alone", NSA, put(k_cmp=ones(2, 9, 2, 16)), V, r"k_cmp and g_cmp are given without v_cmp"),
    # options
    Bad("stride_size", COMPRESSED, put(kernel_size=9), V, r"kernel_size is 9, but it should be a positive multiple of kernel_stride=4"),
    Bad("stride_zero", MEAN, put(kernel_stride=0), V, r"kernel_stride is 0, but it should be at least 1"),
    Bad("stride_zero_nsa", NSA, put(kernel_stride=0), V, r"kernel_stride is 0, but it should be at least 1"),
    Bad("stride_block", NSA, put(kernel_size=6, kernel_stride=3), V, r"kernel_stride is 3, but it should divide block_size=16"),
    Bad("stride_block_select", SELECT, put(block_size=16, kernel_size=32, kernel_stride=32, k_cmp=ones(2, 1, 2, 16)), V, r"kernel_stride is 32, but it should divide block_size=16"),
    Bad("block_power", SELECTED, put(block_size=48), V, r"block_size is 48, but it should be a power of two and at least 16"),
    Bad("block_small", NSA, put(block_size=8), V, r"block_size is 8, but it should be a power of two and at least 16"),
    Bad("places", SELECT, put(num_selected=3, init_blocks=2, local_blocks=2), V, r"num_selected is 3, .*init_blocks \+ local_blocks = 4"),
    Bad("places_nsa", NSA, put(block_indices=None, num_selected=1), V, r"num_selected is 1, .*init_blocks \+ local_blocks = 2"),
    Bad("no_places", SELECT, put(num_selected=0, init_blocks=0, local_blocks=0), V, r"num_selected is 0"),
    Bad("negative_forced", SELECT, put(local_blocks=-1), V, r"local_blocks is -1, but it should not be negative"),
    Bad("window", NSA, put(window_size=-1), V, r"window_size is -1, but it should be at least 1, or 0 for no window"),
    Bad("window_zero", SLIDING, put(window_size=0), V, r"window_size is 0, but it should be at least 1"),
    Bad("pool", SELECT, put(pool="mean"), V, r"pool is 'mean', but it should be one of 'overlap', 'max'"),
    Bad("no_lse", SELECT, put(lse=None), V, r"lse is None, but it should be given, as pool is 'overlap'"),
    Bad("loop_order", SELECTED, put(loop_order="flash"), V, r"loop_order is 'flash', but it should be one of 'auto', 'fsa', 'nsa'"),
    Bad("loop_order_nsa", NSA, put(loop_order="NSA"), V, r"loop_order is 'NSA'"),
    # packed sequences
    Bad("packed_batch", SELECTED, put(cu_seqlens_q=cu(0, 10, 40)), V, r"cu_seqlens_q is given and batch is 2, but packed sequences should have batch 1"),
    Bad("packed_batch_mean", MEAN, put(cu_seqlens=cu(0, 10, 40)), V, r"cu_seqlens is given and batch is 2"),
    Bad("packed_none", SLIDING, put(cu_seqlens_q=cu(0)), V, r"cu_seqlens_q has shape \(1,\), but it should be \[num_seqs \+ 1\] with num_seqs >= 1", PACKED),
    Bad("packed_keys_only", SELECTED, put(cu_seqlens_q=None, cu_seqlens_k=cu(0, 117)), V, r"cu_seqlens_k is given without cu_seqlens_q", PACKED),
    Bad("packed_counts", SELECTED, put(cu_seqlens_k=cu(0, 104)), V, r"cu_seqlens_k has shape \(2,\), but it should be \[num_seqs \+ 1=4\]", NAMED["packed_more_keys"]),
    Bad("packed_lengths", SELECTED, put(cu_seqlens_k=None), V, r"cu_seqlens_k is None.*41 queries and 104 keys", NAMED["packed_more_keys"]),
    Bad("max_seqlen", SELECTED, put(max_seqlen_q=-1), V, r"max_seqlen_q is -1, but it should not be negative", PACKED),
    # padded batches
    Bad("seqused_dtype", SELECTED, put(seqused_k=ones(2)), T, r"seqused_k is torch.float32, but it should be torch.int32"),
    Bad("seqused_shape", COMPRESSED, put(seqused_k=cu(1, 2, 3)), V, r"seqused_k has shape \(3,\), but it should be \[batch=2\]"),
    Bad("leftpad_rank", NSA, put(leftpad_k=cu(1, 2)[None]), V, r"leftpad_k has 2 dimensions.*\[batch=2\]"),
    Bad("leftpad_mean", MEAN, put(leftpad=cu(1, 2).long()), T, r"leftpad is torch.int64, but it should be torch.int32"),
    Bad("seqused_packed", SLIDING, put(seqused_k=cu(1)), V, r"seqused_k is given with cu_seqlens_q, but it is for padded batches", PACKED),
    Bad("leftpad_packed", SELECT, put(leftpad_k=cu(1)), V, r"leftpad_k is given with cu_seqlens_q", PACKED),
    Bad("seqused_packed_mean", MEAN, put(seqused=cu(1)), V, r"seqused is given with cu_seqlens, but it is for padded batches", PACKED),
    # devices
    Bad("device_k", SELECTED, put(k=lambda k: k.to("meta")), V, r"k is on meta, but it should be on cpu, where q is"),
    Bad("device_blocks", SELECTED, put(block_indices=lambda b: b.to("meta")), V, r"block_indices is on meta, but it should be on cpu"),
    Bad("device_gate", NSA, put(g_cmp=lambda g: g.to("meta")), V, r"g_cmp is on meta, but it should be on cpu"),
    Bad("device_cu_seqlens", SLIDING, put(cu_seqlens_q=lambda c: c.to("meta")), V, r"cu_seqlens_q is on meta", PACKED),
)  # fmt: skip


def named_arguments(call: Call) -> dict[str, Any]:
    """All arguments by name, without gradients, positional ones first."""
    names = [p.name for p in OPERATORS[call.name].signature.parameters.values()]
    values = [x.detach() if isinstance(x, Tensor) else x for x in call.args]
    return {**dict(zip(names, values, strict=False)), **call.options}


def good_call(op: str, spec: Spec) -> Call:
    x = make_inputs(spec)
    return selection_of(x) if op == SELECT else call_of(op, x)


def invoke(op: str, arguments: dict[str, Any]) -> Any:
    return getattr(fsa, op)(**arguments)


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_refused_eagerly_and_compiled(bad: Bad) -> None:
    arguments = named_arguments(good_call(bad.op, bad.spec))
    invoke(bad.op, arguments)  # good until now
    bad.change(arguments)
    with pytest.raises(bad.error, match=bad.message):
        invoke(bad.op, arguments)
    with pytest.raises(bad.error, match=bad.message):
        getattr(fsa_compile, bad.op)(**arguments)
    torch._dynamo.reset()
    # Dynamo puts its own exception around that of a fake kernel.
    with pytest.raises(Exception, match=bad.message):
        torch.compile(invoke, backend="eager", fullgraph=True)(bad.op, arguments)


@pytest.mark.parametrize("bad", [bad for bad in BAD if not bad.name.startswith("device")], ids=lambda bad: bad.name)
def test_refused_on_fake_tensors(bad: Bad) -> None:
    arguments = named_arguments(good_call(bad.op, bad.spec))
    bad.change(arguments)
    mode = FakeTensorMode()
    fake = {name: mode.from_tensor(x) if isinstance(x, Tensor) else x for name, x in arguments.items()}
    with pytest.raises(bad.error, match=bad.message):
        invoke(bad.op, fake)


BACKWARD = (
    ("grad_out", lambda x: x[..., :8], V, r"grad_out has shape .*, but it should be .*head_dim_v=16\]"),
    ("grad_out", lambda x: x.half(), T, r"grad_out is torch.float16"),
    ("grad_log_sum", lambda x: x.half(), T, r"grad_log_sum is torch.float16, but it should be torch.float32"),
    ("out", lambda x: x[:, :1], V, r"out has shape"),
    ("shift", lambda x: x[..., None], V, r"shift has 4 dimensions"),
    ("log_sum", lambda x: x.half(), T, r"log_sum is torch.float16, but it should be torch.float32"),
)


@pytest.mark.parametrize("op", [SELECTED, COMPRESSED, SLIDING])
@pytest.mark.parametrize("name,change,error,message", BACKWARD)
def test_backwards_refuse_too(
    op: str, name: str, change: Callable[[Tensor], Tensor], error: type[Exception], message: str
) -> None:
    call = good_call(op, BATCH)
    arguments = named_arguments(backward_call(call, upstream_of(call)))
    invoke(f"{op}_backward", arguments)
    arguments[name] = change(arguments[name])
    with pytest.raises(error, match=f"fsa::{op}_backward: {message}"):
        invoke(f"{op}_backward", arguments)


@pytest.mark.parametrize("op", [SELECTED, COMPRESSED, SLIDING])
@pytest.mark.parametrize("scale", [0.0, -0.5, float("nan")])
def test_forwards_and_backwards_want_a_positive_scale(op: str, scale: float) -> None:
    """The public operators, which take any, never pass another on."""
    call = good_call(op, BATCH)
    for each in (forward_call(call), backward_call(call, upstream_of(call))):
        with pytest.raises(ValueError, match=rf"fsa::{op}\w*: scale is {scale}, but here it should be positive"):
            invoke(each.name, {**named_arguments(each), "scale": scale})


def test_backward_of_the_mean_refuses_too() -> None:
    call = good_call(MEAN, BATCH)
    arguments = named_arguments(backward_call(call, upstream_of(call)))
    invoke("mean_compress_backward", arguments)
    with pytest.raises(ValueError, match=r"fsa::mean_compress_backward: grad_out has shape \(2, 9, 2, 16\).*=12"):
        invoke("mean_compress_backward", {**arguments, "seq_len": 55})


def test_every_operator_has_a_bad_input() -> None:
    forwards = {f"{name}_forward" for name in schema.ATTENTION_OPS}
    assert {bad.op for bad in BAD} == set(schema.SEMANTIC_OPS) - set(schema.BACKWARD_OPS) - forwards


@pytest.mark.gpu
def test_devices_that_differ() -> None:
    arguments = named_arguments(good_call(SELECTED, BATCH))
    arguments |= {name: arguments[name].cuda() for name in ("q", "v", "block_indices")}
    with pytest.raises(ValueError, match=r"k is on cpu, but it should be on cuda:0, where q is"):
        invoke(SELECTED, arguments)


@pytest.fixture
def validating() -> Iterator[None]:
    debug.validate(True)
    yield
    debug.validate(False)


def with_block(call: Call, row: int, slot: int, value: int) -> Call:
    blocks = call.others[0].clone()
    blocks[0, row, 0, slot] = value
    return Call(call.name, call.floating, (blocks,), call.options)


@pytest.mark.parametrize(
    "spec", [Spec(batch=2, seq_len=70, blocks="full"), Spec(lengths=(30, 40), blocks="full")], ids=str
)
def test_wrong_block_ids_are_found_when_asked(device: str, spec: Spec, validating: None) -> None:
    call = call_of(SELECTED, make_inputs(spec, device))
    run(call.op(), call, upstream_of(call))  # right ids pass, forward and backward
    last = int(call.others[0][0, 69, 0].max())
    for wrong, message in (
        (with_block(call, 69, 0, 10**6), r"block_indices\[0, 69, 0\] holds block id 1000000, but a block id should be -1 or from 0 to"),
        (with_block(call, 69, 0, -2), r"block_indices\[0, 69, 0\] holds block id -2"),
        (with_block(call, 5, 1, 1), r"block_indices\[0, 5, 0\] holds block id 1, but a block id should not lie in the future"),
        (with_block(with_block(call, 69, 0, last), 69, 1, last), r"block_indices\[0, 69, 0\] .* should not repeat within a row"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            wrong.op()(*wrong.args, **wrong.options)
    debug.validate(False)
    wrong = with_block(call, 69, 0, 10**6)
    wrong.op()(*wrong.args, **wrong.options)


@pytest.mark.parametrize("op", [SELECTED, SLIDING, COMPRESSED, SELECT, NSA, MEAN])
def test_wrong_cu_seqlens_are_found_when_asked(device: str, op: str, validating: None) -> None:
    x = make_inputs(PACKED, device)
    call = selection_of(x) if op == SELECT else call_of(op, x)
    name = "cu_seqlens" if op == MEAN else "cu_seqlens_q"
    call.op()(*call.args, **call.options)
    for bounds, message in (
        ((-3, 37, 38, 102, 117), r"starts at -3, but it should not be negative"),
        ((0, 38, 37, 102, 117), r"decreases from 38 to 37 at index 2"),
        ((0, 37, 38, 102, 118), r"ends at 118, but it should end within the 117 rows there are"),
    ):
        options = {**call.options, name: cu(*bounds).to(device)}
        with pytest.raises(ValueError, match=message):
            call.op()(*call.args, **options)


@pytest.mark.parametrize("op", [SELECTED, SLIDING, COMPRESSED, SELECT, NSA, MEAN])
def test_wrong_paddings_are_found_when_asked(device: str, op: str, validating: None) -> None:
    x = make_inputs(Spec(batch=2, seq_len=40, blocks="local"), device)
    call = selection_of(x) if op == SELECT else call_of(op, x)
    suffix = "" if op == MEAN else "_k"  # of the whole's keys, the mean is the first to see them
    for used, left, message in (
        ((40, 41), (0, 0), r"seqused(_k)?\[1\] is 41, but it should be from 0 to 40"),
        ((-1, 40), (0, 0), r"seqused(_k)?\[0\] is -1, but it should be from 0 to 40"),
        ((40, 30), (0, 31), r"leftpad(_k)?\[1\] is 31, but it should be from 0 to 30"),
    ):
        options = {**call.options, f"seqused{suffix}": cu(*used).to(device), f"leftpad{suffix}": cu(*left).to(device)}
        with pytest.raises(ValueError, match=message):
            call.op()(*call.args, **options)


def test_the_environment_switches_validation_on() -> None:
    code = "import fsa_compile; print(fsa_compile.debug.is_validating())"
    environment = {**os.environ, "FSA_COMPILE_VALIDATE": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "True"
    assert not debug.is_validating(), "off by default"
