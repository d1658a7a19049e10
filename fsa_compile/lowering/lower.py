"""Inductor lowerings of the loop-order operators.

Each kernel module in ``templates`` has a jinja shell beside it that calls the same device functions as the eager
kernel. The shell's main result goes through ``store_output``, so that what follows can be fused into it; the others are
buffers that it mutates. The remaining loop-order operators (lists and tables) are called as they are.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .. import templates as _templates
from ..templates import (
    merge_partials,
    reduce_tiles,
    selected_bwd_kv_outer,
    selected_bwd_query_outer,
    selected_fwd_kv_outer,
    selected_fwd_query_outer,
    sum_partials,
)
from ..templates.config import Meta, PartialShape, StaticSizes
from . import _inductor
from .benchmark_inputs import BenchmarkInputs, TileInputs

__all__ = ["fuses_epilogue", "register"]

log = logging.getLogger(__name__)

_SHELLS = Path(_templates.__file__).parent
_QUERY_TABLES = ("cu_seqlens_q_ptr", "cu_seqlens_k_ptr", "seq_ids_ptr")
_BLOCK_TABLES = ("cu_seqlens_k_ptr", "block_base_ptr", "block_seq_ids_ptr")
_LISTS = ("entries_ptr", "tile_list_ptr", "tile_offsets_ptr", "list_offsets_ptr")
# Read through their strides; every other input is read as dense.
_STRIDED = frozenset(("grad_out_ptr", "q_ptr", "k_ptr", "v_ptr"))


def fuses_epilogue(meta: Meta) -> bool:
    """Whether what follows a kernel is fused into its store, or left to a kernel of its own.

    As measured on an H200 (benchmarks/results, selected_h200.csv and selected_groups_h200.csv): always, but in a
    query-outer kernel. There the gates took up to 11 % longer fused than apart; at a group of 16, 1 % longer in one
    problem and 2 % less in another.
    """
    return "BLOCK_G" not in meta


# ---- one kernel as a template ----


def _grid(x: Any, y: Any, z: Any, meta: Meta, *, cdiv: Any) -> tuple[Any, Any, Any]:
    return x, y, z


def _row_grid(num_rows: Any, seq_len_k: Any, meta: Meta, *, cdiv: Any) -> tuple[Any, Any, Any]:
    return cdiv(num_rows, meta["BLOCK_R"]), 1, 1


@functools.cache
def _template(module: ModuleType, grid: Callable[..., tuple[Any, Any, Any]]) -> Any:
    name = module.__name__.rsplit(".", 1)[1]
    # A shell can name what the eager kernel can.
    functions = {f: x.fn.__module__ for f, x in vars(module).items() if hasattr(x, "fn") and not f.endswith("_kernel")}
    imports = [f"from {where} import {f}" for f, where in sorted(functions.items())]
    return _inductor.triton_template(f"fsa_{name}", (_SHELLS / f"{name}.jinja").read_text(), imports, grid)


def _configurations(module: ModuleType, default: Meta) -> list[Meta]:
    """The default alone, unless the user wants configurations measured; then the module's candidates too."""
    if not _inductor.max_autotune():
        return [default]
    candidates = getattr(module, "candidates", None)
    if candidates is not None:
        others = candidates(default)
    else:
        others = [default | {"num_warps": w, "num_stages": s} for w in (2, 4, 8) for s in (1, 2, 3)]
    return [default, *(one for one in others if one != default)]


def _call(
    module: ModuleType,
    meta: Meta,
    inputs: dict[str, Any],
    size: list[Any],
    dtype: torch.dtype,
    call_sizes: tuple[Any, ...],
    mutated: tuple[str, ...] = (),
    scale: float | None = None,
    bench: BenchmarkInputs | TileInputs | None = None,
) -> Any:
    """The template's main result, a dense tensor of ``size``; it also writes the inputs named in ``mutated``."""
    nodes = {
        name: x if name in mutated else _inductor.realize(x, contiguous=name not in _STRIDED)
        for name, x in inputs.items()
    }
    nodes = {name: _inductor.storage(x) for name, x in nodes.items()}
    device = next(iter(nodes.values())).get_device()
    layout = _inductor.contiguous_layout(device, dtype, size)
    template = _template(module, _row_grid if "BLOCK_R" in meta else _grid)
    # What follows in an epilogue divides the output's index, element by element: in 32 bits wherever they suffice.
    narrow = _inductor.statically_less(math.prod(size), 2**31)
    constants = {"INDEX": "tl.int32" if narrow else "tl.int64"}
    if scale is not None:
        constants["SCALE"] = repr(float(scale))
    choices: list[Any] = []
    for configuration in _configurations(module, meta):
        options = {**configuration, **constants}
        launch = {"num_warps": options.pop("num_warps", 4), "num_stages": options.pop("num_stages", 1)}
        _inductor.append_choice(
            template,
            choices,
            input_nodes=tuple(nodes.values()),
            layout=layout,
            mutated_inputs=[nodes[name] for name in mutated],
            call_sizes=list(call_sizes),
            **launch,
            **options,
        )
    generators = bench.generators(list(nodes)) if bench is not None else {}
    out = _inductor.autotune(template.name, choices, list(nodes.values()), layout, generators)
    if not fuses_epilogue(meta):
        _inductor.forbid_fusion(out)
    return out


