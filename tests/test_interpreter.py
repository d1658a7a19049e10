"""The kernels' tests in Triton's interpreter, in processes of their own: it has to be on before Triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


# Files and which of their tests: nothing is left out, no process takes long, and none is started for little.
PARTS = [
    ("test_kernels.py", "fsa"),
    pytest.param("test_kernels.py", "nsa", marks=pytest.mark.slow),
    ("test_kernels.py test_union_kernels.py", "not fsa and not nsa"),
    ("test_layout_kernels.py", "fsa or cut"),
    pytest.param("test_layout_kernels.py", "not fsa and not cut", marks=pytest.mark.slow),
    pytest.param("test_banded_kernels.py", "", marks=pytest.mark.slow),
    ("test_selection_kernels.py test_compression_kernels.py", ""),
]


def test_every_file_of_kernel_tests_is_run() -> None:
    files = {file for part in PARTS for file in getattr(part, "values", part)[0].split()}
    assert files == {path.name for path in TESTS.glob("test_*kernels.py")}


@pytest.mark.parametrize(("files", "part"), PARTS)
def test_kernels_in_the_interpreter(files: str, part: str) -> None:
    command = [sys.executable, *"-m pytest -q -p no:cacheprovider -m interpreter".split(), "-k", part]
    done = subprocess.run(
        [*command, *(str(TESTS / file) for file in files.split())],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
