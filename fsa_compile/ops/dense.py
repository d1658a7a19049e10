"""The stages other than the selected branch in chunked plain PyTorch, for any device.

Queries are taken a chunk at a time against the keys that the chunk can see, so memory is linear in the length and no
matrix has a side per query and one per key. Lengths and shapes alone decide what is launched: nothing is read back
from the device, and a CUDA graph can hold all of it. Packed sequences are told apart by masks computed on the device.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .schema import impl
from .visibility import Visibility, compressed_visibility, packed_windows, sliding_visibility, token_sequences

__all__ = [
    "compressed_attention_backward",
    "compressed_attention_forward",
    "mean_compress",
    "mean_compress_backward",
    "select_blocks",
    "sliding_window_attention_backward",
    "sliding_window_attention_forward",
]

_MAX_ROWS = 1024  # queries in a chunk
_SCORE_BYTES = {"cpu": 4 << 20}  # of one chunk's float32 scores: what stays in a CPU's cache, what keeps a GPU busy
_SCORE_BYTES_DEFAULT = 256 << 20


def compressed_attention_forward(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, *, kernel_size: int = 32, kernel_stride: int = 16, seq_len_k: int | None
    = None, scale: float | None = None, cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`fsa::compressed_attention_forward`: stage 2 of the specification, `(out, shift, log_sum)`."""
    visibility = compressed_visibility(
        q, k_cmp.shape[1], kernel_size, kernel_stride, seq_len_k, cu_seqlens_q, cu_seqlens_k, max_seqlen_k
    )
    return attend(q, k_cmp, v_cmp, visibility, scale)


