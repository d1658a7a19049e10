"""Named argument specs: one description of a problem that tests and benchmarks make their inputs from."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Spec:
    """One problem, in the glossary's names. Small by default, with every option away from its default.

    lengths: packed sequences' query lengths (`batch` and `seq_len` follow); extra_keys: keys before the first query, of
    every sequence. blocks: "random" ids anywhere in the past, in any order, with -1 among them; "full" the same without
    -1 as long as there are blocks; "local" the newest blocks, so that neighbours agree. strides: "contiguous",
    "transposed" ([batch, heads, seq_len, head_dim] in memory), "sliced" (every other element of something larger).
    """

    name: str = ""
    batch: int = 1
    seq_len: int = 96
    extra_keys: int = 0
    num_kv_heads: int = 2
    gqa_group_size: int = 2
    head_dim: int = 16
    head_dim_v: int = 16
    block_size: int = 16
    num_selected: int = 4
    kernel_size: int = 8
    kernel_stride: int = 4
    init_blocks: int = 1
    local_blocks: int = 1
    window_size: int = 20
    scale: float | None = None
    lengths: tuple[int, ...] | None = None
    blocks: str = "random"
    strides: str = "contiguous"
    logits: float = 1.0

    def __post_init__(self) -> None:
        if self.lengths is not None:
            object.__setattr__(self, "batch", 1)
            object.__setattr__(self, "seq_len", sum(self.lengths))

    def __str__(self) -> str:
        if self.name:
            return self.name
        default = Spec()
        changed = [f.name for f in fields(self) if getattr(self, f.name) != getattr(default, f.name)]
        return "-".join(f"{name}={getattr(self, name)}" for name in changed) or "default"

    @property
    def num_q_heads(self) -> int:
        return self.num_kv_heads * self.gqa_group_size

    @property
    def lengths_k(self) -> tuple[int, ...] | None:
        return None if self.lengths is None else tuple(n + self.extra_keys for n in self.lengths)

    @property
    def seq_len_k(self) -> int:
        return self.seq_len + self.extra_keys if self.lengths_k is None else sum(self.lengths_k)

    @property
    def windows(self) -> dict[str, Any]:
        return {"kernel_size": self.kernel_size, "kernel_stride": self.kernel_stride}

    @property
    def selection(self) -> dict[str, Any]:
        names = ("block_size", "num_selected", "init_blocks", "local_blocks")
        return {name: getattr(self, name) for name in names}

    def __repr__(self) -> str:
        return f"Spec({self})"


# What hypothesis is unlikely to hit together, and what a person wants to see by name in a report.
SPECS = (
    Spec(name="plain"),
    Spec(name="defaults", seq_len=300, head_dim=32, head_dim_v=32, block_size=64, num_selected=4, kernel_size=32,
         kernel_stride=16, local_blocks=2, window_size=64),
    Spec(name="one_token", seq_len=1),
    Spec(name="shorter_than_a_window", seq_len=7),
    Spec(name="shorter_than_a_block", seq_len=15, gqa_group_size=3),
    Spec(name="batch_of_three", batch=3, seq_len=50, num_kv_heads=1, gqa_group_size=5),
    Spec(name="odd_dims", seq_len=70, head_dim=24, head_dim_v=40, gqa_group_size=7),
    Spec(name="tiny_dims", seq_len=40, head_dim=1, head_dim_v=3, gqa_group_size=1),
    Spec(name="widest_heads", seq_len=40, num_kv_heads=1, gqa_group_size=1, head_dim=256, head_dim_v=256),
    Spec(name="decode_one", batch=2, seq_len=1, extra_keys=100),
    Spec(name="decode_some", batch=2, seq_len=5, extra_keys=61, gqa_group_size=4),
    Spec(name="packed", lengths=(37, 1, 64, 15), gqa_group_size=3),
    Spec(name="packed_empty", lengths=(0, 20, 0, 33, 0)),
    Spec(name="packed_more_keys", lengths=(9, 30, 2), extra_keys=21),
    Spec(name="packed_one", lengths=(50,)),
    Spec(name="transposed", seq_len=60, batch=2, strides="transposed"),
    Spec(name="sliced", seq_len=60, head_dim_v=32, strides="sliced"),
    Spec(name="packed_sliced", lengths=(33, 40), strides="sliced"),
    Spec(name="stride_is_size", seq_len=90, kernel_size=16, kernel_stride=16, block_size=16),
    Spec(name="more_places_than_blocks", seq_len=60, num_selected=9),
    Spec(name="nothing_forced", seq_len=80, init_blocks=0, local_blocks=0, num_selected=1),
    Spec(name="only_forced", seq_len=120, init_blocks=2, local_blocks=2, num_selected=4),
    Spec(name="local", seq_len=130, blocks="local"),
    Spec(name="own_scale", seq_len=64, scale=0.5),
    Spec(name="window_of_one", seq_len=40, window_size=1),
    Spec(name="window_beyond", seq_len=40, window_size=1000),
)  # fmt: skip
NAMED = {spec.name: spec for spec in SPECS}
