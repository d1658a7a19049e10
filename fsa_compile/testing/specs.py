"""Named argument specs: one description of a problem that tests and benchmarks make their inputs from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

_ROWS_AT_ONCE = 4096  # of random block ids: bounds the scratch memory at benchmark lengths


@dataclass(frozen=True)
class Spec:
    """One problem, in the glossary's names. Small by default, with every option away from its default.

    lengths: packed sequences' query lengths (`batch` and `seq_len` follow); extra_keys: keys before the first query, of
    every sequence. blocks: "random" ids anywhere in the past, in any order, with -1 among them; "full" the same without
    -1 as long as there are blocks; "local" the newest blocks, so that neighbours agree. strides: "contiguous",
    "transposed" ([batch, heads, seq_len, head_dim] in memory), "sliced" (every other element of something larger).
    """

    name: str = ""
    batch: int = 1
    seq_len: int = 96
    extra_keys: int = 0
    num_kv_heads: int = 2
    gqa_group_size: int = 2
    head_dim: int = 16
    head_dim_v: int = 16
    block_size: int = 16
    num_selected: int = 4
    kernel_size: int = 8
    kernel_stride: int = 4
    init_blocks: int = 1
    local_blocks: int = 1
    window_size: int = 20
    scale: float | None = None
    lengths: tuple[int, ...] | None = None
    blocks: str = "random"
    strides: str = "contiguous"
    logits: float = 1.0

    def __post_init__(self) -> None:
        if self.lengths is not None:
            object.__setattr__(self, "batch", 1)
            object.__setattr__(self, "seq_len", sum(self.lengths))

    def __str__(self) -> str:
        if self.name:
            return self.name
        default = Spec()
        changed = [f.name for f in fields(self) if getattr(self, f.name) != getattr(default, f.name)]
        return "-".join(f"{name}={getattr(self, name)}" for name in changed) or "default"

    @property
    def num_q_heads(self) -> int:
        return self.num_kv_heads * self.gqa_group_size

    @property
    def lengths_k(self) -> tuple[int, ...] | None:
        return None if self.lengths is None else tuple(n + self.extra_keys for n in self.lengths)

    @property
    def seq_len_k(self) -> int:
        return self.seq_len + self.extra_keys if self.lengths_k is None else sum(self.lengths_k)

    @property
    def windows(self) -> dict[str, int]:
        return {"kernel_size": self.kernel_size, "kernel_stride": self.kernel_stride}

    @property
    def selection(self) -> dict[str, int]:
        names = ("block_size", "num_selected", "init_blocks", "local_blocks")
        return {name: getattr(self, name) for name in names}

    def __repr__(self) -> str:
        return f"Spec({self})"


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
    floating = [x.detach().requires_grad_(requires_grad) for x in (q, k, v, *gates)]
    return Inputs(
        spec,
        *floating,
        block_indices=make_block_indices(spec, device, generator),
        cu_seqlens_q=None if spec.lengths is None else cumulative(spec.lengths, device),
        cu_seqlens_k=None if spec.lengths_k is None or not spec.extra_keys else cumulative(spec.lengths_k, device),
    )


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


# What hypothesis is unlikely to hit together, and what a person wants to see by name in a report.
SPECS = (
    Spec(name="plain"),
    Spec(name="defaults", seq_len=300, head_dim=32, head_dim_v=32, block_size=64, num_selected=4, kernel_size=32,
         kernel_stride=16, local_blocks=2, window_size=64),
    Spec(name="one_token", seq_len=1),
    Spec(name="shorter_than_a_window", seq_len=7),
    Spec(name="shorter_than_a_block", seq_len=15, gqa_group_size=3),
    Spec(name="batch_of_three", batch=3, seq_len=50, num_kv_heads=1, gqa_group_size=5),
    Spec(name="odd_dims", seq_len=70, head_dim=24, head_dim_v=40, gqa_group_size=7),
    Spec(name="tiny_dims", seq_len=40, head_dim=1, head_dim_v=3, gqa_group_size=1),
    Spec(name="widest_heads", seq_len=40, num_kv_heads=1, gqa_group_size=1, head_dim=256, head_dim_v=256),
    Spec(name="decode_one", batch=2, seq_len=1, extra_keys=100),
    Spec(name="decode_some", batch=2, seq_len=5, extra_keys=61, gqa_group_size=4),
    Spec(name="packed", lengths=(37, 1, 64, 15), gqa_group_size=3),
    Spec(name="packed_empty", lengths=(0, 20, 0, 33, 0)),
    Spec(name="packed_more_keys", lengths=(9, 30, 2), extra_keys=21),
    Spec(name="packed_one", lengths=(50,)),
    Spec(name="transposed", seq_len=60, batch=2, strides="transposed"),
    Spec(name="sliced", seq_len=60, head_dim_v=32, strides="sliced"),
    Spec(name="packed_sliced", lengths=(33, 40), strides="sliced"),
    Spec(name="stride_is_size", seq_len=90, kernel_size=16, kernel_stride=16, block_size=16),
    Spec(name="more_places_than_blocks", seq_len=60, num_selected=9),
    Spec(name="nothing_forced", seq_len=80, init_blocks=0, local_blocks=0, num_selected=1),
    Spec(name="only_forced", seq_len=120, init_blocks=2, local_blocks=2, num_selected=4),
    Spec(name="local", seq_len=130, blocks="local"),
    Spec(name="own_scale", seq_len=64, scale=0.5),
    Spec(name="window_of_one", seq_len=40, window_size=1),
    Spec(name="window_beyond", seq_len=40, window_size=1000),
)  # fmt: skip
NAMED = {spec.name: spec for spec in SPECS}
