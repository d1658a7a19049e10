"""The demo, small: that it trains, compares, times, reports and draws, and what it says when it cannot."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fsa_compile.demo.__main__ import main
from fsa_compile.demo.measure import errors
from fsa_compile.demo.model import ByteLM, Config, selected_blocks
from fsa_compile.demo.picture import block_kinds

_TINY = ["--batch-size", "2", "--layers", "1", "--measure-seconds", "0.1", "--learning-rate", "0.01"]


def _loss(text: str) -> tuple[float, float]:
    first, last = re.search(r"^loss ([\d.]+) -> ([\d.]+) nats per byte$", text, re.MULTILINE).groups()
    return float(first), float(last)


def _errors(text: str, name: str) -> list[float]:
    row = re.search(rf"^{name} +([-+.e\d]+) +([-+.e\d]+) +([-+.e\d]+) +([-+.e\d]+)$", text, re.MULTILINE)
    return [float(number) for number in row.groups()]


def _check(text: str, picture: Path, tolerance: float) -> None:
    first, last = _loss(text)
    assert last < first - 1.0
    compiled, reference = _errors(text, "compiled"), _errors(text, "eager reference")
    # Relative errors; a block chosen otherwise in a tie may cost more than rounding, hence the room.
    for actual, yardstick in zip(compiled[1::2], reference[1::2], strict=True):
        assert actual < max(3 * yardstick, tolerance)
    speeds = re.findall(r"^(NSA|dense SDPA), (eager|compiled) +([\d,]+) tokens/s$", text, re.MULTILINE)
    assert len(speeds) == 4
    assert all(int(speed.replace(",", "")) > 0 for *_, speed in speeds)
    assert "fsa::nsa_attention" in text
    assert "Graph breaks: none" in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_demo_end_to_end(device: str, tmp_path: Path) -> None:
    picture = tmp_path / "demo.png"
    command = [sys.executable, "-m", "fsa_compile.demo", "--device", device, "--steps", "12", "--seq-len", "256"]
    run = subprocess.run(
        [*command, "--gqa-group-size", "3", "--output", str(picture), *_TINY],
        capture_output=True,
        text=True,
        timeout=500,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parent.parent,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "12/12" in run.stderr  # the progress bar
    _check(run.stdout, picture, 1e-4 if device == "cpu" else 5e-2)


def test_eager_run_without_picture(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "none.png"
    arguments = ["--device", "cpu", "--no-compile", "--no-picture", "--steps", "8", "--seq-len", "96"]
    assert main([*arguments, "--output", str(picture), *_TINY]) == 0
    text = capsys.readouterr().out
    first, last = _loss(text)
    assert last < first
    assert len(re.findall(r"tokens/s$", text, re.MULTILINE)) == 2
    assert "compiled" not in text
    assert not picture.exists()


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    find_spec = importlib.util.find_spec
    gone = {"matplotlib", "tqdm"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in gone else find_spec(name))
    assert main(["--steps", "1"]) == 2
    assert capsys.readouterr().err == "the demo needs tqdm and matplotlib: pip install fsa_compile[demo]\n"
    gone.remove("tqdm")
    assert main(["--steps", "1"]) == 2
    assert "needs matplotlib:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps must be at least 1"),
        (["--seq-len", "-4"], "--seq-len must be at least 1"),
        (["--head-dim", "7"], "--head-dim must be even"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_sequence_longer_than_the_text_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--seq-len 1000000000 is longer than the text \(\d+ bytes\)"):
        main(["--device", "cpu", "--seq-len", "1000000000", "--no-picture"])


def test_error_table_sees_an_error() -> None:
    """The comparison that the demo prints would show a model that is off."""
    torch.manual_seed(0)
    model = ByteLM(Config(num_layers=1))
    tokens = torch.randint(256, (2, 130))
    table = errors(model, lambda x: model(x) * 1.001, "off", tokens, tokens)
    logits, gradient = table["off"]
    assert logits.relative == pytest.approx(1e-3, rel=1e-2)
    assert gradient.relative > 1e-4
    assert all(error.relative < 1e-5 for error in table["eager reference"])


def test_selected_blocks_and_their_kinds() -> None:
    torch.manual_seed(0)
    config = Config(num_layers=2)
    seq_len = 320
    block_indices = selected_blocks(ByteLM(config), torch.randint(256, (1, seq_len)), layer=1)
    assert block_indices.shape == (1, seq_len, config.num_kv_heads, config.num_selected)
    queries = [0, 31, 200, 319]
    future, unselected, first, newest, scored = range(5)
    rows = block_kinds(block_indices[0, :, 0], queries, config)
    assert rows[0] == rows[1] == [first] + [future] * 9
    for row, t in zip(rows[2:], queries[2:], strict=True):
        current = t // config.block_size
        assert row[0] == first
        assert row[current - 1 : current + 1] == [newest, newest]
        assert row[current + 1 :] == [future] * (9 - current)
        assert row.count(scored) == min(config.num_selected, current + 1) - 3
        assert row.count(unselected) == current + 1 - min(config.num_selected, current + 1)
