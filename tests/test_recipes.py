"""The recipes in CONTRIBUTING name every file that a change of their kind touches, and no other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fsa_compile"
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")

# What uses the package is no part of a recipe: the demo, and the GPU that tests pretend to have.
_USERS = ("fsa_compile/demo/", "fsa_compile/testing/fake_gpu.py")
# By recipe: an example that is there, as names in code or whole strings, and what its placeholders are.
EXAMPLES = {
    "A stage": (
        {
            "sliding_window_attention",
            "Sliding",
            "sliding_window_attention_forward",
            "sliding_window_attention_backward",
        },
        {"stage": "window"},
    ),
    "A kernel": ({"BANDED_FWD"}, {"family": "banded", "kernel": "forward"}),
    "A loop order": ({"'nsa'"}, {}),
    "An argument": ({"pool"}, {}),
    "A GPU": ({"'H200'"}, {}),
    "A torch version": (set(), {}),
}


def recipe(title: str) -> str:
    (text,) = re.findall(rf"^### {title}\n(.*?)(?=^##)", CONTRIBUTING, re.MULTILINE | re.DOTALL)
    return text


def files_of(title: str, placeholders: dict[str, str]) -> list[str]:
    """The files of a recipe's list."""
    text = recipe(title)
    for name, value in placeholders.items():
        text = text.replace(f"<{name}>", value)
    return re.findall(r"^- `([^`]+)`", text, re.MULTILINE)


def words_of(tree: ast.AST) -> Iterator[str]:
    """Names that code uses or imports, words of its strings, and whole strings in quotes; no documentation."""
    documented = (ast.Module, ast.FunctionDef, ast.ClassDef)
    docs = {
        id(n.body[0].value) for n in ast.walk(tree) if isinstance(n, documented) and isinstance(n.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield from re.findall(r"\w+", node.value)
            yield repr(node.value)
        for field in ("id", "attr", "name", "arg"):
            if isinstance(getattr(node, field, None), str):
                yield getattr(node, field)


WORDS = {
    path.relative_to(ROOT).as_posix(): frozenset(words_of(ast.parse(path.read_text(encoding="utf-8"))))
    for path in sorted(PACKAGE.rglob("*.py"))
}


def test_every_recipe_has_an_example() -> None:
    (recipes,) = re.findall(r"^## Recipes\n(.*?)(?=^## )", CONTRIBUTING, re.MULTILINE | re.DOTALL)
    assert re.findall(r"^### (.+)$", recipes, re.MULTILINE) == list(EXAMPLES)


@pytest.mark.parametrize("title", EXAMPLES)
def test_a_recipe_names_files_that_are_there(title: str) -> None:
    files = files_of(title, EXAMPLES[title][1])
    assert files
    assert [f for f in files if not (ROOT / f).is_file()] == []


@pytest.mark.parametrize("title", [title for title in EXAMPLES if title != "A torch version"])
def test_a_recipe_names_all_that_its_example_touches(title: str) -> None:
    names, placeholders = EXAMPLES[title]
    touched = {f for f, words in WORDS.items() if words & names and not f.startswith(_USERS)}
    listed = {f for f in files_of(title, placeholders) if f.startswith("fsa_compile/")}
    assert touched - listed == set(), "CONTRIBUTING does not name them"
    # A stage's name in the list of them is its folder's.
    assert listed - touched <= ({"fsa_compile/ops/__init__.py"} if title == "A stage" else set()), "nothing to do there"
