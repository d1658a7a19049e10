"""A small byte-level language model whose attention is given to it: NSA, the plain-PyTorch reference, or dense SDPA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fsa_compile
from fsa_compile.ops import reference

# (q, k, v, (g_cmp, g_slc, g_swa)) -> out, all [batch, seq_len, heads, head_dim], gates [batch, seq_len, num_q_heads].
Attention = Callable[[Tensor, Tensor, Tensor, tuple[Tensor, Tensor, Tensor]], Tensor]

VOCAB_SIZE = 256  # bytes


@dataclass(frozen=True)
class Config:
    """Sizes of the model and of its attention; the latter are smaller than NSA's defaults to suit short sequences."""

    num_layers: int = 2
    num_kv_heads: int = 2
    gqa_group_size: int = 2
    head_dim: int = 32
    block_size: int = 32
    num_selected: int = 6
    kernel_size: int = 32
    kernel_stride: int = 16
    init_blocks: int = 1
    local_blocks: int = 2
    window_size: int = 64

    @property
    def num_q_heads(self) -> int:
        return self.num_kv_heads * self.gqa_group_size

    @property
    def dim(self) -> int:
        return self.num_q_heads * self.head_dim

    def compression(self) -> dict[str, Any]:
        return {"kernel_size": self.kernel_size, "kernel_stride": self.kernel_stride}

    def selection(self) -> dict[str, Any]:
        names = ("block_size", "num_selected", "init_blocks", "local_blocks")
        return {name: getattr(self, name) for name in names} | self.compression()


def nsa(config: Config) -> Attention:
    """NSA through this package's op; eager, or whatever ``torch.compile`` makes of it."""
    arguments = config.selection() | {"window_size": config.window_size}

    def attention(q: Tensor, k: Tensor, v: Tensor, gates: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return fsa_compile.nsa_attention(q, k, v, *gates, **arguments)

    return attention


def nsa_reference(config: Config) -> Attention:
    """The same function in plain PyTorch, slow and obviously right."""
    arguments = config.selection() | {"window_size": config.window_size}

    def attention(q: Tensor, k: Tensor, v: Tensor, gates: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return reference.nsa_attention(q, k, v, *gates, **arguments)

    return attention


def dense(config: Config) -> Attention:
    """Causal SDPA over all keys; the gates have no part in it."""

    def attention(q: Tensor, k: Tensor, v: Tensor, gates: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    return attention


def rotary(x: Tensor) -> Tensor:
    """Rotary position embedding, half-split. x: (batch, seq_len, heads, head_dim), head_dim even; same dtype out."""
    half = x.shape[-1] // 2
    work = torch.float64 if x.dtype is torch.float64 else torch.float32
    frequency = 10000.0 ** (-torch.arange(half, device=x.device, dtype=work) / half)
    angle = torch.arange(x.shape[1], device=x.device, dtype=work)[:, None, None] * frequency  # [seq_len, 1, half]
    a, b = x[..., :half].to(work), x[..., half:].to(work)
    return torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), dim=-1).to(x.dtype)


class NSALayer(nn.Module):
    """Projections to queries, keys, values and three gates per query head, attention, projection back."""

    def __init__(self, config: Config, attention: Attention) -> None:
        super().__init__()
        self.config = config
        self.attention = attention
        self.q = nn.Linear(config.dim, config.num_q_heads * config.head_dim, bias=False)
        self.k = nn.Linear(config.dim, config.num_kv_heads * config.head_dim, bias=False)
        self.v = nn.Linear(config.dim, config.num_kv_heads * config.head_dim, bias=False)
        self.gate = nn.Linear(config.dim, 3 * config.num_q_heads)
        self.out = nn.Linear(config.dim, config.dim, bias=False)

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x: (batch, seq_len, dim) -> q, k (rotated) and v, (batch, seq_len, heads, head_dim)."""
        q, k, v = (f(x).unflatten(-1, (-1, self.config.head_dim)) for f in (self.q, self.k, self.v))
        return rotary(q), rotary(k), v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        g_cmp, g_slc, g_swa = self.gate(x).sigmoid().unflatten(-1, (-1, 3)).unbind(-1)  # [batch, seq_len, num_q_heads]
        return self.out(self.attention(q, k, v, (g_cmp, g_slc, g_swa)).flatten(-2))


class Block(nn.Module):
    def __init__(self, config: Config, attention: Attention) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(config.dim)
        self.mixer = NSALayer(config, attention)
        self.norm2 = nn.RMSNorm(config.dim)
        self.mlp = nn.Sequential(
            nn.Linear(config.dim, 4 * config.dim), nn.GELU(approximate="tanh"), nn.Linear(4 * config.dim, config.dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ByteLM(nn.Module):
    """tokens: (batch, seq_len) int64 in [0, 256) -> logits (batch, seq_len, 256)."""

    def __init__(self, config: Config, attention: Attention | None = None) -> None:
        super().__init__()
        attention = nsa(config) if attention is None else attention
        self.config = config
        self.embedding = nn.Embedding(VOCAB_SIZE, config.dim)
        self.blocks = nn.ModuleList(Block(config, attention) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.dim)
        self.head = nn.Linear(config.dim, VOCAB_SIZE, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.5)
        nn.init.normal_(self.head.weight, std=config.dim**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def with_attention(self, make: Callable[[Config], Attention], dtype: torch.dtype | None = None) -> ByteLM:
        """A copy with the same weights and another attention, on the same device."""
        parameter = next(self.parameters())
        other = ByteLM(self.config, make(self.config)).to(parameter.device, dtype or parameter.dtype)
        other.load_state_dict(self.state_dict())
        return other


@torch.no_grad()
def selected_blocks(model: ByteLM, tokens: Tensor, layer: int) -> Tensor:
    """What layer ``layer`` selects: (batch, seq_len, num_kv_heads, num_selected) int32, ascending, -1 at the end."""
    config = model.config
    x = model.embedding(tokens)
    for block in model.blocks[:layer]:
        x = block(x)
    block = model.blocks[layer]
    assert isinstance(block, Block)
    q, k, v = block.mixer.qkv(block.norm1(x))
    k_cmp, v_cmp = (fsa_compile.mean_compress(y, **config.compression()) for y in (k, v))
    _, lse = fsa_compile.compressed_attention(q, k_cmp, v_cmp, seq_len_k=k.shape[1], **config.compression())
    return fsa_compile.select_blocks(q, k_cmp, lse, seq_len_k=k.shape[1], **config.selection())
