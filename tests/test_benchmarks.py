"""The benchmarks run, check what they time, and write rows that say what they were measured with."""

from __future__ import annotations

import csv
import functools
import gc
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import fsa_compile  # noqa: E402
from benchmarks import attentions, common, decoder, exact, models, peers, selected, whole  # noqa: E402
from fsa_compile.ops import reference  # noqa: E402
from fsa_compile.testing.inputs import causal_block_indices  # noqa: E402

_SMALL = ["--device", "cpu", "--dtype", "float32", "--heads", "4/2", "--head-dim", "16", "--rounds", "2"]
_PROVIDERS = ["--providers", "eager", "dense-math"]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("benchmark") / "whole.csv"
    assert whole.main([*_SMALL, *_PROVIDERS, "--lengths", "200", "1100", "--out", str(out)]) == 0
    return out


def test_whole(measured: Path) -> None:
    rows = rows_of(measured)
    passes = {(row["what"], row["pass"]) for row in rows if row["provider"] == "eager"}
    assert passes == {
        *((what, name) for what in whole.STAGES if what != "select" for name in ("forward", "backward")),
        ("select", "forward"),
        ("whole", "step"),
    }
    assert {row["seq_len"] for row in rows} == {"200", "1100"}
    assert {row["pass"] for row in rows if row["provider"] == "dense-math"} == {"forward", "backward", "step"}
    for row in rows:
        assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert float(row["error"]) < 1e-4
        for column in ("date", "commit", "torch", "triton", "device"):
            assert row[column]


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = fsa_compile.sliding_window_attention

    def late(*args: Any, **options: Any) -> Any:
        return right(*args, **{**options, "window_size": options["window_size"] - 1})

    monkeypatch.setattr(fsa_compile, "sliding_window_attention", late)
    out = tmp_path / "whole.csv"
    arguments = [*_SMALL, *_PROVIDERS, "--lengths", "1100", "--stages", "mean", "window", "--out", str(out)]
    assert whole.main(arguments) == 1
    assert {row["what"] for row in rows_of(out)} == {"mean"}


