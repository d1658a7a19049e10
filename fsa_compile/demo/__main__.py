"""``python -m fsa_compile.demo``; see ``--help``."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shutil
import sys
import time
from pathlib import Path

import torch

import fsa_compile
from fsa_compile.demo.measure import Error, errors, settle_threads, tokens_per_second
from fsa_compile.demo.model import ByteLM, Config, dense, selected_blocks
from fsa_compile.demo.training import Batches, Forward, autocast, corpus, train

# The float64 reference holds [heads, seq_len, seq_len] matrices: longer sequences are compared on their front only.
_REFERENCE_SEQ_LEN = 2048


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fsa_compile.demo",
        description="Train a small byte-level language model with Native Sparse Attention under torch.compile on the "
        "sources of Python's standard library, then check it against plain PyTorch, time it and draw what it selects.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seq-len", type=int, default=1024, help="tokens (bytes) in a sequence")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--gqa-group-size", type=int, default=2, help="query heads to a key/value head")
    parser.add_argument("--num-kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--threads", type=int, default=0, help="CPU threads; 0: all cores, one if they are busy already"
    )
    parser.add_argument("--measure-seconds", type=float, default=3.0, help="how long to time each variant")
    parser.add_argument("--output", type=Path, default=Path("fsa_demo.png"), help="where the picture goes")
    parser.add_argument("--no-picture", action="store_true")
    parser.add_argument("--no-compile", action="store_true", help="everything eager")
    arguments = parser.parse_args(argv)
    for name in ("seq_len", "batch_size", "gqa_group_size", "num_kv_heads", "layers", "steps"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if arguments.head_dim < 2 or arguments.head_dim % 2:
        parser.error("--head-dim must be even: rotary embedding turns pairs")
    return arguments


def missing_packages(picture: bool) -> list[str]:
    needed = ["tqdm"] + (["matplotlib"] if picture else [])
    return [name for name in needed if importlib.util.find_spec(name) is None]


def cpu_compiler() -> str | None:
    """torch.compile's CPU back end writes C++; the compiler it would call, if there is one."""
    return next((name for name in (os.environ.get("CXX"), "g++", "clang++") if name and shutil.which(name)), None)


def heading(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}")


def show_errors(table: dict[str, tuple[Error, Error]]) -> None:
    print(f"{'':16}  {'logits':^22}  {'gradients':^22}")
    print(f"{'':16}  {'largest':>10}  {'relative':>10}  {'largest':>10}  {'relative':>10}")
    for name, (logits, gradient) in table.items():
        numbers = (logits.largest, logits.relative, gradient.largest, gradient.relative)
        print(f"{name:16}  " + "  ".join(f"{number:10.1e}" for number in numbers))


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU ({threads} thread{'s' * (threads > 1)}, {platform.machine()})"


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    missing = missing_packages(not arguments.no_picture)
    if missing:
        print(f"the demo needs {' and '.join(missing)}: pip install fsa_compile[demo]", file=sys.stderr)
        return 2
    from tqdm import tqdm

    began = time.perf_counter()
    device = torch.device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    elif device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        settle_threads()
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("highest")
    config = Config(
        num_layers=arguments.layers,
        num_kv_heads=arguments.num_kv_heads,
        gqa_group_size=arguments.gqa_group_size,
        head_dim=arguments.head_dim,
    )
    model = ByteLM(config).to(device)
    text, num_files = corpus()
    batches = Batches(text, arguments.batch_size, arguments.seq_len, device, arguments.seed)

    compiling, backend = not arguments.no_compile, "inductor"
    if compiling and device.type == "cpu" and cpu_compiler() is None:
        print("No C++ compiler found (g++ or clang++): tracing with the aot_eager back end instead of Inductor.")
        backend = "aot_eager"
    how = "compiled" if compiling else "eager"

    def compile_(module: torch.nn.Module) -> Forward:
        return torch.compile(module, fullgraph=True, backend=backend) if compiling else module

    heading("Native Sparse Attention on the Python standard library")
    parameters = sum(p.numel() for p in model.parameters())
    print(f"text      {text.numel() / 1e6:.1f} MB in {num_files} files of Python {platform.python_version()}'s library")
    print(
        f"model     {parameters / 1e6:.2f} M parameters, {config.num_layers} layers, {config.num_q_heads} query and "
        f"{config.num_kv_heads} key/value heads of {config.head_dim}"
    )
    print(
        f"attention {config.num_selected} selected blocks of {config.block_size}, window {config.window_size}, "
        f"compression {config.kernel_size}/{config.kernel_stride}: "
        f"at most {config.num_selected * config.block_size + config.window_size} of {arguments.seq_len} keys, "
        "and the compressed ones"
    )
    precision = "bf16 autocast" if device.type == "cuda" else "fp32"
    print(f"machine   {device_name(device)}, torch {torch.__version__}, {precision}")

    heading(f"Training, {how}, {arguments.steps} steps of {arguments.batch_size} x {arguments.seq_len} bytes")
    forward = compile_(model)
    losses: list[float] = []
    if compiling:
        print("(the first step compiles)")
    bar = tqdm(
        train(model, forward, batches, arguments.steps, arguments.learning_rate), total=arguments.steps, unit="step"
    )
    for loss in bar:
        losses.append(loss)
        bar.set_postfix_str(f"loss {loss:.3f}")
    tail = losses[-max(1, len(losses) // 10) :]
    print(f"loss {losses[0]:.3f} -> {sum(tail) / len(tail):.3f} nats per byte")

    tokens, targets = batches()
    length = min(arguments.seq_len, _REFERENCE_SEQ_LEN)
    heading(f"How exact: errors against float64, {arguments.batch_size} x {length} bytes")
    show_errors(errors(model, forward, how, tokens[:, :length], targets[:, :length]))
    print("'eager reference' is plain PyTorch at the same precision: what any implementation would be off by.")
    print("largest: of the absolute differences; relative: Frobenius norms.")

    heading(f"How fast: forward + backward, {arguments.batch_size} x {arguments.seq_len} bytes")
    dense_model = model.with_attention(dense)
    runs: dict[str, Forward] = {"NSA, eager": model, "dense SDPA, eager": dense_model}
    if compiling:
        runs = {"NSA, compiled": forward, **runs, "dense SDPA, compiled": compile_(dense_model)}
    speeds = {name: tokens_per_second(run, tokens, targets, arguments.measure_seconds) for name, run in runs.items()}
    for name, speed in speeds.items():
        print(f"{name:22}{speed:12,.0f} tokens/s")
    print("Dense attention is faster at short lengths; its cost per token grows with them far more than NSA's does.")

    if compiling:
        heading("What the compiler did: fsa_compile.explain(model, tokens)")
        with autocast(device):
            print(fsa_compile.explain(model, tokens))

    if not arguments.no_picture:
        from fsa_compile.demo.picture import draw

        layer, head = config.num_layers - 1, 0
        with autocast(device):
            block_indices = selected_blocks(model, tokens[:1], layer)[0, :, head].cpu()
        draw(
            arguments.output,
            losses,
            block_indices,
            where=f"layer {layer}, key/value head {head}",
            title=f"fsa_compile demo: {parameters / 1e6:.2f} M parameters on {device_name(device)}",
            config=config,
        )
        print(f"\nPicture: {arguments.output} (the loss, and which blocks some queries select)")
    print(f"\nDone in {time.perf_counter() - began:.0f} s.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
