"""What the linters cannot see: who names Inductor's private parts, what README promises, what a wheel holds."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fsa_compile

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fsa_compile"
SOURCES = sorted(PACKAGE.rglob("*.py"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
_PRIVATE = "torch._inductor"


def _mentions(source: str) -> list[str]:
    """Places in the code (not in comments or docstrings) that import or reach into torch._inductor."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        else:
            continue
        found += [f"{node.lineno}: {name}" for name in names if f"{name}.".startswith(f"{_PRIVATE}.")]
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import torch._inductor.config as c",
        "from torch._inductor import ir",
        "from torch import _inductor",
        "import torch\ntorch._inductor.config.trace = 1",
    ],
)
def test_every_way_to_reach_inductor_is_seen(source: str) -> None:
    assert _mentions(source)


def test_one_module_names_inductor() -> None:
    found = {path.relative_to(PACKAGE).as_posix(): _mentions(path.read_text(encoding="utf-8")) for path in SOURCES}
    # The fake GPU is there to look at what Inductor emits.
    assert [path for path, places in found.items() if places] == ["lowering/_inductor.py", "testing/fake_gpu.py"], found


def test_files_stay_small() -> None:
    files = [*SOURCES, *(ROOT / "tests").glob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    lines = {path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {path: count for path, count in lines.items() if count > 400} == {}


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_readme_set_up_commands_are_one_line_each() -> None:
    commands = [block for block in _blocks("sh") if "python3 -m venv .venv" in block]
    assert len(commands) == 2
    for command in commands:
        assert command.count("\n") == 1
    assert commands[0].rstrip().endswith(".venv/bin/python -m fsa_compile.demo")
    assert re.search(r"<!-- ci: tests -->\n```sh\n" + re.escape(commands[1]) + "```", README)
    assert "-m pytest" in commands[1]


def test_readme_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """As printed, at a shorter length."""
    (example,) = _blocks("python")
    assert "4096" in example
    names: dict[str, object] = {}
    exec(compile(example.replace("4096", "320"), "README.md", "exec"), names)
    for name in "qkv":
        gradient = names[name].grad  # type: ignore[attr-defined]
        assert gradient is not None
        assert gradient.isfinite().all()
        assert gradient.abs().sum() > 0
    assert "fsa::nsa_attention" in capsys.readouterr().out


def test_readme_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", README)
    local = [link for link in links if not link.startswith("http")]
    assert local
    assert [link for link in local if not (ROOT / link).exists()] == []


def test_versions_agree() -> None:
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert version.group(1) == fsa_compile.__version__
    assert f"## [{version.group(1)}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


_WITHOUT_TRITON = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "triton" else find(name, package)
sys.modules["triton"] = None
import torch, fsa_compile
q, k = torch.randn(1, 90, 4, 16, requires_grad=True), torch.randn(1, 90, 2, 16)
fsa_compile.nsa_attention(q, k, k).sum().backward()
assert q.grad.isfinite().all() and q.grad.abs().sum() > 0
found = fsa_compile.explain(fsa_compile.nsa_attention, q, k, k)
print(found)
(site,) = found.sites
assert (site.loop_order, site.stages[-1]) == ("fsa", "selected_attention"), site
"""


def test_a_cpu_needs_no_triton() -> None:
    """Triton has no wheels for macOS, whose users develop on their laptops all the same."""
    done = subprocess.run([sys.executable, "-c", _WITHOUT_TRITON], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "fsa::nsa_attention" in done.stdout


def test_wheel_holds_the_whole_package(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        path.relative_to(ROOT).as_posix()
        for pattern in ("*.py", "*.npz", "py.typed")
        for path in PACKAGE.rglob(pattern)
    }
    assert "fsa_compile/testing/selection_16k.npz" in wanted
    assert "fsa_compile/py.typed" in wanted
    assert wanted <= names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]