# ---- sizes ----


def _static(x: Any, dim: int) -> int:
    return _inductor.static_int(x.get_size()[dim])


def _sizes(q: Any, k: Any, v: Any, block_indices: Any, block_size: int, packed: bool) -> StaticSizes:
    num_kv_heads = _static(k, 2)
    return StaticSizes(
        num_kv_heads=num_kv_heads,
        group=_static(q, 2) // num_kv_heads,
        head_dim=_static(q, 3),
        head_dim_v=_static(v, 3),
        num_selected=_static(block_indices, 3),
        block_size=block_size,
        itemsize=q.get_dtype().itemsize,
        packed=packed,
    )


def _partial_shape(partial: Any, block_size: int) -> PartialShape:
    num_kv_heads, num_selected, num_chunks, group, head_dim = (_static(partial, dim) for dim in range(2, 7))
    return PartialShape(num_kv_heads, num_selected, num_chunks, group, head_dim, block_size)


def _given(names: tuple[str, ...], tensors: tuple[Any, ...]) -> dict[str, Any]:
    return {name: x for name, x in zip(names, tensors, strict=True) if x is not None}


def _row_statistics(size: list[Any], device: torch.device) -> dict[str, Any]:
    """Where a forward leaves the softmax statistics of its rows."""
    return {name: _inductor.empty(size, torch.float32, device) for name in ("shift_ptr", "log_sum_ptr")}


# ---- the operators ----


def _selected_fwd_query_outer(
    q: Any, k: Any, v: Any, block_indices: Any, *tables: Any, block_size: int, scale: float
) -> tuple[Any, Any, Any]:
    sizes = _sizes(q, k, v, block_indices, block_size, tables[0] is not None)
    batch, seq_len = q.get_size()[:2]
    num_q_heads = sizes.num_kv_heads * sizes.group  # as a number: what follows is fused only into equal sizes
    statistics = _row_statistics([batch, seq_len, num_q_heads], q.get_device())
    inputs = {"q_ptr": q, "k_ptr": k, "v_ptr": v, "block_indices_ptr": block_indices, **statistics}
    out = _call(
        selected_fwd_query_outer,
        selected_fwd_query_outer.meta(sizes),
        {**inputs, **_given(_QUERY_TABLES, tables)},
        [batch, seq_len, num_q_heads, sizes.head_dim_v],
        q.get_dtype(),
        (batch * seq_len, sizes.num_kv_heads, 1),
        tuple(statistics),
        scale,
        BenchmarkInputs(block_indices, k.get_size()[1], block_size, tables[0], q.get_device()),
    )
    return out, *statistics.values()


def _selected_fwd_kv_outer(
    q: Any, k: Any, v: Any, block_indices: Any, *lists_and_tables: Any, block_size: int, scale: float
) -> tuple[Any, Any]:
    lists, tables = lists_and_tables[:4], lists_and_tables[4:]
    sizes = _sizes(q, k, v, block_indices, block_size, tables[0] is not None)
    shape = [*block_indices.get_size(), sizes.num_chunks, sizes.group]
    partial_stats = _inductor.empty([*shape, 2], torch.float32, q.get_device())
    inputs = {"q_ptr": q, "k_ptr": k, "v_ptr": v, "block_indices_ptr": block_indices, **_given(_LISTS, lists)}
    partial_out = _call(
        selected_fwd_kv_outer,
        selected_fwd_kv_outer.meta(sizes),
        {**inputs, "partial_stats_ptr": partial_stats, **_given(_QUERY_TABLES, tables)},
        [math.prod(shape), sizes.head_dim_v],
        q.get_dtype(),
        (lists[1].get_size()[0], sizes.num_chunks, 1),
        ("partial_stats_ptr",),
        scale,
        BenchmarkInputs(block_indices, k.get_size()[1], block_size, tables[0], q.get_device()),
    )
    return _inductor.view(partial_out, [*shape, sizes.head_dim_v]), partial_stats


