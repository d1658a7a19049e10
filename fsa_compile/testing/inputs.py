"""Inputs of a spec, and the block selections that kernels are measured on."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .specs import Spec

TRACE = Path(__file__).with_name("selection_16k.npz")
_ROWS_AT_ONCE = 4096  # of random block ids: bounds the scratch memory at benchmark lengths


@dataclass(frozen=True)
class Inputs:
    """Tensors of one spec. `packed` is the keyword arguments for packed sequences, empty for a batch."""

    spec: Spec
    q: Tensor
    k: Tensor
    v: Tensor
    g_cmp: Tensor
    g_slc: Tensor
    g_swa: Tensor
    block_indices: Tensor
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None

    @property
    def gates(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.g_cmp, self.g_slc, self.g_swa

    @property
    def packed(self) -> dict[str, Any]:
        given: dict[str, Any] = {"scale": self.spec.scale}
        if self.cu_seqlens_q is not None:
            assert self.spec.lengths is not None
            given |= {"cu_seqlens_q": self.cu_seqlens_q, "max_seqlen_q": max(self.spec.lengths)}
        if self.cu_seqlens_k is not None:
            assert self.spec.lengths_k is not None
            given |= {"cu_seqlens_k": self.cu_seqlens_k, "max_seqlen_k": max(self.spec.lengths_k)}
        return given

    @property
    def cu_seqlens(self) -> Tensor | None:
        """Of the keys, which is what is compressed."""
        return self.cu_seqlens_q if self.cu_seqlens_k is None else self.cu_seqlens_k

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same values in another dtype, detached; gates as well."""
        names = ("q", "k", "v", "g_cmp", "g_slc", "g_swa")
        return replace(self, **{name: getattr(self, name).detach().to(dtype) for name in names})