def test_selected(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every order and dense attention, on one sequence and on packed ones."""
    monkeypatch.setattr(selected, "TRACE_TOKENS", 128)
    out = tmp_path / "selected.csv"
    small = [*_SMALL[:4], "--head-dim", "16", "--rounds", "2", "--num-kv-heads", "2", "--groups", "2"]
    arguments = [*small, "--lengths", "384", "--providers", *selected.ORDERS, "dense-math", "--out", str(out)]
    assert selected.main(arguments) == 0
    rows = rows_of(out)
    assert {(row["pattern"], row["num_sequences"]) for row in rows} == {("random", "1"), ("trace", "3")}
    assert {row["provider"] for row in rows if row["pattern"] == "random"} == {*selected.ORDERS, "dense-math"}
    assert {row["provider"] for row in rows if row["pattern"] == "trace"} == {*selected.ORDERS}
    assert {row["pass"] for row in rows} == {"forward", "backward", "step"}
    assert all(float(row["error"]) < 1e-4 for row in rows)
    assert {row["chosen"] for row in rows} == {"fsa"}


def test_ratio_to_the_best_peer() -> None:
    """Neither dense attention nor the orders of this package are peers."""
    cell = {"pattern": "random", "seq_len": 64, "block_size": 64, "num_selected": 16, "group": 1, "what": "selected"}
    times = {"auto": 2.0, "fsa": 1.5, "dense-flash": 1.0, "official-fsa": 5.0, "xunhao-lai": 8.0}
    rows = [
        {**cell, "pass": "forward", "provider": provider, "p50_ms": f"{ms:.4f}", "chosen": "nsa"}
        for provider, ms in times.items()
    ]
    rows.append({**rows[0], "pass": "backward"})
    title, forward, backward = selected.table(rows).splitlines()
    assert title.split()[-1] == "peer/auto"
    assert forward.split()[-1] == "2.50"
    assert backward.split()[-1] == "-"


def test_gates_after_the_selected_branch(tmp_path: Path) -> None:
    out = tmp_path / "selected.csv"
    small = [*_SMALL[:4], "--head-dim", "16", "--rounds", "2", "--num-kv-heads", "2", "--groups", "2"]
    arguments = [*small, "--lengths", "200", "--patterns", "local", "--what", "gated", "--providers", "fsa-compiled"]
    assert selected.main([*arguments, "--out", str(out)]) == 0
    assert {row["provider"] for row in rows_of(out)} == {"fsa-compiled", "fsa-separate"}


def test_pictures_come_from_the_rows(measured: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks import plot

    assert plot.main([str(measured), "--out", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole_stages.png", "whole_whole.png"]


def test_exact_rows_are_the_references() -> None:
    """Two pieces of plain PyTorch that share nothing."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 333, h, 16, generator=generator, dtype=torch.float64) for h in (6, 2, 2))
    rows = torch.tensor([0, 5, 31, 32, 90, 332])
    windows, selection = whole.WINDOWS, {**whole.SELECTION, "num_selected": 4}
    k_cmp, v_cmp = (reference.mean_compress(x, **windows) for x in (k, v))
    blocks = causal_block_indices(333, 2, 4, device="cpu")
    out, lse = reference.compressed_attention(q, k_cmp, v_cmp, **windows)
    pairs = {
        "means": (exact.means(k, **windows), k_cmp),
        "compressed": (exact.compressed(q, k_cmp, v_cmp, rows, **windows), out[:, rows]),
        "selected": (
            exact.selected(q, k, v, rows, blocks, 64),
            reference.selected_attention(q, k, v, blocks, block_size=64)[0][:, rows],
        ),
        "window": (
            exact.window(q, k, v, rows, 20),
            reference.sliding_window_attention(q, k, v, window_size=20)[0][:, rows],
        ),
    }
    for name, (have, want) in pairs.items():
        assert torch.allclose(have, want, rtol=0, atol=1e-12), name
    want_ids = reference.select_blocks(q, k_cmp, lse, **windows, **selection)[0, rows]
    have_ids = exact.blocks(q, k_cmp, rows, **windows, **selection, seq_len=333)
    assert exact.missing(want_ids, have_ids) == 0
    assert exact.missing(want_ids.clamp(max=1), have_ids) > 0


def test_percentiles_and_turns() -> None:
    assert common.Times.of([float(x) for x in range(11)]) == (2, 5, 8)
    assert common.Times.of([3.0]) == (3, 3, 3)
    calls: list[str] = []
    found = common.timings(
        {"a": lambda: calls.append("a"), "b": lambda made: calls.append(made)},
        prepare={"b": lambda: "made"}, rounds=3, warmup=1, device="cpu",
    )  # fmt: skip
    assert calls == ["a", "made"] * 4
    assert set(found) == {"a", "b"}


def test_the_commit_can_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    common.commit.cache_clear()
    monkeypatch.setenv("FSA_COMPILE_COMMIT", "abc")
    assert common.versions(torch.device("cpu"))["commit"] == "abc"
    common.commit.cache_clear()


@pytest.mark.parametrize("locality", ["random", "local", "trace"])
def test_selections(locality: str) -> None:
    """Ascending, causal, no id twice, -1 at the end, the first and the current block always."""
    blocks = causal_block_indices(5000, 3, locality=locality, device="cpu")
    assert blocks.shape == (1, 5000, 3, 16)
    assert blocks.dtype == torch.int32
    current = torch.arange(5000)[None, :, None, None] // 64
    assert (blocks <= current).all()
    shown = blocks.masked_fill(blocks < 0, 10**6)
    assert ((shown.diff(dim=-1) > 0) | (shown[..., 1:] == 10**6)).all()
    assert (blocks[..., 0] == 0).all()
    assert (blocks == current).any(-1).all()


def test_the_trace_is_what_it_says() -> None:
    with pytest.raises(ValueError, match="16384 tokens, not 16385"):
        causal_block_indices(16385, 1, locality="trace", device="cpu")
    with pytest.raises(ValueError, match="16 blocks of 64"):
        causal_block_indices(100, 1, 8, locality="trace", device="cpu")
    blocks = causal_block_indices(16384, 4, locality="trace", device="cpu")[0]
    union = [len(set(blocks[t : t + 16, 0].flatten().tolist())) for t in range(8192, 16384, 512)]
    assert 30 < sum(union) / len(union) < 90  # of 16 tokens; independent ones would select 160


_TINY = decoder.Shape("tiny", 3, 32, 48, 4, 2, 16, qk_norm=True, qkv_bias=True)
_CPU = ["--models", "tiny", "--device", "cpu", "--dtype", "float32", "--layers", "1", "--rounds", "2"]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model for a test, whose graphs are not compiled further."""
    monkeypatch.setitem(decoder.SHAPES, "tiny", _TINY)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


@pytest.mark.usefixtures("tiny")
def test_models(tmp_path: Path) -> None:
    out = tmp_path / "models.csv"
    arguments = [*_CPU, "--lengths", "200", "--no-warm", "--passes", "prefill", "train-checkpointed"]
    providers = ["--providers", "dense-math", "nsa", "auto"]
    assert models.main([*arguments, *providers, "--blocks", "32x5", "--out", str(out)]) == 0
    rows = rows_of(out)
    for name in ("prefill", "train-checkpointed"):
        mine = {row["provider"]: row for row in rows if row["pass"] == name}
        assert list(mine) == ["free", "dense-math", "nsa", "auto"]
        loss = {provider: float(row["loss"]) for provider, row in mine.items()}
        assert loss["nsa"] == pytest.approx(loss["auto"], rel=1e-5)
        assert len({round(value, 2) for value in loss.values()}) == 3
    for row in rows:
        assert row["status"] == "ok"
        assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert float(row["tokens_per_s"]) == pytest.approx(200 / float(row["p50_ms"]) * 1e3, rel=1e-2)
        assert (row["layers"], row["model_layers"], row["block_size"]) in (("1", "3", ""), ("1", "3", "32"))
        assert bool(row["attention_share"]) == (row["provider"] != "free")
        assert bool(row["error"]) == bool(row["block_size"])
        assert bool(row["output_error"]) == (row["provider"] == "auto")
        assert row["compile_cold_s"]
        for column in ("date", "commit", "torch", "triton", "device"):
            assert row[column]
    pytest.importorskip("matplotlib")
    from benchmarks import plot

    assert plot.main([str(out), "--out", str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.glob("*.png")] == ["models_tokens.png"]


@pytest.mark.slow
def test_models_compiled_by_inductor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The cache on disk serves the second time."""
    monkeypatch.setitem(decoder.SHAPES, "tiny", _TINY)
    out = tmp_path / "models.csv"
    arguments = [*_CPU, "--lengths", "200", "--providers", "auto", "--blocks", "64x4", "--passes", "train-checkpointed"]
    assert models.main([*arguments, "--out", str(out)]) == 0
    for row in rows_of(out):
        assert row["status"] == "ok"
        assert float(row["compile_warm_s"]) < float(row["compile_cold_s"]) / 2


@pytest.mark.usefixtures("tiny")
def test_a_wrong_model_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = fsa_compile.nsa_attention

    def late(*args: Any, **options: Any) -> Any:
        return right(*args, **{**options, "window_size": 512 if options["loop_order"] == "nsa" else 20})

    monkeypatch.setattr(fsa_compile, "nsa_attention", late)
    monkeypatch.setattr(torch, "compile", lambda fn, **options: fn)
    out = tmp_path / "models.csv"
    arguments = [*_CPU, "--lengths", "100", "--providers", "nsa", "auto", "--blocks", "32x4", "--no-warm"]
    arguments += ["--passes", "prefill", "--out", str(out)]
    for more, error in (([], "error"), (["--no-check"], "output_error")):
        assert models.main([*arguments, *more]) == 1
        free, nsa, auto = rows_of(out)
        assert (free["status"], nsa["status"], auto["status"]) == ("ok", "ok", "wrong")
        assert free["p50_ms"]
        assert nsa["p50_ms"]
        assert not auto["p50_ms"]
        assert float(auto[error]) > 1e-3


@pytest.mark.usefixtures("tiny")
def test_a_model_without_memory_is_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def hungry(*args: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(attentions.F, "scaled_dot_product_attention", torch.compiler.disable(hungry))
    monkeypatch.setattr(torch, "compile", lambda fn, **options: fn)
    out = tmp_path / "models.csv"
    arguments = [*_CPU, "--lengths", "100", "--providers", "dense", "nsa", "--blocks", "32x4", "--passes", "train"]
    assert models.main([*arguments, "--out", str(out)]) == 0
    assert [(row["provider"], row["status"], bool(row["p50_ms"])) for row in rows_of(out)] == [
        ("free", "ok", True), ("dense", "out of memory", False), ("nsa", "ok", True)
    ]  # fmt: skip
    assert "out of memory" in models.table(rows_of(out))


def test_what_does_not_fit_in_turns_is_timed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda fn, **options: fn)

    def timings(steps: dict[Any, Any], **limits: Any) -> dict[Any, common.Times]:
        if len(steps) > 1:
            raise torch.OutOfMemoryError("fragments")
        return common.timings(steps, **limits)

    monkeypatch.setattr(models, "timings", timings)
    found = [attentions.Variant(name, attentions.free) for name in ("free", "other")]
    runs = models.Cell(_TINY, 64, "train", 1, torch.empty(0)).measure(found, models.parser().parse_args(_CPU[2:]))
    assert all(run.times is not None and run.status == models.ALONE for run in runs)


@pytest.mark.usefixtures("tiny")
def test_a_cell_leaves_no_weights_behind() -> None:
    options = models.parser().parse_args([*_CPU, "--providers", "auto"])
    like = torch.empty(0)
    cell = models.Cell(_TINY, 100, "train", 1, like)
    weights = weakref.ref(cell.weights.layers[0].q.weight)
    runs = cell.measure([attentions.Variant("free", attentions.free)], options)
    assert runs[0].times is not None
    del cell, runs
    torch._dynamo.reset()
    gc.collect()
    assert weights() is None


def test_decoder() -> None:
    """Models share their weights, checkpoints change nothing, and each attention takes part."""
    x = torch.randn(1, 70, _TINY.hidden)
    model = decoder.Decoder.random(_TINY, 2, 70, attentions.free, x)
    nsa = model.sharing(attentions.ours("auto", 32, 4))
    again = model.sharing(attentions.ours("auto", 32, 4), checkpointed=True)
    assert all(a is b for a, b in zip(model.parameters(), nsa.parameters(), strict=True))
    grads = []
    for one in (nsa, again):
        one(x).square().sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
        assert all(grad is not None for grad in grads[-1])
        model.zero_grad()
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*grads, strict=True))
    assert not torch.allclose(model(x), nsa(x), atol=1e-2)
    assert 0.5 < nsa(x).std() < 2
    later = torch.cat((x[:, :50], torch.randn(1, 20, _TINY.hidden)), 1)
    assert torch.allclose(nsa(later)[:, :50], nsa(x)[:, :50], atol=1e-5)


