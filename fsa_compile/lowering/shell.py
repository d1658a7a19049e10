"""The Inductor template of a kernel, written from the kernel itself.

The body is the kernel's own source; the parameters become Inductor's hooks, and the call of ``store_output`` becomes
the template's store, behind which Inductor appends the epilogue.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ..templates.kernel import Dense, Kernel, Output, Plan, Strided

__all__ = ["Shell", "shell_of"]


@dataclass
class Shell:
    """A kernel's template for calls of one kind: those that leave out the same optional arguments.

    text: the jinja source. inputs: the names ``def_kernel`` is given, in order, with the plan's tensors by that name.
    numbers: run-time numbers, in the order of the ``number`` hook's index. Every result but the first is an input that
    is written. strided: the inputs that are read through their strides. imports: statements for the generated module.
    rank: how many indices the main store has.
    """

    text: str = ""
    inputs: dict[str, Any] = field(default_factory=dict)
    numbers: list[Any] = field(default_factory=list)
    strided: set[str] = field(default_factory=set)
    imports: list[str] = field(default_factory=list)
    rank: int = 0


def _bind(shell: Shell, name: str, value: Any) -> str:
    """The expression that a kernel's parameter is bound to."""
    if value is None:
        return "None"
    if isinstance(value, Strided):
        shell.inputs[f"{name}_ptr"] = value.tensor
        shell.strided.add(f"{name}_ptr")
        hooks = ", ".join(f'{{{{stride("{name}_ptr", {axis})}}}}' for axis in range(value.tensor.dim() - 1))
        return f"Rows({name}_ptr, ({hooks}))"
    if isinstance(value, Dense):
        shell.inputs[f"{name}_ptr"] = value.tensor
        return f"{name}_ptr"
    if isinstance(value, tuple):
        fields = zip(value._fields, value, strict=True)  # type: ignore[attr-defined]
        shell.imports.append(f"from {type(value).__module__} import {type(value).__name__}")
        return f"{type(value).__name__}({', '.join(_bind(shell, f'{name}_{f}', x) for f, x in fields)})"
    if isinstance(value, (bool, float)):
        return repr(value)
    shell.numbers.append(value)
    return f"{{{{number({len(shell.numbers) - 1})}}}}"


def _indented(lines: Iterable[str], depth: int) -> list[str]:
    return [" " * 4 * depth + line for line in lines]


class _Body:
    """The kernel's statements as template lines."""

    def __init__(self, kernel: Kernel, main: str) -> None:
        (function,) = ast.parse(textwrap.dedent(inspect.getsource(kernel.fn.fn))).body
        assert isinstance(function, ast.FunctionDef)
        self.main, self.rank = main, 0
        self.lines = self._statements(function.body, 1)
        if not self.rank:
            raise NotImplementedError(f"{kernel.name} has no store_output of {main}")

    def _statements(self, statements: list[ast.stmt], depth: int) -> list[str]:
        lines: list[str] = []
        for s in statements:
            if isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant):
                continue  # a docstring
            if isinstance(s, ast.Expr) and isinstance(s.value, ast.Call) and self._is_store(s.value):
                lines += _indented(self._store(s.value, depth), depth)
            elif isinstance(s, (ast.For, ast.If, ast.While)):
                lines += self._block(s, depth)
            else:
                lines += _indented(ast.unparse(s).split("\n"), depth)
        return lines

    def _block(self, s: Any, depth: int) -> list[str]:
        body, orelse = s.body, s.orelse
        s.body, s.orelse = [ast.Pass()], []
        head = ast.unparse(s).split("\n", 1)[0]
        lines = [*_indented([head], depth), *self._statements(body, depth + 1)]
        if orelse:
            lines += [*_indented(["else:"], depth), *self._statements(orelse, depth + 1)]
        return lines

    def _is_store(self, call: ast.Call) -> bool:
        return isinstance(call.func, ast.Name) and call.func.id == "store_output"

    def _store(self, call: ast.Call, depth: int) -> list[str]:
        """``store_output(out, indices, strides, value, mask, shape)``: the strides are Inductor's own."""
        out, indices, _, value, mask, shape = call.args
        if self.rank or ast.unparse(out) != self.main:
            raise NotImplementedError(
                f"store_output of {ast.unparse(out)}: one, of {self.main}, is what a template has"
            )
        assert isinstance(indices, ast.Tuple)
        assert isinstance(shape, ast.Tuple)
        assert isinstance(value, ast.Name)
        assert isinstance(mask, ast.Name)
        self.rank = len(indices.elts)
        names = [f"index_{i}" for i in range(self.rank)]
        lines = [f"{n} = ({ast.unparse(e)}).to(INDEX)" for n, e in zip(names, indices.elts, strict=True)]
        dims = tuple(ast.unparse(e) for e in shape.elts)
        arguments = f"{tuple(names)}, {value.id!r}, {mask.id!r}, indent_width={4 * depth}, val_shape={dims}"
        return [*lines, "{{store_output(" + arguments + ")}}"]


def _names(kernel: Kernel) -> list[str]:
    """Imports for what the kernel's body names: device functions, NamedTuples, constants."""
    module = inspect.getmodule(kernel.fn.fn)
    used = {
        n.id for n in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(kernel.fn.fn)))) if isinstance(n, ast.Name)
    }
    own = {"tl", "triton", "store_output", "Rows"}
    names = sorted(n for n in used - own if hasattr(module, n))
    return [f"from {module.__name__} import {n}" for n in names]  # type: ignore[union-attr]


def shell_of(kernel: Kernel, plan: Plan) -> Shell:
    """The template of ``kernel`` for calls like ``plan``."""
    shell = Shell(imports=["from fsa_compile.templates.sequences import Rows", *_names(kernel)])
    if kernel.hides_lengths:
        shell.imports.append("from fsa_compile.templates.opaque import at_run_time")
    main = next(iter(plan.outputs))
    body = _Body(kernel, main)
    sizes = type(plan.sizes)
    shell.imports.append(f"from {sizes.__module__} import {sizes.__name__}")
    bindings = {name: _bind(shell, name, value) for name, value in plan.inputs.items()}
    for name, output in list(plan.outputs.items())[1:]:
        assert isinstance(output, Output)
        if output.shape is None:
            bindings[name] = "None"
        else:
            shell.inputs[f"{name}_ptr"] = output
            bindings[name] = f"{name}_ptr"
    shell.rank = body.rank
    arguments = ", ".join(f'"{name}"' for name in shell.inputs)
    lines = [f"    {name} = {value}" for name, value in bindings.items()]
    shell.text = "\n".join([f"{{{{def_kernel({arguments})}}}}", *lines, *body.lines]) + "\n"
    shell.imports = sorted(set(shell.imports))
    return shell