def _merge_partials(
    partial_out: Any, partial_stats: Any, block_indices: Any, *tables: Any, seq_len_k: Any, block_size: int,
    scale: float,
) -> tuple[Any, Any, Any]:  # fmt: skip
    shape = _partial_shape(partial_out, block_size)
    batch, seq_len = block_indices.get_size()[:2]
    num_q_heads = shape.num_kv_heads * shape.group
    device = partial_out.get_device()
    statistics = _row_statistics([batch, seq_len, num_q_heads], device)
    inputs = {"partial_out_ptr": partial_out, "partial_stats_ptr": partial_stats, "block_indices_ptr": block_indices}
    out = _call(
        merge_partials,
        merge_partials.meta(shape, tables[0] is not None),
        {**inputs, **statistics, **_given(_QUERY_TABLES, tables)},
        [batch, seq_len, num_q_heads, shape.head_dim],
        partial_out.get_dtype(),
        (batch * seq_len * num_q_heads, seq_len_k),
        tuple(statistics),
        scale,
        BenchmarkInputs(block_indices, seq_len_k, block_size, tables[0], device),
    )
    return out, *statistics.values()


def _attention_delta(grad_out: Any, grad_log_sum: Any, out: Any) -> Any:
    """Plain pointwise operators and a sum, so that it fuses with the gates' backward, which reads the same tensors.

    Not in float32, where the order of the sum matters (see the kernel).
    """
    if out.get_dtype() == torch.float32:
        return _inductor.fallback(torch.ops.fsa._attention_delta.default)(grad_out, grad_log_sum, out)
    aten = torch.ops.aten
    product = _inductor.call(aten.mul.Tensor, _inductor.to_float(grad_out), _inductor.to_float(out))
    delta = _inductor.call(aten.sum.dim_IntList, product, [-1])
    return delta if grad_log_sum is None else _inductor.call(aten.sub.Tensor, delta, grad_log_sum)


def _selected_bwd_query_outer(
    grad_out: Any,
    q: Any,
    k: Any,
    v: Any,
    block_indices: Any,
    shift: Any,
    log_sum: Any,
    delta: Any,
    *tables: Any,
    block_size: int,
    scale: float,
) -> Any:
    sizes = _sizes(q, k, v, block_indices, block_size, tables[0] is not None)
    inputs = {"grad_out_ptr": grad_out, "q_ptr": q, "k_ptr": k, "v_ptr": v, "block_indices_ptr": block_indices}
    statistics = {"shift_ptr": shift, "log_sum_ptr": log_sum}
    batch, seq_len = q.get_size()[:2]
    return _call(
        selected_bwd_query_outer,
        selected_bwd_query_outer.meta(sizes),
        {**inputs, **statistics, "delta_ptr": delta, **_given(_QUERY_TABLES, tables)},
        list(q.get_size()),
        q.get_dtype(),
        (batch * seq_len, sizes.num_kv_heads, 1),
        (),
        scale,
        BenchmarkInputs(block_indices, k.get_size()[1], block_size, tables[0], q.get_device()),
    )


