"""The kernel of block selection, id by id.

On a GPU (`-m gpu`) as it is; without one in Triton's interpreter, where `test_interpreter.py` runs this file with
`TRITON_INTERPRET=1`. Inputs are small integers and powers of two wherever ids are compared, so that scores are the same
in any order of summation and ties are ties.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from fsa_compile.templates.kernel import argument, device_of
from fsa_compile.templates.selection import SELECT_BLOCKS
from fsa_compile.tiling import Config

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)

kernels = pytest.mark.interpreter if INTERPRETED else pytest.mark.gpu


@dataclass(frozen=True)
class Case:
    """One call. lengths: packed sequences' query lengths; extra: keys before the first query of each (may be < 0).

    used, left: `seqused_k` and `leftpad_k` of a batch of buffers of `seq_len + extra` keys.
    """

    batch: int = 1
    seq_len: int = 100
    extra: int = 0
    heads: int = 2
    group: int = 2
    dim: int = 16
    block_size: int = 16
    num_selected: int = 4
    kernel_size: int = 8
    kernel_stride: int = 4
    init_blocks: int = 1
    local_blocks: int = 1
    pool: str = "overlap"
    logits: bool = False
    scale: float = 1.0
    lengths: tuple[int, ...] | None = None
    used: tuple[int, ...] | None = None
    left: tuple[int, ...] | None = None

    def __str__(self) -> str:
        default = Case()
        return "-".join(f"{n}={v}" for n, v in vars(self).items() if v != getattr(default, n)) or "default"

    @property
    def options(self) -> dict[str, Any]:
        names = "block_size num_selected kernel_size kernel_stride init_blocks local_blocks pool scale".split()
        return {name: getattr(self, name) for name in names}


def select_one(
    q: Tensor, k_cmp: Tensor, lse: Tensor | None, length: int, case: Case, exact: bool = True
) -> Tensor:
    """SPEC's stage 3 for one sequence, in float64: q [T, HQ, D], k_cmp [NC, HK, D], lse [T, HQ] -> [T, HK, S].

    exact: probabilities are powers of two but for rounding.
    """
    rows, (heads, dim) = q.shape[0], k_cmp.shape[1:]
    stride, size, overlap = case.kernel_stride, case.block_size, case.kernel_size // case.kernel_stride
    steps, blocks = size // stride, -(-length // size)
    count = max(0, (length - case.kernel_size) // stride + 1)
    position = torch.arange(length - rows, length, device=q.device)
    token = torch.arange(count, device=q.device)
    seen = (token * stride + case.kernel_size - 1 <= position[:, None])[:, None]  # [T, 1, NC]
    grouped = q.double().reshape(rows, heads, q.shape[1] // heads, dim)
    scores = torch.einsum("thgd,chd->thgc", grouped, k_cmp[:count].double()) * case.scale
    if lse is not None:
        scores = (scores - lse.double().reshape(rows, heads, lse.shape[1] // heads, 1)).exp()
        if exact:
            scores = scores.log2().round().exp2()
        scores = scores.masked_fill((lse == -torch.inf).reshape(rows, heads, lse.shape[1] // heads, 1), 0)
    nothing = -torch.inf if lse is None else 0.0
    group = scores.sum(2).masked_fill(~seen, nothing)
    group = F.pad(group, (overlap - 1, max(0, steps * blocks - count)), value=nothing)
    parts = [group[..., m + n :][..., : blocks * steps : steps] for m in range(steps) for n in range(overlap)]
    score = torch.stack(parts).amax(0) if case.pool == "max" else torch.stack(parts).sum(0)
    if not blocks:
        return torch.full((rows, heads, case.num_selected), -1, dtype=torch.int32, device=q.device)
    block = torch.arange(blocks, device=q.device)
    current = torch.div(position, size, rounding_mode="floor")[:, None, None]
    rank = torch.where((block < case.init_blocks) | (block > current - case.local_blocks), 2, 1)
    rank = torch.where(block <= current, rank, 0).expand(score.shape)
    order = score.sort(dim=-1, descending=True, stable=True).indices
    order = order.gather(-1, rank.gather(-1, order).sort(dim=-1, descending=True, stable=True).indices)
    order = order[..., : case.num_selected]
    chosen = torch.where(rank.gather(-1, order) > 0, order, blocks).sort(-1).values
    chosen = F.pad(torch.where(chosen == blocks, -1, chosen), (0, case.num_selected - chosen.shape[-1]), value=-1)
    return chosen.int()


def reference(q: Tensor, k_cmp: Tensor, lse: Tensor | None, cu_seqlens: tuple[Any, Any], case: Case) -> Tensor:
    """Every sequence of a call by itself."""
    cu_q, cu_k = cu_seqlens
    out = torch.full((*q.shape[:2], case.heads, case.num_selected), -1, dtype=torch.int32, device=q.device)
    if cu_q is not None:
        for (a, b), (c, d) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
            keys = k_cmp[0, c // case.kernel_stride :]
            out[0, a:b] = select_one(q[0, a:b], keys, None if lse is None else lse[0, a:b], d - c, case)
        return out
    for b in range(q.shape[0]):
        end = case.seq_len + case.extra if case.used is None else case.used[b]
        length = end - (0 if case.left is None else case.left[b])
        out[b] = select_one(q[b], k_cmp[b], None if lse is None else lse[b], length, case)
    return out


def inputs(case: Case, dtype: torch.dtype, exact: bool = True, seed: int = 0) -> tuple[Any, ...]:
    """q, k_cmp, lse, sequences. Exact: every product is an integer times ln 2 / scale, every lse one times ln 2."""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, device=DEVICE, generator=generator)

    batch, seq_len = (1, sum(case.lengths) + 5) if case.lengths else (case.batch, case.seq_len)
    seq_len_k = max(0, case.seq_len + case.extra)
    cu_q = cu_k = used = left = None
    if case.lengths is not None:
        cu_q = torch.tensor([2, *case.lengths], device=DEVICE).cumsum(0).int()
        cu_k = torch.tensor([0, *(max(0, n + case.extra) for n in case.lengths)], device=DEVICE).cumsum(0).int()
        seq_len_k = int(cu_k[-1])
    if case.used is not None:
        used = torch.tensor(case.used, device=DEVICE, dtype=torch.int32)
    if case.left is not None:
        left = torch.tensor(case.left, device=DEVICE, dtype=torch.int32)
    count = seq_len_k // case.kernel_stride if case.lengths else (seq_len_k - case.kernel_size) // case.kernel_stride + 1
    shapes = (batch, seq_len, case.heads * case.group, case.dim), (batch, max(0, count), case.heads, case.dim)
    if exact:
        q, k_cmp = (integers(-1, 2, *shape).to(dtype) for shape in shapes)
        q = q * (integers(0, 4, *shapes[0]) == 0) * 4  # few of a head's products: no probability leaves 24 bits
        lse = integers(0, 3, *shapes[0][:3]).float()
    else:
        q, k_cmp = (torch.randn(*shape, device=DEVICE, generator=generator).to(dtype) for shape in shapes)
        lse = torch.randn(shapes[0][:3], device=DEVICE, generator=generator)
    return q, k_cmp, None if case.logits else lse, seq_len_k, (cu_q, cu_k, used, left)


def run(q: Tensor, k_cmp: Tensor, lse: Tensor | None, seq_len_k: int, seqs: Any, case: Case, config: Any = None) -> Tensor:
    """The kernel's ids, every element of which it must have written, in a given configuration or its own."""
    plan = SELECT_BLOCKS.plan(q, k_cmp, lse, *seqs, seq_len_k=seq_len_k, **case.options)
    out = {
        name: torch.full(output.shape, -77, dtype=output.dtype, device=q.device)
        for name, output in plan.outputs.items()
    }
    config = config or SELECT_BLOCKS.config(plan.sizes, device_of(q.device))
    if INTERPRETED:  # otherwise hundreds of programs with nothing to do
        SELECT_BLOCKS.fn[(3,)](
            **{name: argument(value) for name, value in plan.inputs.items()}, **out, SIZES=plan.sizes, **config.tiles
        )
    else:
        SELECT_BLOCKS.launch(plan, out, config)
    return out["block_indices"]


