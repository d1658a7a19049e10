"""DTensors: each device runs an operator on its part of the batch or of the heads, and none waits for another.

No operator looks from one batch row to another, nor from one key/value head and the query heads of its group to others.
So what a dimension is called says whether it may be sharded, and one rule serves every operator. Whatever would take
communication is refused in words rather than gathered in silence; only an upstream gradient, whose placement is not the
caller's to choose, is redistributed to where its result lay.

The rules are torch_dispatch's, not those of `torch.distributed.tensor.experimental.register_sharding`. That one never
redistributes a keyword (`seqused_k`), refuses plain tensors (`cu_seqlens_q`) before it asks for a strategy, and gathers
what it has none for.

Imported as soon as `torch.distributed.tensor` is, and not before: see `ops/__init__.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from .arguments import BOUNDS, LENGTHS
from .operators import OPERATORS, TENSORS, Operator
from .schema import LIB

__all__ = ["Plan", "plan"]

BATCH, HEADS = "the batch", "the heads"
_INDEPENDENT = {"batch": BATCH, "num_q_heads": HEADS, "num_kv_heads": HEADS}


@dataclass(frozen=True)
class Plan:
    """How one call is spread over a mesh.

    shards: for each dimension of the mesh BATCH or HEADS, which its devices share, or None where all do the same.
    """

    mesh: DeviceMesh
    shards: tuple[str | None, ...]

    def placements(self, layout: tuple[str, ...]) -> tuple[Placement, ...]:
        """Where a tensor of this layout has to lie."""
        return tuple(self._placement(layout, shard) for shard in self.shards)

    @staticmethod
    def _placement(layout: tuple[str, ...], shard: str | None) -> Placement:
        dims = {_INDEPENDENT[name]: dim for dim, name in enumerate(layout) if name in _INDEPENDENT}
        return Shard(dims[shard]) if shard in dims else Replicate()

    def local(self, x: Tensor, layout: tuple[str, ...]) -> Tensor:
        """This device's part of `x`; a plain tensor counts as replicated."""
        want = self.placements(layout)
        if not isinstance(x, DTensor):
            replicated = [Replicate()] * self.mesh.ndim
            if want == tuple(replicated):
                return x
            x = DTensor.from_local(x, self.mesh, replicated, run_check=False)
        if x.placements != want:
            # torch 2.11 has no rule for the `detach_` that autograd would do here
            x = cast(DTensor, x.detach()).redistribute(self.mesh, want)
        return x.to_local()

    def whole(self, part: Tensor, layout: tuple[str, ...], shape: tuple[int, ...]) -> DTensor:
        """The DTensor of this shape that `part` is this device's part of. It is contiguous, as all results are."""
        stride = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
        where = self.placements(layout)
        return DTensor.from_local(part, self.mesh, where, run_check=False, shape=torch.Size(shape), stride=stride)


def plan(name: str, given: Mapping[str, Any]) -> Plan | None:
    """How a call of `fsa::name` with these arguments is spread, None if no DTensor is among them.

    Raises:
        ValueError: a placement would take communication, or plain tensors and DTensors are mixed.
    """
    op = OPERATORS[name]
    placed = {name: x for name in op.layouts if isinstance(x := given.get(name), DTensor)}
    if not placed:
        return None
    first = next(iter(placed))
    mesh = placed[first].device_mesh
    _on_one_mesh(op, given, first, mesh)
    if len(placed) > 1:  # an upstream gradient follows the others
        placed = {name: x for name, x in placed.items() if not name.startswith("grad_")}
    made = Plan(mesh, tuple(_shard(op, placed, mesh, i) for i in range(mesh.ndim)))
    _sharded_evenly(op, given, made)
    _without_communication(op, placed, made)
    return made


def _fail(op: Operator, message: str) -> ValueError:
    return ValueError(f"fsa::{op.public}: {message}")


def _misplaced(op: Operator, name: str, how: str, over: str) -> ValueError:
    right = [f"Shard({dim}), {_INDEPENDENT[d]}" for dim, d in enumerate(op.layouts[name]) if d in _INDEPENDENT]
    return _fail(
        op,
        f"{name} is {how} over {over}, but an operator does not communicate, so it should be "
        f"{' or '.join(['Replicate()', *right])}: redistribute it first",
    )


def _over(mesh: DeviceMesh, i: int) -> str:
    names = mesh.mesh_dim_names
    return f"mesh dimension {i}" + (f" ({names[i]!r})" if names else "")


