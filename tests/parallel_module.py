"""A module whose projections are parallelised: what `test_distributed.py` runs of it in each of two processes."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from dtensor_cases import HEADS, assert_same_bits, mesh_of, nsa, whole
from torch import Tensor, nn
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module


class Attention(nn.Module):
    """q, k, v and gates by columns, the output by rows. Works on whatever heads its projections return."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (
            nn.Linear(8, 64, bias=False),
            nn.Linear(8, 32, bias=False),
            nn.Linear(8, 32, bias=False),
        )
        self.gates = nn.ModuleList(nn.Linear(8, 4, bias=False) for _ in range(3))
        self.out = nn.Linear(64, 8, bias=False)
        whole_numbers = torch.Generator().manual_seed(0)
        for weight in self.parameters():  # their sums have one value in any order
            weight.data = torch.randint(-2, 3, weight.shape, generator=whole_numbers) / 16

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (project(x).unflatten(-1, (-1, 16)) for project in (self.q, self.k, self.v))
        return nsa(q, k, v, *(gate(x).sigmoid() for gate in self.gates))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        heads = self.attend(x)
        return self.out(heads.flatten(-2)), heads.detach()


def parallel(use_local_output: bool) -> Attention:
    by_columns = ColwiseParallel(use_local_output=use_local_output)
    names = ("q", "k", "v", *(f"gates.{i}" for i in range(3)))
    return parallelize_module(Attention(), mesh_of(2), {**dict.fromkeys(names, by_columns), "out": RowwiseParallel()})


def trained(model: Attention, x: Tensor, compiled: bool) -> tuple[Tensor, Tensor, list[Tensor], dict[Any, int]]:
    """Output, the attention's, gradients, and how many collectives of each kind it took."""
    torch._dynamo.reset()
    x = x.detach().requires_grad_()
    step = torch.compile(model, fullgraph=True) if compiled else model
    with CommDebugMode() if not compiled else contextlib.nullcontext() as seen:
        out, heads = step(x)
        out.square().sum().backward()
    counts = dict(seen.get_comm_counts()) if seen is not None else {}
    return out.detach(), heads.detach(), [whole(p.grad) for p in (x, *model.parameters())], counts  # type: ignore[arg-type]


def case_parallelized(compiled: bool) -> None:
    """Both forms of output compute the same, with the same collectives: those of the projections."""
    x = torch.randint(-2, 3, (2, 50, 8), generator=torch.Generator().manual_seed(1)).float()
    out, heads, grads, _ = trained(Attention(), x, compiled)
    local_out, local_heads, local_grads, local_counts = trained(parallel(True), x, compiled)
    have_out, have_heads, have_grads, counts = trained(parallel(False), x, compiled)
    assert_same_bits([have_heads], [heads], HEADS)
    assert torch.equal(have_heads.to_local(), local_heads)  # type: ignore[attr-defined]
    assert counts == local_counts
    assert compiled or sum(counts.values()) > 0
    torch.testing.assert_close(have_out, out)  # its rows are added up over the processes
    assert torch.equal(have_out, local_out)
    for have, local, want in zip(have_grads, local_grads, grads, strict=True):
        assert torch.equal(have, local)
        torch.testing.assert_close(have, want)
