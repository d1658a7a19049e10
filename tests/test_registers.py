"""The limit of registers of a template's kernel: stated in what Inductor writes, and obeyed by who compiles it."""

from __future__ import annotations

import pickle
from typing import Any

from fsa_compile.lowering.registers import limit_registers


class Autotuner:
    """As much of Inductor's as the decorator knows."""

    def __init__(self, num_warps: int) -> None:
        self.num_warps = num_warps

    def _create_compile_options(self, config: Any, meta: dict[str, Any]) -> dict[str, Any]:
        return {"num_warps": self.num_warps, **meta}


def test_the_limit_travels_between_processes() -> None:
    autotuner = limit_registers(128)(Autotuner(8))
    for one in (autotuner, pickle.loads(pickle.dumps(autotuner))):
        assert one._create_compile_options(None, {"debug": False}) == {"num_warps": 8, "debug": False, "maxnreg": 128}
    assert "maxnreg" not in Autotuner(8)._create_compile_options(None, {})


def test_inductor_asks_its_autotuner_for_options() -> None:
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    assert callable(CachingAutotuner._create_compile_options)
