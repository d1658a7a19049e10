"""What is measured after training: errors against a float64 reference, and tokens per second."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from fsa_compile.demo.model import ByteLM, nsa_reference
from fsa_compile.demo.training import Forward, loss_of


@dataclass(frozen=True)
class Result:
    """One forward and backward, float64 on the CPU: logits (batch, seq_len, 256), gradient of all parameters (n,)."""

    logits: Tensor
    gradient: Tensor


@dataclass(frozen=True)
class Error:
    """The largest difference, and the Frobenius norm of the difference over the norm of what it should be."""

    largest: float
    relative: float

    @classmethod
    def between(cls, actual: Tensor, expected: Tensor) -> Error:
        difference = actual - expected
        return cls(difference.abs().max().item(), (difference.norm() / expected.norm()).item())


def run_once(model: ByteLM, forward: Forward, tokens: Tensor, targets: Tensor, rows: int = 0) -> Result:
    """Forward and backward of ``forward``; ``rows`` sequences at a time (0: all), for the reference wants memory."""
    model.zero_grad()
    batch_size = tokens.shape[0]
    pieces = zip(tokens.split(rows or batch_size), targets.split(rows or batch_size), strict=True)
    logits = []
    for some_tokens, some_targets in pieces:
        loss, some_logits = loss_of(forward, some_tokens, some_targets)
        (loss * (some_tokens.shape[0] / batch_size)).backward()
        logits.append(some_logits.detach().double().cpu())
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double().cpu()
    model.zero_grad()
    return Result(torch.cat(logits), gradient)


def errors(
    model: ByteLM, forward: Forward, name: str, tokens: Tensor, targets: Tensor
) -> dict[str, tuple[Error, Error]]:
    """{what ran: (error of the logits, error of the gradient)}, each against the reference in float64.

    ``name`` is what to call ``forward``.
    The plain-PyTorch reference at the model's own precision is the yardstick: what any implementation would be off by.
    """
    exact_model = model.with_attention(nsa_reference, torch.float64)
    exact = run_once(exact_model, exact_model, tokens, targets, rows=1)
    plain_model = model.with_attention(nsa_reference)
    measured = {
        name: run_once(model, forward, tokens, targets),
        "eager reference": run_once(plain_model, plain_model, tokens, targets, rows=1),
    }
    return {
        what: (Error.between(result.logits, exact.logits), Error.between(result.gradient, exact.gradient))
        for what, result in measured.items()
    }


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def tokens_per_second(forward: Forward, tokens: Tensor, targets: Tensor, seconds: float = 3.0) -> float:
    """Median over forward + backward passes, repeated for about ``seconds`` after two warm-ups."""

    def once() -> float:
        _synchronize(tokens.device)
        start = time.perf_counter()
        loss, _ = loss_of(forward, tokens, targets)
        loss.backward()
        _synchronize(tokens.device)
        return time.perf_counter() - start

    once(), once()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        times.append(once())
    return tokens.numel() / statistics.median(times)


def settle_threads(seconds: float = 0.3) -> int:
    """Sets and returns the number of CPU threads: all that torch would use, or one if the machine has no room for them.

    Threads of a parallel loop wait for each other: beside one busy process on two cores, two are far slower than one.
    """

    def rate(threads: int) -> float:
        torch.set_num_threads(threads)
        x = torch.zeros(1 << 18)
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            x.add_(1.0)
            count += 1
        return count / (time.perf_counter() - start)

    most = torch.get_num_threads()
    alone, together = rate(1), rate(most)
    best = most if together > alone else 1
    torch.set_num_threads(best)
    return best
