"""The cost model against this package's own kernels, as measured on an H200."""

from __future__ import annotations

import math

import pytest

from fsa_compile.cost import DEVICES, Choice, Problem, breakdown, choose

H200 = DEVICES["H200"]

# ms of the eager operators, lists included: one NVIDIA H200, torch 2.11.0+cu130, triton 3.6.0, bf16, 4 KV heads,
# block 64, S = 16; `python -m benchmarks.selected --eager-only` with --groups, --seq-len, --head-dim and --localities.
# (locality, D, T): {G: (forward fsa, forward nsa, backward fsa, backward nsa)}
MEASURED: dict[tuple[str, int, int], dict[int, tuple[float, float, float, float]]] = {
    ("random", 128, 1024): {
        1: (0.592, 0.372, 0.721, 0.875),
        2: (0.601, 0.377, 0.741, 0.941),
        4: (0.681, 0.373, 0.886, 1.036),
        8: (0.819, 0.377, 1.076, 1.146),
        16: (1.188, 0.38, 1.543, 1.437),
        32: (1.728, 0.529, 2.662, 2.203),
    },
    ("random", 128, 2048): {
        1: (0.632, 0.631, 0.753, 1.202),
        2: (0.723, 0.637, 0.864, 1.308),
        4: (0.801, 0.66, 1.043, 1.42),
        8: (1.029, 0.652, 1.414, 1.61),
        16: (1.406, 0.642, 2.018, 1.931),
        32: (2.208, 0.937, 3.522, 3.015),
    },
    ("random", 128, 4096): {
        1: (0.594, 1.112, 0.74, 1.681),
        2: (0.684, 1.116, 0.864, 1.807),
        4: (0.821, 1.11, 1.087, 1.892),
        8: (1.243, 1.135, 1.67, 2.192),
        16: (1.784, 1.133, 2.521, 2.62),
        32: (2.845, 1.654, 4.401, 4.093),
    },
    ("random", 128, 8192): {
        1: (0.651, 2.103, 0.887, 2.792),
        2: (0.789, 2.106, 1.089, 2.873),
        4: (1.122, 2.091, 1.524, 3.165),
        8: (1.637, 2.102, 2.432, 3.489),
        16: (2.605, 2.095, 3.978, 4.25),
        32: (4.627, 3.156, 7.571, 7.125),
    },
    ("random", 128, 16384): {
        1: (0.891, 4.094, 1.281, 5.061),
        2: (1.18, 4.115, 1.669, 5.258),
        4: (1.693, 4.091, 2.499, 5.802),
        8: (2.72, 4.079, 4.15, 6.314),
        16: (4.492, 4.083, 7.075, 7.673),
        32: (8.207, 6.211, 13.654, 13.052),
    },
    ("random", 128, 32768): {
        1: (1.179, 8.063, 1.927, 9.545),
        2: (1.612, 8.048, 2.658, 9.828),
        4: (2.559, 8.015, 4.292, 10.771),
        8: (4.511, 8.048, 7.656, 12.007),
        16: (7.987, 8.178, 13.586, 14.929),
        32: (15.767, 13.409, 28.332, 27.157),
    },
    ("random", 128, 65536): {
        1: (1.663, 16.074, 3.117, 18.305),
        2: (2.624, 16.0, 4.606, 19.035),
        4: (4.507, 15.895, 7.933, 20.912),
        8: (8.455, 15.978, 14.719, 23.351),
        16: (16.085, 17.069, 28.037, 30.615),
        32: (30.777, 25.62, 56.39, 54.658),
    },
    ("random", 128, 131072): {
        1: (2.882, 32.67, 5.763, 36.878),
        2: (4.892, 32.863, 8.908, 38.555),
        4: (8.776, 33.02, 15.976, 43.297),
        8: (17.172, 33.834, 31.044, 49.327),
        16: (32.467, 34.347, 56.544, 64.181),
        32: (60.932, 50.492, 110.924, 109.868),
    },
    ("local", 128, 65536): {
        1: (1.657, 15.901, 3.154, 18.182),
        4: (4.584, 15.765, 8.125, 20.87),
        16: (15.922, 16.481, 27.694, 30.01),
    },
    ("random", 64, 65536): {
        1: (1.275, 8.727, 2.117, 9.454),
        4: (2.578, 8.66, 5.173, 10.894),
        16: (8.766, 8.939, 14.168, 17.571),
    },
}
CASES = [(*key, group) for key, by_group in MEASURED.items() for group in by_group]
LONG = [case for case in CASES if case[2] >= 8192]


