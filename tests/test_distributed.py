"""DTensors, on two processes: the bits of one process, no collective, and errors in words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch.distributed as dist
from two_processes import TwoProcesses

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("torch is built without gloo", allow_module_level=True)

import dtensor_cases as cases
from dtensor_cases import BATCH, HEADS
from parallel_module import case_parallelized
from torch.distributed.tensor import Partial, Replicate, Shard

from fsa_compile.testing.calls import STAGES


@pytest.fixture(scope="module")
def both() -> Iterator[TwoProcesses]:
    processes = TwoProcesses()
    yield processes
    processes.stop()


PLACED = [
    ("batch", Replicate()), ("batch", BATCH), ("batch", HEADS), ("padded", BATCH), ("padded", HEADS),
    ("uneven", BATCH), ("one_row", BATCH), ("packed", HEADS), ("packed_more_keys", HEADS), ("packed", Replicate()),
]  # fmt: skip


def placed_id(x: Any) -> str:
    return {Replicate(): "replicated", BATCH: "batch", HEADS: "heads"}.get(x) or str(x)


@pytest.mark.parametrize("name, placement", PLACED, ids=placed_id)
def test_the_bits_of_one_process(both: TwoProcesses, name: str, placement: Any) -> None:
    """Every stage and the whole, forward and backward, without a collective."""
    both(cases.case_stages, name, placement)


@pytest.mark.parametrize("name, placement", PLACED, ids=placed_id)
def test_selection_and_inference_mode(both: TwoProcesses, name: str, placement: Any) -> None:
    if name != "padded":
        both(cases.case_selection, name, placement)
    both(cases.case_inference_mode, name, placement)


def test_lengths_as_dtensors(both: TwoProcesses) -> None:
    both(cases.case_lengths_as_dtensors)


@pytest.mark.parametrize("sharded", [0, 1, 2])
def test_replicated_beside_sharded(both: TwoProcesses, sharded: int) -> None:
    both(cases.case_some_replicated, sharded)


@pytest.mark.parametrize("name", [name for name in STAGES if name not in ("mean_compress", "nsa_attention")])
def test_a_missing_upstream_gradient(both: TwoProcesses, name: str) -> None:
    both(cases.case_one_upstream_gradient, name)


@pytest.mark.parametrize("placement, collectives", [(HEADS, 0), (Replicate(), 0), (Shard(1), 1), (Partial(), 1)])
def test_a_gradient_that_lies_elsewhere(both: TwoProcesses, placement: Any, collectives: int) -> None:
    both(cases.case_misplaced_gradient, placement, collectives)


@pytest.mark.parametrize("placement", [HEADS, Replicate(), Shard(1), Partial()])
def test_the_gradient_of_a_mean(both: TwoProcesses, placement: Any) -> None:
    both(cases.case_gradient_of_the_mean, placement)


def test_a_mesh_of_two_dimensions(both: TwoProcesses) -> None:
    both(cases.case_two_mesh_dimensions)


def test_a_process_outside_the_mesh(both: TwoProcesses) -> None:
    both(cases.case_a_mesh_of_others)


@pytest.mark.parametrize("inference", [False, True], ids=["", "inference_mode"])
@pytest.mark.parametrize("name", cases.REFUSED)
def test_what_needs_communication_is_refused(both: TwoProcesses, name: str, inference: bool) -> None:
    both(cases.case_refused, name, inference)


def test_refused_while_compiling(both: TwoProcesses) -> None:
    both(cases.case_refused_while_compiling)


def test_compiled(both: TwoProcesses) -> None:
    both(cases.case_compiled, "batch", HEADS, True)


@pytest.mark.slow
@pytest.mark.parametrize("name, placement", PLACED, ids=placed_id)
def test_the_whole_compiled(both: TwoProcesses, name: str, placement: Any) -> None:
    both(cases.case_compiled, name, placement, False)


def test_parallelized_module(both: TwoProcesses) -> None:
    both(case_parallelized, False)


@pytest.mark.slow
def test_parallelized_module_compiled(both: TwoProcesses) -> None:
    both(case_parallelized, True)
