"""The benchmarks run, check what they time, and write rows that say what they were measured with."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import fsa_compile  # noqa: E402
from benchmarks import common, exact, selected, whole  # noqa: E402
from fsa_compile.ops import reference  # noqa: E402
from fsa_compile.testing.inputs import causal_block_indices  # noqa: E402

_SMALL = ["--device", "cpu", "--dtype", "float32", "--heads", "4/2", "--head-dim", "16", "--rounds", "2"]
_PROVIDERS = ["--providers", "eager", "dense-math"]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("benchmark") / "whole.csv"
    assert whole.main([*_SMALL, *_PROVIDERS, "--lengths", "200", "1100", "--out", str(out)]) == 0
    return out


def test_whole(measured: Path) -> None:
    rows = rows_of(measured)
    passes = {(row["what"], row["pass"]) for row in rows if row["provider"] == "eager"}
    assert passes == {
        *((what, name) for what in whole.STAGES if what != "select" for name in ("forward", "backward")),
        ("select", "forward"),
        ("whole", "step"),
    }
    assert {row["seq_len"] for row in rows} == {"200", "1100"}
    assert {row["pass"] for row in rows if row["provider"] == "dense-math"} == {"forward", "backward", "step"}
    for row in rows:
        assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert float(row["error"]) < 1e-4
        for column in ("date", "commit", "torch", "triton", "device"):
            assert row[column]


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = fsa_compile.sliding_window_attention

    def late(*args: Any, **options: Any) -> Any:
        return right(*args, **{**options, "window_size": options["window_size"] - 1})

    monkeypatch.setattr(fsa_compile, "sliding_window_attention", late)
    out = tmp_path / "whole.csv"
    arguments = [*_SMALL, *_PROVIDERS, "--lengths", "1100", "--stages", "mean", "window", "--out", str(out)]
    assert whole.main(arguments) == 1
    assert {row["what"] for row in rows_of(out)} == {"mean"}


def test_selected(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every order and dense attention, on one sequence and on packed ones."""
    monkeypatch.setattr(selected, "TRACE_TOKENS", 128)
    out = tmp_path / "selected.csv"
    small = [*_SMALL[:4], "--head-dim", "16", "--rounds", "2", "--num-kv-heads", "2", "--groups", "2"]
    arguments = [*small, "--lengths", "384", "--providers", *selected.ORDERS, "dense-math", "--out", str(out)]
    assert selected.main(arguments) == 0
    rows = rows_of(out)
    assert {(row["pattern"], row["num_sequences"]) for row in rows} == {("random", "1"), ("trace", "3")}
    assert {row["provider"] for row in rows if row["pattern"] == "random"} == {*selected.ORDERS, "dense-math"}
    assert {row["provider"] for row in rows if row["pattern"] == "trace"} == {*selected.ORDERS}
    assert {row["pass"] for row in rows} == {"forward", "backward", "step"}
    assert all(float(row["error"]) < 1e-4 for row in rows)
    assert {row["chosen"] for row in rows} == {"fsa"}


def test_gates_after_the_selected_branch(tmp_path: Path) -> None:
    out = tmp_path / "selected.csv"
    small = [*_SMALL[:4], "--head-dim", "16", "--rounds", "2", "--num-kv-heads", "2", "--groups", "2"]
    arguments = [*small, "--lengths", "200", "--patterns", "local", "--what", "gated", "--providers", "fsa-compiled"]
    assert selected.main([*arguments, "--out", str(out)]) == 0
    assert {row["provider"] for row in rows_of(out)} == {"fsa-compiled", "fsa-separate"}


def test_pictures_come_from_the_rows(measured: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks import plot

    assert plot.main([str(measured), "--out", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole_stages.png", "whole_whole.png"]


def test_exact_rows_are_the_references() -> None:
    """Two pieces of plain PyTorch that share nothing."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 333, h, 16, generator=generator, dtype=torch.float64) for h in (6, 2, 2))
    rows = torch.tensor([0, 5, 31, 32, 90, 332])
    windows, selection = whole.WINDOWS, {**whole.SELECTION, "num_selected": 4}
    k_cmp, v_cmp = (reference.mean_compress(x, **windows) for x in (k, v))
    blocks = causal_block_indices(333, 2, 4, device="cpu")
    out, lse = reference.compressed_attention(q, k_cmp, v_cmp, **windows)
    pairs = {
        "means": (exact.means(k, **windows), k_cmp),
        "compressed": (exact.compressed(q, k_cmp, v_cmp, rows, **windows), out[:, rows]),
        "selected": (
            exact.selected(q, k, v, rows, blocks, 64),
            reference.selected_attention(q, k, v, blocks, block_size=64)[0][:, rows],
        ),
        "window": (
            exact.window(q, k, v, rows, 20),
            reference.sliding_window_attention(q, k, v, window_size=20)[0][:, rows],
        ),
    }
    for name, (have, want) in pairs.items():
        assert torch.allclose(have, want, rtol=0, atol=1e-12), name
    want_ids = reference.select_blocks(q, k_cmp, lse, **windows, **selection)[0, rows]
    have_ids = exact.blocks(q, k_cmp, rows, **windows, **selection, seq_len=333)
    assert exact.missing(want_ids, have_ids) == 0
    assert exact.missing(want_ids.clamp(max=1), have_ids) > 0


def test_percentiles_and_turns() -> None:
    assert common.Times.of([float(x) for x in range(11)]) == (2, 5, 8)
    assert common.Times.of([3.0]) == (3, 3, 3)
    calls: list[str] = []
    found = common.timings(
        {"a": lambda: calls.append("a"), "b": lambda made: calls.append(made)},
        prepare={"b": lambda: "made"}, rounds=3, warmup=1, device="cpu",
    )  # fmt: skip
    assert calls == ["a", "made"] * 4
    assert set(found) == {"a", "b"}


def test_the_commit_can_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    common.commit.cache_clear()
    monkeypatch.setenv("FSA_COMPILE_COMMIT", "abc")
    assert common.versions(torch.device("cpu"))["commit"] == "abc"
    common.commit.cache_clear()


@pytest.mark.parametrize("locality", ["random", "local", "trace"])
def test_selections(locality: str) -> None:
    """Ascending, causal, no id twice, -1 at the end, the first and the current block always."""
    blocks = causal_block_indices(5000, 3, locality=locality, device="cpu")
    assert blocks.shape == (1, 5000, 3, 16)
    assert blocks.dtype == torch.int32
    current = torch.arange(5000)[None, :, None, None] // 64
    assert (blocks <= current).all()
    shown = blocks.masked_fill(blocks < 0, 10**6)
    assert ((shown.diff(dim=-1) > 0) | (shown[..., 1:] == 10**6)).all()
    assert (blocks[..., 0] == 0).all()
    assert (blocks == current).any(-1).all()


def test_the_trace_is_what_it_says() -> None:
    with pytest.raises(ValueError, match="16384 tokens, not 16385"):
        causal_block_indices(16385, 1, locality="trace", device="cpu")
    with pytest.raises(ValueError, match="16 blocks of 64"):
        causal_block_indices(100, 1, 8, locality="trace", device="cpu")
    blocks = causal_block_indices(16384, 4, locality="trace", device="cpu")[0]
    union = [len(set(blocks[t : t + 16, 0].flatten().tolist())) for t in range(8192, 16384, 512)]
    assert 30 < sum(union) / len(union) < 90  # of 16 tokens; independent ones would select 160
