"""What every `fsa` operator accepts. The eager implementations and the fake kernels run these same checks.

ValueError is for shapes, devices and options, TypeError for dtypes; each names the operator and the argument, says
what it had and what it should be. Each check has its operator's argument names, kinds and defaults. The public
attention operators are made of their `_forward`, which is where their arguments are checked, under the public name.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .arguments import BLOCKS, K_CMP, ROWS, V_CMP, X_CMP, Call, K, Q, Size, V, X

__all__ = ["CHECKS"]


def _nsa_attention(
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
    max_seqlen_q: Size | None = None,
    max_seqlen_k: Size | None = None,
    loop_order: str = "auto",
) -> None:
    call = Call("nsa_attention")
    call.data("q", q, Q)
    call.data("k", k, K)
    call.data("v", v, V)
    call.heads()
    call.packed(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    call.block_size(block_size, kernel_stride if kernel_stride > 0 else None)
    call.windows(kernel_size, kernel_stride)
    if window_size < 0:
        raise call.fail(f"window_size is {window_size}, but it should be at least 1, or 0 for no window")
    call.gate("g_cmp", g_cmp)
    call.gate("g_slc", g_slc)
    call.gate("g_swa", g_swa)
    if k_cmp is None and v_cmp is not None:
        raise call.fail("v_cmp is given without k_cmp, but compressed values should come with their keys")
    if k_cmp is not None and v_cmp is None and g_cmp is not None:
        raise call.fail("k_cmp and g_cmp are given without v_cmp, but the compressed branch should have values")
    if k_cmp is not None:
        call.compressed(kernel_size, kernel_stride, cu_seqlens_q)
        call.data("k_cmp", k_cmp, K_CMP)
        call.data("v_cmp", v_cmp, V_CMP)
    if block_indices is None:
        call.selection(num_selected, init_blocks, local_blocks)
    else:
        call.typed("block_indices", block_indices, BLOCKS, torch.int32)
    call.loop_order(loop_order)


def _selected_call(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    block_size: int,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: Size | None,
    max_seqlen_k: Size | None,
    loop_order: str,
) -> Call:
    call = Call(op)
    call.data("q", q, Q)
    call.data("k", k, K)
    call.data("v", v, V)
    call.typed("block_indices", block_indices, BLOCKS, torch.int32)
    call.heads()
    call.packed(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    call.block_size(block_size)
    call.loop_order(loop_order)
    return call


def _selected_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    *,
    block_size: int = 64,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: Size | None = None,
    max_seqlen_k: Size | None = None,
    loop_order: str = "auto",
) -> None:
    call = _selected_call(
        "selected_attention", q, k, v, block_indices, block_size, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
        max_seqlen_k, loop_order,
    )  # fmt: skip
    call.scale(scale)


def _selected_attention_backward(
    grad_out: Tensor | None,
    grad_log_sum: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    out: Tensor,
    shift: Tensor,
    log_sum: Tensor,
    *,
    block_size: int = 64,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: Size | None = None,
    max_seqlen_k: Size | None = None,
    loop_order: str = "auto",
) -> None:
    call = _selected_call(
        "selected_attention_backward", q, k, v, block_indices, block_size, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
        max_seqlen_k, loop_order,
    )  # fmt: skip
    call.scale(scale)
    call.results(out, shift, log_sum)
    call.grads(grad_out, grad_log_sum)


def _compressed_call(
    op: str,
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor | None,
    kernel_size: int,
    kernel_stride: int,
    seq_len_k: Size | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: Size | None,
    max_seqlen_k: Size | None,
) -> Call:
    call = Call(op)
    call.windows(kernel_size, kernel_stride)
    call.data("q", q, Q)
    call.lengths_k(seq_len_k)
    call.compressed(kernel_size, kernel_stride, cu_seqlens_q)
    call.data("k_cmp", k_cmp, K_CMP)
    call.data("v_cmp", v_cmp, V_CMP)
    call.heads()
    call.packed(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return call


def _compressed_attention_forward(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    *,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    seq_len_k: Size | None = None,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: Size | None = None,
    max_seqlen_k: Size | None = None,
) -> None:
    call = _compressed_call(
        "compressed_attention", q, k_cmp, v_cmp, kernel_size, kernel_stride, seq_len_k, cu_seqlens_q, cu_seqlens_k,
        max_seqlen_q, max_seqlen_k,
    )  # fmt: skip
    call.scale(scale)


def _compressed_attention_backward(
    grad_out: Tensor | None,
    grad_log_sum: Tensor | None,
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    out: Tensor,
    shift: Tensor,
    log_sum: Tensor,
    *,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    seq_len_k: Size | None = None,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: Size | None = None,
    max_seqlen_k: Size | None = None,
) -> None:
    call = _compressed_call(
        "compressed_attention_backward", q, k_cmp, v_cmp, kernel_size, kernel_stride, seq_len_k, cu_seqlens_q,
        cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    )  # fmt: skip
    call.scale(scale)
    call.results(out, shift, log_sum)
    call.grads(grad_out, grad_log_sum)


def _select_blocks(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    *,
    block_size: int = 64,
    num_selected: int = 16,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    init_blocks: int = 1,
    local_blocks: int = 2,
    seq_len_k: Size | None = None,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: Size | None = None,
    max_seqlen_k: Size | None = None,
) -> None:
    call = _compressed_call(
        "select_blocks", q, k_cmp, None, kernel_size, kernel_stride, seq_len_k, cu_seqlens_q, cu_seqlens_k,
        max_seqlen_q, max_seqlen_k,
    )  # fmt: skip
    call.typed("lse", lse, ROWS, torch.float32)
    call.block_size(block_size, kernel_stride)
    call.selection(num_selected, init_blocks, local_blocks)


def _sliding_call(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: int,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: Size | None,
    max_seqlen_k: Size | None,
) -> Call:
    call = Call(op)
    call.data("q", q, Q)
    call.data("k", k, K)
    call.data("v", v, V)
    call.heads()
    call.packed(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if window_size < 1:
        raise call.fail(f"window_size is {window_size}, but it should be at least 1")
    return call


def _sliding_window_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window_size: int,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: Size | None = None,
    max_seqlen_k: Size | None = None,
) -> None:
    call = _sliding_call(
        "sliding_window_attention", q, k, v, window_size, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    )
    call.scale(scale)


def _sliding_window_attention_backward(
    grad_out: Tensor | None,
    grad_log_sum: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    shift: Tensor,
    log_sum: Tensor,
    *,
    window_size: int,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: Size | None = None,
    max_seqlen_k: Size | None = None,
) -> None:
    call = _sliding_call(
        "sliding_window_attention_backward", q, k, v, window_size, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
        max_seqlen_k,
    )  # fmt: skip
    call.scale(scale)
    call.results(out, shift, log_sum)
    call.grads(grad_out, grad_log_sum)


def _mean_compress(
    x: Tensor, *, kernel_size: int = 32, kernel_stride: int = 16, cu_seqlens: Tensor | None = None
) -> None:
    call = Call("mean_compress")
    call.windows(kernel_size, kernel_stride)
    call.data("x", x, X)
    call.heads()
    call.cu_seqlens("cu_seqlens", cu_seqlens)


def _mean_compress_backward(
    grad_out: Tensor, *, seq_len: Size, kernel_size: int = 32, kernel_stride: int = 16, cu_seqlens: Tensor | None = None
) -> None:
    call = Call("mean_compress_backward")
    call.windows(kernel_size, kernel_stride)
    call.dims["seq_len"] = seq_len
    call.compressed(kernel_size, kernel_stride, cu_seqlens, of="seq_len")
    call.data("grad_out", grad_out, X_CMP)
    call.heads()
    call.cu_seqlens("cu_seqlens", cu_seqlens)


CHECKS: dict[str, Callable[..., None]] = {
    check.__name__[1:]: check
    for check in (
        _nsa_attention,
        _selected_attention_forward,
        _selected_attention_backward,
        _compressed_attention_forward,
        _compressed_attention_backward,
        _select_blocks,
        _sliding_window_attention_forward,
        _sliding_window_attention_backward,
        _mean_compress,
        _mean_compress_backward,
    )
}
