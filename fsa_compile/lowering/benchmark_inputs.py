"""Inputs for measuring configurations under ``max_autotune``: random index tensors would read out of bounds."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ..templates.kernel import Plan
from ..templates.selected.sizes import Lists
from ..templates.sequences import Sequences
from . import _inductor

__all__ = ["generators"]

# Assumed for a size without a hint; every tensor of one call then agrees with the others.
_UNKNOWN = 4096


def _hint(size: Any) -> int:
    return _inductor.optimization_hint(_inductor.expression(size), _UNKNOWN)


class _Made:
    """Index tensors of one plan that agree with each other: equally long sequences, uniformly drawn causal blocks."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.seqs: Sequences | None = plan.inputs.get("seqs")
        self.device = torch.device("cuda", torch.cuda.current_device())

    def bounds(self, total: int, count: int) -> torch.Tensor:
        bounds = [i * total // max(1, count - 1) for i in range(count)]
        return torch.tensor(bounds, dtype=torch.int32, device=self.device)

    @functools.cached_property
    def runs(self) -> tuple[torch.Tensor | None, ...]:
        """cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k."""
        if self.seqs is None:
            return (None,) * 4
        s = self.seqs
        count, batch = _hint(s.num_seqs), _hint(s.num_seqs)
        rows, keys = _hint(s.seq_len), _hint(s.seq_len_k)
        return (
            None if s.cu_seqlens_q is None else self.bounds(rows, count + 1),
            None if s.cu_seqlens_k is None else self.bounds(keys, count + 1),
            None if s.seqused_k is None else torch.full((batch,), keys, dtype=torch.int32, device=self.device),
            None if s.leftpad_k is None else torch.zeros(batch, dtype=torch.int32, device=self.device),
        )

    @functools.cached_property
    def block_indices(self) -> torch.Tensor:
        shape = [_hint(size) for size in self.plan.inputs["block_indices"].tensor.shape]
        assert self.seqs is not None
        offset = _hint(self.seqs.seq_len_k) - shape[1]
        pos = torch.arange(shape[1], device=self.device) + max(0, offset)
        if self.runs[0] is not None:
            pos = pos % max(1, shape[1] // max(1, len(self.runs[0]) - 1))
        last = (pos // self.plan.sizes.BLOCK_SIZE).view(1, -1, 1, 1)
        generator = torch.Generator(self.device).manual_seed(0)  # the user's own must not notice
        draws = torch.rand(shape, device=self.device, generator=generator) * (last + 1)
        return draws.to(torch.int32).minimum(last.to(torch.int32))

    @functools.cached_property
    def lists(self) -> tuple[torch.Tensor, ...]:
        assert self.seqs is not None
        keys, size = _hint(self.seqs.seq_len_k), self.plan.sizes.BLOCK_SIZE
        return torch.ops.fsa._block_lists(self.block_indices, *self.runs, seq_len_k=keys, block_size=size)

    def tile_offsets(self) -> torch.Tensor:
        """Equally long lists."""
        count = _hint(self.plan.inputs["tile_offsets"].tensor.shape[0])
        return self.bounds(_hint(self.plan.inputs["tiles"].tensor.shape[0]), count)


def generators(plan: Plan, names: list[str]) -> dict[int, Callable[[Any], torch.Tensor]]:
    """``input_gen_fns`` for a template whose inputs are called ``names``."""
    made = _Made(plan)
    makers: dict[str, Callable[[], Any]] = {
        "block_indices_ptr": lambda: made.block_indices,
        "tile_offsets_ptr": made.tile_offsets,
    }
    for i, name in enumerate(Sequences._fields[3:]):
        makers[f"seqs_{name}_ptr"] = functools.partial(lambda i: made.runs[i], i)
    for i, name in enumerate(Lists._fields):
        makers[f"lists_{name}_ptr"] = functools.partial(lambda i: made.lists[i], i)
    return {i: functools.partial(_ignoring, makers[name]) for i, name in enumerate(names) if name in makers}


def _ignoring(make: Callable[[], torch.Tensor], _: Any) -> torch.Tensor:
    return make()