def test_a_checkpointed_model_keeps_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the compiled forward keeps for the backward: all that layers make, or little more than their inputs."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager_decomp_partition"))
    kept = {}
    for name in ("train", "train-checkpointed"):
        cell = models.Cell(_TINY, 300, name, 2, torch.empty(0))
        call = cell.compiled(attentions.Variant("auto", attentions.ours("auto", 32, 4)))
        call()
        others = {x.data_ptr() for x in (*cell.weights.parameters(), *cell.weights.buffers(), cell.x, cell.target)}
        found: dict[int, int] = {}

        def pack(x: torch.Tensor, others: set[int] = others, found: dict[int, int] = found) -> torch.Tensor:
            if x.data_ptr() not in others:
                found[x.data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            call()
        kept[name] = sum(found.values()) / (300 * _TINY.hidden * 4)  # hidden states
    assert kept["train-checkpointed"] < 5
    assert kept["train"] > 20


def test_layers_that_fit() -> None:
    counted = sum(p.numel() for name, p in decoder.Layer(_TINY, attentions.free).named_parameters()
                  if p.dim() == 2 and "gates" not in name)  # fmt: skip
    assert _TINY.parameters == counted
    llama = decoder.SHAPES["llama-3-8b"]
    billions = {name: shape.num_layers * shape.parameters / 1e9 for name, shape in decoder.SHAPES.items()}
    assert billions == pytest.approx({"llama-3-8b": 7.0, "qwen3-14b": 13.2, "qwen2.5-32b": 31.2}, rel=0.01)
    for name in models.PASSES:
        found = [decoder.fitting_layers(llama, seq_len, name, 72 * decoder.GIB, 32) for seq_len in (8192, 65536, 2**20)]
        assert 32 >= found[0] >= found[1] >= found[2] >= 1
        assert found[0] > found[2]
        assert decoder.bytes_needed(llama, found[1], 65536, name) <= 72 * decoder.GIB
        assert found[1] == 32 or decoder.bytes_needed(llama, found[1] + 1, 65536, name) > 72 * decoder.GIB
    assert decoder.fitting_layers(llama, 8192, "prefill", 72 * decoder.GIB, 4) == 4


@pytest.mark.usefixtures("tiny")
def test_a_peer_runs_between_graphs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Peer:
        name, commit = "official-fsa", "abc"

        def __init__(self, checkouts: Path, lengths: list[int], sizes: dict[str, int]) -> None:
            assert lengths == [100]
            self.sizes = sizes

        def attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gates: Any) -> torch.Tensor:
            assert q.sum().isfinite().item()  # reads the device, which no graph can
            return fsa_compile.nsa_attention(q, k, v, *gates, **self.sizes)

    monkeypatch.setattr(attentions, "WHOLE", (Peer,))
    out = tmp_path / "models.csv"
    arguments = [*_CPU, "--lengths", "100", "--providers", "official-fsa", "auto", "--blocks", "32x4", "--no-warm"]
    assert models.main([*arguments, "--passes", "train-checkpointed", "--out", str(out)]) == 0
    free, peer, auto = rows_of(out)
    assert (free["fullgraph"], peer["fullgraph"], auto["fullgraph"]) == ("True", "False", "True")
    assert (peer["status"], peer["peer_commit"], auto["peer_commit"]) == ("ok", "abc", "")
    assert float(peer["loss"]) == pytest.approx(float(auto["loss"]), rel=1e-5)
    assert float(peer["error"]) < 1e-5


def test_peers_that_are_not_there_are_left_out(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert [peer.name for peer in peers.WHOLE] == ["official-fsa", "xunhao-lai"]
    options = models.parser().parse_args(["--providers", "official-fsa", "xunhao-lai", "--peers", str(tmp_path)])
    assert [v.provider for v in attentions.variants(options, _TINY, 64, torch.device("cpu"), torch.float32)] == ["free"]
    assert capsys.readouterr().out.count("left out") == 4
