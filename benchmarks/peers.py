"""Other people's implementations, from checkouts that git ignores: `peers/<name>/`, or another folder by `--peers`.

Nothing of theirs is here but the calls. A checkout without its `.git` may say its commit in a file `COMMIT`.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def commit_of(checkout: Path) -> str:
    """The commit of a checkout, "unknown" if it does not say."""
    if (checkout / "COMMIT").exists():
        return (checkout / "COMMIT").read_text().strip()
    if not (checkout / ".git").exists():
        return "unknown"
    command = ["git", "-C", str(checkout), "rev-parse", "--short=12", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


class ScalableFlashNSA:
    """github.com/mdy666/Scalable-Flash-Native-Sparse-Attention, in `scalable_flash_nsa`: NSA without the window, which
    it leaves to flash-attn; batch 1, our layout. Its stages take `[T, H, D]` and know the lengths from a global.
    """

    name = "scalable-flash-nsa"
    folder = "scalable_flash_nsa"

    def __init__(self, peers: Path, lengths: list[int], options: dict[str, int]) -> None:
        checkout = peers / self.folder
        if not checkout.exists():
            raise FileNotFoundError(f"no {checkout}")
        self.commit = commit_of(checkout)
        _stand_in("pandas")  # imported at the top there, used in none of what is called here
        _stand_in("pkg_resources", parse_version=lambda text: tuple(int(x) for x in text.split(".")[:2]))
        if str(checkout) not in sys.path:
            sys.path.insert(0, str(checkout))
        self.nsa: Any = importlib.import_module("flash_nsa")
        helper = self.nsa.NSAHelper
        helper.set_hyperparameters(
            kernel_size=options["kernel_size"], stride=options["kernel_stride"], block_size=options["block_size"],
            window_size=options["window_size"], top_n=options["num_selected"],
            num_init_blocks=options["init_blocks"], num_local_blocks=options["local_blocks"],
        )  # fmt: skip
        helper.init_cu_seqlens(torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda"))
        self.combine = importlib.import_module("flash_nsa.ops.combine").fused_sigmoid_combine

    def mean(self, k: Tensor) -> Tensor:
        """Compressed keys."""
        return self.nsa.mean_pooling(k[0])[None]

    def compressed(self, q: Tensor, k_cmp: Tensor, v_cmp: Tensor) -> Tensor:
        """Compressed attention."""
        return self.nsa.compress_attn(q[0], k_cmp[0], v_cmp[0])[0][None]

    def lse(self, q: Tensor, k_cmp: Tensor, v_cmp: Tensor) -> Tensor:
        """What `select` needs."""
        return self.nsa.compress_attn(q[0], k_cmp[0], v_cmp[0])[1]

    def select(self, q: Tensor, k_cmp: Tensor, lse: Tensor) -> Tensor:
        """Blocks, [HK, T, S]; none is the number of blocks."""
        return self.nsa.slc_topk_indices(q[0], k_cmp[0], lse, maybe_efficient_version=True, scale_slc_p=True)[0]

    def selected(self, q: Tensor, k: Tensor, v: Tensor, found: Tensor) -> Tensor:
        """Selected attention over what `select` gave."""
        return self.nsa.select_attn(q[0], k[0], v[0], found)[None]

    def ids(self, found: Tensor, num_blocks: int) -> Tensor:
        """What `select` gave as `block_indices`."""
        return found.transpose(0, 1)[None].masked_fill(found.transpose(0, 1)[None] >= num_blocks, -1)

    def found(self, block_indices: Tensor, num_blocks: int) -> Tensor:
        """The other way round."""
        found = block_indices[0].transpose(0, 1)
        return found.masked_fill(found < 0, num_blocks).contiguous()

    def whole(self, q: Tensor, k: Tensor, v: Tensor, logits: Tensor) -> Tensor:
        """NSA without a window; `logits` [T, HQ, 3] of the gates, the third so low that it shuts out its branch."""
        q, k, v = q[0], k[0], v[0]
        k_cmp, v_cmp = self.nsa.mean_pooling(k), self.nsa.mean_pooling(v)
        o_cmp, lse = self.nsa.compress_attn(q, k_cmp, v_cmp)
        with torch.no_grad():
            found, _ = self.nsa.slc_topk_indices(q, k_cmp, lse, maybe_efficient_version=True, scale_slc_p=True)
        o_slc = self.nsa.select_attn(q, k, v, found)
        return self.combine(o_cmp, o_slc, o_slc.detach(), logits)[None]


PEERS = (ScalableFlashNSA,)


def _stand_in(name: str, **members: Any) -> None:
    if name not in sys.modules and importlib.util.find_spec(name) is None:
        module = types.ModuleType(name)
        vars(module).update(members)
        sys.modules[name] = module
