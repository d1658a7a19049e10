"""What importing the package costs a process that never compiles, and that compiling finds the pass all the same."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

_PLAIN = """
import sys, time
import torch
start = time.process_time()
import fsa_compile
taken = time.process_time() - start
assert fsa_compile.is_enabled()
for name in ("torch._dynamo", "torch._inductor", "torch.distributed.tensor", "sympy"):
    assert name not in sys.modules, f"{name} was imported"
print(taken)
"""

_COMPILED = """
import torch
import fsa_compile

q, k, v = torch.randn(1, 32, 2, 16), torch.randn(1, 32, 1, 16), torch.randn(1, 32, 1, 16)
blocks = torch.zeros(1, 32, 1, 1, dtype=torch.int32)
with fsa_compile.lowering.collect_sites() as sites:
    torch.compile(lambda: fsa_compile.selected_attention(q, k, v, blocks, block_size=16)[0], fullgraph=True)()
assert [site.op for site in sites] == ["fsa::selected_attention"], sites
assert fsa_compile.is_enabled()
"""

_SWITCHED_OFF = """
import torch
import fsa_compile

fsa_compile.disable()
import torch._inductor.compile_fx
assert not fsa_compile.is_enabled()
assert torch._inductor.config.joint_custom_pre_pass is None
fsa_compile.enable()
assert torch._inductor.config.joint_custom_pre_pass is fsa_compile.lowering.PASS
"""

_DTENSORS_LATER = """
import importlib.util, sys
import torch
import fsa_compile

assert importlib.util.find_spec("torch.distributed.tensor") is not None  # whoever asks executes nothing
assert "torch.distributed.tensor" not in sys.modules
assert "fsa_compile.ops.dtensor" not in sys.modules
import torch.distributed.tensor
assert "fsa_compile.ops.dtensor" in sys.modules
assert not [finder for finder in sys.meta_path if getattr(finder, "name", "") == "torch.distributed.tensor"]
"""

_DTENSORS_BEFORE = """
import sys
import torch.distributed.tensor
import fsa_compile
assert "fsa_compile.ops.dtensor" in sys.modules
"""


def run(code: str) -> str:
    environment = os.environ | {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}  # a graph from a cache never meets the pass
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_a_process_that_never_compiles_imports_no_compiler() -> None:
    assert float(run(_PLAIN)) < 1.0  # of a core: about 0.4 s, whatever else the machine does


def test_the_pass_is_there_when_the_compiler_is() -> None:
    run(_COMPILED)


def test_switched_off_before_the_compiler_it_stays_off() -> None:
    run(_SWITCHED_OFF)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed")
@pytest.mark.parametrize("code", [_DTENSORS_LATER, _DTENSORS_BEFORE], ids=["later", "before"])
def test_the_placements_come_with_dtensors(code: str) -> None:
    run(code)