def _selected_bwd_kv_outer(
    grad_out: Any, q: Any, k: Any, v: Any, block_indices: Any, shift: Any, log_sum: Any, delta: Any,
    *lists_and_tables: Any, block_size: int, scale: float, with_dq: bool,
) -> tuple[Any, Any, Any]:  # fmt: skip
    lists, tables = lists_and_tables[:4], lists_and_tables[4:]
    sizes = _sizes(q, k, v, block_indices, block_size, tables[0] is not None)
    device = q.get_device()
    tile = [lists[1].get_size()[0], sizes.num_chunks, sizes.block_n]
    dv_tiles = _inductor.empty([*tile, sizes.head_dim_v], torch.float32, device)
    partial = [*block_indices.get_size(), sizes.num_chunks, sizes.group, sizes.head_dim] if with_dq else [0]
    dq_partial = _inductor.empty(partial, q.get_dtype(), device)
    inputs = {"grad_out_ptr": grad_out, "q_ptr": q, "k_ptr": k, "v_ptr": v, "block_indices_ptr": block_indices}
    inputs |= {"shift_ptr": shift, "log_sum_ptr": log_sum, "delta_ptr": delta, **_given(_LISTS, lists)}
    inputs["dv_tiles_ptr"] = dv_tiles
    mutated: tuple[str, ...] = ("dv_tiles_ptr",)
    if with_dq:
        inputs["dq_partial_ptr"] = dq_partial
        mutated += ("dq_partial_ptr",)
    dk_tiles = _call(
        selected_bwd_kv_outer,
        selected_bwd_kv_outer.meta(sizes, with_dq),
        {**inputs, **_given(_QUERY_TABLES, tables)},
        [math.prod(tile), sizes.head_dim],
        torch.float32,
        (tile[0], sizes.num_chunks, 1),
        mutated,
        scale,
        BenchmarkInputs(block_indices, k.get_size()[1], block_size, tables[0], device),
    )
    return _inductor.view(dk_tiles, [*tile, sizes.head_dim]), dv_tiles, dq_partial


def _sum_partials(partial: Any, block_indices: Any, *tables: Any, seq_len_k: Any, block_size: int) -> Any:
    shape = _partial_shape(partial, block_size)
    batch, seq_len = block_indices.get_size()[:2]
    num_q_heads = shape.num_kv_heads * shape.group
    return _call(
        sum_partials,
        sum_partials.meta(shape, tables[0] is not None),
        {"partial_ptr": partial, "block_indices_ptr": block_indices, **_given(_QUERY_TABLES, tables)},
        [batch, seq_len, num_q_heads, shape.head_dim],
        partial.get_dtype(),
        (batch * seq_len * num_q_heads, seq_len_k),
        (),
        None,
        BenchmarkInputs(block_indices, seq_len_k, block_size, tables[0], partial.get_device()),
    )


def _reduce_tiles(tiles: Any, tile_offsets: Any, like: Any, *tables: Any, block_size: int) -> Any:
    num_kv_heads = _static(like, 2)
    num_chunks, block_n, head_dim = (_static(tiles, dim) for dim in (1, 2, 3))
    num_blocks = _inductor.floor_divide(tile_offsets.get_size()[0] - 1, num_kv_heads)
    sized = torch.empty((0, num_chunks, block_n, head_dim), device="meta")
    return _call(
        reduce_tiles,
        reduce_tiles.meta(sized, num_kv_heads, block_size, tables[1] is not None),
        {"tiles_ptr": tiles, "tile_offsets_ptr": tile_offsets, **_given(_BLOCK_TABLES, tables)},
        list(like.get_size()),
        like.get_dtype(),
        (num_blocks, num_kv_heads, num_chunks),
        bench=TileInputs(tiles, like, tables[0], block_size),
    )


_LOWERINGS: dict[str, Callable[..., Any]] = {
    "_selected_fwd_query_outer": _selected_fwd_query_outer,
    "_selected_fwd_kv_outer": _selected_fwd_kv_outer,
    "_merge_partials": _merge_partials,
    "_attention_delta": _attention_delta,
    "_selected_bwd_query_outer": _selected_bwd_query_outer,
    "_selected_bwd_kv_outer": _selected_bwd_kv_outer,
    "_sum_partials": _sum_partials,
    "_reduce_tiles": _reduce_tiles,
}


def _or_as_it_is(op: torch._ops.OpOverload, lowering: Callable[..., Any]) -> Callable[..., Any]:
    """A lowering that calls the operator itself where the template cannot be made."""

    @functools.wraps(lowering)
    def lowered(*args: Any, **kwargs: Any) -> Any:
        if args[0].get_device().type == "cuda":
            try:
                return lowering(*args, **kwargs)
            except Exception as error:
                log.warning("%s is called as it is: %s: %s", op, type(error).__name__, error, exc_info=True)
        return _inductor.fallback(op)(*args, **kwargs)

    return lowered


@functools.cache
def register() -> None:
    """Register every lowering, once."""
    for name, lowering in _LOWERINGS.items():
        op = getattr(torch.ops.fsa, name).default
        _inductor.register_lowering(op, _or_as_it_is(op, lowering))
