"""The attentions of `benchmarks.recognised`, which are of any size, here of small ones."""

from __future__ import annotations

from torch import Tensor

from fsa_compile.testing import handwritten

from . import BLOCK, positive


@positive(layout="bthd", padded=True)
def long_sdpa_mask(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    return handwritten.sdpa_mask(q, k, v, ids, block_size=BLOCK)


@positive(layout="bthd", padded=True)
def long_softmax_by_hand(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    return handwritten.softmax_by_hand(q, k, v, ids, block_size=BLOCK)


@positive(layout="bthd", padded=True)
def long_einsum_grouped(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    return handwritten.einsum_grouped(q, k, v, ids, block_size=BLOCK)


@positive(layout="bthd", padded=True)
def long_bmm_added_mask(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    return handwritten.bmm_added_mask(q, k, v, ids, block_size=BLOCK)
