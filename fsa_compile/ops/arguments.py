"""The declarative checker: says how each argument should look, and what is wrong, in the glossary's names.

A name stands for one size wherever it appears. Sizes may be symbolic: comparing two of them guards on the relation
that the operator needs anyway, and an unbacked one is taken on trust.
"""

from __future__ import annotations

import itertools
from typing import Any, TypeAlias

import torch
from torch import SymInt, Tensor

from .. import cost

__all__ = ["MAX_HEAD_DIM", "Call", "Size", "compressed_length", "packed_compressed_length"]

MAX_HEAD_DIM = 256
MIN_BLOCK_SIZE = 16
_AT_LEAST_ONE = ("num_q_heads", "num_kv_heads", "head_dim", "head_dim_v", "num_selected")
POOLS = ("overlap", "max")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

Size: TypeAlias = int | SymInt

Q = ("batch", "seq_len", "num_q_heads", "head_dim")
K = ("batch", "seq_len_k", "num_kv_heads", "head_dim")
V = ("batch", "seq_len_k", "num_kv_heads", "head_dim_v")
K_CMP = ("batch", "num_compressed", "num_kv_heads", "head_dim")
V_CMP = ("batch", "num_compressed", "num_kv_heads", "head_dim_v")
OUT = ("batch", "seq_len", "num_q_heads", "head_dim_v")
ROWS = ("batch", "seq_len", "num_q_heads")
BLOCKS = ("batch", "seq_len", "num_kv_heads", "num_selected")
X = ("batch", "seq_len", "num_kv_heads", "head_dim")
X_CMP = ("batch", "num_compressed", "num_kv_heads", "head_dim")
BOUNDS = ("num_seqs + 1",)
LENGTHS = ("batch",)


def _true(condition: Any) -> bool:
    """`bool(condition)`, but False where it hangs on an unbacked size."""
    if condition is True or condition is False:
        return condition
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return guard_or_false(condition)


def compressed_length(seq_len: Size, kernel_size: int, kernel_stride: int) -> Size:
    """Number of compressed tokens of one sequence, without a guard on its length."""
    length = seq_len // kernel_stride - (kernel_size // kernel_stride - 1)
    if kernel_size == kernel_stride:  # never negative
        return length
    return max(0, length) if isinstance(seq_len, int) else torch.sym_max(0, length)


def packed_compressed_length(total_len: Size, kernel_stride: int) -> Size:
    """Number of rows that hold the compressed tokens of packed sequences, padding included."""
    return total_len // kernel_stride