def _on_one_mesh(op: Operator, given: Mapping[str, Any], first: str, mesh: DeviceMesh) -> None:
    for name, layout in op.layouts.items():
        x = given.get(name)
        if isinstance(x, DTensor):
            if x.device_mesh != mesh:
                raise _fail(op, f"{name} is on {x.device_mesh}, but it should be on {mesh}, where {first} is")
        elif isinstance(x, Tensor) and layout not in (BOUNDS, LENGTHS):
            raise _fail(
                op,
                f"{name} is a plain tensor, but it should be a DTensor, as {first} is: see "
                "torch.distributed.tensor.distribute_tensor and DTensor.from_local",
            )


def _shard(op: Operator, placed: Mapping[str, DTensor], mesh: DeviceMesh, i: int) -> str | None:
    """What the devices of mesh dimension `i` share."""
    wanted: dict[str, str] = {}  # by the first argument that is sharded so
    for name, x in placed.items():
        placement, layout = x.placements[i], op.layouts[name]
        if placement.is_replicate():
            continue
        dim = layout[placement.dim % x.ndim] if type(placement) is Shard else None
        what = None if dim is None else _INDEPENDENT.get(dim)
        if what is not None:
            wanted.setdefault(what, name)
        elif not name.startswith("grad_"):  # that is made whole
            raise _misplaced(op, name, str(placement) if dim is None else f"sharded along {dim}", _over(mesh, i))
    if len(wanted) > 1:
        raise _fail(
            op,
            f"over {_over(mesh, i)} {wanted[BATCH]} is sharded along {BATCH} and {wanted[HEADS]} along {HEADS}, "
            "but they should agree: redistribute one of them first",
        )
    return next(iter(wanted), None)


def _sharded_evenly(op: Operator, given: Mapping[str, Any], plan: Plan) -> None:
    packed_by = next((name for name, x in op.layouts.items() if x == BOUNDS and given.get(name) is not None), None)
    if BATCH in plan.shards and packed_by is not None:
        raise _fail(
            op,
            f"{packed_by} is given and the batch is sharded, but packed sequences have a batch of 1: shard the heads",
        )
    over = math.prod(plan.mesh.size(i) for i, shard in enumerate(plan.shards) if shard == HEADS)
    name = next(name for name, layout in op.layouts.items() if "num_kv_heads" in layout)
    num_kv_heads = given[name].shape[op.layouts[name].index("num_kv_heads")]
    if num_kv_heads % over:
        raise _fail(
            op,
            f"the heads are sharded over {over} devices and num_kv_heads is {num_kv_heads}, but it should be a "
            "multiple of that, as a key/value head and its query heads stay together: replicate or shard the batch",
        )


def _without_communication(op: Operator, placed: Mapping[str, DTensor], plan: Plan) -> None:
    """Taking a part of what is replicated needs none, unless a later mesh dimension has taken its own already."""
    for name, x in placed.items():
        want = plan.placements(op.layouts[name])
        for i, (have, placement) in enumerate(zip(x.placements, want, strict=True)):
            if have.is_replicate() and not placement.is_replicate() and placement in x.placements[i + 1 :]:
                raise _fail(
                    op, f"{name} is placed as {x.placements}, but the others want {want}; redistribute it first"
                )


@dataclass(frozen=True)
class _Looks:
    """What a fake kernel looks at in a tensor, and what it returns: of the whole, over all devices."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def new_empty(self, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> _Looks:
        return _Looks(shape, dtype or self.dtype, self.device)


def _tuple(results: Any) -> tuple[Any, ...]:
    return results if isinstance(results, tuple) else (results,)


def _rule(op: Operator) -> Callable[..., Any]:
    """The operator on each device's part."""
    fake, layouts, result_layouts = op.fake(), op.layouts, [TENSORS[name].layout for name in op.results]

    def rule(cls: type, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
        given = {**dict(zip(op.inputs, args, strict=False)), **(kwargs or {})}
        tensors = {name: x for name, x in given.items() if isinstance(x, Tensor)}
        looks = _tuple(fake(**given | {name: _Looks(x.shape, x.dtype, x.device) for name, x in tensors.items()}))
        spread = plan(op.name, given)
        assert spread is not None
        with torch.no_grad():
            if spread.mesh.get_coordinate() is None:  # the mesh is others': DTensor wants something of the right dtype
                parts = tuple(torch.empty(0, dtype=x.dtype, device=x.device) for x in looks)
            else:
                parts = _tuple(func(**given | {name: spread.local(x, layouts[name]) for name, x in tensors.items()}))
            made = [spread.whole(*x) for x in zip(parts, result_layouts, (x.shape for x in looks), strict=True)]
        return made[0] if len(made) == 1 else tuple(made)

    return rule


def _composite(cls: type, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
    """In inference mode the dispatcher leaves it to us to take a composite apart."""
    return func.decompose(*args, **(kwargs or {}))


for _op in OPERATORS.values():
    _made = _composite if _op.is_composite else _rule(_op)
    torch.library.register_torch_dispatch(f"fsa::{_op.name}", DTensor, _made, lib=LIB)
