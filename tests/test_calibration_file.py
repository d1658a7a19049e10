"""The file of a calibration is read, refused where it is broken or of other kernels, and answered for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from calibrations import H200, NAME, TRUTH, saved

from fsa_compile import cost
from fsa_compile.calibrate.grid import CELLS
from fsa_compile.cost import calibration
from fsa_compile.lowering.install import PASS, PRE_GRAD_PASS


def test_a_calibration_is_what_choices_are_made_by(cache: Path) -> None:
    assert cost.device_for(NAME) is H200
    file = saved()
    assert file.parent == cache
    found = cost.device_for(NAME)
    assert found == replace(TRUTH, name=NAME, source="calibrated on this machine")
    assert cost.device_for("NVIDIA H100 80GB HBM3") is cost.DEVICES["H100"]
    choice = cost.choose(CELLS[0].problem, found)
    assert "on NVIDIA H200 (constants calibrated on this machine)" in choice.reason
    assert f"{NAME}" in cost.describe()
    assert "calibrated on this machine" in cost.describe()
    assert [p.name for p in cache.iterdir()] == [file.name]  # nothing half written is left


def _edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    def edit(file: Path) -> None:
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    return edit


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda file: file.write_text(file.read_text()[:100]), "Expecting|Unterminated"),
        (lambda file: file.write_bytes(b"\xff\xfe\x00"), "decode"),
        (lambda file: file.write_text("[]"), "holds a list"),
        (_edited(lambda c: c.update(dram_bandwidth=float("nan"))), "its dram_bandwidth is nan"),
        (_edited(lambda c: c.update(l2_bandwidth=-1.0)), "its l2_bandwidth is -1.0"),
        (_edited(lambda c: c.pop("sort_rate")), "its sort_rate is None"),
        (_edited(lambda c: c["efficiency"].pop("query-outer")), "its efficiencies"),
        (_edited(lambda c: c.update(kernels="0123456789ab")), "of kernels 0123456789ab"),
        (_edited(lambda c: c.update(name=None)), "does not name its device"),
    ],
)
def test_a_broken_file_is_ignored_and_told_of(
    cache: Path, spoil: Callable[[Path], Any], complaint: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = saved()
    spoil(file)
    calibration.forget()
    assert cost.device_for(NAME) is H200
    (record,) = caplog.records
    assert str(file) in record.message
    with pytest.raises(ValueError, match=complaint):
        calibration.load(file)


def test_a_file_of_other_kernels_is_ignored(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved()
    monkeypatch.setattr(calibration, "kernels_version", lambda: "0123456789ab")
    calibration.forget()
    assert cost.device_for(NAME) is H200


def test_the_version_follows_the_kernels_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "package"
    for name in calibration._KERNELS:
        file = root / name if name.endswith(".py") else root / name / "kernel.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("one")
        assert (calibration._ROOT / name).exists()
    monkeypatch.setattr(calibration, "_ROOT", root)
    version = calibration.kernels_version.__wrapped__
    before = version()
    (root / "templates" / "kernel.py").write_text("two")
    assert before != version()
    (root / "templates" / "kernel.py").write_text("one")
    assert before == version()


def test_where_files_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("FSA_COMPILE_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert calibration.cache_dir() == Path("/home/someone/.cache/fsa_compile")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert calibration.cache_dir() == Path("/home/someone/.cache/fsa_compile")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache")
    assert calibration.cache_dir() == Path("/var/cache/fsa_compile")
    monkeypatch.setenv("FSA_COMPILE_CACHE_DIR", "~/mine")
    assert calibration.cache_dir() == Path("/home/someone/mine")


def test_compiled_code_is_of_one_calibration(cache: Path) -> None:
    without = PASS.uuid()
    pre_grad = PRE_GRAD_PASS.uuid()
    file = saved()
    first = PASS.uuid()
    saved(replace(TRUTH, l2_bandwidth=1e12))
    second = PASS.uuid()
    assert len({without, first, second}) == 3
    # Another process may write at any time; this one keeps to what it has read.
    file.unlink()
    assert PASS.uuid() == second
    assert cost.device_for(NAME).l2_bandwidth == 1e12
    calibration.forget()
    assert PASS.uuid() == without
    assert PRE_GRAD_PASS.uuid() == pre_grad  # what is recognised depends on no constant
