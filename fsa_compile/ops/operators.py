"""Every semantic operator, once: its schema, its signature, its argument checks and its fake kernel follow from the
names of its arguments and results.

In this package a name means one thing wherever it stands, so the glossary is code: what an argument is called says its
type, default, layout and dtype. The checks of an operator are generated as straight-line source, once, so that a call
pays for nothing but them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from . import arguments, options
from .arguments import BLOCKS, BOUNDS, K_CMP, LENGTHS, OUT, ROWS, V_CMP, X_CMP, K, Q, V, X

__all__ = ["ATTENTION_OPS", "BACKWARD_OPS", "OPERATORS", "SEMANTIC_OPS", "TENSORS", "Operator", "Tensor"]

DATA, GATE = "data", "gate"  # of the call's one dtype; of any floating dtype
REQUIRED = inspect.Parameter.empty


class Tensor(NamedTuple):
    """A tensor's layout and dtype."""

    layout: tuple[str, ...]
    dtype: torch.dtype | str = DATA


# A row's softmax is `exp(scale * (q @ k - shift) - log_sum)`, its log-sum-exp `scale * shift + log_sum`. One float32
# number would not do: at logits of 1e4 it is off by 5e-4, and so would be every probability that a backward makes of
# it.
TENSORS: dict[str, Tensor] = {
    "q": Tensor(Q), "k": Tensor(K), "v": Tensor(V), "k_cmp": Tensor(K_CMP), "v_cmp": Tensor(V_CMP),
    "x": Tensor(X), "x_cmp": Tensor(X_CMP), "grad_x_cmp": Tensor(X_CMP),
    "g_cmp": Tensor(ROWS, GATE), "g_slc": Tensor(ROWS, GATE), "g_swa": Tensor(ROWS, GATE),
    "block_indices": Tensor(BLOCKS, torch.int32), "lse": Tensor(ROWS, torch.float32),
    "out": Tensor(OUT), "shift": Tensor(ROWS, torch.float32), "log_sum": Tensor(ROWS, torch.float32),
    "grad_out": Tensor(OUT), "grad_log_sum": Tensor(ROWS, torch.float32),
    "dq": Tensor(Q), "dk": Tensor(K), "dv": Tensor(V), "dk_cmp": Tensor(K_CMP), "dv_cmp": Tensor(V_CMP),
    "dx": Tensor(X),
    "cu_seqlens": Tensor(BOUNDS, torch.int32), "cu_seqlens_q": Tensor(BOUNDS, torch.int32),
    "cu_seqlens_k": Tensor(BOUNDS, torch.int32), "seqused": Tensor(LENGTHS, torch.int32),
    "leftpad": Tensor(LENGTHS, torch.int32), "seqused_k": Tensor(LENGTHS, torch.int32),
    "leftpad_k": Tensor(LENGTHS, torch.int32),
}  # fmt: skip
OPTIONS: dict[str, tuple[str, Any]] = {  # type in the schema, default
    "block_size": ("int", 64), "num_selected": ("int", 16), "kernel_size": ("int", 32), "kernel_stride": ("int", 16),
    "init_blocks": ("int", 1), "local_blocks": ("int", 2), "window_size": ("int", 512), "seq_len": ("SymInt", REQUIRED),
    "seq_len_k": ("SymInt?", None), "scale": ("float?", None), "pool": ("str", "overlap"),
    "loop_order": ("str", "auto"), "cu_seqlens": ("Tensor?", None), "cu_seqlens_q": ("Tensor?", None),
    "cu_seqlens_k": ("Tensor?", None), "max_seqlen_q": ("SymInt?", None), "max_seqlen_k": ("SymInt?", None),
    "seqused": ("Tensor?", None), "leftpad": ("Tensor?", None), "seqused_k": ("Tensor?", None),
    "leftpad_k": ("Tensor?", None),
}  # fmt: skip

_PACKED, _PADDED = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k", "seqused_k leftpad_k"
_WINDOWS, _FORCED, _RESULTS = "kernel_size kernel_stride", "init_blocks local_blocks", "out shift log_sum"

# The checks of options, each made where its operator has the named ones. The first come before any tensor.
_FIRST_CHECKS = (("kernel_size", "windows(kernel_size, kernel_stride)"),)
_CHECKS = (
    ("cu_seqlens_q", f"packed({', '.join(_PACKED.split())})"),
    ("seqused_k", "padded('cu_seqlens_q', cu_seqlens_q, seqused_k=seqused_k, leftpad_k=leftpad_k)"),
    ("cu_seqlens", "cu_seqlens('cu_seqlens', cu_seqlens)"),
    ("seqused", "padded('cu_seqlens', cu_seqlens, seqused=seqused, leftpad=leftpad)"),
    ("block_size", "block_size(block_size, {stride})"),
    ("num_selected", "selection(num_selected, init_blocks, local_blocks)"),
    ("window_size", "window(window_size)"),
    ("pool", "pool(pool, lse)"),
    ("loop_order", "loop_order(loop_order)"),
)


