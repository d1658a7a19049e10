"""The public functions. Each is one `torch.ops.fsa` operator of the same name, arguments and defaults.

Conventions shared by all of them:

- Layout is `[batch, seq_len, heads, head_dim]`, contiguous or not; q, k, v and what is compressed from them share one
  of bfloat16, float16 and float32. `num_q_heads` is a multiple of `num_kv_heads`; query head `h` reads key/value head
  `h // gqa_group_size`. Head dims are at most 256, multiples of 16 are fast. Softmax and sums are in float32.
- The queries are the last `seq_len` of `seq_len_k` positions; one that would stand before the first key sees nothing.
- Packed sequences have batch 1, `[1, total_len, heads, head_dim]`, and `cu_seqlens_q` int32 `[num_seqs + 1]` on the
  same device, the starts of the sequences and the total length; `cu_seqlens_k` likewise, if the keys' lengths differ.
  `max_seqlen_q` and `max_seqlen_k` are optional upper bounds in tokens. Positions and block ids restart at each
  sequence. A row before the first or after the last sequence has output 0, lse -inf and no gradient.
- Padded batches and caches: `seqused_k` and `leftpad_k`, int32 `[batch]`, say that the keys of batch row `b` are rows
  `leftpad_k[b]` to `seqused_k[b] - 1`. Positions, blocks and windows count from `leftpad_k[b]`, and the queries are the
  last of those positions. Other rows are never read and have no gradient. Not together with `cu_seqlens`.
- DTensors may be sharded along the batch or the heads, all alike, and are computed with part by part;
  `docs/semantics.md` has the conditions.
- Empty batches and lengths give empty results.
- `scale` multiplies the logits; None means `head_dim ** -0.5`.
- `lse` is the natural log-sum-exp of a row's logits, float32. A row that sees no key has output 0 and lse -inf.
- `loop_order`: "fsa" iterates over key blocks outside and queries inside, "nsa" the other way round, "tile" takes
  neighbouring queries together over the union of their blocks, "mixed" over those that many of them selected, and the
  rest as "fsa"; "auto" what a cost model predicts to be fastest. The result is the same up to rounding.
- Shapes, devices and options that do not fit raise ValueError, dtypes TypeError, before anything runs, and equally
  under `torch.compile`. What only the device knows, such as a block id out of range, is checked under
  `debug.validate(True)`.

Sources: NSA, "Native Sparse Attention", arXiv 2502.11089; FSA, "Flash Sparse Attention", arXiv 2508.18224.
"""

# mypy: disable-error-code="empty-body"

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from . import ops as ops  # registers torch.ops.fsa

__all__ = [
    "compressed_attention",
    "mean_compress",
    "nsa_attention",
    "select_blocks",
    "selected_attention",
    "sliding_window_attention",
]

_fsa = torch.ops.fsa
_Function = TypeVar("_Function", bound=Callable[..., object])
# A length that only the device knows is no hint: reading it would wait, and break a compiled graph.
_HINT = "None if isinstance({0}, Tensor) else {0}"


def _operator(declared: _Function) -> _Function:
    """The call of the operator that `declared` has the name, the arguments and the defaults of.

    Written out as source, argument by argument: handed on as `*args, **kwargs` they would cost every call more, and a
    wrong call would be refused in the dispatcher's words.
    """
    name, signature = declared.__name__, inspect.signature(declared)
    given = []
    for p in signature.parameters.values():
        value = _HINT.format(p.name) if p.name.startswith("max_seqlen") else p.name
        given.append(f"{p.name}={value}" if p.kind is p.KEYWORD_ONLY else value)
    source = f"def {name}{signature}:\n    return _fsa.{name}.default({', '.join(given)})"
    # In this file and at the declaration's line, which is where a traceback and a graph's stack traces point.
    at = "\n" * (declared.__code__.co_firstlineno - 1)
    made: dict[str, _Function] = {}
    exec(compile(at + source, __file__, "exec"), globals(), made)
    operator = made[name]
    functools.update_wrapper(operator, declared)
    return operator


