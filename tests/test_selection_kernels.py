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
from kernel_runs import DEVICE, DTYPES, INTERPRETED, kernels
from torch import Tensor

from fsa_compile.templates.kernel import argument, device_of
from fsa_compile.templates.selection import SELECT_BLOCKS
from fsa_compile.tiling import Config

LONG = 300 if INTERPRETED else 700


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


def select_one(q: Tensor, k_cmp: Tensor, lse: Tensor | None, length: int, case: Case, exact: bool = True) -> Tensor:
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
    """q, k_cmp, lse, the keys' length and the sequences. Exact: small integers, `lse` to be in units of ln 2."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator).to(DEVICE)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE)

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
    count = (
        seq_len_k // case.kernel_stride if case.lengths else (seq_len_k - case.kernel_size) // case.kernel_stride + 1
    )
    shapes = (batch, seq_len, case.heads * case.group, case.dim), (batch, max(0, count), case.heads, case.dim)
    if exact:
        q, k_cmp = (integers(-1, 2, *shape).to(dtype) for shape in shapes)
        q = q * (integers(0, 4, *shapes[0]) == 0) * 4  # few of a head's products: no probability leaves 24 bits
        lse = integers(0, 3, *shapes[0][:3]).float()
    else:
        q, k_cmp, lse = normal(*shapes[0]).to(dtype), normal(*shapes[1]).to(dtype), normal(*shapes[0][:3])
    return q, k_cmp, None if case.logits else lse, seq_len_k, (cu_q, cu_k, used, left)


def run(
    q: Tensor, k_cmp: Tensor, lse: Tensor | None, seq_len_k: int, seqs: Any, case: Case, config: Any = None
) -> Tensor:
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
        case = replace(case, scale=logarithm(0.25))
        lse = torch.tensor([0.0, logarithm(1.0), logarithm(2.0)]).to(lse)[lse.long()]
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
    Case(seq_len=3),
    Case(seq_len=1, extra=600, batch=2),
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
    for seed, dtype in enumerate(DTYPES[:1] if INTERPRETED else DTYPES):
        check(case, dtype, seed)


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype: torch.dtype) -> None:
    check(Case(seq_len=130, dim=48), dtype)


@kernels
def test_nothing_there() -> None:
    for case in (Case(seq_len=0, extra=40), Case(batch=0), Case(seq_len=5, extra=-5), Case(seq_len=2, extra=-2)):
        q, k_cmp, lse, seq_len_k, seqs = inputs(case, torch.float32)
        have = run(q, k_cmp, lse, seq_len_k, seqs, case)
        assert (have == -1).all()


@kernels
def test_all_scores_equal() -> None:
    """Zero everywhere, and of a row whose `lse` is -inf: the lowest ids."""
    case = Case(seq_len=400, num_selected=5, heads=1)
    q, k_cmp, lse, seq_len_k, seqs = inputs(case, torch.float32)
    want = [0, 1, 2, 3, 24]
    assert run(q * 0, k_cmp, lse, seq_len_k, seqs, case)[0, -1, 0].tolist() == want
    assert run(q, k_cmp, torch.full_like(lse, -torch.inf), seq_len_k, seqs, case)[0, -1, 0].tolist() == want
    logits = replace(case, pool="max", logits=True)
    assert run(q * 0, k_cmp, None, seq_len_k, seqs, logits)[0, -1, 0].tolist() == want
    assert run(q * -0.0, k_cmp, None, seq_len_k, seqs, replace(logits, scale=-1.0))[0, -1, 0].tolist() == want


@kernels
@pytest.mark.parametrize("logits", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_hidden_keys_do_not_count(bad: float, logits: bool) -> None:
    case = Case(seq_len=300, num_selected=5, heads=1, pool="max" if logits else "overlap", logits=logits)
    q, k_cmp, lse, seq_len_k, seqs = inputs(case, torch.float32)
    first = run(q, k_cmp, lse, seq_len_k, seqs, case)
    spoilt = k_cmp.clone()
    spoilt[:, 50:] = bad  # seen from position 50 * 4 + 7 on
    assert torch.equal(run(q, spoilt, lse, seq_len_k, seqs, case)[:, :207], first[:, :207])
    left = replace(case, seq_len=40, extra=260, used=(260,), left=(30,))
    inside = run(q[:, :40], k_cmp, None if lse is None else lse[:, :40], seq_len_k, (*seqs[:2], *ends(left)), left)
    spoilt = k_cmp.clone()
    spoilt[:, (230 - 8) // 4 + 1 :] = bad
    have = run(q[:, :40], spoilt, None if lse is None else lse[:, :40], seq_len_k, (*seqs[:2], *ends(left)), left)
    assert torch.equal(have, inside)


def ends(case: Case) -> tuple[Tensor, Tensor]:
    """`seqused_k` and `leftpad_k`."""
    return (
        torch.tensor(case.used, device=DEVICE, dtype=torch.int32),
        torch.tensor(case.left, device=DEVICE, dtype=torch.int32),
    )


@kernels
@pytest.mark.parametrize(
    "case",
    [
        Case(seq_len=LONG, group=3, heads=1, kernel_size=12, kernel_stride=4, num_selected=6),
        Case(seq_len=LONG, group=2, heads=1, num_selected=6, dim=24),
        Case(seq_len=LONG, group=1, heads=1, num_selected=6, pool="max", logits=True),
    ],
    ids=str,
)
def test_every_configuration_gives_the_same(case: Case) -> None:
    """On inputs whose sums do round."""
    dtype = torch.float32 if INTERPRETED else torch.bfloat16
    q, k_cmp, lse, seq_len_k, seqs = inputs(case, dtype, exact=False)
    plan = SELECT_BLOCKS.plan(q, k_cmp, lse, *seqs, seq_len_k=seq_len_k, **case.options)
    configs = SELECT_BLOCKS.candidates(plan.sizes, device_of(q.device))
    tiles = dict(configs[0].tiles)
    configs = [*configs[:: 3 if INTERPRETED else 1], Config(tiles | {"RESIDENT": not tiles["RESIDENT"]}, 4, 2)]
    first = run(q, k_cmp, lse, seq_len_k, seqs, case, configs[0])
    for config in configs[1:]:
        assert torch.equal(run(q, k_cmp, lse, seq_len_k, seqs, case, config), first), config


@kernels
def test_minicpm4() -> None:
    """InfLLM-V2: scores from windows 32/16 normalised over windows 128/64, the largest of them, 96 blocks of 64."""
    seq_len = 1500 if INTERPRETED else 9000
    wanted = 12 if INTERPRETED else 96
    case = Case(
        seq_len=seq_len, heads=1, group=2, block_size=64, kernel_size=32, kernel_stride=16, pool="max",
        num_selected=wanted, local_blocks=wanted // 3 + 1,
    )  # fmt: skip
    q, k_cmp, _, seq_len_k, seqs = inputs(case, torch.float32, exact=False)
    fine, coarse = q[0, :, :, :].double(), k_cmp[0, ::4, 0].double()  # any coarser keys will do
    coarse = coarse[: (seq_len - 128) // 64 + 1]
    position = torch.arange(seq_len, device=DEVICE)
    scale = case.dim**-0.5
    coarse_logits = torch.einsum("thd,cd->thc", fine, coarse) * scale
    unseen = torch.arange(coarse.shape[0], device=DEVICE) * 64 + 127 > position[:, None]
    lse = coarse_logits.masked_fill(unseen[:, None], -torch.inf).logsumexp(-1)
    p = (torch.einsum("thd,cd->thc", fine, k_cmp[0, :, 0].double()) * scale - lse[..., None]).exp()
    p = p.masked_fill((lse == -torch.inf)[..., None], 0).sum(1)
    ends_at = torch.arange(p.shape[1], device=DEVICE) * 16 + 31
    p = p.masked_fill(ends_at > position[:, None], 0)
    blocks = -(-seq_len // 64)
    pooled = F.max_pool1d(F.pad(p, (1, 4 * blocks - p.shape[1]))[:, None], 5, 4)[:, 0]
    have = run(q, k_cmp, lse.float()[None], seq_len_k, seqs, replace(case, scale=scale))
    differing = compare(have[0, :, 0], pooled, position // 64, case)
    assert differing == 0


@kernels
def test_minimax_m3() -> None:
    """MSA: one index query per key/value head, one index key for all, the largest logit of a block of 128."""
    seq_len = 700 if INTERPRETED else 6000
    case = Case(
        seq_len=seq_len, heads=2, group=1, block_size=128, kernel_size=1, kernel_stride=1, pool="max", logits=True,
        init_blocks=0, local_blocks=1, num_selected=3 if INTERPRETED else 16,
    )  # fmt: skip
    q, k_cmp, _, seq_len_k, seqs = inputs(case, torch.float32, exact=False)
    shared = k_cmp[:, :, :1].expand(-1, -1, 2, -1)
    have = run(q, shared, None, seq_len_k, seqs, replace(case, scale=0.25))
    position = torch.arange(seq_len, device=DEVICE)
    logits = torch.einsum("thd,cd->htc", q[0].double(), k_cmp[0, :, 0].double())
    logits = logits.masked_fill(position[None, :] > position[:, None], -torch.inf)
    logits = F.pad(logits, (0, -seq_len % 128), value=-torch.inf)
    for head in range(2):
        pooled = logits[head].unflatten(1, (-1, 128)).amax(-1)
        assert compare(have[0, :, head], pooled, position // 128, case) == 0


def compare(have: Tensor, score: Tensor, current: Tensor, case: Case) -> int:
    """Rows whose blocks are wrong, where scores are not the same but for rounding: [T, S], [T, NB], [T]."""
    block = torch.arange(score.shape[1], device=score.device)
    forced = (block < case.init_blocks) | (block > current[:, None] - case.local_blocks)
    score = score.masked_fill(forced, torch.inf).masked_fill(block > current[:, None], -torch.inf)
    ids = score.topk(min(case.num_selected, score.shape[1]), -1)
    want = torch.zeros_like(score, dtype=torch.bool).scatter(1, ids.indices, True) & (block <= current[:, None])
    got = torch.zeros(score.shape[0], score.shape[1] + 1, dtype=torch.bool, device=score.device)
    got = got.scatter(1, torch.where(have < 0, score.shape[1], have).long(), True)[:, :-1]
    assert torch.equal(got.sum(1), want.sum(1))
    ascending = torch.where(have < 0, score.shape[1], have)
    assert torch.equal(ascending, ascending.sort(1).values)
    worst = score.masked_fill(~want, torch.inf).amin(1)
    wrong = got & ~want & ~torch.isclose(score, worst[:, None], rtol=1e-4, atol=1e-5)
    return int(wrong.any(1).sum())
