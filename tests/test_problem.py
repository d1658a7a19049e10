"""From tensors, symbolic sizes and devices to what the cost model wants."""

from __future__ import annotations

import torch
from torch._subclasses import FakeTensorMode

from fsa_compile import cost
from fsa_compile.ops.problem import device_of, problem_of, size_hint


def test_problem_of_meta_tensors() -> None:
    q = torch.empty(2, 100, 12, 80, dtype=torch.float16, device="meta")
    k, v = (torch.empty(2, 130, 4, d, dtype=torch.float16, device="meta") for d in (80, 48))
    blocks = torch.empty(2, 100, 4, 7, dtype=torch.int32, device="meta")
    expected = cost.Problem(2, 100, 130, 4, 3, 80, 48, 32, 7, 2, cost.LIKELY_AGREEMENT)
    assert problem_of(q, k, v, blocks, 32) == problem_of(q, k, v, 7, 32) == expected


def test_problem_of_empty_tensors_still_has_a_cost() -> None:
    empty = torch.empty(1, 0, 2, 16)
    problem = problem_of(empty, empty, empty, 4, 16)
    assert problem.seq_len == 1
    assert cost.choose(problem, device_of(empty)).order == "fsa"


def test_device_of_a_gpu_that_is_not_here_is_the_generic_one() -> None:
    with FakeTensorMode():
        fake = torch.empty(1, device="cuda:7")
    assert device_of(fake) is cost.DEVICES["cuda"]
    assert device_of(torch.empty(1)) is cost.DEVICES["cpu"]


def test_size_hint_of_symbolic_sizes_adds_no_guard() -> None:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    real = torch.empty(2, 77, 3)
    torch._dynamo.mark_dynamic(real, 1)
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    context = StatelessSymbolicContext([DimDynamic.STATIC, DimDynamic.DYNAMIC, DimDynamic.STATIC])
    fake = mode.from_tensor(real, symbolic_context=context)
    assert isinstance(fake.shape[1], torch.SymInt)
    guards = len(env.guards)
    assert size_hint(fake.shape[1]) == 77
    assert size_hint(fake.shape[1] * 2 + 1) == 155
    assert size_hint(5) == 5
    assert size_hint(env.create_unbacked_symint(), fallback=123) == 123
    assert len(env.guards) == guards
