"""The sizes that a cost depends on."""

from __future__ import annotations

from dataclasses import dataclass

LOOP_ORDERS = ("fsa", "nsa")

# Rows of the KV-outer pass's matmul: (entry, query head) pairs of one list, taken this many at a time.
KV_OUTER_ROWS = 64
# Tensor cores have no smaller row count, so the query-outer pass pads the group's heads up to it.
MIN_QUERY_ROWS = 16
# Entries of one work item of the backward's KV-outer pass: one [block_size, D + DV] float32 tile is written for each.
BACKWARD_ENTRIES_PER_TILE = 256


@dataclass(frozen=True)
class Problem:
    """Sizes of one selected-attention call; SPEC's notation in the comments.

    Packed sequences: ``batch=1`` and the lengths are totals. Raises ValueError naming the field when one is < 1.
    """

    batch: int  # B
    seq_len: int  # T, queries
    seq_len_k: int  # Tk, keys
    num_kv_heads: int  # HK
    gqa_group_size: int  # G = HQ // HK
    head_dim: int  # D
    head_dim_v: int  # DV
    block_size: int
    num_selected: int  # S
    itemsize: int  # bytes of an element of q, k, v

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"Problem.{name} is {value}; it should be at least 1")

    @property
    def query_rows(self) -> int:
        """Rows of the query-outer matmul tile: G rounded up to a power of two, at least ``MIN_QUERY_ROWS``."""
        return max(MIN_QUERY_ROWS, 1 << (self.gqa_group_size - 1).bit_length())
