"""Hypothesis strategies over specs."""

from __future__ import annotations

from hypothesis import strategies as st

from .specs import Spec

_HEAD_DIMS = st.sampled_from((16, 32, 64, 1, 7, 20, 24, 48, 80))


@st.composite
def specs(draw: st.DrawFn, max_seq_len: int = 140) -> Spec:
    """Ragged lengths from one token on, packed or not, any group size, unequal and odd head dims, any layout."""
    kernel_stride = draw(st.sampled_from((4, 8, 16)))
    init_blocks, local_blocks = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    packed = draw(st.booleans())
    lengths = draw(st.lists(st.integers(0, max_seq_len // 3), min_size=1, max_size=4).filter(any)) if packed else None
    return Spec(
        batch=draw(st.integers(1, 3)),
        seq_len=draw(st.integers(1, max_seq_len)),
        extra_keys=draw(st.one_of(st.just(0), st.integers(0, 70))),
        num_kv_heads=draw(st.integers(1, 3)),
        gqa_group_size=draw(st.integers(1, 7)),
        head_dim=draw(_HEAD_DIMS),
        head_dim_v=draw(_HEAD_DIMS),
        block_size=draw(st.sampled_from((16, 32))),
        num_selected=draw(st.integers(max(1, init_blocks + local_blocks), 7)),
        kernel_size=kernel_stride * draw(st.integers(1, 3)),
        kernel_stride=kernel_stride,
        init_blocks=init_blocks,
        local_blocks=local_blocks,
        window_size=draw(st.sampled_from((1, 5, 16, 33, 200))),
        scale=draw(st.sampled_from((None, None, 0.3))),
        lengths=None if lengths is None else tuple(lengths),
        blocks=draw(st.sampled_from(("random", "full", "local"))),
        strides=draw(st.sampled_from(("contiguous", "transposed", "sliced"))),
    )
