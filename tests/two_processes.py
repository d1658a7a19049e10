"""Two processes of one gloo group, which run what tests send them."""

from __future__ import annotations

import datetime
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

TIMEOUT = 240  # seconds, of one case


def _serve(rank: int, store: str, jobs: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)  # each has a core, and one order of sums
    patience = datetime.timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=patience)
    while True:
        case, args = jobs.recv()
        try:
            case(*args)
        except BaseException:
            jobs.send(traceback.format_exc())
        else:
            jobs.send("")


class TwoProcesses:
    """Started by the first case, and anew after one that failed, as it may have left the other waiting."""

    def __init__(self) -> None:
        self._started: list[tuple[Any, Connection]] = []

    def _start(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory(prefix="fsa_compile_gloo_")
        for rank in range(2):
            ours, theirs = spawn.Pipe()
            store = str(Path(self._folder.name) / "store")
            process = spawn.Process(target=_serve, args=(rank, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self._started.append((process, ours))

    def __call__(self, case: Callable[..., None], *args: Any) -> None:
        """Run `case(*args)`, which pickle finds by its name, in both; raise as soon as one has failed."""
        if not self._started:
            self._start()
        waiting = {jobs: rank for rank, (_, jobs) in enumerate(self._started)}
        try:
            for jobs in waiting:
                jobs.send((case, args))
            while waiting:
                answered = wait(list(waiting), TIMEOUT)
                assert answered, f"no answer within {TIMEOUT} seconds"
                for jobs in answered:
                    rank = waiting.pop(jobs)  # type: ignore[call-overload]
                    wrong = jobs.recv()  # type: ignore[union-attr]
                    assert not wrong, f"process {rank}: {wrong}"
        except (AssertionError, EOFError, OSError):
            self.stop()
            raise

    def stop(self) -> None:
        for process, jobs in self._started:
            process.kill()
            process.join()
            jobs.close()
        if self._started:
            self._folder.cleanup()
        self._started = []