def compressed_attention_backward(
    grad_out: Tensor | None, grad_log_sum: Tensor | None, q: Tensor, k_cmp: Tensor, v_cmp: Tensor, out: Tensor, shift:
    Tensor, log_sum: Tensor, *, kernel_size: int = 32, kernel_stride: int = 16, seq_len_k: int | None = None, scale:
    float | None = None, cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None, max_seqlen_q: int |
    None = None, max_seqlen_k: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`fsa::compressed_attention_backward`: the gradients of q, k_cmp and v_cmp."""
    visibility = compressed_visibility(
        q, k_cmp.shape[1], kernel_size, kernel_stride, seq_len_k, cu_seqlens_q, cu_seqlens_k, max_seqlen_k
    )
    return attend_backward(grad_out, grad_log_sum, q, k_cmp, v_cmp, out, shift, log_sum, visibility, scale)


def sliding_window_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, *, window_size: int, scale: float | None = None, cu_seqlens_q: Tensor | None =
    None, cu_seqlens_k: Tensor | None = None, max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`fsa::sliding_window_attention_forward`: causal attention over the last `window_size` keys, `(out, shift,
    log_sum)`.
    """
    return attend(q, k, v, sliding_visibility(q, k.shape[1], window_size, cu_seqlens_q, cu_seqlens_k), scale)


def sliding_window_attention_backward(
    grad_out: Tensor | None, grad_log_sum: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, shift: Tensor,
    log_sum: Tensor, *, window_size: int, scale: float | None = None, cu_seqlens_q: Tensor | None = None, cu_seqlens_k:
    Tensor | None = None, max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`fsa::sliding_window_attention_backward`: the gradients of q, k and v."""
    visibility = sliding_visibility(q, k.shape[1], window_size, cu_seqlens_q, cu_seqlens_k)
    return attend_backward(grad_out, grad_log_sum, q, k, v, out, shift, log_sum, visibility, scale)


def select_blocks(
    q: Tensor, k_cmp: Tensor, lse: Tensor, *, block_size: int = 64, num_selected: int = 16, kernel_size: int = 32,
    kernel_stride: int = 16, init_blocks: int = 1, local_blocks: int = 2, seq_len_k: int | None = None, scale: float |
    None = None, cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None, max_seqlen_q: int | None =
    None, max_seqlen_k: int | None = None,
) -> Tensor:  # fmt: skip
    """`fsa::select_blocks`: stage 3 of the specification, [B, T, HK, num_selected] int32."""
    batch, seq_len, _, head_dim = q.shape
    num_compressed, num_kv_heads = k_cmp.shape[1:3]
    scale = head_dim**-0.5 if scale is None else scale
    visibility = compressed_visibility(
        q, num_compressed, kernel_size, kernel_stride, seq_len_k, cu_seqlens_q, cu_seqlens_k, max_seqlen_k
    )
    length = seq_len if seq_len_k is None else seq_len_k
    if cu_seqlens_q is not None and max_seqlen_k is not None:
        length = min(length, max_seqlen_k)
    num_blocks = -(-length // block_size)
    first = None  # the row of k_cmp that a packed query's block 0 starts at
    if cu_seqlens_q is not None:
        cu_seqlens = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        first = (cu_seqlens[:-1] // kernel_stride)[visibility.q_sequence].long()
    k_cmp = _by_head(k_cmp)
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # a row that sees nothing: exp(s - inf) = 0
    chosen = torch.empty(batch, seq_len, num_kv_heads, num_selected, dtype=torch.int32, device=q.device)
    for start, stop, lo, hi in _chunks(visibility, q):
        rows = slice(start, stop)
        blocks = num_blocks if first is not None else min(num_blocks, (visibility.offset + stop - 1) // block_size + 1)
        weights = q.new_zeros(batch, num_kv_heads, stop - start, 0, dtype=torch.float32)
        if hi > lo:
            scores = _bmm(_by_group(q[:, rows], num_kv_heads), k_cmp[:, lo:hi].transpose(1, 2)).mul_(scale)
            scores = scores.view(batch, num_kv_heads, stop - start, -1, hi - lo)
            scores.sub_(lse[:, rows].unflatten(2, (num_kv_heads, -1)).transpose(1, 2)[..., None]).exp_()
            # masked after the exponential: of a hidden key that may be inf, which masked_fill_ drops
            visibility.hide_(scores, rows, lo, hi, 0.0)
            weights = scores.sum(3)
        score = _block_scores(
            weights, blocks, block_size // kernel_stride, kernel_size // kernel_stride, first, rows, lo
        )
        current = (visibility.q_position[rows] // block_size)[:, None]
        chosen[:, rows] = _top_blocks(score, current, num_selected, init_blocks, local_blocks).transpose(1, 2)
    return chosen


def _block_scores(
    weights: Tensor, num_blocks: int, steps: int, overlap: int, first: Tensor | None, rows: slice, lo: int
) -> Tensor:
    """Sums group probabilities over the compressed tokens that touch each block.

    weights: [B, HK, rows, n], of the compressed tokens from `lo` on; `steps` tokens start in a block and `overlap`
    touch a token's stride. Returns [B, HK, rows, num_blocks].
    """
    count = weights.shape[-1]
    if first is None:
        span = steps * num_blocks
        weights = F.pad(weights, (overlap - 1, max(0, span - count)))
        boxes = weights[..., :span]
        for shift in range(1, overlap):
            boxes = boxes + weights[..., shift : span + shift]
        return boxes.unflatten(-1, (num_blocks, steps)).sum(-1)
    span = count + overlap  # scores at every compressed token, of which each query then takes those at its own blocks
    # the tokens of other sequences are zeros, which add nothing
    weights = F.pad(weights, (overlap - 1, steps + overlap))
    boxes = functools.reduce(torch.add, (weights[..., n : n + span + steps - 1] for n in range(overlap)))
    score = functools.reduce(torch.add, (boxes[..., m : m + span] for m in range(steps)))
    block = torch.arange(num_blocks, device=weights.device)
    column = first[rows, None] - lo + steps * block  # [rows, num_blocks]
    inside = column < span
    column = column.clamp(0, span - 1).expand(*score.shape[:2], -1, -1)
    return score.gather(-1, column).masked_fill_(~inside, 0)


def _top_blocks(score: Tensor, current: Tensor, num_selected: int, init_blocks: int, local_blocks: int) -> Tensor:
    """[B, HK, rows, num_blocks] scores, [rows, 1] current block -> [B, HK, rows, num_selected] ids, ascending, -1 at
    the end.

    A block's key is its score's bits above its negated id. Scores are not negative, so that orders as score and then
    id do, and as no two keys are equal, top-k, which promises nothing for ties, has one answer.
    """
    num_blocks = score.shape[-1]
    block = torch.arange(num_blocks, device=score.device)
    low = (1 << 31) - 1
    key = score.view(torch.int32).long().masked_fill_((block < init_blocks) | (block > current - local_blocks), low)
    key = key.bitwise_left_shift_(32).add_(low - block).masked_fill_(block > current, -1)
    key = key.topk(min(num_selected, num_blocks), dim=-1).values
    ids = low - key.bitwise_and(low)
    ids = ids.masked_fill_(key < 0, low).sort(-1).values
    ids = ids.masked_fill_(ids == low, -1).to(torch.int32)
    return F.pad(ids, (0, num_selected - ids.shape[-1]), value=-1)


def attend(
    q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax attention over the visible keys. q: [B, T, HQ, D], k: [B, N, HK, D], v: [B, N, HK, DV] -> out [B, T, HQ,
    DV], shift (the highest score before scaling) and log_sum [B, T, HQ] f32.
    """
    batch, seq_len, num_q_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    scale = head_dim**-0.5 if scale is None else scale
    out = q.new_empty(batch, seq_len, num_q_heads, v.shape[3])
    shift, log_sum = (torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) for _ in range(2))
    k, v = _by_head(k), _by_head(v)
    for start, stop, lo, hi in _chunks(visibility, q):
        rows = slice(start, stop)
        if hi <= lo:
            out[:, rows], shift[:, rows], log_sum[:, rows] = 0, 0, -torch.inf
            continue
        p = _bmm(_by_group(q[:, rows], num_kv_heads), k[:, lo:hi].transpose(1, 2))
        visibility.hide_(p.view(batch, num_kv_heads, stop - start, -1, hi - lo), rows, lo, hi, -torch.inf)
        highest = p.amax(-1, keepdim=True)
        highest.masked_fill_(highest == -torch.inf, 0)  # a row that sees nothing
        total = p.sub_(highest).mul_(scale).exp_().sum(-1, keepdim=True)
        o = _bmm(p.to(v.dtype), v[:, lo:hi]).div_(total.masked_fill(total == 0, 1))
        out[:, rows] = _by_token(o, batch, stop - start)
        shift[:, rows] = _by_token(highest, batch, stop - start)[..., 0]
        log_sum[:, rows] = _by_token(total.log_(), batch, stop - start)[..., 0]
    return out, shift, log_sum


def attend_backward(
    grad_out: Tensor | None, grad_log_sum: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, shift: Tensor,
    log_sum: Tensor, visibility: Visibility, scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of `attend`, each with the shape and dtype of its input."""
    batch, _, _, head_dim = q.shape
    num_kv_heads = k.shape[2]
    scale = head_dim**-0.5 if scale is None else scale
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    nothing = log_sum == -torch.inf
    log_sum = log_sum.masked_fill(nothing, torch.inf)  # a row that sees nothing: exp(s - inf) = 0
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dtypes = k.dtype, v.dtype
    k, v = _by_head(k), _by_head(v)
    dk = torch.zeros(k.shape, dtype=torch.float32, device=q.device)
    dv = torch.zeros(v.shape, dtype=torch.float32, device=q.device)
    for start, stop, lo, hi in _chunks(visibility, q):
        rows = slice(start, stop)
        if hi <= lo:
            dq[:, rows] = 0
            continue
        q_rows, do = _by_group(q[:, rows], num_kv_heads), _by_group(grad_out[:, rows], num_kv_heads)
        # the very product of the forward: with scores rounded otherwise, p of large logits would not add up to 1
        p = (
            _bmm(q_rows, k[:, lo:hi].transpose(1, 2))
            .sub_(_by_group(shift[:, rows, :, None], num_kv_heads))
            .mul_(scale)
            .sub_(_by_group(log_sum[:, rows, :, None], num_kv_heads))
            .exp_()
        )
        visibility.hide_(p.view(batch, num_kv_heads, stop - start, -1, hi - lo), rows, lo, hi, 0.0)
        dv[:, lo:hi] += _bmm(p.to(do.dtype).transpose(1, 2), do)
        # takes the mean of dP out of this dP: where p is nearly 1 the two cancel, to the last bit
        ds = torch._softmax_backward_data(_bmm(do, v[:, lo:hi].transpose(1, 2)), p, -1, torch.float32)
        if grad_log_sum is not None:
            grad = grad_log_sum[:, rows].masked_fill(nothing[:, rows], 0)
            ds.addcmul_(p, _by_group(grad[..., None], num_kv_heads))
        ds = ds.mul_(scale).to(k.dtype)
        dq[:, rows] = _by_token(_bmm(ds, k[:, lo:hi]), batch, stop - start)
        dk[:, lo:hi] += _bmm(ds.transpose(1, 2), q_rows)
    return (
        dq,
        dk.unflatten(0, (batch, num_kv_heads)).transpose(1, 2).to(dtypes[0]).contiguous(),
        dv.unflatten(0, (batch, num_kv_heads)).transpose(1, 2).to(dtypes[1]).contiguous(),
    )


def _chunks(visibility: Visibility, q: Tensor) -> Iterator[tuple[int, int, int, int]]:
    """Cuts the queries so that a chunk's scores fit the budget: (start, stop) of the queries, (lo, hi) of the keys
    they can see.
    """
    batch, seq_len, num_q_heads, _ = q.shape
    budget = _SCORE_BYTES.get(q.device.type, _SCORE_BYTES_DEFAULT) // (4 * batch * num_q_heads)
    most = _MAX_ROWS if visibility.window is None else min(_MAX_ROWS, max(64, visibility.window // 2))
    start = 0
    while start < seq_len:
        stop = min(start + most, seq_len)
        lo, hi = visibility.keys(start, stop)
        stop = min(stop, start + max(1, budget // max(1, hi - lo)))
        yield start, stop, *visibility.keys(start, stop)
        start = stop


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    """Batched product of operands of one dtype, accumulated and returned in float32."""
    if a.dtype == torch.float32:
        return torch.bmm(a, b)
    return torch.bmm(a, b, out_dtype=torch.float32)


def _operand(x: Tensor) -> Tensor:
    """`x` in the dtype that products take it in: a CPU has no product of 16-bit operands that returns float32."""
    return x.float() if x.device.type == "cpu" else x


def _by_head(x: Tensor) -> Tensor:
    """[B, N, HK, D] -> contiguous [B * HK, N, D]."""
    return _operand(x).transpose(1, 2).flatten(0, 1).contiguous()


def _by_group(x: Tensor, num_kv_heads: int) -> Tensor:
    """[B, rows, HQ, D] -> [B * HK, rows * G, D]: all the heads of a group against one matrix of keys."""
    x = _operand(x).unflatten(2, (num_kv_heads, -1)).transpose(1, 2)  # [B, HK, rows, G, D]
    return x.reshape(x.shape[0] * num_kv_heads, -1, x.shape[-1])


def _by_token(x: Tensor, batch: int, rows: int) -> Tensor:
    """The inverse of `_by_group`."""
    x = x.view(batch, -1, rows, x.shape[1] // rows, x.shape[2])  # [B, HK, rows, G, D]
    return x.transpose(1, 2).flatten(2, 3)


def mean_compress(
    x: Tensor, *, kernel_size: int = 32, kernel_stride: int = 16, cu_seqlens: Tensor | None = None
) -> Tensor:
    """`fsa::mean_compress`: the mean of each window, [B, NC, H, D]; packed [1, T // kernel_stride, H, D]."""
    batch, seq_len, heads, head_dim = x.shape
    if cu_seqlens is None:
        overlap = kernel_size // kernel_stride
        count = max(0, (seq_len - kernel_size) // kernel_stride + 1)
        if count == 0:
            return x.new_empty(batch, 0, heads, head_dim)
        steps = (
            x[:, : (count + overlap - 1) * kernel_stride].unflatten(1, (-1, kernel_stride)).sum(2, dtype=torch.float32)
        )
        total = steps[:, :count]
        for shift in range(1, overlap):
            total = total + steps[:, shift : shift + count]
        return (total / kernel_size).to(x.dtype).contiguous()
    sequence, window, inside = packed_windows(cu_seqlens, seq_len // kernel_stride, kernel_size, kernel_stride)
    out = x.new_empty(1, seq_len // kernel_stride, heads, head_dim)
    token = cu_seqlens[sequence] + window * kernel_stride
    token = token[:, None] + torch.arange(kernel_size, device=x.device)
    token = token.masked_fill(~inside[:, None], 0)
    step = max(1, (64 << 20) // (4 * kernel_size * heads * head_dim))
    for start in range(0, out.shape[1], step):
        rows = slice(start, start + step)
        part = x[0].index_select(0, token[rows].flatten()).unflatten(0, (-1, kernel_size))
        part = part.sum(1, dtype=torch.float32) / kernel_size
        out[0, rows] = part.masked_fill(~inside[rows, None, None], 0)
    return out


def mean_compress_backward(
    grad_out: Tensor, *, seq_len: int, kernel_size: int = 32, kernel_stride: int = 16, cu_seqlens: Tensor | None = None
) -> Tensor:
    """`fsa::mean_compress_backward`: each token gets the gradients of its windows, divided by their size."""
    batch, count, heads, head_dim = grad_out.shape
    overlap = kernel_size // kernel_stride
    if cu_seqlens is None:
        # stride step s lies in the windows s - overlap + 1 ... s
        steps = torch.zeros(
            batch, -(-seq_len // kernel_stride), heads, head_dim, dtype=torch.float32, device=grad_out.device
        )
        if count > 0:
            for shift in range(overlap):
                steps[:, shift : shift + count] += grad_out
        steps = (steps / kernel_size).to(grad_out.dtype)
        return steps.repeat_interleave(kernel_stride, 1)[:, :seq_len].contiguous()
    if count == 0:
        return grad_out.new_zeros(1, seq_len, heads, head_dim)
    sequence, position = token_sequences(cu_seqlens, seq_len)
    length = (cu_seqlens[1:] - cu_seqlens[:-1])[sequence]
    windows = (length - kernel_size).div(kernel_stride, rounding_mode="floor") + 1  # below 1: none
    total = torch.zeros(seq_len, heads, head_dim, dtype=torch.float32, device=grad_out.device)
    for shift in range(overlap):
        window = position // kernel_stride - shift
        inside = (window >= 0) & (window < windows)
        row = (cu_seqlens[sequence] // kernel_stride + window).masked_fill(~inside, 0)
        total += grad_out[0].index_select(0, row).masked_fill(~inside[:, None, None], 0)
    return (total / kernel_size).to(grad_out.dtype)[None]


for _fn in (
    compressed_attention_forward, compressed_attention_backward, select_blocks, sliding_window_attention_forward,
    sliding_window_attention_backward,
):  # fmt: skip
    impl(_fn.__name__, _fn, "CUDA")
for _fn in (mean_compress, mean_compress_backward):  # type: ignore[assignment]
    impl(_fn.__name__, _fn, "CPU", "CUDA")
