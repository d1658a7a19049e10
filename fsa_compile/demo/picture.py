"""The picture: the loss curve, and which blocks a few queries select."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from fsa_compile.demo.model import Config

_NUM_QUERIES = 32  # rows shown
_COLORS = ("#ececec", "#ffffff", "#7f9bb3", "#f0b45a", "#c8443c")
_LABELS = ("future", "not selected", "forced: first", "forced: newest", "chosen by score")


def block_kinds(block_indices: Tensor, queries: list[int], config: Config) -> list[list[int]]:
    """What each block is to each query, as an index into the legend.

    block_indices: (seq_len, num_selected) int32 of one sequence and one key/value head, on the CPU.
    """
    num_blocks = -(-block_indices.shape[0] // config.block_size)
    rows = []
    for t in queries:
        newest = t // config.block_size
        chosen = set(block_indices[t].tolist())
        row = []
        for j in range(num_blocks):
            if j > newest:
                row.append(0)
            elif j not in chosen:
                row.append(1)
            elif j < config.init_blocks:
                row.append(2)
            elif j > newest - config.local_blocks:
                row.append(3)
            else:
                row.append(4)
        rows.append(row)
    return rows


def draw(path: Path, losses: list[float], block_indices: Tensor, where: str, title: str, config: Config) -> None:
    """Writes the PNG. losses: nats per byte, one a step. block_indices: as for `block_kinds`; where: of which head."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    seq_len = block_indices.shape[0]
    count = min(_NUM_QUERIES, seq_len)
    queries = [(i + 1) * seq_len // count - 1 for i in range(count)]
    kinds = block_kinds(block_indices, queries, config)

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.5), width_ratios=(2, 3), layout="constrained")
    figure.suptitle(title)

    left.plot(range(1, len(losses) + 1), losses, color="#c8443c", linewidth=1.5)
    left.set(title="Training loss", xlabel="step", ylabel="nats per byte")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.grid(alpha=0.3)

    num_blocks = len(kinds[0])
    colors = ListedColormap(_COLORS)
    right.pcolormesh(kinds, cmap=colors, vmin=-0.5, vmax=len(_COLORS) - 0.5, edgecolors="#d8d8d8", linewidth=0.3)
    right.invert_yaxis()
    step = max(1, count // 8)
    right.set_yticks(
        [i + 0.5 for i in range(step - 1, count, step)], [str(queries[i]) for i in range(step - 1, count, step)]
    )
    every = max(1, num_blocks // 16)
    right.set_xticks([j + 0.5 for j in range(0, num_blocks, every)], [str(j) for j in range(0, num_blocks, every)])
    right.set(
        title=f"Blocks selected, {where}",
        xlabel=f"key block ({config.block_size} tokens each)",
        ylabel="query position",
    )
    handles = [Patch(facecolor=c, edgecolor="#b0b0b0", label=label) for c, label in zip(_COLORS, _LABELS, strict=True)]
    right.legend(handles=handles, loc="upper right", fontsize="small", framealpha=0.95)

    figure.savefig(path, dpi=120)
    plt.close(figure)
