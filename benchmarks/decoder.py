"""Decoder layers with the sizes of models that people train, in plain PyTorch; the attention is given to them.

Embedding and head are left out: they know nothing of attention, and a few layers under a whole vocabulary would say
more of the vocabulary than of the layers. The input stands for embedded tokens, the loss is taken of the last hidden
states.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fsa_compile.demo.model import Attention

GIB = 2**30
_EPS = 1e-6


@dataclass(frozen=True)
class Shape:
    """Sizes of one model, after its published configuration."""

    name: str
    num_layers: int
    hidden: int
    ffn: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int = 128
    qk_norm: bool = False
    qkv_bias: bool = False
    rope_theta: float = 1e6

    @property
    def parameters(self) -> int:
        """Of one layer, but for norms, biases and the gates, which are few."""
        q, kv = self.num_q_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return self.hidden * (2 * q + 2 * kv + 3 * self.ffn)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama-3-8b", 32, 4096, 14336, 32, 8, rope_theta=5e5),
        Shape("qwen3-14b", 40, 5120, 17408, 40, 8, qk_norm=True),
        Shape("qwen2.5-32b", 64, 5120, 27648, 40, 8, qkv_bias=True),
    )
}


class Layer(nn.Module):
    """RMSNorm, attention, RMSNorm, SwiGLU; a linear layer makes the gates, as in NSA."""

    def __init__(self, shape: Shape, attention: Attention) -> None:
        super().__init__()
        self.head_dim, self.attention = shape.head_dim, attention
        q, kv = shape.num_q_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.norm1 = nn.RMSNorm(shape.hidden, eps=_EPS)
        self.q = nn.Linear(shape.hidden, q, bias=shape.qkv_bias)
        self.k = nn.Linear(shape.hidden, kv, bias=shape.qkv_bias)
        self.v = nn.Linear(shape.hidden, kv, bias=shape.qkv_bias)
        self.q_norm = nn.RMSNorm(shape.head_dim, eps=_EPS) if shape.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(shape.head_dim, eps=_EPS) if shape.qk_norm else nn.Identity()
        self.gates = nn.Linear(shape.hidden, 3 * shape.num_q_heads, bias=False)
        self.out = nn.Linear(q, shape.hidden, bias=False)
        self.norm2 = nn.RMSNorm(shape.hidden, eps=_EPS)
        self.gate = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.up = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.down = nn.Linear(shape.ffn, shape.hidden, bias=False)

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: (batch, seq_len, hidden), normed; same shape out."""
        q, k, v = (f(x).unflatten(-1, (-1, self.head_dim)) for f in (self.q, self.k, self.v))
        q, k = _rotated(self.q_norm(q), cos, sin), _rotated(self.k_norm(k), cos, sin)
        g_cmp, g_slc, g_swa = self.gates(x).sigmoid().chunk(3, -1)  # [batch, seq_len, num_q_heads]
        return self.out(self.attention(q, k, v, (g_cmp, g_slc, g_swa)).flatten(-2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x), cos, sin)
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """Layers and the last norm. x: (batch, seq_len, hidden) -> the same."""

    cos: Tensor  # [seq_len, 1, head_dim // 2], float32
    sin: Tensor

    def __init__(self, shape: Shape, num_layers: int, seq_len: int, attention: Attention) -> None:
        super().__init__()
        self.shape, self.seq_len, self.checkpointed = shape, seq_len, False
        self.layers = nn.ModuleList(Layer(shape, attention) for _ in range(num_layers))
        self.norm = nn.RMSNorm(shape.hidden, eps=_EPS)
        for name in ("cos", "sin"):
            self.register_buffer(name, torch.empty(seq_len, 1, shape.head_dim // 2))

    @classmethod
    def random(cls, shape: Shape, num_layers: int, seq_len: int, attention: Attention, x: Tensor) -> Decoder:
        """Weights that keep the scale of what passes through them, with device and dtype of `x`."""
        with torch.device("meta"):
            model = cls(shape, num_layers, seq_len, attention)
        for parameter in model.parameters():  # the rotation's tables stay in float32
            parameter.data = torch.empty_like(parameter, dtype=x.dtype)
        model.to_empty(device=x.device)
        generator = torch.Generator(x.device).manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 2:
                    parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
                else:
                    parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            half = torch.arange(shape.head_dim // 2, device=x.device, dtype=torch.float64)
            frequency = shape.rope_theta ** (-2 * half / shape.head_dim)
            angle = torch.arange(seq_len, device=x.device)[:, None, None] * frequency
            model.cos.copy_(angle.cos())
            model.sin.copy_(angle.sin())
        return model

    def sharing(self, attention: Attention, checkpointed: bool = False) -> Decoder:
        """Another attention over the very same weights, so that several models take the memory of one."""
        with torch.device("meta"):
            other = Decoder(self.shape, len(self.layers), self.seq_len, attention)
        other.load_state_dict(self.state_dict(keep_vars=True), assign=True)
        other.checkpointed = checkpointed
        return other

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.checkpointed:
                x = checkpoint(layer, x, self.cos, self.sin, use_reentrant=False)
            else:
                x = layer(x, self.cos, self.sin)
        return self.norm(x)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, half-split; x: (batch, seq_len, heads, head_dim)."""
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


def bytes_needed(shape: Shape, num_layers: int, seq_len: int, name: str) -> int:
    """A guess, on the safe side, of what a pass of NSA takes at 16 bits: weights, gradients, Adam's, activations."""
    q, kv = shape.num_q_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    # For the backward: normed and plain inputs, q, k, v before and after rotation, the branches, both halves of SwiGLU.
    saved = 4 * shape.hidden + 3 * shape.ffn + 6 * q + 4 * kv
    passing = 4 * shape.hidden + 4 * shape.ffn  # gradients on their way, or what one layer makes in inference
    tokens = {"prefill": passing, "train": num_layers * saved + passing}.get(
        name, num_layers * shape.hidden + saved + passing
    )
    weights = num_layers * shape.parameters * (1 if name == "prefill" else 4)
    return 2 * (weights + seq_len * tokens) + 3 * GIB


def fitting_layers(shape: Shape, seq_len: int, name: str, memory: int, at_most: int) -> int:
    """How many layers fit into `memory` bytes; one at least, which may not."""
    fits = (n for n in range(min(at_most, shape.num_layers), 1, -1) if bytes_needed(shape, n, seq_len, name) <= memory)
    return next(fits, 1)
