"""Checks of values that only the device knows. They wait for the device, so they run only when asked for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["check_values", "is_validating", "validate"]

_validating = os.environ.get("FSA_COMPILE_VALIDATE", "0").lower() not in ("", "0", "false", "off")


def validate(on: bool = True) -> None:
    """Switch the checks of values on or off (off after import, unless the environment has `FSA_COMPILE_VALIDATE=1`).

    While on, every eager `fsa` operator reads its index tensors back to the host and raises ValueError for a block id
    that is out of range, in the future or repeated within a row, for `cu_seqlens` that decrease or lie outside the rows
    there are, and for `seqused_k` and `leftpad_k` out of range. Each check waits for the device, and none runs inside
    compiled code that has replaced the operator by kernels.
    """
    global _validating
    _validating = bool(on)


def is_validating() -> bool:
    """Whether the checks of values run."""
    return _validating


def check_values(op: str, arguments: Mapping[str, Any]) -> None:
    """Raise ValueError for the first wrong value among `arguments`, those of one call of `fsa::op` by name.

    Understands block_indices, cu_seqlens, cu_seqlens_q, cu_seqlens_k, seqused(_k) and leftpad(_k), with the lengths
    that bound them.
    """
    seq_len, seq_len_k = _lengths(arguments)
    _bounds(op, "cu_seqlens", arguments.get("cu_seqlens"), seq_len)
    cu_seqlens = _bounds(op, "cu_seqlens_q", arguments.get("cu_seqlens_q"), seq_len)
    cu_seqlens_k = _bounds(op, "cu_seqlens_k", arguments.get("cu_seqlens_k"), seq_len_k) or cu_seqlens
    lengths = _padding(op, arguments, seq_len_k)
    block_indices = arguments.get("block_indices")
    if block_indices is None:
        return
    if lengths is not None:
        for b, length in enumerate(lengths):
            _check_blocks(op, block_indices[b : b + 1].cpu().long(), length, arguments["block_size"], 0, b)
        return
    if cu_seqlens is None or cu_seqlens_k is None:
        cu_seqlens, cu_seqlens_k = [0, seq_len], [0, seq_len_k]
    for i in range(len(cu_seqlens) - 1):
        rows = block_indices[:, cu_seqlens[i] : cu_seqlens[i + 1]].cpu().long()
        _check_blocks(op, rows, cu_seqlens_k[i + 1] - cu_seqlens_k[i], arguments["block_size"], cu_seqlens[i])


def _padding(op: str, arguments: Mapping[str, Any], seq_len_k: int) -> list[int] | None:
    """How many keys each batch row has, None if they are not told."""
    suffix = "" if "seqused" in arguments else "_k"
    used, left = arguments.get(f"seqused{suffix}"), arguments.get(f"leftpad{suffix}")
    if used is None and left is None:
        return None
    ends = [seq_len_k] * len(left) if used is None else used.tolist()  # type: ignore[arg-type]
    starts = [0] * len(ends) if left is None else left.tolist()
    for b, (start, end) in enumerate(zip(starts, ends, strict=True)):
        if not 0 <= end <= seq_len_k:
            raise ValueError(
                f"fsa::{op}: seqused{suffix}[{b}] is {end}, but it should be from 0 to {seq_len_k}, the rows of keys"
            )
        if not 0 <= start <= end:
            raise ValueError(
                f"fsa::{op}: leftpad{suffix}[{b}] is {start}, but it should be from 0 to {end}, where the keys end"
            )
    return [end - start for start, end in zip(starts, ends, strict=True)]


def _lengths(arguments: Mapping[str, Any]) -> tuple[int, int]:
    """Lengths of the queries and of the keys; of both, that of the one sequence dimension there is in a compression."""
    if "seq_len" in arguments:
        return arguments["seq_len"], arguments["seq_len"]
    if "x" in arguments:
        return arguments["x"].shape[1], arguments["x"].shape[1]
    seq_len = arguments["q"].shape[1]
    if "k" in arguments:
        return seq_len, arguments["k"].shape[1]
    seq_len_k = arguments.get("seq_len_k")
    return seq_len, seq_len if seq_len_k is None else seq_len_k


def _bounds(op: str, name: str, cu_seqlens: Tensor | None, total: int) -> list[int] | None:
    if cu_seqlens is None:
        return None
    bounds = cu_seqlens.tolist()
    if bounds[0] < 0:
        raise ValueError(f"fsa::{op}: {name} starts at {bounds[0]}, but it should not be negative")
    for i in range(len(bounds) - 1):
        if bounds[i] > bounds[i + 1]:
            raise ValueError(
                f"fsa::{op}: {name} decreases from {bounds[i]} to {bounds[i + 1]} at index {i + 1}, but it should not"
            )
    if bounds[-1] > total:
        raise ValueError(f"fsa::{op}: {name} ends at {bounds[-1]}, but it should end within the {total} rows there are")
    return bounds


def _check_blocks(op: str, rows: Tensor, seq_len_k: int, block_size: int, first_row: int, first_batch: int = 0) -> None:
    """`rows`: [B, T, HK, S], block ids of one sequence, whose first query is that row of the whole tensor."""
    num_blocks = -(-seq_len_k // block_size)
    position = torch.arange(seq_len_k - rows.shape[1], seq_len_k)[:, None, None]
    ordered = rows.sort(-1).values
    repeated = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] != -1)
    for wrong, values, should in (
        ((rows < -1) | (rows >= num_blocks), rows, f"be -1 or from 0 to {num_blocks - 1}, the last block"),
        (rows > position // block_size, rows, "not lie in the future of its query"),
        (repeated, ordered[..., 1:], "not repeat within a row"),
    ):
        if wrong.any():
            b, t, h, s = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"fsa::{op}: block_indices[{first_batch + b}, {first_row + t}, {h}] holds block id "
                f"{int(values[b, t, h, s])}, but a block id should {should}"
            )