def sizes(group: int, seq_len: int = 65536, head_dim: int = 128) -> Problem:
    return Problem(1, seq_len, seq_len, 4, group, head_dim, head_dim, 64, 16, 2)


def measured(case: tuple[str, int, int, int]) -> list[tuple[Choice, dict[str, float]]]:
    """The model's choice and the measured ms by order, forward and backward."""
    locality, head_dim, seq_len, group = case
    problem = sizes(group, seq_len, head_dim)
    ms = MEASURED[locality, head_dim, seq_len][group]
    rows = (
        (False, dict(zip(("fsa", "nsa"), ms[:2], strict=True))),
        (True, dict(zip(("fsa", "nsa"), ms[2:], strict=True))),
    )
    return [(choose(problem, H200, backward=backward), times) for backward, times in rows]


@pytest.mark.parametrize("case", CASES)
def test_the_order_chosen_is_the_fastest_measured_or_close_to_it(case: tuple[str, int, int, int]) -> None:
    allowed = 1.10 if case[2] >= 4096 else 1.25
    for choice, ms in measured(case):
        assert ms[choice.order] <= allowed * min(ms.values()), (choice, ms)


@pytest.mark.parametrize("case", LONG)
def test_predicts_the_measured_time_within_25_percent(case: tuple[str, int, int, int]) -> None:
    for choice, ms in measured(case):
        for order, seconds in choice.costs.items():
            assert seconds * 1e3 == pytest.approx(ms[order], rel=0.25), order


def test_predictions_of_long_sequences_are_unbiased_by_more_than_10_percent() -> None:
    for order in ("fsa", "nsa"):
        logs = [math.log(c.costs[order] * 1e3 / ms[order]) for case in LONG for c, ms in measured(case)]
        assert abs(sum(logs) / len(logs)) < math.log(1.10)
        assert math.sqrt(sum(x * x for x in logs) / len(logs)) < 0.12


# The kernels by themselves at T = 65536, D = 128, best launch options: ms at G = 1, 4, 16 (same machine,
# `python -m benchmarks.tune`).
KERNELS = {
    ("forward", "nsa", "query-outer"): (16.08, 15.88, 16.09),
    ("forward", "fsa", "KV-outer partials"): (0.816, 2.928, 10.46),
    ("forward", "fsa", "merge"): (0.327, 1.138, 4.352),
    ("backward", "nsa", "KV-outer dk dv"): (1.290, 3.657, 12.53),
    ("backward", "nsa", "query-outer dq"): (15.97, 16.25, 15.68),
    ("backward", "fsa", "KV-outer dq dk dv"): (1.767, 5.870, 21.40),
    ("backward", "fsa", "sum dq partials"): (0.291, 1.059, 4.100),
    ("backward", "fsa", "lists"): (0.593, 0.460, 0.559),
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_predicts_every_pass_within_35_percent(kernel: tuple[str, str, str]) -> None:
    direction, order, name = kernel
    for group, ms in zip((1, 4, 16), KERNELS[kernel], strict=True):
        passes = breakdown(sizes(group), H200, order)
        (predicted,) = (p.seconds * 1e3 for p in passes if (p.direction, p.name) == (direction, name))
        assert predicted == pytest.approx(ms, rel=0.35)