def make_inputs(
    spec: Spec,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    requires_grad: bool = False,
    seed: int = 0,
) -> Inputs:
    """Inputs of `spec`, the same for the same seed and device: values of `dtype`, gates already through a sigmoid."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return _laid_out(torch.randn(*shape, device=device, generator=generator).to(dtype), spec.strides)

    rows, cols = (spec.batch, spec.seq_len), (spec.batch, spec.seq_len_k)
    q = normal(*rows, spec.num_q_heads, spec.head_dim) * spec.logits
    k = normal(*cols, spec.num_kv_heads, spec.head_dim)
    v = normal(*cols, spec.num_kv_heads, spec.head_dim_v)
    gates = [torch.rand(*rows, spec.num_q_heads, device=device, generator=generator).to(dtype) for _ in range(3)]
    q, k, v, g_cmp, g_slc, g_swa = (x.detach().requires_grad_(requires_grad) for x in (q, k, v, *gates))
    return Inputs(
        spec, q, k, v, g_cmp, g_slc, g_swa,
        block_indices=make_block_indices(spec, device, generator),
        cu_seqlens_q=None if spec.lengths is None else cumulative(spec.lengths, device),
        cu_seqlens_k=None if spec.lengths_k is None or not spec.extra_keys else cumulative(spec.lengths_k, device),
    )  # fmt: skip


def cumulative(lengths: Sequence[int], device: str | torch.device = "cpu") -> Tensor:
    """cu_seqlens of these lengths."""
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    return torch.tensor(bounds, dtype=torch.int32, device=device)


def make_block_indices(spec: Spec, device: str | torch.device, generator: torch.Generator) -> Tensor:
    """[batch, seq_len, num_kv_heads, num_selected] int32, as `spec.blocks` says."""
    lengths = (spec.seq_len,) if spec.lengths is None else spec.lengths
    parts = []
    for length in lengths:
        length_k = length + spec.extra_keys
        for first in range(0, length, _ROWS_AT_ONCE):
            stop = min(first + _ROWS_AT_ONCE, length)
            position = torch.arange(first, stop, device=device) + spec.extra_keys
            parts.append(_rows_of_blocks(spec, position, -(-length_k // spec.block_size), generator))
    empty = torch.empty(spec.batch, 0, spec.num_kv_heads, spec.num_selected, dtype=torch.int32, device=device)
    return torch.cat([empty, *parts], 1)


def _rows_of_blocks(spec: Spec, position: Tensor, num_blocks: int, generator: torch.Generator) -> Tensor:
    shape = (spec.batch, position.numel(), spec.num_kv_heads)
    current = (position // spec.block_size)[:, None, None]  # [rows, 1, 1]
    if spec.blocks == "local":
        ids = current - torch.arange(spec.num_selected, device=position.device)
        return ids.clamp(min=-1).expand(*shape, -1).to(torch.int32)
    rank = torch.rand(*shape, num_blocks, device=position.device, generator=generator)
    rank = rank.masked_fill(torch.arange(num_blocks, device=position.device) > current, -1)
    rank, ids = rank.topk(min(spec.num_selected, num_blocks), -1)  # a random choice in a random order
    ids = torch.where(rank < 0, -1, ids)
    ids = torch.nn.functional.pad(ids, (0, spec.num_selected - ids.shape[-1]), value=-1)
    if spec.blocks == "random":
        drop = torch.rand(*ids.shape, device=position.device, generator=generator) < 0.15
        ids = ids.masked_fill(drop, -1)
        order = torch.rand(*ids.shape, device=position.device, generator=generator).argsort(-1)
        ids = ids.gather(-1, order)  # -1 anywhere
    return ids.to(torch.int32)


def _laid_out(x: Tensor, strides: str) -> Tensor:
    if strides == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if strides == "sliced":
        big = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1] + 1)
        big[..., 1::2] = x
        return big[..., 1::2]
    return x


def causal_block_indices(
    seq_len: int,
    num_kv_heads: int,
    num_selected: int = 16,
    block_size: int = 64,
    *,
    locality: str = "random",
    device: torch.device | str = "cuda",
    seed: int = 0,
) -> torch.Tensor:
    """Block indices as the selection makes them: the first, current and previous block always, the rest drawn.

    `locality="random"` draws for every token by itself; `"local"` lets 64 neighbours share most of their draw;
    `"trace"` draws nothing: see `traced_block_indices`. Returns (1, seq_len, num_kv_heads, num_selected), int32,
    ascending, -1 at the end.
    """
    if locality == "trace":
        if (num_selected, block_size) != (16, 64):
            raise ValueError(f"the trace has 16 blocks of 64, not {num_selected} of {block_size}")
        return traced_block_indices(seq_len, num_kv_heads, device)
    if locality not in ("random", "local"):
        raise ValueError(f"locality is 'random', 'local' or 'trace', not {locality!r}")
    generator = torch.Generator(device=device).manual_seed(seed)
    num_blocks = -(-seq_len // block_size)
    blocks = torch.arange(num_blocks, device=device)
    chunk = max(64, min(seq_len, 2**28 // (num_blocks * num_kv_heads)) // 64 * 64)
    parts = []
    for start in range(0, seq_len, chunk):
        rows = torch.arange(start, min(seq_len, start + chunk), device=device)
        score = torch.rand(len(rows), num_kv_heads, num_blocks, device=device, generator=generator)
        if locality == "local":
            shared = torch.rand(-(-len(rows) // 64), num_kv_heads, num_blocks, device=device, generator=generator)
            score = score * 0.01 + shared.repeat_interleave(64, 0)[: len(rows)]
        current = (rows // block_size)[:, None, None]
        score = torch.where((blocks == 0) | (blocks == current) | (blocks == current - 1), 2.0, score)
        score = torch.where(blocks > current, -1.0, score)
        top = score.topk(min(num_selected, num_blocks), -1)
        picked = torch.where(top.values >= 0, top.indices, num_blocks).sort(-1).values
        parts.append(torch.where(picked == num_blocks, -1, picked).int())
    result = torch.cat(parts)[None]
    return torch.nn.functional.pad(result, (0, num_selected - result.shape[-1]), value=-1)


@functools.cache
def _trace() -> Tensor:
    import numpy as np  # of the `tests` extra

    with np.load(TRACE) as file:
        return torch.from_numpy(file["block_indices"])  # [layers, 16384, heads, 16]


def traced_block_indices(seq_len: int, num_kv_heads: int, device: torch.device | str = "cuda") -> Tensor:
    """What a trained model selected, up to 16,384 tokens and cyclically its 4 heads; README beside the file says more.

    Returns (1, seq_len, num_kv_heads, 16), int32, blocks of 64, ascending, -1 at the end.
    """
    heads = _trace().transpose(1, 2).flatten(0, 1)  # [heads, 16384, 16]
    if seq_len > heads.shape[1]:
        raise ValueError(f"the trace has {heads.shape[1]} tokens, not {seq_len}")
    chosen = heads[torch.arange(num_kv_heads) % heads.shape[0], :seq_len]
    return chosen.transpose(0, 1)[None].to(device, torch.int32).contiguous()
