"""The cost model: it reproduces what was measured, behaves sanely between and beyond, and can be read."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fsa_compile import cost
from fsa_compile.cost import DEVICES, Device, Problem, breakdown, choose, device_for, scratch_bytes

H200 = DEVICES["H200"]
BENCH = Problem(
    batch=1,
    seq_len=65536,
    seq_len_k=65536,
    num_kv_heads=4,
    gqa_group_size=4,
    head_dim=128,
    head_dim_v=128,
    block_size=64,
    num_selected=16,
    itemsize=2,
)

# The forward's table in docs/cost-model.md, ms: probes without the lists, kernels of the query-outer order with all.
MEASURED_KV_OUTER = {1: 1.19, 4: 4.56, 16: 31.0}
MEASURED_QUERY_OUTER = {1: (13.3, 18.9), 4: (13.2, 18.9), 16: (13.3, 18.5)}


def at(**changes: int) -> Problem:
    if "seq_len" in changes:
        changes.setdefault("seq_len_k", changes["seq_len"])
    return replace(BENCH, **changes)


def seconds(problem: Problem, order: str, device: Device = H200, **options: bool) -> float:
    return choose(problem, device, **options).costs[order]


# ------------------------------------------------------------------------------------------------ what was measured


@pytest.mark.parametrize("group", MEASURED_KV_OUTER)
def test_reproduces_the_measured_kv_outer_forward_within_35_percent(group: int) -> None:
    passes = [p for p in breakdown(at(gqa_group_size=group), H200, "fsa") if p.direction == "forward"]
    attention = sum(p.seconds for p in passes if p.name != "lists") * 1e3
    assert MEASURED_KV_OUTER[group] / 1.35 < attention < MEASURED_KV_OUTER[group] * 1.35
    (lists,) = (p.seconds for p in passes if p.name == "lists")
    assert 0.3e-3 < lists < 0.8e-3


@pytest.mark.parametrize("group", MEASURED_QUERY_OUTER)
def test_reproduces_the_measured_query_outer_forward(group: int) -> None:
    low, high = MEASURED_QUERY_OUTER[group]
    assert low < seconds(at(gqa_group_size=group), "nsa") * 1e3 < high


def test_query_outer_costs_the_same_at_every_group_size_up_to_16() -> None:
    costs = [seconds(at(gqa_group_size=g), "nsa") for g in range(1, 17)]
    assert max(costs) < 1.02 * min(costs)


def test_query_outer_at_8k_is_near_the_measured_kernels() -> None:
    # Measured 1.36 to 2.2 ms at any group size.
    for group in (1, 4, 16):
        assert 1.3 < seconds(at(gqa_group_size=group, seq_len=8192), "nsa") * 1e3 < 2.2


@pytest.mark.parametrize("options", [{}, {"backward": True}, {"training": True}])
def test_the_crossover_in_group_size_lies_between_the_measured_points(options: dict[str, bool]) -> None:
    orders = [choose(at(gqa_group_size=g), H200, **options).order for g in range(1, 33)]
    flips = [g for g in range(1, 32) if orders[g] != orders[g - 1]]
    assert (orders[0], orders[-1], len(flips)) == ("fsa", "nsa", 1)
    assert 4 < flips[0] + 1 <= 16


def test_cpu_constants_reproduce_the_aten_probe_within_30_percent() -> None:
    probe = Problem(1, 16384, 16384, 2, 4, 64, 64, 64, 16, 4)
    choice = choose(probe, DEVICES["cpu"])
    assert choice.costs["fsa"] == pytest.approx(0.46, rel=0.3)
    assert choice.costs["nsa"] == pytest.approx(3.6, rel=0.3)


# ------------------------------------------------------------------------------------------------------ the choice


def test_the_kernels_tiles_are_the_ones_that_the_model_counts() -> None:
    from fsa_compile.cost.problem import ENTRIES_PER_TILE

    config = pytest.importorskip("fsa_compile.templates.config", exc_type=ImportError)
    assert config.ENTRIES_PER_TILE == ENTRIES_PER_TILE
    for head_dim, block_size, itemsize in itertools.product((16, 80, 128, 256), (16, 64, 128, 256), (2, 4)):
        problem = at(head_dim=head_dim, block_size=block_size, itemsize=itemsize)
        sizes = config.StaticSizes(4, 4, head_dim, 128, 16, block_size, itemsize, False)
        assert sizes.num_chunks == problem.chunks


def test_decoding_takes_the_order_without_lists() -> None:
    assert choose(at(seq_len=1, seq_len_k=65536), H200).order == "nsa"


@pytest.mark.parametrize("order", ["fsa", "nsa"])
def test_loop_order_overrides_the_model_and_still_shows_both_costs(order: str) -> None:
    for group in (1, 16):
        forced, free = choose(at(gqa_group_size=group), H200, order), choose(at(gqa_group_size=group), H200)
        assert forced.order == order
        assert forced.costs == free.costs
        assert f'loop_order="{order}" was asked for' in forced.reason
        assert forced.speedup == pytest.approx(free.speedup if free.order == order else 1 / free.speedup)


@pytest.mark.parametrize("asked", ["auto", "fsa", "nsa"])
def test_cpu_is_always_kv_outer_and_says_so(asked: str) -> None:
    choice = choose(BENCH, device_for("", "cpu"), asked)
    assert choice.order == "fsa"
    assert choice.reason.startswith("the CPU path is KV-outer")
    assert ('"nsa" makes no difference' in choice.reason) == (asked == "nsa")


def test_reason_is_one_sentence_with_both_times_and_the_sizes_that_decide() -> None:
    choice = choose(BENCH, H200)
    assert "\n" not in choice.reason
    for order in ("fsa", "nsa"):
        assert f"{choice.costs[order] * 1e3:.3g} ms" in choice.reason
    assert "gqa_group_size 4" in choice.reason
    assert "H200" in choice.reason
    assert "forward + backward is predicted" in choose(BENCH, H200, training=True).reason


def test_an_order_that_would_not_fit_in_memory_is_not_chosen() -> None:
    problem = at(seq_len=1 << 20, gqa_group_size=4)
    roomy = choose(problem, replace(H200, memory=1e15))
    choice = choose(problem, H200)
    assert (roomy.order, choice.order) == ("fsa", "nsa")
    assert "GB of temporaries" in choice.reason
    assert choose(problem, H200, "fsa").order == "fsa"  # asked for: the caller knows best
    assert scratch_bytes(problem, "fsa") > (1 << 20) * 4 * 16 * 4 * 128 * 2
    assert scratch_bytes(problem, "nsa") == 0
    assert scratch_bytes(problem, "nsa", training=True) > 0


def test_training_counts_the_lists_once() -> None:
    (lists,) = (p.seconds for p in breakdown(BENCH, H200, "fsa") if (p.direction, p.name) == ("forward", "lists"))
    forward, backward = seconds(BENCH, "fsa"), seconds(BENCH, "fsa", backward=True)
    assert seconds(BENCH, "fsa", training=True) == pytest.approx(forward + backward - lists)
    both = seconds(BENCH, "nsa") + seconds(BENCH, "nsa", backward=True)
    assert seconds(BENCH, "nsa", training=True) == pytest.approx(both)


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match="loop_order is 'outer'; it should be 'auto', 'fsa' or 'nsa'"):
        choose(BENCH, H200, "outer")
    with pytest.raises(ValueError, match="training and backward are both set"):
        choose(BENCH, H200, training=True, backward=True)
    with pytest.raises(ValueError, match=r"Problem\.head_dim is 0; it should be at least 1"):
        replace(BENCH, head_dim=0)
    with pytest.raises(ValueError, match="order is 'auto'"):
        breakdown(BENCH, H200, "auto")
    with pytest.raises(ValueError, match="order is 'auto'"):
        scratch_bytes(BENCH, "auto")


def test_choose_is_cached() -> None:
    assert choose(at(seq_len=12345), H200) is choose(at(seq_len=12345), H200)


# ------------------------------------------------------------------------------------------------- sanity in general

_sizes = st.builds(
    Problem,
    batch=st.integers(1, 8),
    seq_len=st.integers(1, 1 << 21),
    seq_len_k=st.integers(1, 1 << 21),
    num_kv_heads=st.integers(1, 64),
    gqa_group_size=st.integers(1, 128),
    head_dim=st.integers(1, 256),
    head_dim_v=st.integers(1, 256),
    block_size=st.sampled_from([16, 32, 64, 128, 256]),
    num_selected=st.integers(1, 64),
    itemsize=st.sampled_from([2, 4]),
)
_devices = st.sampled_from(sorted(DEVICES)).map(DEVICES.__getitem__)
_stages = st.sampled_from([{}, {"training": True}, {"backward": True}])


@given(problem=_sizes, device=_devices, stage=_stages)
@settings(max_examples=200, deadline=None)
def test_costs_are_finite_and_the_order_is_the_cheapest_that_fits(
    problem: Problem, device: Device, stage: dict[str, bool]
) -> None:
    choice = choose(problem, device, **stage)
    assert set(choice.costs) == {"fsa", "nsa"}
    assert all(math.isfinite(c) and c > 0 for c in choice.costs.values())
    if device.kind == "cpu":
        assert choice.order == "fsa"
    elif "temporaries" not in choice.reason:
        assert choice.costs[choice.order] == min(choice.costs.values())
        assert choice.speedup >= 1
    else:
        assert choice.costs[choice.order] == max(choice.costs.values())


@given(problem=_sizes, device=_devices, order=st.sampled_from(["fsa", "nsa"]), stage=_stages)
@settings(max_examples=100, deadline=None)
def test_more_work_never_costs_less(problem: Problem, device: Device, order: str, stage: dict[str, bool]) -> None:
    base = seconds(problem, order, device, **stage)
    for name in ("batch", "num_kv_heads", "gqa_group_size", "head_dim", "head_dim_v", "num_selected"):
        more = replace(problem, **{name: 2 * getattr(problem, name)})
        assert seconds(more, order, device, **stage) >= base * (1 - 1e-9), name


@given(problem=_sizes, order=st.sampled_from(["fsa", "nsa"]))
@settings(max_examples=100, deadline=None)
def test_breakdown_adds_up_to_the_costs(problem: Problem, order: str) -> None:
    passes = breakdown(problem, H200, order)
    for direction, options in (("forward", {}), ("backward", {"backward": True})):
        total = sum(p.seconds for p in passes if p.direction == direction)
        assert total == pytest.approx(seconds(problem, order, **options))


def test_twice_the_length_costs_about_twice() -> None:
    for order in ("fsa", "nsa"):
        short, long = (seconds(at(seq_len=n, gqa_group_size=1), order) for n in (65536, 131072))
        assert 1.9 < long / short < 2.3


def test_float32_is_slower_than_bfloat16() -> None:
    for order in ("fsa", "nsa"):
        assert seconds(at(itemsize=4), order) > 1.5 * seconds(BENCH, order)


# ------------------------------------------------------------------------------------------------ devices, reading it


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA GH200 480GB", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA GB200", "B200"),
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA H20", "cuda"),
        ("NVIDIA A10", "cuda"),
        ("NVIDIA A1000", "cuda"),
        ("NVIDIA GeForce RTX 4090", "cuda"),
        ("", "cuda"),
    ],
)
def test_device_names(name: str, row: str) -> None:
    assert device_for(name) is DEVICES[row]


@pytest.mark.parametrize("name", sorted(DEVICES))
def test_every_device_has_positive_constants_and_makes_a_choice(name: str) -> None:
    device = DEVICES[name]
    assert device.name == name
    assert all(getattr(device, f.name) > 0 for f in fields(device) if f.name not in ("name", "kind"))
    for group in (1, 4, 16):
        choose(at(gqa_group_size=group, seq_len=16384), device)
    assert choose(at(gqa_group_size=1, seq_len=16384), device).order == "fsa"


def test_expressions_are_symbolic_and_print() -> None:
    import sympy

    for expressions in (cost.EXPRESSIONS, cost.BACKWARD_EXPRESSIONS):
        assert set(expressions) == {"fsa", "nsa"}
        for expr in expressions.values():
            assert isinstance(expr, sympy.Expr)
            assert {str(s) for s in expr.free_symbols} >= {"BW_dram", "BW_L2", "FLOPS", "D", "DV", "bs"}
    assert "M_q" in sympy.pretty(cost.EXPRESSIONS["nsa"], use_unicode=False)
    assert "R_sort" in sympy.pretty(cost.EXPRESSIONS["fsa"], use_unicode=False)


def test_every_symbol_of_the_model_is_explained() -> None:
    from fsa_compile.cost.expressions import BACKWARD_EXPRESSIONS, DERIVED, EXPRESSIONS, MEANING

    used = set().union(
        *(e.free_symbols for e in (*EXPRESSIONS.values(), *BACKWARD_EXPRESSIONS.values(), *DERIVED.values()))
    )
    assert used <= set(MEANING)
    text = cost.describe()
    for symbol, meaning in MEANING.items():
        assert f"  {symbol!s:<10} {meaning}" in text
    for words in ("forward, loop order 'nsa'", "[merge]", "backward, loop order 'fsa'", *DEVICES):
        assert words in text
    assert text.isascii()


def test_hand_evaluated_query_outer_forward() -> None:
    # 65536 tokens x 4 heads x 16 blocks x 64 keys x 256 elements x 2 bytes through L2.
    expected = 65536 * 4 * 16 * 64 * 256 * 2 / H200.l2_bandwidth + H200.launch_overhead
    assert seconds(BENCH, "nsa") == pytest.approx(expected)


def test_import_leaves_sympy_alone_until_a_cost_is_asked_for() -> None:
    # By file, as importing the package around it may pull torch in.
    program = (
        "import sys, types, pathlib; root = pathlib.Path(sys.argv[1]); package = types.ModuleType('p');"
        "package.__path__ = [str(root)]; sys.modules['p'] = package; import p.cost;"
        "assert 'sympy' not in sys.modules and 'torch' not in sys.modules;"
        "P = p.cost.Problem(1, 64, 64, 1, 1, 16, 16, 16, 2, 4);"
        "p.cost.choose(P, p.cost.DEVICES['H200']); assert 'sympy' in sys.modules and 'torch' not in sys.modules"
    )
    root = str(__import__("pathlib").Path(cost.__file__).parents[1])
    subprocess.run([sys.executable, "-c", program, root], check=True, timeout=60)
