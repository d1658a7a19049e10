"""Inductor's caches: they serve another process, and never a program of other sources."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fsa_compile
from fsa_compile.lowering import install

ROOT = Path(fsa_compile.__file__).resolve().parent

_CHILD = """
import json, sys
import torch
import fsa_compile
from torch._dynamo.utils import counters

def fn(q, k, v, block_indices):
    return fsa_compile.selected_attention(q, k, v, block_indices, block_size=16)[0]  # nothing for a C++ compiler

torch.manual_seed(0)
q, k, v = (torch.randn(1, 32, 2, 16) for _ in range(3))
block_indices = (torch.arange(32) // 16).view(1, 32, 1, 1).expand(1, 32, 2, 1).to(torch.int32)
out = torch.compile(fn, fullgraph=True)(q, k, v, block_indices)
torch.testing.assert_close(out, fn(q, k, v, block_indices))
found = {**counters["inductor"], **counters["aot_autograd"]}
print(json.dumps({"file": fsa_compile.__file__, **{key: n for key, n in found.items() if "cache" in key}}))
"""


def test_cache_hits_in_a_second_process_and_misses_after_an_edit(tmp_path: Path) -> None:
    shutil.copytree(ROOT, tmp_path / "fsa_compile", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "child.py").write_text(_CHILD)

    def compiled_anew() -> bool:
        env = {**os.environ, "PYTHONPATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
        env.pop("FSA_COMPILE_VALIDATE", None)
        done = subprocess.run(
            [sys.executable, "child.py"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-4000:]
        found = json.loads(done.stdout.splitlines()[-1])
        assert found["file"].startswith(str(tmp_path))
        hits = found.get("fxgraph_cache_hit", 0) + found.get("autograd_cache_hit", 0)
        misses = found.get("fxgraph_cache_miss", 0)
        assert bool(hits) != bool(misses), found
        return bool(misses)

    assert compiled_anew()
    assert not compiled_anew()
    path = tmp_path / "fsa_compile" / "templates" / "selected" / "merge_partials.py"
    path.write_text(path.read_text() + "# an edit")
    assert compiled_anew(), "stale code after an edit"


def test_every_source_file_is_hashed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    copy = tmp_path / "fsa_compile"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(install, "__file__", str(copy / "lowering" / "install.py"))
    hash_now = install.source_hash.__wrapped__
    (copy / "templates" / "tuned").mkdir(exist_ok=True)
    (copy / "templates" / "tuned" / "some_gpu.json").write_text("{}")
    seen = {hash_now()}
    sources = sorted(p for p in copy.rglob("*") if p.suffix in (".py", ".json"))
    assert any(p.suffix == ".json" for p in sources)
    for path in sources:
        path.write_bytes(path.read_bytes() + b"\n")
        seen.add(hash_now())
    assert len(seen) == len(sources) + 1