def logarithm(exponent: float) -> float:
    """The float32 number that log2(e), in float32, makes ``exponent`` of."""
    start = torch.tensor(exponent * 0.6931471805599453, dtype=torch.float32).view(torch.int32)
    near = (start + torch.arange(-4, 5, dtype=torch.int32)).view(torch.float32)
    exact = near[near * torch.tensor(1.4426950408889634) == exponent]
    return float(exact[0])


def check(case: Case, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
    """Every id as the reference has it, on inputs whose scores are exact."""
    q, k_cmp, lse, seq_len_k, seqs = inputs(case, dtype, seed=seed)
    if lse is not None:
        case, lse = replace(case, scale=logarithm(0.25)), torch.tensor([0.0, logarithm(1.0), logarithm(2.0)]).to(lse)[lse.long()]
    have = run(q, k_cmp, lse, seq_len_k, seqs, case)
    want = reference(q, k_cmp, lse, seqs[:2], case)
    assert have.shape == want.shape
    different = (have != want).any(-1)
    assert not different.any(), (str(case), different.nonzero()[:5], have[different][:3], want[different][:3])


SHAPES = [
    Case(),
    Case(pool="max"),
    Case(pool="max", logits=True),
    Case(seq_len=300, group=1, num_selected=5),
    Case(seq_len=330, group=3, num_selected=3, init_blocks=0, local_blocks=0, batch=2, heads=1),
    Case(seq_len=260, group=5, kernel_size=4, kernel_stride=4, num_selected=6, local_blocks=3),
    Case(seq_len=300, kernel_size=32, kernel_stride=4, num_selected=5, heads=1),  # reaches two blocks back
    Case(seq_len=300, kernel_size=12, kernel_stride=4, num_selected=5, heads=1, pool="max"),
    Case(seq_len=200, kernel_size=64, kernel_stride=16, num_selected=5, heads=1),  # a token a block
    Case(seq_len=300, kernel_size=2, kernel_stride=1, num_selected=5, heads=1),
    Case(seq_len=300, kernel_size=5, kernel_stride=1, num_selected=5, heads=1, block_size=32, pool="max"),
    Case(seq_len=600, kernel_size=7, kernel_stride=1, num_selected=2, heads=1, block_size=128, local_blocks=0),
    Case(seq_len=900, kernel_size=3, kernel_stride=1, num_selected=2, heads=1, block_size=256, init_blocks=0),
    Case(seq_len=40, extra=400, num_selected=7, dim=24),
    Case(seq_len=60, extra=-20, num_selected=2),
    Case(seq_len=3, extra=0),
    Case(lengths=(0, 130, 1, 77), extra=50, num_selected=5, heads=1),
    Case(lengths=(150, 30, 0, 44), extra=-9, num_selected=3, pool="max", logits=True, heads=1),
    Case(batch=3, seq_len=70, extra=130, used=(200, 90, 40), left=(20, 0, 3), num_selected=5, heads=1),
    Case(seq_len=1200, num_selected=96, init_blocks=1, local_blocks=33, heads=1, group=1, pool="max"),
    Case(seq_len=600, num_selected=20, init_blocks=0, local_blocks=20, heads=1),
    Case(seq_len=2400, extra=20000, num_selected=3, local_blocks=0, heads=1, group=1) if not INTERPRETED else
    Case(seq_len=64, extra=20000, num_selected=3, local_blocks=0, heads=1, group=1),  # a tree of several levels
]  # fmt: skip


@kernels
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_against_reference(case: Case) -> None:
    check(case)
    check(case, torch.float16, seed=1)
