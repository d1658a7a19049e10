"""The text and the training loop."""

from __future__ import annotations

import math
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsa_compile.demo.model import ByteLM


def corpus() -> tuple[Tensor, int]:
    """The Python standard library's own modules as one uint8 tensor, and how many files that is."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(folder.glob("*.py"))
    data = b"\n".join(file.read_bytes() for file in files)
    if not data:
        raise FileNotFoundError(f"no *.py files in {folder}: the demo trains on the standard library's sources")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8), len(files)


class Batches:
    """Random pieces of the text. Calling it gives (tokens, targets), each (batch_size, seq_len) int64."""

    def __init__(self, text: Tensor, batch_size: int, seq_len: int, device: torch.device, seed: int) -> None:
        if text.numel() <= seq_len + 1:
            raise ValueError(f"--seq-len {seq_len} is longer than the text ({text.numel()} bytes)")
        self.text, self.batch_size, self.seq_len, self.device = text, batch_size, seq_len, device
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self) -> tuple[Tensor, Tensor]:
        last = self.text.numel() - self.seq_len - 1
        starts = torch.randint(last, (self.batch_size, 1), generator=self.generator)
        piece = self.text[starts + torch.arange(self.seq_len + 1)].long().to(self.device)
        return piece[:, :-1].contiguous(), piece[:, 1:].contiguous()


def autocast(device: torch.device) -> torch.autocast:
    """bf16 on CUDA, nothing on the CPU; it leaves float64 as it is."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


Forward = Callable[[Tensor], Tensor]  # tokens -> logits: a model or its compiled form


def loss_of(forward: Forward, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(loss in nats per byte, logits)."""
    with autocast(tokens.device):
        logits = forward(tokens)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten()), logits


def train(model: ByteLM, forward: Forward, batches: Batches, steps: int, learning_rate: float) -> Iterator[float]:
    """Yields the loss of each step. ``forward`` is ``model`` or its compiled form."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.55 + 0.45 * math.cos(math.pi * step / steps))
    )
    for _ in range(steps):
        loss, _ = loss_of(forward, *batches())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield loss.item()
