"""What the cost model counts of calls that the workspace cuts in parts, and of sequences' first tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_cost import H200, at, seconds

from fsa_compile.cost import Problem, breakdown
from fsa_compile.cost import choice as choices


@pytest.mark.parametrize("options", [{}, {"backward": True}])
def test_cutting_a_call_costs_ends_and_sums(options: dict[str, bool]) -> None:
    """Less than it was measured to when results of parts were copied: one in eight, H100, 32K and 64K tokens."""
    direction = "backward" if options else "forward"

    def parts(problem: Problem) -> float:
        found = breakdown(problem, H200, "fsa")
        return next(p.seconds for p in found if (p.direction, p.name) == (direction, "parts"))

    def costs(problem: Problem) -> tuple[float, float]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(choices, "WORKSPACE", 1 << 62)
            whole = choices.seconds(problem, H200)["fsa", direction]
        return whole, choices.seconds(problem, H200)["fsa", direction]

    # 32 query heads of 16K tokens have as much as fits, and a token more does not fit.
    largest = at(seq_len=16384, gqa_group_size=8)
    assert parts(largest) == 0
    assert costs(largest)[0] == costs(largest)[1]
    assert parts(at(seq_len=16385, gqa_group_size=8)) >= 2 * H200.launch_overhead
    for group, seq_len in ((8, 32768), (4, 65536), (16, 65536)):
        whole, cut = costs(at(gqa_group_size=group, seq_len=seq_len))
        assert 1.01 < cut / whole < 1.15, (group, seq_len)
    # Forward, a batch row has one set of lists, backward each KV head that is a part by itself.
    more, fewer = (parts(at(gqa_group_size=group, seq_len=131072)) for group in (32, 16))
    if direction == "forward":
        assert fewer == pytest.approx(15 * 2 * H200.launch_overhead)
        assert more == pytest.approx(31 * 2 * H200.launch_overhead)
    else:
        assert more > 2 * fewer
    row, rows = (parts(at(gqa_group_size=4, seq_len=131072, batch=batch)) for batch in (1, 3))
    assert rows > 3 * row + 2 * 20 * H200.launch_overhead


def test_what_the_first_tokens_leave_empty_is_not_counted() -> None:
    """By hand: of 16 blocks of 128 a token of the i-th sees i, and the last one of a sequence sees them all."""
    from fsa_compile.cost.expressions import DERIVED, E

    def entries(problem: Problem) -> float:
        return choices._compile([DERIVED[E]])(*choices._arguments(problem, H200))[0]

    short = at(seq_len=2048, block_size=128)
    assert entries(short) == pytest.approx(2048 * 4 * sum(range(1, 17)) / 16)
    assert entries(replace(short, num_selected=8)) == pytest.approx(2048 * 4 * (sum(range(1, 9)) + 8 * 8) / 16)
    assert entries(replace(short, num_selected=64)) == entries(short)
    assert entries(replace(short, seq_len=1)) == 4 * 16
    assert entries(replace(short, seq_len=256)) == pytest.approx(256 * 4 * (15 + 16) / 2)
    # The query-outer kernel walks every slot, whatever is in it; a tile cannot walk more blocks than there are.
    nsa, tile = (seconds(short, order) / seconds(at(seq_len=2048), order) for order in ("nsa", "tile"))
    assert nsa > 1.7
    assert tile < 1.2
