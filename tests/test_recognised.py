"""The benchmark of recognised programs trains, compares and times them, and says so where one is not recognised."""

from __future__ import annotations

import csv
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import fsa_compile  # noqa: E402
from benchmarks import recognised  # noqa: E402
from fsa_compile.lowering import switch  # noqa: E402
from fsa_compile.testing import handwritten  # noqa: E402

_ARGUMENTS = ["--device", "cpu", "--rounds", "2", "--dtype"]
_SIZES = recognised.Sizes(4, 2, 16, 64, 3, hidden=32, check_length=200, window_size=100)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, model in recognised.MODELS.items():
        monkeypatch.setitem(recognised.MODELS, name, replace(model, sizes=_SIZES))


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def check_rows(rows: list[dict[str, str]], models: set[str]) -> None:
    assert {row["model"] for row in rows} == models
    assert {row["status"] for row in rows} == {"ok"}
    for name in models:
        check, first, second = (row for row in rows if row["model"] == name)
        assert (check["what"], check["steps"]) == ("check", "10")
        assert float(check["loss"]) < float(check["first_loss"])
        assert bool(check["rows_off"]) == ("fsa::select_blocks" in recognised.MODELS[name].operators)
        assert (first["provider"], second["provider"]) == ("recognised", "original")
        for row in (first, second):
            assert row["what"] == "step"
            assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
            for column in ("date", "commit", "torch", "triton", "device", "compile_s"):
                assert row[column]
        speedup = float(second["p50_ms"]) / float(first["p50_ms"])
        assert float(first["speedup"]) == pytest.approx(speedup, rel=0.05, abs=0.01)
        assert not second["speedup"]


def test_a_model_is_checked_and_timed(tmp_path: Path) -> None:
    out = tmp_path / "recognised.csv"
    arguments = [*_ARGUMENTS, "float32", "--models", "einsum", "--lengths", "200", "--out", str(out)]
    assert recognised.main(arguments) == 0
    check_rows(rows_of(out), {"einsum"})
    assert switch.is_recognising()


@pytest.mark.slow
def test_every_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """But FlexAttention, which has no backward here."""
    pytest.importorskip("transformers", minversion="5.17")
    models = set(recognised.MODELS) - {"flex"}
    out = tmp_path / "recognised.csv"
    arguments = [*_ARGUMENTS, "bfloat16", "--models", *models, "--lengths", "200", "--out", str(out)]
    assert recognised.main(arguments) == 0
    check_rows(rows_of(out), models)


def test_what_is_not_recognised_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def strictly_before(q: Any, k: Any, v: Any, ids: Any, *, block_size: int) -> Any:
        return handwritten.sdpa_mask(q, k.roll(1, 1).cumsum(1), v, ids, block_size=12)

    monkeypatch.setattr(handwritten, "einsum_grouped", strictly_before)
    out = tmp_path / "recognised.csv"
    arguments = [*_ARGUMENTS, "float32", "--models", "einsum", "--lengths", "200", "--providers", "recognised"]
    assert recognised.main([*arguments, "--out", str(out)]) == 1
    check, step = rows_of(out)
    assert "became [], not ['fsa::selected_attention']" in check["status"]
    assert (step["status"], step["p50_ms"]) == (check["status"], "")


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled, and the original does not fit for more than 100 tokens."""

    def compile_run(run: recognised.Run, problem: recognised.Problem, training: bool = True) -> None:
        if run.provider == "original" and problem.x.shape[1] > 100:
            raise torch.OutOfMemoryError("no")
        run.call, run.compile_s = problem.module, 0.0

    monkeypatch.setattr(recognised, "compile_run", compile_run)


@pytest.mark.usefixtures("uncompiled")
def test_what_does_not_fit_is_timed_at_half_the_length(tmp_path: Path) -> None:
    out = tmp_path / "recognised.csv"
    arguments = [*_ARGUMENTS, "float32", "--models", "softmax", "--lengths", "64", "320", "--no-check"]
    assert recognised.main([*arguments, "--out", str(out)]) == 0
    rows = [(row["seq_len"], row["provider"], row["status"], bool(row["speedup"])) for row in rows_of(out)]
    assert rows == [
        ("64", "recognised", "ok", True), ("64", "original", "ok", False),
        ("320", "recognised", "ok", False), ("320", "original", "out of memory", False),
        ("160", "recognised", "ok", False), ("160", "original", "out of memory", False),
        ("80", "recognised", "ok", True), ("80", "original", "ok", False),
    ]  # fmt: skip
    assert "out of memory" in recognised.table(recognised_rows(out))


def recognised_rows(out: Path) -> list[dict[str, Any]]:
    return [{**row, "seq_len": int(row["seq_len"])} for row in rows_of(out)]


@pytest.mark.usefixtures("uncompiled")
def test_a_wrong_gradient_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of one projection, by a thousandth."""

    class Off(torch.nn.Module):
        def __init__(self, module: Any) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: Any, ids: Any) -> Any:
            out = self.module(x, ids)
            out.register_hook(lambda grad: grad * 1.001)
            return out

    def compile_run(run: recognised.Run, problem: recognised.Problem, training: bool = True) -> None:
        run.call = Off(problem.module)

    monkeypatch.setattr(recognised, "compile_run", compile_run)
    out = tmp_path / "recognised.csv"
    arguments = [*_ARGUMENTS, "float32", "--models", "softmax", "--lengths", "200", "--providers", "recognised"]
    assert recognised.main([*arguments, "--out", str(out)]) == 1
    check, step = rows_of(out)
    assert check["status"].startswith("AssertionError")
    assert "allowed" in check["status"]
    assert step["status"] == "ok"


def test_goals_are_those_of_32k_tokens() -> None:
    row = {"model": "sdpa", "what": "step", "seq_len": 32768, "speedup": "4.90", "less_memory": "10.10"}
    assert recognised.missed_goals([row, {**row, "seq_len": 8192}]) == ["sdpa: speedup 4.90, goal 5"]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # said once in a process
def test_flexattention_is_the_same_function_as_its_mask() -> None:
    sizes = replace(_SIZES, head_dim=16)
    problem = recognised.Problem(
        replace(recognised.MODELS["flex"], sizes=sizes), 150, torch.device("cpu"), torch.float32
    )
    with torch.no_grad():
        torch.testing.assert_close(
            problem.module(problem.x, problem.ids), problem.plain(problem.x, problem.ids), atol=1e-5, rtol=1e-4
        )


def test_recognition_is_on_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(fn: Any) -> Any:
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(recognised, "compiled", broken)
    problem = recognised.Problem(recognised.MODELS["sdpa"], 64, torch.device("cpu"), torch.float32)
    with pytest.raises(RuntimeError, match="on purpose"):
        recognised.compile_run(recognised.Run("original"), problem)
    assert switch.is_recognising()
    assert fsa_compile.is_enabled()
