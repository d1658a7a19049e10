"""Calibration: known constants come back from times made of them, and the program measures, judges and keeps."""

from __future__ import annotations

import math
import multiprocessing
import random
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrations import H200, NAME, TRUTH, made

from fsa_compile import cost
from fsa_compile.calibrate import __main__ as program
from fsa_compile.calibrate import ahead, report, timing
from fsa_compile.calibrate.fit import fit, residuals
from fsa_compile.calibrate.grid import CELLS, Cell, Measurement
from fsa_compile.testing.timing import seconds_of

# ------------------------------------------------------------------------------------------------------------ the fit


def test_half_of_the_grid_is_held_out_and_no_kind_of_shape_is() -> None:
    seen = [cell.problem for cell in CELLS if not cell.held_out]
    assert 2 * len(seen) == len(CELLS) == len({cell.problem for cell in CELLS})
    for name in ("seq_len", "gqa_group_size", "block_size", "head_dim"):
        everywhere = {getattr(cell.problem, name) for cell in CELLS}
        assert {getattr(p, name) for p in seen} == everywhere
        assert len(everywhere) > 1


@pytest.mark.parametrize("spoiled", [0, 3], ids=["noise", "noise and outliers"])
def test_fit_recovers_constants_from_noisy_times(spoiled: int) -> None:
    seen = [m for m in made(TRUTH, noise=0.03, spoiled=spoiled) if not m.held_out]
    found = fit(H200, seen)
    for name in ("dram_bandwidth", "l2_bandwidth", "sort_rate", "launch_overhead"):
        assert getattr(found, name) == pytest.approx(getattr(TRUTH, name), rel=0.1), name
    assert found.efficiency == pytest.approx(TRUTH.efficiency, rel=0.1)
    assert (found.flops, found.num_sms, found.memory) == (H200.flops, H200.num_sms, H200.memory)


def test_choices_of_a_fit_are_good_where_it_has_not_looked() -> None:
    measured = made(TRUTH, noise=0.02)
    seen, held_out = ([m for m in measured if m.held_out is out] for out in (False, True))
    found = report.judge(fit(H200, seen), held_out)
    assert {j.stage for j in found} == {"forward", "trained forward", "backward"}
    assert len(found) == 3 * len(CELLS) // 2
    # The two orders' noise is in what is compared, and both near a crossing.
    assert max(j.slower for j in found) < 0.07
    assert max(j.slower for j in report.judge(H200, held_out)) > 0.1  # what there was to gain


def test_constants_that_nothing_measured_tells_of_stay() -> None:
    short = [m for m in made(TRUTH) if m.stage == "lists"]
    found = fit(H200, short)
    assert found.sort_rate == pytest.approx(TRUTH.sort_rate, rel=0.05)
    assert found.l2_bandwidth == pytest.approx(H200.l2_bandwidth)
    assert found.efficiency == pytest.approx(H200.efficiency)
    with pytest.raises(ValueError, match="nothing was measured"):
        fit(H200, [])


def test_residuals_are_logs_of_predicted_over_measured() -> None:
    measured = [replace(m, seconds=2 * m.seconds) for m in made(H200, CELLS[:2])]
    assert residuals(measured, H200) == pytest.approx([-math.log(2)] * len(measured))


# -------------------------------------------------------------------------------------------------------- the program


