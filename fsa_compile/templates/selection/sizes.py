"""What the selection kernel is compiled for."""

from __future__ import annotations

from typing import Any, NamedTuple

from ...tiling import next_power_of_2, padded

# Children of a node in the tree of maxima over a row's blocks.
FANOUT = 8

# Query rows in flight, over all programs: what bounds the workspace. 264 programs of 64 rows, two on each
# multiprocessor of an H100.
ROWS_IN_FLIGHT = 264 * 64


class SelectionSizes(NamedTuple):
    """Static sizes; lengths, batch and scale are run-time values.

    STEPS, OVERLAP: compressed tokens of a block, and how many of them one block's window adds: ``block_size`` and
    ``kernel_size`` over ``kernel_stride``. SHIFTS: how many of the following blocks a compressed token touches besides
    its own. NEED: places left for blocks that are not forced; PICKS: the power of two that holds them.
    MAX_POOL: ``pool="max"``. LOGITS: no ``lse``, scores are logits.
    """

    NUM_KV_HEADS: int
    GROUP: int
    HEAD_DIM: int
    BLOCK_D: int
    ITEMSIZE: int
    BLOCK_SIZE: int
    NUM_SELECTED: int
    KERNEL_SIZE: int
    KERNEL_STRIDE: int
    INIT_BLOCKS: int
    LOCAL_BLOCKS: int
    STEPS: int
    OVERLAP: int
    SHIFTS: int
    NEED: int
    PICKS: int
    FANOUT: int
    MAX_POOL: bool
    LOGITS: bool

    @classmethod
    def of_call(
        cls, q: Any, k_cmp: Any, lse: Any, block_size: int, num_selected: int, kernel_size: int, kernel_stride: int,
        init_blocks: int, local_blocks: int, pool: str,
    ) -> SelectionSizes:  # fmt: skip
        """Read the sizes off q and k_cmp ``[B, T, H, D]``; the rest are the operator's options."""
        num_kv_heads, head_dim = int(k_cmp.shape[2]), int(q.shape[3])
        steps, overlap = block_size // kernel_stride, kernel_size // kernel_stride
        need = num_selected - init_blocks - local_blocks
        return cls(
            num_kv_heads, int(q.shape[2]) // num_kv_heads, head_dim, padded(head_dim), q.dtype.itemsize, block_size,
            num_selected, kernel_size, kernel_stride, init_blocks, local_blocks, steps, overlap,
            -(-(overlap - 1) // steps), need, max(4, next_power_of_2(need)), FANOUT,
            pool == "max", lse is None,
        )  # fmt: skip

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of a tile."""
        return self.BLOCK_D * self.ITEMSIZE


def workspace_width(seq_len_k: Any, sizes: SelectionSizes) -> Any:
    """What a query row in flight keeps: keys of its blocks, the maxima over them level by level, chosen ids.

    ``level_sizes`` walks the same levels on the device: each has an eighth of the one below, rounded up, down to one
    that fits a selection step; sixteen levels are more than there can be.
    """
    blocks = (seq_len_k + sizes.BLOCK_SIZE - 1) // sizes.BLOCK_SIZE
    leaves = (blocks + FANOUT - 1) // FANOUT * FANOUT
    return leaves + leaves // (FANOUT - 1) + 16 + sizes.PICKS
