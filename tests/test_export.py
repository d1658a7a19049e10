"""`torch.export` with lengths that may be anything: no stage guards one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim, export

import fsa_compile
from fsa_compile.testing.inputs import make_inputs
from fsa_compile.testing.specs import Spec

OPTIONS: dict[str, Any] = {"block_size": 16, "num_selected": 4}  # and windows of 32, longer than a short prompt


class Whole(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        return fsa_compile.nsa_attention(q, k, v, g, g, g, window_size=20, **OPTIONS)


class Selection(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        k_cmp = fsa_compile.mean_compress(k)
        seq_len_k = k.shape[1]
        _, lse = fsa_compile.compressed_attention(q, k_cmp, k_cmp, seq_len_k=seq_len_k)
        return fsa_compile.select_blocks(q, k_cmp, lse, seq_len_k=seq_len_k, **OPTIONS)


class Stages(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        blocks = torch.zeros(*q.shape[:2], k.shape[2], 1, dtype=torch.int32, device=q.device)
        a, _ = fsa_compile.selected_attention(q, k, v, blocks, block_size=16)
        b, _ = fsa_compile.sliding_window_attention(q, k, v, window_size=20)
        return a + b


def arguments(seq_len: int, extra_keys: int, device: str) -> tuple[Tensor, ...]:
    x = make_inputs(Spec(batch=2, seq_len=seq_len, extra_keys=extra_keys), device)
    return x.q, x.k, x.v, x.g_slc


@pytest.mark.parametrize("model", [Whole, Selection, Stages])
def test_prompt(device: str, model: type[torch.nn.Module]) -> None:
    """Traced at 50 tokens; a prompt shorter than a window runs, and one longer."""
    length = Dim("T", min=2)
    shapes = ({1: length},) * 4
    program = export(model(), arguments(50, 0, device), dynamic_shapes=shapes).module()
    for seq_len in (2, 20, 31, 32, 33, 130):
        args = arguments(seq_len, 0, device)
        torch.testing.assert_close(program(*args), model()(*args))


@pytest.mark.parametrize("model", [Whole, Selection, Stages])
def test_decode(device: str, model: type[torch.nn.Module]) -> None:
    """Queries and keys of lengths in any relation."""
    rows, keys = Dim("T", min=2), Dim("S", min=2)
    shapes = ({1: rows}, {1: keys}, {1: keys}, {1: rows})
    program = export(model(), arguments(5, 45, device), dynamic_shapes=shapes).module()
    for seq_len, extra in ((2, 0), (5, 100), (20, 2), (40, -17)):
        q, _, _, g = arguments(seq_len, 0, device)
        _, k, v, _ = arguments(seq_len + extra, 0, device)
        torch.testing.assert_close(program(q, k, v, g), model()(q, k, v, g))


class Packed(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, cu_seqlens: Tensor) -> Tensor:
        return fsa_compile.nsa_attention(q, k, v, g, g, g, window_size=20, cu_seqlens_q=cu_seqlens, **OPTIONS)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
def test_ahead_of_time(packed: bool, device: str, tmp_path: Path) -> None:
    """AOTInductor's package answers as the model does, at lengths that it has not seen."""
    model = Packed() if packed else Whole()

    def given(seq_len: int) -> tuple[Tensor, ...]:
        inputs = arguments(seq_len, 0, device)
        if not packed:
            return inputs
        bounds = torch.tensor([0, seq_len // 3, seq_len], dtype=torch.int32, device=device)
        return *(x[:1] for x in inputs), bounds

    length = Dim("T", min=2, max=4096)
    shapes = ({1: length},) * 4 + ((None,) if packed else ())
    with torch.no_grad():
        exported = export(model, given(64), dynamic_shapes=shapes)
        path = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
        compiled = torch._inductor.aoti_load_package(path)
        for seq_len in (64, 20, 333):
            inputs = given(seq_len)
            torch.testing.assert_close(compiled(*inputs), model(*inputs))