@_operator
def nsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_cmp: Tensor | None = None,
    g_slc: Tensor | None = None,
    g_swa: Tensor | None = None,
    *,
    k_cmp: Tensor | None = None,
    v_cmp: Tensor | None = None,
    block_indices: Tensor | None = None,
    block_size: int = 64,
    num_selected: int = 16,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    init_blocks: int = 1,
    local_blocks: int = 2,
    window_size: int = 512,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    loop_order: str = "auto",
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
) -> Tensor:
    """Native Sparse Attention: `g_cmp * compressed + g_slc * selected + g_swa * sliding window` (NSA, equation 5).

    Differentiable in every floating input; the selection of blocks carries no gradient.

    Args:
        q: (batch, seq_len, num_q_heads, head_dim), bf16/fp16/fp32.
        k: (batch, seq_len_k, num_kv_heads, head_dim), dtype of q.
        v: (batch, seq_len_k, num_kv_heads, head_dim_v), dtype of q.
        g_cmp: (batch, seq_len, num_q_heads), any floating dtype, weight of the compressed branch, sigmoid already
            applied. None leaves the branch out of the sum; selection still uses its scores.
        g_slc: likewise for the selected branch. None means weight 1.
        g_swa: likewise for the sliding window. None leaves the branch out.
        k_cmp: (batch, num_compressed, num_kv_heads, head_dim), dtype of q: keys that the caller compressed (learned, or
            before rotary embedding), laid out as `mean_compress` returns them. None takes the mean of k.
        v_cmp: (batch, num_compressed, num_kv_heads, head_dim_v), likewise for the values. Goes with k_cmp.
        block_indices: (batch, seq_len, num_kv_heads, num_selected), int32: the blocks to attend to, as in
            `selected_attention`. None selects them by the scores of the compressed branch.
        block_size: tokens in a selected block, a power of two, at least 16.
        num_selected: blocks that a query selects, forced ones included; at least `init_blocks + local_blocks`.
        kernel_size: tokens in a compression window, a multiple of kernel_stride.
        kernel_stride: tokens from one window to the next; divides block_size.
        init_blocks: first blocks of the sequence, always selected.
        local_blocks: newest blocks, always selected, the query's own counted.
        window_size: keys the sliding window sees, the query's own counted; 0 leaves the branch out.
        scale, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, loop_order, seqused_k, leftpad_k: see the module.

    Returns:
        (batch, seq_len, num_q_heads, head_dim_v), contiguous, dtype of q.

    Raises:
        ValueError: a shape, device or option does not fit.
        TypeError: a dtype does not fit.
    """


@_operator
def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    *,
    block_size: int = 64,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    loop_order: str = "auto",
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Exact causal attention over the tokens of the blocks that each query selected (NSA, section 3.3.2).

    Args:
        q: (batch, seq_len, num_q_heads, head_dim), bf16/fp16/fp32.
        k: (batch, seq_len_k, num_kv_heads, head_dim), dtype of q.
        v: (batch, seq_len_k, num_kv_heads, head_dim_v), dtype of q.
        block_indices: (batch, seq_len, num_kv_heads, num_selected), int32: block `j` is tokens
            `[j * block_size, (j + 1) * block_size)` of the sequence. Any order, -1 anywhere for no block; an id may not
            repeat within a row. One that is out of range or in the future contributes nothing.
        block_size: tokens in a block, a power of two, at least 16.
        scale, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, loop_order, seqused_k, leftpad_k: see the module.

    Returns:
        out: (batch, seq_len, num_q_heads, head_dim_v), contiguous, dtype of q.
        lse: (batch, seq_len, num_q_heads), float32. Both are differentiable.

    Raises:
        ValueError: a shape, device or option does not fit.
        TypeError: a dtype does not fit.
    """


@_operator
def compressed_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    *,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    seq_len_k: int | None = None,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the compressed tokens whose whole window is in the past (NSA, section 3.3.1).

    Args:
        q: (batch, seq_len, num_q_heads, head_dim), bf16/fp16/fp32.
        k_cmp: (batch, num_compressed, num_kv_heads, head_dim), dtype of q, with
            `num_compressed = max(0, (seq_len_k - kernel_size) // kernel_stride + 1)`. Packed: `(1, total_len_k //
            kernel_stride, ...)`, the rows of sequence `i` starting at `cu_seqlens_k[i] // kernel_stride`.
        v_cmp: (batch, num_compressed, num_kv_heads, head_dim_v), dtype of q.
        kernel_size, kernel_stride: the windows that were compressed, in tokens.
        seq_len_k: length of the keys before compression (packed: their total length). None means seq_len.
        scale, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k, leftpad_k: see the module, in
            uncompressed tokens.

    Returns:
        out: (batch, seq_len, num_q_heads, head_dim_v), contiguous, dtype of q.
        lse: (batch, seq_len, num_q_heads), float32. Both are differentiable.

    Raises:
        ValueError: a shape, device or option does not fit.
        TypeError: a dtype does not fit.
    """