class Operator:
    """One operator. Names are apart by spaces; `x?` may be None and is by default, `x!` may be None or has no default.

    inputs: positional arguments. options: keyword arguments. results: what it returns. bundle: the tuple that an
    implementation gets the options as.
    """

    def __init__(self, name: str, inputs: str, options: str, results: str, bundle: type[Any] | None) -> None:
        self.name, self.bundle, self.results = name, bundle, tuple(results.split())
        self.public = name.removesuffix("_forward")  # under which its errors are reported
        self._marked = (*inputs.split(), *options.split())
        glossary = [name.rstrip("?!") for name in inputs.split()]
        # a mean's own upstream gradient goes by another layout than an attention's
        self.tensors = {name.replace("grad_x_cmp", "grad_out"): TENSORS[name] for name in glossary}
        self.inputs = tuple(self.tensors)
        self.options = tuple(name.rstrip("?!") for name in options.split())
        self.optional = {name[:-1] for name in self._marked if name[-1] in "?!"}

    def _default(self, name: str) -> Any:
        if f"{name}!" in self._marked:
            return REQUIRED
        return OPTIONS[name][1] if name in OPTIONS else None if f"{name}?" in self._marked else REQUIRED

    @property
    def signature(self) -> inspect.Signature:
        """Python's view: names, kinds and defaults."""
        kinds: list[tuple[str, Any]] = [(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in self.inputs]
        kinds += [(name, inspect.Parameter.KEYWORD_ONLY) for name in self.options]
        return inspect.Signature([inspect.Parameter(name, kind, default=self._default(name)) for name, kind in kinds])

    @property
    def schema(self) -> str:
        """The dispatcher's view."""
        parts = []
        for p in self.signature.parameters.values():
            type_ = OPTIONS[p.name][0] if p.name in OPTIONS else "Tensor?" if p.name in self.optional else "Tensor"
            default = "" if p.default is REQUIRED else f"={p.default}"
            default = f'="{p.default}"' if isinstance(p.default, str) else default
            if p.kind is p.KEYWORD_ONLY and "*" not in parts:
                parts.append("*")
            parts.append(f"{type_} {p.name}{default}")
        results = ", ".join(f"Tensor {name}" for name in self.results)
        return f"{self.name}({', '.join(parts)}) -> {'Tensor' if len(self.results) == 1 else f'({results})'}"

    @property
    def arguments(self) -> tuple[str, ...]:
        return (*self.inputs, *self.options)

    @property
    def is_composite(self) -> bool:
        """Whether it is made of others, and has no implementation, autograd and fake kernel of its own."""
        return self.bundle is None or self.name == "nsa_attention"

    @functools.cached_property
    def layouts(self) -> dict[str, tuple[str, ...]]:
        """What the dimensions of each tensor are, keywords included."""
        keywords = {name: TENSORS[name] for name in self.options if name in TENSORS}
        return {name: tensor.layout for name, tensor in (self.tensors | keywords).items()}

    # ------------------------------------------------------------------------------------------------- generated code

    def compile(self, *body: str, checked: bool = True, **namespace: Any) -> Callable[..., Any]:
        """A function of the operator's signature: its checks, which leave a `call`, and then the lines of `body`."""
        parameters = str(self.signature).replace("<", "_").replace(">", "_")
        body = (*self._checks(), *body) if checked else body
        lines = [f"def {self.name}{parameters}:", *(f"    {line}" for line in body)]
        names = {"Call": arguments.Call, "TENSORS": TENSORS, **vars(arguments), **vars(options), **namespace}
        exec(compile("\n".join(lines), f"<fsa::{self.name}>", "exec"), names)
        made = names[self.name]
        made.__module__, made.__qualname__ = __name__, f"{self.name}"
        return made

    def _checks(self) -> list[str]:
        nsa = self.name == "nsa_attention"
        has = set(self.options)
        lines = [f"call = Call({self.public!r})"]
        if not nsa:
            lines += [f"call.{check}" for name, check in _FIRST_CHECKS if name in has]
        if "seq_len" in has:
            lines.append("call.dims['seq_len'] = seq_len")
        compressed = False
        late: list[str] = []  # upstream gradients, once the others have fixed the dtype
        for name, (layout, dtype) in self.tensors.items():
            if layout in (K_CMP, V_CMP, X_CMP) and not compressed:
                compressed = True
                lines += ["call.lengths_k(seq_len_k)"] if "seq_len_k" in has else []
                lines.append(self.compressed)
            check = f"call.{self._check_of(name, layout, dtype)}"
            (late if name.startswith("grad_") and len(self.inputs) > 1 else lines).append(check)
        lines += [*late, "call.heads()"]
        if nsa:
            lines += [
                "call.windows(kernel_size, kernel_stride)",
                "call.branches(window_size, k_cmp, v_cmp, g_cmp)",
                "if k_cmp is not None:",
                f"    {self.compressed}",
                f"    call.{self._check_of('k_cmp', *TENSORS['k_cmp'])}",
                f"    call.{self._check_of('v_cmp', *TENSORS['v_cmp'])}",
                "if block_indices is not None:",
                f"    call.{self._check_of('block_indices', *TENSORS['block_indices'])}",
            ]
        stride = "kernel_stride" if "kernel_stride" in has else "None"
        for name, check in _CHECKS:
            if name in has and not (nsa and name == "window_size"):
                guard = "if block_indices is None: " if nsa and name == "num_selected" else ""
                lines.append(f"{guard}call.{check.format(stride=stride)}")
        if "scale" in has and self.name.endswith(("_forward", "_backward")):
            lines.append("call.scale(scale)")
        return lines

    @property
    def compressed(self) -> str:
        """The line that fixes how many compressed tokens there are."""
        if "cu_seqlens_q" in self.options:
            return "call.compressed(kernel_size, kernel_stride, cu_seqlens_q)"
        return "call.compressed(kernel_size, kernel_stride, cu_seqlens, of='seq_len')"

    @staticmethod
    def _check_of(name: str, layout: tuple[str, ...], dtype: Any) -> str:
        if dtype is DATA:
            return f"data({name!r}, {name}, {layout})"
        if dtype is GATE:
            return f"gate({name!r}, {name})"
        return f"typed({name!r}, {name}, {layout}, torch.{str(dtype).removeprefix('torch.')})"

    def check(self) -> Callable[..., Any]:
        """The checks alone; returns the call that knows every size."""
        return self.compile("return call")

    def fake(self) -> Callable[..., Any]:
        """Empty, contiguous results, of the shapes and dtypes that their names say."""
        lines = ["dims = call.dims"]
        if self.results == ("x_cmp",):
            lines += [self.compressed, "dims['num_compressed'] = free(dims['num_compressed'])"]
        like = next(name for name, t in self.tensors.items() if t.dtype is DATA and name not in self.optional)
        made = []
        for name in self.results:
            layout, dtype = TENSORS[name]
            sizes = ", ".join(d if d in self.options else f"dims[{d!r}]" for d in layout)
            empty = f"{like}.new_empty(({sizes},){'' if dtype is DATA else f', dtype={dtype}'})"
            made.append(empty)
        return self.compile(*lines, f"return {', '.join(made)}", free=_free)


def _free(length: Any) -> Any:
    """How many compressed tokens there are, while a graph is exported: a size of its own. It may be 0 or 1 where the
    keys are few, and torch would hold a size that is told from theirs to be more than that if it is so now.
    """
    if isinstance(length, int) or not torch.compiler.is_exporting():
        return length
    return torch.library.get_ctx().new_dynamic_size()


def _operators() -> dict[str, Operator]:
    stages = {  # inputs; options; gradients; bundle
        "selected_attention": (
            "q k v block_indices", f"block_size scale {_PACKED} loop_order {_PADDED}", "dq dk dv", options.Selected,
        ),
        "compressed_attention": (
            "q k_cmp v_cmp", f"{_WINDOWS} seq_len_k scale {_PACKED} {_PADDED}", "dq dk_cmp dv_cmp", options.Compressed,
        ),
        "sliding_window_attention": (
            "q k v", f"window_size! scale {_PACKED} {_PADDED}", "dq dk dv", options.Sliding,
        ),
    }  # fmt: skip
    made = [
        Operator(
            "nsa_attention", "q k v g_cmp? g_slc? g_swa?",
            f"k_cmp? v_cmp? block_indices? block_size num_selected {_WINDOWS} {_FORCED} window_size scale {_PACKED} "
            f"loop_order {_PADDED}", "out", options.Nsa,
        ),
        Operator(
            "select_blocks", "q k_cmp lse!",
            f"block_size num_selected {_WINDOWS} {_FORCED} seq_len_k scale {_PACKED} pool {_PADDED}", "block_indices",
            options.Selection,
        ),
        Operator("mean_compress", "x", f"{_WINDOWS} cu_seqlens seqused leftpad", "x_cmp", options.Compression),
        Operator(
            "mean_compress_backward", "grad_x_cmp", f"seq_len {_WINDOWS} cu_seqlens seqused leftpad", "dx",
            options.CompressionBackward,
        ),
    ]  # fmt: skip
    for name, (inputs, names, grads, bundle) in stages.items():
        made += [
            Operator(name, inputs, names, "out lse", None),
            Operator(f"{name}_forward", inputs, names, _RESULTS, bundle),
            Operator(f"{name}_backward", f"grad_out! grad_log_sum! {inputs} {_RESULTS}", names, grads, bundle),
        ]
    return {op.name: op for op in made}


OPERATORS = _operators()
SEMANTIC_OPS = tuple(OPERATORS)
BACKWARD_OPS = tuple(name for name in OPERATORS if name.endswith("_backward"))
# Of these, `<name>` is made of `<name>_forward`, which has the autograd and the kernels.
ATTENTION_OPS = tuple(name.removesuffix("_forward") for name in OPERATORS if name.endswith("_forward"))