@pytest.fixture
def gpu(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A GPU that takes the times of ``TRUTH``, and the cache directory."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(program, "gpu_of", lambda index: (NAME, cost.Properties("sm_90", 132, 141 << 30)))
    monkeypatch.setattr(program, "measure", lambda cell, device: (made(TRUTH, [cell]), []))
    monkeypatch.setattr(program, "compile_ahead", lambda cells, device, seconds: None)
    return cache


def test_without_a_gpu_it_says_so(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert program.main([]) == 1
    assert "there is no GPU here" in capsys.readouterr().err
    assert not cache.exists()


def test_it_measures_judges_and_keeps(
    gpu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    csv = tmp_path / "measured.csv"
    assert program.main(["--row", "--save", str(csv)]) == 0
    out = capsys.readouterr().out
    assert "constants are shipped" in out
    assert f"choices: {3 * len(CELLS) // 2}, more than 5% slower than the best order: 0" in out
    kept = cost.device_for(NAME)
    assert kept.source == "calibrated on this machine"
    assert kept.l2_bandwidth == pytest.approx(TRUTH.l2_bandwidth, rel=0.02)
    # The row can be pasted.
    rows: dict[str, cost.Device] = {}
    names = {"_TERA": 1e12, "_GIGA": 1e9, "_gpu": cost.device._gpu}
    exec("rows |= {" + out[out.index('    "H200": _gpu(') :].split("\n    ),")[0] + ")}", names | {"rows": rows})
    assert rows["H200"] == replace(
        kept, name="H200", source="shipped", **{f: pytest.approx(getattr(kept, f), rel=0.03) for f in (
            "dram_bandwidth", "l2_bandwidth", "sort_rate", "launch_overhead", "efficiency")}
    )  # fmt: skip
    # What was measured can be fitted again, on any machine.
    file = next(gpu.iterdir())
    before = file.read_text()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert program.main(["--load", str(csv)]) == 0
    assert "more than 5% slower than the best order: 0" in capsys.readouterr().out
    assert file.read_text() == before
    csv.write_text("a,b\n1,2\n")
    assert program.main(["--load", str(csv)]) == 1


def test_it_stops_in_time_and_says_what_is_missing(
    gpu: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = iter(range(0, 10**6, 10))
    monkeypatch.setattr(program.time, "perf_counter", lambda: next(now))
    monkeypatch.setitem(sys.modules, "tqdm", None)  # the plain bar
    assert program.main(["--seconds", "500"]) == 0
    captured = capsys.readouterr()
    assert f"of {len(CELLS)} shapes were measured in 500 s" in captured.out
    assert f"/{len(CELLS)}" in captured.err
    assert program.main(["--seconds", "30"]) == 1
    assert "too few shapes" in capsys.readouterr().err


def test_it_keeps_nothing_that_is_worse_or_wild(
    gpu: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(0)

    def noise(cell: Cell, device: torch.device) -> tuple[list[Measurement], list[str]]:
        return [replace(m, seconds=m.seconds * 10 ** rng.uniform(-2, 2)) for m in made(H200, [cell])], ["it: failed"]

    monkeypatch.setattr(program, "measure", noise)
    assert program.main([]) == 1
    captured = capsys.readouterr()
    assert "nothing is kept: predictions are off by" in captured.err
    assert "not measured: it: failed" in captured.out

    def misleading(cell: Cell, device: torch.device) -> tuple[list[Measurement], list[str]]:
        # What the fit sees is of another GPU than what it is judged by.
        return made(replace(H200, l2_bandwidth=1.5e13) if not cell.held_out else H200, [cell]), []

    monkeypatch.setattr(program, "measure", misleading)
    assert program.main([]) == 1
    assert "constants shipped choose better" in capsys.readouterr().err
    assert not gpu.exists()


def test_a_cell_is_measured_in_every_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, where all orders are one and need no lists; what cannot run is left out and named."""
    cell = Cell(cost.Problem(1, 96, 96, 2, 2, 16, 16, 16, 4, 4), held_out=True)
    found, failed = timing.measure(cell, torch.device("cpu"), seconds=0)
    both = {(order, stage) for order in cost.LOOP_ORDERS for stage in ("forward", "backward")}
    both.remove(("mixed", "backward"))  # which is that of fsa
    assert {(m.order, m.stage) for m in found} == both
    assert all(m.seconds > 0 and m.held_out for m in found)
    assert not failed
    (problem,) = {m.problem for m in found}
    assert replace(problem, agreement=0.0) == cell.problem

    real = timing.selected_attention

    def picky(*args: Any, loop_order: str, **options: Any) -> Any:
        if loop_order == "tile":
            raise RuntimeError("does not fit")
        return real(*args, loop_order=loop_order, **options)

    monkeypatch.setattr(timing, "selected_attention", picky)
    found, failed = timing.measure(cell, torch.device("cpu"), seconds=0)
    assert {m.order for m in found} == set(cost.LOOP_ORDERS) - {"tile"}
    assert [text.split(",")[0] for text in failed] == ["tile forward", "tile backward"]
    assert all("RuntimeError: does not fit" in text for text in failed)

    def large(*args: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(timing, "variants", large)
    assert timing.measure(cell, torch.device("cpu"))[0] == []


def test_a_gpu_is_timed_by_its_own_clock_behind_a_head_start(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")

        def elapsed_time(self, end: Event) -> float:
            return 3.0

    for name in ("synchronize", "_sleep"):
        monkeypatch.setattr(torch.cuda, name, lambda *args, name=name: log.append(name))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert seconds_of(lambda: log.append("run"), torch.device("cuda", 0)) == pytest.approx(3e-3)
    assert log == ["synchronize", "_sleep", "record", "run", "record", "synchronize"]


def test_what_cannot_be_kept_is_said(
    gpu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FSA_COMPILE_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert program.main([]) == 1
    assert "cannot be kept" in capsys.readouterr().err


def test_every_kind_of_kernel_is_compiled_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    found = ahead.kinds(CELLS)
    sizes = {replace(cell.problem, seq_len=1, seq_len_k=1) for cell in CELLS}
    assert {replace(cell.problem, seq_len=1, seq_len_k=1) for cell in found} == sizes
    assert len(found) == len(sizes)
    assert {cell.problem.seq_len for cell in found} == {min(cell.problem.seq_len for cell in CELLS)}

    called: list[Any] = []

    def variants(problem: cost.Problem, device: torch.device) -> tuple[cost.Problem, dict[str, Any]]:
        return problem, {"fails": lambda: 1 / 0, "runs": lambda: called.append((problem, device.type))}

    monkeypatch.setattr(timing, "variants", variants)
    monkeypatch.setattr(ahead.os, "dup2", lambda *args: None)
    ahead.run_once(found, "cpu")
    assert called == [(cell.problem, "cpu") for cell in found]


def hang(cells: list[Cell], device: str) -> None:
    """Stands in for a compiler that does not come back."""
    time.sleep(600)


def test_processes_that_hang_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead.os, "cpu_count", lambda: 4)
    start = time.monotonic()
    ahead.compile_ahead(CELLS, torch.device("cpu"), 0.5, target=hang)
    assert 0.5 <= time.monotonic() - start < 60
    assert not multiprocessing.active_children()


def test_agreement_of_a_selection() -> None:
    problem = cost.Problem(1, 64, 64 * 64, 1, 4, 128, 128, 64, 4, 2)
    assert problem.union_tokens == 16
    same = torch.arange(4, dtype=torch.int32).expand(1, 64, 1, 4)
    assert timing.agreement(same, problem) == 1
    apart = torch.randint(32, (1, 64, 1, 4), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    assert timing.agreement(apart, problem) < 0.15
    assert timing.agreement(torch.where(same > 1, -1, same), problem) == 1  # -1 is no block
