"""What docs/growth.md says is what the CSVs have, and floors count what there is to do."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import growth, whole  # noqa: E402
from benchmarks.common import RESULTS  # noqa: E402
from benchmarks.growth import Shape  # noqa: E402

PAGE = ROOT / "docs" / "growth.md"
CSVS = [RESULTS / "lengths_h100.csv", RESULTS / "whole_h100.csv"]


def test_the_page_has_the_csvs_numbers() -> None:
    """Else: the second line of the script's help."""
    page = PAGE.read_text(encoding="utf-8")
    rows = growth.merged(CSVS)
    assert growth.filled(page, rows) == page
    rows[0] = {**rows[0], "p50_ms": "9.87"}
    assert growth.filled(page, rows) != page


def test_of_the_same_rows_the_first_csv_counts(tmp_path: Path) -> None:
    """The newer one has what it has, the other what is missing there."""
    second = growth.merged([CSVS[1]])
    of_whole = {"provider": "compiled", "what": "whole", "seq_len": "65536"}
    first = [{**row, "commit": "newer"} for row in second if of_whole.items() <= row.items()]
    newer = tmp_path / "newer.csv"
    with newer.open("w", newline="") as file:
        writer = csv.DictWriter(file, first[0])
        writer.writeheader()
        writer.writerows(first)
    both = growth.merged([newer, CSVS[1]])
    assert both[: len(first)] == first
    assert len(first) == 3
    assert both[3:] == [row for row in second if not of_whole.items() <= row.items()]
    assert len(growth.merged(CSVS)) == sum(len(growth.merged([path])) for path in CSVS)  # a row stands in one of them


@pytest.mark.parametrize("length", [20, 300, 2100])
def test_pairs_are_those_that_are_visible(length: int) -> None:
    t, key = torch.arange(length)[:, None], torch.arange(length)[None]
    last = torch.arange(0, max(0, length - 31), 16) + 31  # of each compressed token
    # the 16 latest blocks: which ones are selected does not matter, but that a query's own is among them
    chosen = (t // 64 - key // 64 < 16) & (key <= t)
    want = {
        "mean": 0,
        "compressed": (last[None] <= t).sum(),
        "select": (last[None] <= t).sum(),
        "selected": chosen.sum(),
        "window": ((key <= t) & (key > t - 512)).sum(),
        "partials": chosen[:, ::64].sum(),
    }
    assert whole.WINDOWS | whole.SELECTION | whole.WINDOW == {
        "kernel_size": 32, "kernel_stride": 16, "block_size": 64, "num_selected": 16, "init_blocks": 1,
        "local_blocks": 2, "window_size": 512,
    }  # fmt: skip
    assert {name: growth.pairs(name, length) for name in want} == {name: int(x) for name, x in want.items()}


def test_floors() -> None:
    """Against the same by hand, at 65,536 tokens."""
    shape, length = Shape(32, 8, 128), 65536
    weights = length**2 / 32 * 32
    ms, kind = growth.floor("compressed", "forward", shape, length)
    assert (ms, kind) == (pytest.approx(4 * 128 * weights / 989e12 * 1e3, rel=1e-3), "products")
    ms, kind = growth.floor("select", "forward", shape, length)
    assert (ms, kind) == (pytest.approx(weights / (16 * 132 * 1.7e9) * 1e3, rel=1e-3), "exponentials")
    keys = length * 8 * 128 * 2
    ms, kind = growth.floor("mean", "backward", shape, length)
    assert (ms, kind) == (pytest.approx(keys * 17 / 16 / 3.35e12 * 1e3), "memory")
    ms, kind = growth.floor("selected", "backward", shape, length)
    with_partials, of = growth.floor("selected", "backward", shape, length, partials=True)
    rows = 4 * (length * 32 * 128 * 2 + keys) + 8 * length * 32 + 4 * length * 8 * 16  # q, out and theirs; k, v; ids
    partials = 2 * (16 * length - 64 * 120) * 32 * 128 * 2  # a block's tokens select 1, 2 ... 15 blocks at first
    assert of == "memory"
    assert with_partials == pytest.approx((rows + partials) / 3.35e12 * 1e3)
    assert ms < with_partials / 2
    stages = ("mean", "mean", "compressed", "select", "selected", "window")
    assert growth.floor("whole", "forward", shape, length)[0] == pytest.approx(
        sum(growth.floor(stage, "forward", shape, length)[0] for stage in stages)
    )


def test_where_the_whole_turns() -> None:
    """A stage that is quadratic and one that is linear, equal at 4,096 tokens."""
    lengths = (1024, 2048, 8192)
    times: growth.Times = {
        ("compressed", "forward"): {n: n**2 / 4096 for n in lengths},
        ("window", "forward"): {n: float(n) for n in lengths},
        ("whole", "forward"): dict.fromkeys(lengths, 0.0),
    }
    assert growth.turn(times, ("forward",)) == pytest.approx(4096)


def test_pictures_of_several_shapes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks import plot

    assert plot.main([*map(str, CSVS), "--together", "--out", str(tmp_path)]) == 0
    names = [
        f"lengths_h100_{shape}_{kind}" for shape in ("32_8_128", "4_1_64") for kind in ("memory", "stages", "whole")
    ]
    assert sorted(path.stem for path in tmp_path.iterdir()) == [*names, "lengths_h100_growth"]
    committed = {path.name for path in RESULTS.glob("lengths_h100*.png")}
    assert committed == {path.name for path in tmp_path.iterdir()}
    assert all(path.stat().st_size < 150_000 for path in RESULTS.glob("*.png"))


def test_dense_rows_with_repeated_keys_are_of_the_same_shape() -> None:
    pytest.importorskip("matplotlib")
    from benchmarks import plot

    rows = [{"num_q_heads": "4", "num_kv_heads": kv, "head_dim": "16"} for kv in ("4", "2")]
    rows.append({"num_q_heads": "4", "num_kv_heads": "2", "head_dim": "32"})
    assert plot.shapes(rows) == {Shape(4, 2, 16): rows[:2], Shape(4, 2, 32): rows[2:]}
