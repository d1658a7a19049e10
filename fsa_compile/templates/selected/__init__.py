"""The kernels of the selected branch, in each loop order.

Names and shapes, besides those of the semantic operators:

- an *entry* is one (batch, row, key/value head, slot) of block_indices, numbered in row-major order;
- a *list* is the entries that chose one block, numbered ``hk * num_blocks + block``, blocks counted over all runs as
  ``sequences.run_of_block`` does;
- a *tile* is up to ``ENTRIES_PER_TILE`` consecutive entries of a list;
- *partials* are ``[B, T, HK, S, C, G, D]``: C chunks of a block (1 up to 128 keys), G heads of the group; the forward's
  come with their softmax statistics ``[B, T, HK, S, C, G, 2]`` (largest score, unscaled, and sum). Slots whose block is
  not visible are never written and never read.
"""

from __future__ import annotations

from .bwd_kv_outer import BWD_KV_OUTER
from .bwd_query_outer import BWD_QUERY_OUTER
from .bwd_union import BWD_UNION
from .fwd_kv_outer import FWD_KV_OUTER
from .fwd_query_outer import FWD_QUERY_OUTER
from .fwd_union import FWD_UNION
from .listing import LIST_KEYS, LIST_OFFSETS, LIST_TILES
from .merge_partials import MERGE_PARTIALS
from .reduce_tiles import REDUCE_TILES
from .sum_partials import SUM_PARTIALS
from .unions import TILE_UNIONS

KERNELS = (
    LIST_KEYS, LIST_OFFSETS, LIST_TILES,
    FWD_QUERY_OUTER, FWD_KV_OUTER, FWD_UNION, MERGE_PARTIALS,
    BWD_KV_OUTER, BWD_QUERY_OUTER, BWD_UNION, SUM_PARTIALS, REDUCE_TILES, TILE_UNIONS,
)  # fmt: skip