@_operator
def select_blocks(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor | None,
    *,
    block_size: int = 64,
    num_selected: int = 16,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    init_blocks: int = 1,
    local_blocks: int = 2,
    seq_len_k: int | None = None,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    pool: str = "overlap",
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
) -> Tensor:
    """The blocks with the highest scores, the forced ones first (NSA, equations 8 to 12). No gradient.

    A block's score is the sum of the compressed branch's probabilities over all query heads of the group and over the
    compressed tokens that overlap the block. Ties go to the lower block id.

    Args:
        q: (batch, seq_len, num_q_heads, head_dim), bf16/fp16/fp32.
        k_cmp: (batch, num_compressed, num_kv_heads, head_dim), dtype of q, as in `compressed_attention`.
        lse: (batch, seq_len, num_q_heads), float32, from `compressed_attention`; or from a coarser one, as in
            InfLLM-V2. None, with `pool="max"` only, scores by bare logits: a token's score is the sum of the group's
            scaled logits, and a block with nothing visible ranks behind all others.
        block_size: tokens in a block, a power of two, at least 16.
        num_selected: blocks to select, forced ones included; at least `init_blocks + local_blocks`.
        kernel_size, kernel_stride: the windows that were compressed, in tokens; kernel_stride divides block_size.
        init_blocks: first blocks of the sequence, always selected.
        local_blocks: newest blocks, always selected, the query's own counted.
        seq_len_k: length of the keys before compression (packed: their total length). None means seq_len.
        scale, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k, leftpad_k: see the module, in
            uncompressed tokens.
        pool: "overlap" adds up a block's compressed tokens, once for each stride that they share with it; "max" takes
            the largest of those that touch it.

    Returns:
        block_indices: (batch, seq_len, num_kv_heads, num_selected), int32, ascending, -1 filling the end where there
        are fewer blocks up to the query's own.

    Raises:
        ValueError: a shape, device or option does not fit.
        TypeError: a dtype does not fit.
    """


@_operator
def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window_size: int,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention over the query's own key and the `window_size - 1` before it (NSA, section 3.3.3).

    Args:
        q: (batch, seq_len, num_q_heads, head_dim), bf16/fp16/fp32.
        k: (batch, seq_len_k, num_kv_heads, head_dim), dtype of q.
        v: (batch, seq_len_k, num_kv_heads, head_dim_v), dtype of q.
        window_size: keys a query sees, at least 1.
        scale, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k, leftpad_k: see the module.

    Returns:
        out: (batch, seq_len, num_q_heads, head_dim_v), contiguous, dtype of q.
        lse: (batch, seq_len, num_q_heads), float32. Both are differentiable.

    Raises:
        ValueError: a shape, device or option does not fit.
        TypeError: a dtype does not fit.
    """


@_operator
def mean_compress(
    x: Tensor,
    *,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    cu_seqlens: Tensor | None = None,
    seqused: Tensor | None = None,
    leftpad: Tensor | None = None,
) -> Tensor:
    """The mean of each window of keys or values, the simplest compression of NSA's equation 7. Differentiable.

    Compressed token `i` covers tokens `[i * kernel_stride, i * kernel_stride + kernel_size)`.

    Args:
        x: (batch, seq_len, num_kv_heads, head_dim), bf16/fp16/fp32.
        kernel_size: tokens in a window, a multiple of kernel_stride.
        kernel_stride: tokens from one window to the next.
        cu_seqlens: (num_seqs + 1), int32, for packed sequences (batch 1); see the module.
        seqused, leftpad: (batch), int32, for padded batches: the end and the start of each batch row's tokens. The
            windows count from the start, and their means from row 0 on; rows that are none of a window are 0.

    Returns:
        (batch, max(0, (seq_len - kernel_size) // kernel_stride + 1), num_kv_heads, head_dim), dtype of x. Packed: (1,
        total_len // kernel_stride, num_kv_heads, head_dim), the rows of sequence `i` starting at `cu_seqlens[i] //
        kernel_stride`; rows that belong to no sequence are 0.

    Raises:
        ValueError: a shape, device or option does not fit.
        TypeError: a dtype does not fit.
    """
