"""What `benchmarks.models` compares: attentions with one signature, compiled, and held against each other."""

from __future__ import annotations

import argparse
import contextlib
import gc
import traceback
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel

import fsa_compile
from benchmarks import exact
from benchmarks.cases import DENSE, TOLERANCE
from benchmarks.decoder import Attention, Shape
from benchmarks.peers import WHOLE
from fsa_compile import cost

ORDERS = ("auto", *cost.LOOP_ORDERS)
PROVIDERS = ("dense", *(f"dense-{name}" for name in DENSE), *ORDERS, *(peer.name for peer in WHOLE))
SIZES = {"kernel_size": 32, "kernel_stride": 16, "init_blocks": 1, "local_blocks": 2, "window_size": 512}
FREE = "free"


class HasStatus(Protocol):
    """Of which `attempt` says how it went."""

    status: str


@dataclass(eq=False)
class Variant:
    """A provider with its blocks, and what was found out about it."""

    provider: str
    attention: Attention
    blocks: tuple[int, int] | None = None
    ours: bool = False
    fullgraph: bool = True
    commit: str = ""
    error: float | None = None
    status: str = "ok"

    @property
    def label(self) -> str:
        return f"{self.provider} {'x'.join(map(str, self.blocks))}" if self.blocks else self.provider


@contextlib.contextmanager
def attempt(of: HasStatus, clear: Callable[[], None] | None = None) -> Iterator[None]:
    """What goes wrong becomes the status, and its memory is free again."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        of.status = "out of memory"
        traceback.clear_frames(error.__traceback__)  # which hold what filled it
    except Exception as error:  # not made for this device or these sizes
        of.status = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        traceback.clear_frames(error.__traceback__)
    if of.status != "ok" and clear is not None:
        clear()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def free(q: Tensor, k: Tensor, v: Tensor, gates: tuple[Tensor, ...]) -> Tensor:
    """In place of attention; reads q, k and v, so that their projections are not compiled away."""
    return (q.unflatten(2, (k.shape[2], -1)) + (k + v).unsqueeze(3)).flatten(2, 3)


def ours(order: str, block_size: int, num_selected: int) -> Attention:
    """`nsa_attention` in one loop order."""
    options = {**SIZES, "block_size": block_size, "num_selected": num_selected, "loop_order": order}

    def attention(q: Tensor, k: Tensor, v: Tensor, gates: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return fsa_compile.nsa_attention(q, k, v, *gates, **options)

    return attention


def dense(backend: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> Attention:
    """Causal SDPA of one backend; its key heads are repeated in the model, if it does not know of groups."""

    def attention(q: Tensor, k: Tensor, v: Tensor, gates: Any = None, repeat: bool = False) -> Tensor:
        if repeat:
            k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(DENSE[backend]) if backend else contextlib.nullcontext():
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=not repeat).transpose(1, 2)

    def repeating(q: Tensor, k: Tensor, v: Tensor, gates: Any) -> Tensor:
        return attention(q, k, v, repeat=True)

    heads = (shape.num_q_heads, shape.num_kv_heads, shape.num_kv_heads)
    try:
        attention(*(torch.randn(1, 64, h, shape.head_dim, device=device, dtype=dtype) for h in heads))
    except RuntimeError:
        return repeating
    return attention


def variants(
    options: argparse.Namespace, shape: Shape, seq_len: int, device: torch.device, dtype: torch.dtype
) -> list[Variant]:
    """The free one, and those that were asked for and are there."""
    found, peers = [Variant(FREE, free)], {peer.name: peer for peer in WHOLE}
    for provider in options.providers:
        if provider.startswith("dense"):
            found.append(Variant(provider, dense(provider[6:], shape, device, dtype)))
            continue
        for blocks in options.blocks:
            if provider in ORDERS:
                found.append(Variant(provider, ours(provider, *blocks), blocks, ours=True))
                continue
            sizes = {**SIZES, "block_size": blocks[0], "num_selected": blocks[1]}
            with attempt(failed := Variant(provider, free, blocks)):
                peer = peers[provider](options.peers, [seq_len], sizes)
                attention = torch.compiler.disable(peer.attention)
                found.append(Variant(provider, attention, blocks, fullgraph=False, commit=peer.commit))
            if failed.status != "ok":
                print(f"left out: {provider}: {failed.status}", flush=True)
    return found


def compiled(fn: Callable[..., Any], fullgraph: bool = True) -> Callable[..., Any]:
    """`fn` compiled by itself: Dynamo keeps what it compiled by code object, and another object starts anew."""
    fn = types.FunctionType(fn.__code__.replace(), fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    return torch.compile(fn, fullgraph=fullgraph, dynamic=False)


def check(variant: Variant, shape: Shape, seq_len: int, like: Tensor, train: bool) -> None:
    """Fill in the error of the attention, compiled and alone, against eager "nsa" on the same random inputs."""
    generator = torch.Generator(like.device).manual_seed(2)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(1, seq_len, *sizes, device=like.device, generator=generator).to(like.dtype)

    heads = [(n, shape.head_dim) for n in (shape.num_q_heads, shape.num_kv_heads, shape.num_kv_heads)]
    leaves = [normal(*sizes) for sizes in heads] + [normal(shape.num_q_heads).sigmoid() for _ in range(3)]
    leaves = [x.requires_grad_(train) for x in leaves]
    upstream = normal(shape.num_q_heads, shape.head_dim)
    assert variant.blocks is not None

    def results(attention: Attention) -> list[Tensor]:
        with torch.set_grad_enabled(train):
            out = attention(*leaves[:3], tuple(leaves[3:]))
        return [out.detach(), *(torch.autograd.grad(out, leaves, upstream) if train else ())]

    want = results(ours("nsa", *variant.blocks))
    have = results(compiled(variant.attention) if variant.fullgraph else variant.attention)
    variant.error = max(exact.relative_error(a, b) for a, b in zip(have, want, strict=True))
    if variant.ours and not variant.error <= TOLERANCE[like.dtype]:
        variant.status = "wrong"
