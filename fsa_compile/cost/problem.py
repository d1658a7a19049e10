"""The sizes that a cost depends on."""

from __future__ import annotations

from dataclasses import dataclass

LOOP_ORDERS = ("fsa", "nsa")

# The kernels' tiles, as fsa_compile.templates has them (tests compare; this package imports nothing of the other).
# Rows of the KV-outer passes' matmuls: (entry, query head) pairs of one list, taken this many at a time.
KV_OUTER_ROWS = 64
# Tensor cores have no smaller row count, so the query-outer passes pad the group's heads up to it.
MIN_QUERY_ROWS = 16
# Entries of one list that one work item of a KV-outer pass serves.
ENTRIES_PER_TILE = 1024


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

    @property
    def chunks(self) -> int:
        """Pieces that the KV-outer passes cut a block into to fit it on chip; each makes partials of its own."""
        widest = 1 << (max(self.head_dim, self.head_dim_v) - 1).bit_length()
        keys = 64 if self.itemsize < 4 else max(16, 4096 // widest)
        return max(1, self.block_size // keys)
