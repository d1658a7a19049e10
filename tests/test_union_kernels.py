"""The unions of query tiles: on a GPU (`-m gpu`) and in the interpreter. What walks them is in `test_kernels.py`."""

from __future__ import annotations

import pytest
import torch
from kernel_runs import DEVICE, kernels
from torch import Tensor

from fsa_compile.templates.selected import TILE_UNIONS
from fsa_compile.testing.inputs import traced_block_indices
from fsa_compile.tiling import union_tokens


def unions_of(block_indices: Tensor, tokens: int, *runs: Tensor | None, seq_len_k: int, block_size: int) -> list:
    """By tile and key/value head: ``{block: {token of the tile, ...}}``, read off what the kernel left."""
    *unions, _ = TILE_UNIONS(
        block_indices, *(runs or [None] * 4), seq_len_k=seq_len_k, block_size=block_size, tokens=tokens
    )
    return read_unions(*unions, tokens)


def read_unions(blocks: Tensor, members: Tensor, counts: Tensor, tokens: int) -> list:
    """The same of the kernel's results."""
    found = []
    for w in range(counts.shape[0]):
        for hk in range(counts.shape[1]):
            count = int(counts[w, hk])
            ids, bits = blocks[w, hk, :count].tolist(), members[w, hk, :count].tolist()
            assert ids == sorted(set(ids))
            found.append({b: {i for i in range(tokens) if bit >> i & 1} for b, bit in zip(ids, bits, strict=True)})
    return found


def expected(block_indices: Tensor, positions: list[int], tokens: int, block_size: int) -> list:
    """The same for one batch row whose tokens stand at ``positions``."""
    found = []
    for first in range(0, len(positions), tokens):
        for hk in range(block_indices.shape[1]):
            union: dict[int, set[int]] = {}
            for i, pos in enumerate(positions[first : first + tokens]):
                for b in block_indices[first + i, hk].tolist():
                    if 0 <= b <= pos // block_size and pos >= 0:
                        union.setdefault(b, set()).add(i)
            found.append(union)
    return found


@kernels
@pytest.mark.parametrize(("tokens", "num_selected"), [(1, 5), (4, 1), (4, 16), (64, 5)])
def test_batches(tokens: int, num_selected: int) -> None:
    """Ids in any order, repeated, in the future, out of range and none at all."""
    generator = torch.Generator().manual_seed(tokens + num_selected)
    block_indices = torch.randint(-2, 9, (2, 70, 2, num_selected), generator=generator, dtype=torch.int32)
    block_indices[0, 3] = 2**31 - 1
    have = unions_of(block_indices.to(DEVICE), tokens, seq_len_k=100, block_size=16)
    positions = list(range(30, 100))
    want = [u for b in range(2) for u in expected(block_indices[b], positions, tokens, 16)]
    assert have == want


@kernels
@pytest.mark.parametrize(("tokens", "num_selected", "least"), [(4, 4, 2), (16, 11, 4), (1, 4, 2), (64, 5, 16)])
def test_what_a_tile_agrees_on_leaves_the_rest(tokens: int, num_selected: int, least: int) -> None:
    """A block that enough tokens selected is in the union with them, and in nobody's rest; any other remains."""
    generator = torch.Generator().manual_seed(tokens)
    draws = torch.rand(2, 70, 2, 12, generator=generator) + 2 * (torch.arange(12) < 2)  # all want the first two
    block_indices = draws.topk(num_selected).indices.int() - 1  # in any order, some -1, some in the future
    block_indices[0, 3, 0, 0] = 2**31 - 1
    *unions, rest = TILE_UNIONS(
        block_indices.to(DEVICE), *[None] * 4, seq_len_k=100, block_size=16, tokens=tokens, least=least
    )
    have = read_unions(*unions, tokens)
    positions = list(range(30, 100))
    every = [u for b in range(2) for u in expected(block_indices[b], positions, tokens, 16)]
    assert have == [{block: who for block, who in union.items() if len(who) >= least} for union in every]
    assert any(have) == (tokens > 1)
    want = block_indices.clone()
    for b in range(2):
        for i, pos in enumerate(positions):
            for hk in range(2):
                union = have[(b * -(-70 // tokens) + i // tokens) * 2 + hk]
                for slot, block in enumerate(block_indices[b, i, hk].tolist()):
                    if not 0 <= block <= pos // 16 or block in union:
                        want[b, i, hk, slot] = -1
    assert torch.equal(rest.cpu(), want)


@kernels
def test_packed_sequences() -> None:
    lengths, lengths_k = (0, 33, 1, 20), (5, 40, 1, 12)  # the last has more queries than keys
    cu_q, cu_k = (torch.tensor([3, *x]).cumsum(0).int() for x in (lengths, lengths_k))
    generator = torch.Generator().manual_seed(0)
    block_indices = torch.randint(-1, 4, (1, 60, 1, 4), generator=generator, dtype=torch.int32)
    have = unions_of(
        block_indices.to(DEVICE), 8, cu_q.to(DEVICE), cu_k.to(DEVICE), None, None, seq_len_k=61, block_size=16
    )
    want = []
    for i, (n, nk) in enumerate(zip(lengths, lengths_k, strict=True)):
        rows = block_indices[0, int(cu_q[i]) : int(cu_q[i + 1])]
        want += expected(rows, list(range(nk - n, nk)), 8, 16)
    assert [u for u in have if u] == [u for u in want if u]


@kernels
def test_padded_batches() -> None:
    used, left = torch.tensor([50, 0, 64]).int(), torch.tensor([10, 0, 0]).int()
    generator = torch.Generator().manual_seed(1)
    block_indices = torch.randint(-1, 5, (3, 20, 1, 3), generator=generator, dtype=torch.int32)
    have = unions_of(
        block_indices.to(DEVICE), 4, None, None, used.to(DEVICE), left.to(DEVICE), seq_len_k=64, block_size=16
    )
    want = []
    for b, length in enumerate((40, 0, 64)):
        want += expected(block_indices[b], list(range(length - 20, length)) if length else [-1] * 20, 4, 16)
    assert have == want


@kernels
def test_neighbours_of_a_trained_model_share_their_blocks() -> None:
    """16 tokens of the trace select 40 to 80 blocks together, where independent ones would select 160."""
    block_indices = traced_block_indices(16384, 2, DEVICE)[:, 8192 : 8192 + 64]
    have = unions_of(block_indices, union_tokens(4, 16, 2), seq_len_k=8192 + 64, block_size=64)
    assert 40 < sum(map(len, have)) / len(have) < 80
