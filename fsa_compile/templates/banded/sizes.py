"""What the kernels of banded attention are compiled for, and what they are given.

Key ``i`` of a run covers positions up to ``last(i) = i * STRIDE + FIRST_END``; a query at position ``t`` sees it iff
``t - WINDOW < last(i) <= t``. Compressed attention: STRIDE is kernel_stride, FIRST_END is kernel_size - 1, WINDOW is 0,
which means none. Sliding-window attention: STRIDE 1, FIRST_END 0, WINDOW the window.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ...tiling import Config, padded
from ..kernel import SEQUENCES, Strided, sequences
from ..query_tiles import query_tiles
from ..sequences import Sequences

ARGUMENTS = f"{SEQUENCES}, *, SymInt seq_len_k, int key_stride, int first_end, int window, float scale"


class BandedSizes(NamedTuple):
    """Static sizes; lengths and batch are run-time values and not part of it."""

    NUM_KV_HEADS: int
    GROUP: int
    HEAD_DIM: int
    HEAD_DIM_V: int
    BLOCK_D: int
    BLOCK_DV: int
    STRIDE: int
    FIRST_END: int
    WINDOW: int
    ITEMSIZE: int
    SPLITS: int = 1

    @classmethod
    def of_call(cls, q: Any, k: Any, v: Any, key_stride: int, first_end: int, window: int) -> BandedSizes:
        """Read the sizes off q, k, v ``[B, T, H, D]``."""
        num_kv_heads, head_dim, head_dim_v = int(k.shape[2]), int(q.shape[3]), int(v.shape[3])
        return cls(
            num_kv_heads, int(q.shape[2]) // num_kv_heads, head_dim, head_dim_v, padded(head_dim), padded(head_dim_v),
            key_stride, first_end, window, q.dtype.itemsize,
        )  # fmt: skip

    @property
    def widest(self) -> int:
        """The larger of the two padded head dims."""
        return max(self.BLOCK_D, self.BLOCK_DV)


def query_config(
    sizes: BandedSizes, block_m: int, block_n: int, block_e: int, warps: int, stages: int, edge_stages: int = 1,
    max_registers: int | None = None,
) -> Config:  # fmt: skip
    """Of a kernel with a program per query tile.

    ``block_e``: width of masked tiles, which then have loops of their own; 0: one loop, masks where needed.
    """
    tiles = query_tiles(sizes, block_m)
    tiles |= {"BLOCK_N": block_n, "BLOCK_E": block_e, "EDGE_STAGES": edge_stages}
    return Config(tiles, warps, stages, max_registers)


def inputs(q: Any, k: Any, v: Any, seqs: tuple[Any, ...], seq_len_k: Any, scale: float) -> dict[str, Any]:
    """What every kernel of the family reads; ``seqs`` are the four tensors of ``SEQUENCES`` or Nones."""
    runs = sequences(q, seq_len_k, seqs)
    return {"q": Strided(q), "k": Strided(k), "v": Strided(v), "seqs": runs, "num_key_rows": k.shape[1], "scale": scale}


def extent(q: Any, k: Any, seqs: Sequences) -> tuple[Any, ...]:
    """batch, seq_len, rows of k, num_seqs, packed, num_kv_heads, group: what grids depend on."""
    packed, num_kv_heads = seqs.cu_seqlens_q is not None, k.shape[2]
    return q.shape[0], q.shape[1], k.shape[1], seqs.num_seqs, packed, num_kv_heads, q.shape[2] // num_kv_heads
