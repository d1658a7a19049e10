"""Devices, hypothesis profiles, and the GPU tests left out where there is none."""

from __future__ import annotations

import atexit
import fcntl
import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

if "PYTEST_XDIST_WORKER" not in os.environ:
    # What an earlier run of the tests compiled must not decide this one: a graph from a cache never meets the pass.
    # Workers and the processes that tests start inherit it.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="fsa_compile_tests_")
    # Nor must what was calibrated on this machine.
    os.environ["FSA_COMPILE_CACHE_DIR"] = os.path.join(os.environ["TORCHINDUCTOR_CACHE_DIR"], "no_calibration")
    atexit.register(shutil.rmtree, os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)

# Several processes, each with as many threads as there are cores, would wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start, too

import pytest
import torch
from hypothesis import HealthCheck, settings

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

if os.environ.get("TRITON_INTERPRET") == "1":
    torch.use_deterministic_algorithms(True)  # memory that no kernel wrote is NaN, and not what happens to lie there

_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=25, suppress_health_check=_SLOW)
settings.register_profile("quick", derandomize=True, deadline=None, max_examples=5, suppress_health_check=_SLOW)
settings.register_profile("thorough", deadline=None, max_examples=400, suppress_health_check=_SLOW)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Each device that the operators are implemented for."""
    return request.param


@pytest.fixture(autouse=True)
def memory_for_others() -> Iterator[None]:
    """A worker of several does not keep what its tests no longer need."""
    yield
    if torch.cuda.is_initialized() and torch.cuda.memory_reserved() > 2**30:
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def own_garbage() -> None:
    """What is collected during a test is of its own making: to look at a million objects of the compiler takes a second
    each time, which is how long many a test takes.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture
def much_memory() -> Iterator[None]:
    """For a test that takes tens of GiB of a GPU: one at a time, whatever the number of workers."""
    with open(os.path.join(tempfile.gettempdir(), "fsa_compile_much_memory.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
        torch.cuda.empty_cache()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty directory of calibrations."""
    from fsa_compile.cost import calibration

    monkeypatch.setenv("FSA_COMPILE_CACHE_DIR", str(tmp_path / "cache"))
    calibration.forget()
    yield tmp_path / "cache"
    monkeypatch.undo()
    calibration.forget()


@pytest.fixture
def uncut(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cost model of calls that are never cut in parts, as the H200's measurements are of."""
    from fsa_compile.cost import choice

    monkeypatch.setattr(choice, "WORKSPACE", 1 << 62)
    choice.choose.cache_clear()
    yield
    monkeypatch.undo()
    choice.choose.cache_clear()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
