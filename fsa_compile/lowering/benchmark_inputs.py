"""Inputs for measuring configurations under ``max_autotune``: random index tensors would read out of bounds."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from . import _inductor

__all__ = ["BenchmarkInputs", "TileInputs"]

# Assumed for a size without a hint; every tensor of one call then agrees with the others.
_UNKNOWN = 4096


class BenchmarkInputs:
    """Generators of the index inputs of one kernel: uniformly drawn causal blocks, equally long packed sequences."""

    def __init__(
        self, block_indices: Any, seq_len_k: Any, block_size: int, cu_seqlens: Any, device: torch.device
    ) -> None:
        self._shape = [_inductor.optimization_hint(size, _UNKNOWN) for size in block_indices.get_size()]
        self._seq_len_k = _inductor.optimization_hint(seq_len_k, _UNKNOWN)
        self._block_size = block_size
        self._num_seqs = 0
        if cu_seqlens is not None:
            self._num_seqs = _inductor.optimization_hint(cu_seqlens.get_size()[0], 2) - 1
        self._device = device

    @functools.cached_property
    def _tensors(self) -> dict[str, torch.Tensor | None]:
        seq_len, num_seqs, device = self._shape[1], self._num_seqs, self._device
        tables: dict[str, torch.Tensor | None] = dict.fromkeys(_TABLES)
        pos = torch.arange(seq_len, device=device)
        if num_seqs:
            for name, total in (("cu_seqlens_q_ptr", seq_len), ("cu_seqlens_k_ptr", self._seq_len_k)):
                bounds = [i * total // num_seqs for i in range(num_seqs + 1)]
                tables[name] = torch.tensor(bounds, dtype=torch.int32, device=device)
            cu_seqlens_q = tables["cu_seqlens_q_ptr"]
            made = torch.ops.fsa._packed_tables(
                cu_seqlens_q,
                tables["cu_seqlens_k_ptr"],
                total_q=seq_len,
                total_k=self._seq_len_k,
                block_size=self._block_size,
            )
            tables.update(zip(_TABLES[2:], made, strict=True))
            assert cu_seqlens_q is not None
            pos = pos - cu_seqlens_q[made[0]]
        else:
            pos = pos + (self._seq_len_k - seq_len)
        last = (pos // self._block_size).view(1, -1, 1, 1)
        generator = torch.Generator(device).manual_seed(0)  # the user's own must not notice
        draws = torch.rand(self._shape, device=device, generator=generator) * (last + 1)
        block_indices = draws.to(torch.int32).minimum(last.to(torch.int32))
        lists = torch.ops.fsa._block_lists(
            block_indices, *tables.values(), seq_len_k=self._seq_len_k, block_size=self._block_size
        )
        return {"block_indices_ptr": block_indices, **tables, **dict(zip(_LISTS, lists, strict=True))}

    def generators(self, names: list[str]) -> dict[int, Callable[[Any], torch.Tensor]]:
        """``input_gen_fns`` for a shell whose inputs are called ``names``."""
        known = {"block_indices_ptr", *_TABLES, *_LISTS}
        return {i: functools.partial(self._one, name) for i, name in enumerate(names) if name in known}

    def _one(self, name: str, _: Any) -> torch.Tensor:
        tensor = self._tensors[name]
        assert tensor is not None
        return tensor


_TABLES = ("cu_seqlens_q_ptr", "cu_seqlens_k_ptr", "seq_ids_ptr", "block_base_ptr", "block_seq_ids_ptr")
_LISTS = ("entries_ptr", "tile_list_ptr", "tile_offsets_ptr", "list_offsets_ptr")


class TileInputs:
    """The same for the sum of a list's tiles: equally long lists, sequences and so on."""

    def __init__(self, tiles: Any, like: Any, cu_seqlens_k: Any, block_size: int) -> None:
        self._num_tiles = _inductor.optimization_hint(tiles.get_size()[0], _UNKNOWN)
        self._total_k = _inductor.optimization_hint(like.get_size()[1], _UNKNOWN)
        self._packed = cu_seqlens_k is not None
        self._num_seqs = _inductor.optimization_hint(cu_seqlens_k.get_size()[0], 2) - 1 if self._packed else 0
        self._block_size = block_size

    def generators(self, names: list[str]) -> dict[int, Callable[[Any], torch.Tensor]]:
        """``input_gen_fns`` for a shell whose inputs are called ``names``."""
        makers = {
            "tile_offsets_ptr": lambda x: self._bounds(x, self._num_tiles),
            "cu_seqlens_k_ptr": lambda x: self._bounds(x, self._total_k),
            "block_base_ptr": lambda x: self._bounds(x, self._total_k // self._block_size),
            "block_seq_ids_ptr": self._block_seq_ids,
        }
        return {i: makers[name] for i, name in enumerate(names) if name in makers}

    def _bounds(self, x: Any, total: int) -> torch.Tensor:
        count = _inductor.optimization_hint(x.get_size()[0], 2) - 1
        return torch.arange(count + 1, device=x.get_device()).mul_(total).floor_divide_(count).to(torch.int32)

    def _block_seq_ids(self, x: Any) -> torch.Tensor:
        count = _inductor.optimization_hint(x.get_size()[0], 2)
        ids = torch.arange(count, device=x.get_device()).mul_(self._num_seqs).floor_divide_(count)
        return ids.to(torch.int32)