class Call:
    """The arguments of one call, checked one after another; remembers which size each dimension name stands for."""

    __slots__ = ("device", "dims", "dtype", "dtype_of", "op")

    def __init__(self, op: str) -> None:
        self.op = op
        self.dims: dict[str, Size] = {}
        self.dtype: torch.dtype | None = None
        self.dtype_of = ""
        self.device: torch.device | None = None

    def fail(self, message: str) -> ValueError:
        return ValueError(f"fsa::{self.op}: {message}")

    def _layout(self, layout: tuple[str, ...], dims: dict[str, Size]) -> str:
        return "[" + ", ".join(f"{d}={dims[d]}" if d in dims else d for d in layout) + "]"

    def _shaped(self, name: str, tensor: Tensor, layout: tuple[str, ...]) -> None:
        shape = tensor.shape
        if len(shape) != len(layout):
            raise self.fail(
                f"{name} has {len(shape)} dimensions, shape {tuple(shape)}, "
                f"but it should have {len(layout)}: {self._layout(layout, self.dims)}"
            )
        dims = self.dims
        before = len(dims)
        for dim, size in zip(layout, shape, strict=True):
            known = dims.get(dim)
            if known is None:
                dims[dim] = size
            elif known is not size and _true(known != size):
                named = dict(itertools.islice(dims.items(), before))
                raise self.fail(
                    f"{name} has shape {tuple(shape)}, but it should be {self._layout(layout, named)} "
                    f"({dim} is {size}, not {known})"
                )
        if self.device is None:
            self.device = tensor.device
        elif tensor.device != self.device:
            raise self.fail(
                f"{name} is on {tensor.device}, but it should be on {self.device}, where {self.dtype_of} is"
            )

    def data(self, name: str, tensor: Tensor | None, layout: tuple[str, ...]) -> None:
        """A tensor of the call's one dtype; the first fixes dtype and device."""
        if tensor is None:
            return
        dtype = tensor.dtype
        if self.dtype is None:
            if dtype not in _DTYPES:
                raise TypeError(f"fsa::{self.op}: {name} is {dtype}, but it should be bfloat16, float16 or float32")
            self.dtype, self.dtype_of = dtype, name
        elif dtype is not self.dtype:
            raise TypeError(
                f"fsa::{self.op}: {name} is {dtype}, but it should be {self.dtype}, the dtype of {self.dtype_of}"
            )
        self._shaped(name, tensor, layout)

    def typed(self, name: str, tensor: Tensor | None, layout: tuple[str, ...], dtype: torch.dtype) -> None:
        """A tensor of a dtype of its own."""
        if tensor is None:
            return
        if tensor.dtype is not dtype:
            raise TypeError(f"fsa::{self.op}: {name} is {tensor.dtype}, but it should be {dtype}")
        self._shaped(name, tensor, layout)

    def gate(self, name: str, tensor: Tensor | None) -> None:
        if tensor is None:
            return
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"fsa::{self.op}: {name} is {tensor.dtype}, but it should be a floating dtype")
        self._shaped(name, tensor, ROWS)

    def heads(self) -> None:
        """Grouped query heads, bounded head dims; neither may be none. Lengths and batch may."""
        dims = self.dims
        for name in _AT_LEAST_ONE:
            if name in dims and _true(dims[name] == 0):
                raise self.fail(f"{name} is 0, but it should be at least 1")
        num_q_heads: Any = dims.get("num_q_heads")
        num_kv_heads: Any = dims["num_kv_heads"]
        if num_q_heads is not None and _true(num_q_heads % num_kv_heads != 0):
            raise self.fail(
                f"num_q_heads is {num_q_heads} and num_kv_heads is {num_kv_heads}, "
                "but num_q_heads should be a multiple of num_kv_heads"
            )
        for name in ("head_dim", "head_dim_v"):
            if name in dims and _true(dims[name] > MAX_HEAD_DIM):
                raise self.fail(f"{name} is {dims[name]}, but it should be at most {MAX_HEAD_DIM}")

    def lengths_k(self, seq_len_k: Size | None) -> None:
        """`seq_len_k` of an operator that does not see the keys."""
        self.dims["seq_len_k"] = self.dims["seq_len"] if seq_len_k is None else seq_len_k

    def compressed(
        self, kernel_size: int, kernel_stride: int, cu_seqlens: Tensor | None, of: str = "seq_len_k"
    ) -> None:
        """Fixes how many compressed tokens there are, from the length of the keys."""
        length = self.dims[of]
        self.dims["num_compressed"] = (
            compressed_length(length, kernel_size, kernel_stride)
            if cu_seqlens is None
            else packed_compressed_length(length, kernel_stride)
        )

    def cu_seqlens(self, name: str, cu_seqlens: Tensor | None) -> None:
        if cu_seqlens is None:
            return
        self.typed(name, cu_seqlens, BOUNDS, torch.int32)
        if _true(self.dims["num_seqs + 1"] < 2):
            raise self.fail(
                f"{name} has shape {tuple(cu_seqlens.shape)}, but it should be [num_seqs + 1] with num_seqs >= 1"
            )
        if _true(self.dims["batch"] != 1):
            raise self.fail(
                f"{name} is given and batch is {self.dims['batch']}, "
                "but packed sequences should have batch 1: [1, total_len, ...]"
            )

    def padded(self, packed_by: str, cu_seqlens: Tensor | None, **lengths: Tensor | None) -> None:
        """Where each batch row's keys end and begin."""
        for name, tensor in lengths.items():
            if tensor is None:
                continue
            self.typed(name, tensor, LENGTHS, torch.int32)
            if cu_seqlens is not None:
                raise self.fail(
                    f"{name} is given with {packed_by}, but it is for padded batches; "
                    f"{packed_by} says where packed sequences begin and end"
                )

    def packed(
        self, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, max_q: Size | None, max_k: Size | None
    ) -> None:
        if cu_seqlens_q is None and cu_seqlens_k is not None:
            raise self.fail(
                "cu_seqlens_k is given without cu_seqlens_q, but packed keys should come with packed queries"
            )
        if max_q is not None and _true(max_q < 0):
            raise self.fail(f"max_seqlen_q is {max_q}, but it should not be negative")
        if max_k is not None and _true(max_k < 0):
            raise self.fail(f"max_seqlen_k is {max_k}, but it should not be negative")
        if cu_seqlens_q is None:
            return
        self.cu_seqlens("cu_seqlens_q", cu_seqlens_q)
        self.cu_seqlens("cu_seqlens_k", cu_seqlens_k)
        if cu_seqlens_k is None and _true(self.dims["seq_len_k"] != self.dims["seq_len"]):
            raise self.fail(
                "cu_seqlens_k is None, which means the queries' lengths, but it should be given, as there are "
                f"{self.dims['seq_len']} queries and {self.dims['seq_len_k']} keys"
            )

    def windows(self, kernel_size: int, kernel_stride: int) -> None:
        if kernel_stride < 1:
            raise self.fail(f"kernel_stride is {kernel_stride}, but it should be at least 1")
        if kernel_size < 1 or kernel_size % kernel_stride:
            raise self.fail(
                f"kernel_size is {kernel_size}, but it should be a positive multiple of kernel_stride={kernel_stride}"
            )

    def block_size(self, block_size: int, kernel_stride: int | None = None) -> None:
        if block_size < MIN_BLOCK_SIZE or block_size & (block_size - 1):
            raise self.fail(
                f"block_size is {block_size}, but it should be a power of two and at least {MIN_BLOCK_SIZE}"
            )
        if kernel_stride is not None and block_size % kernel_stride:
            raise self.fail(f"kernel_stride is {kernel_stride}, but it should divide block_size={block_size}")

    def selection(self, num_selected: int, init_blocks: int, local_blocks: int) -> None:
        for name, count in (("init_blocks", init_blocks), ("local_blocks", local_blocks)):
            if count < 0:
                raise self.fail(f"{name} is {count}, but it should not be negative")
        if num_selected < max(1, init_blocks + local_blocks):
            raise self.fail(
                f"num_selected is {num_selected}, but the forced blocks count towards it, so it should be at least "
                f"init_blocks + local_blocks = {init_blocks + local_blocks} and at least 1"
            )

    def loop_order(self, loop_order: str) -> None:
        if loop_order != "auto" and loop_order not in cost.LOOP_ORDERS:
            names = ", ".join(map(repr, ("auto", *cost.LOOP_ORDERS)))
            raise self.fail(f"loop_order is {loop_order!r}, but it should be one of {names}")

    def pool(self, pool: str, lse: Tensor | None) -> None:
        if pool not in POOLS:
            raise self.fail(f"pool is {pool!r}, but it should be one of {', '.join(map(repr, POOLS))}")
        if lse is None and pool != "max":
            raise self.fail(f"lse is None, but it should be given, as pool is {pool!r}: only 'max' pools bare logits")

    def window(self, window_size: int) -> None:
        if window_size < 1:
            raise self.fail(f"window_size is {window_size}, but it should be at least 1")

    def scale(self, scale: float | None) -> None:
        if scale is not None and not scale > 0:
            raise self.fail(
                f"scale is {scale}, but here it should be positive (the public operator puts the sign into q)"
            )

    def branches(self, window_size: int, k_cmp: Tensor | None, v_cmp: Tensor | None, g_cmp: Tensor | None) -> None:
        """What only the whole has: branches that may be left out."""
        if window_size < 0:
            raise self.fail(f"window_size is {window_size}, but it should be at least 1, or 0 for no window")
        if k_cmp is None and v_cmp is not None:
            raise self.fail("v_cmp is given without k_cmp, but compressed values should come with their keys")
        if k_cmp is not None and v_cmp is None and g_cmp is not None:
            raise self.fail("k_cmp and g_cmp are given without v_cmp, but the compressed branch should have values")
