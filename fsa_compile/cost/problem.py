"""The sizes that a cost depends on."""

from __future__ import annotations

from dataclasses import dataclass

from ..tiling import next_power_of_2, selected_chunk_n, union_tokens

# The loop orders and their names for people. Here, as what only checks an argument needs no expressions.
LOOP_ORDERS = {"fsa": "KV-outer", "nsa": "query-outer", "tile": "query-tile", "mixed": "query-tile and KV-outer"}

# The kernels' tiles; what both packages reckon with is in fsa_compile.tiling.
# Rows of the KV-outer passes' matmuls: (entry, query head) pairs of one list, taken this many at a time.
KV_OUTER_ROWS = 64
# Tensor cores have no smaller row count, so the query-outer passes pad the group's heads up to it.
MIN_QUERY_ROWS = 16

# Agreement of a call whose selection is not looked at. Random blocks beside the three that NSA always selects have 0.2
# to 0.3, a trained model's 0.7 to 0.9 (docs/cost-model.md).
LIKELY_AGREEMENT = 0.25


@dataclass(frozen=True)
class Problem:
    """Sizes of one selected-attention call; SPEC's notation in the comments.

    Packed sequences: ``batch=1`` and the lengths are totals. Raises ValueError naming the field when a size is < 1.
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
    # From 0, where tokens select independently of each other, to 1, where all of a query tile select the same blocks.
    agreement: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "agreement" and value < 1:
                raise ValueError(f"Problem.{name} is {value}; it should be at least 1")
        if not 0 <= self.agreement <= 1:
            raise ValueError(f"Problem.agreement is {self.agreement}; it should be from 0 to 1")

    @property
    def query_rows(self) -> int:
        """Rows of the query-outer matmul tile: G rounded up to a power of two, at least ``MIN_QUERY_ROWS``."""
        return max(MIN_QUERY_ROWS, next_power_of_2(self.gqa_group_size))

    @property
    def union_tokens(self) -> int:
        """Tokens of a query tile that attends to the union of their blocks."""
        return union_tokens(self.gqa_group_size, self.num_selected, self.itemsize)

    @property
    def chunks(self) -> int:
        """Pieces that the KV-outer passes cut a block into to fit it on chip; each makes partials of its own."""
        return self.block_size // selected_chunk_n(self.block_size, self.head_dim, self.head_dim_v, self.itemsize)
