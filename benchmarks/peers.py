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

import fsa_compile


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


class _Packed:
    """What XunhaoLai's code and those that came of it have in common: packed `[T, H, D]`, blocks `[HK, T, S]`, -1 for
    none, ascending, as ours are. Its window is flash-attn's; `attention` takes ours instead, for want of it.
    """

    name: str
    folder: str
    ops: str  # the module of compression and of compressed attention

    def __init__(self, peers: Path, lengths: list[int], options: dict[str, int]) -> None:
        checkout = peers / self.folder
        if not checkout.exists():
            raise FileNotFoundError(f"no {checkout}")
        self.commit, self.options = commit_of(checkout), options
        # imported at the top there, used in none of what is called here
        _stand_in("einops", einsum=None, rearrange=None)
        if str(checkout) not in sys.path:
            sys.path.insert(0, str(checkout))
        self.stages: Any = importlib.import_module(self.ops)
        self.starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")
        self.longest = max(lengths)

    def _sparse(self, q: Tensor, k: Tensor, v: Tensor, found: Tensor) -> Tensor:
        return self.stages.topk_sparse_attention(q, k, v, found, self.options["block_size"], self.starts)

    def selected(self, q: Tensor, k: Tensor, v: Tensor, found: Tensor) -> Tensor:
        """Selected attention."""
        return self._sparse(*(x[0].contiguous() for x in (q, k, v)), found)[None]

    def found(self, block_indices: Tensor, num_blocks: int) -> Tensor:
        """`block_indices` as `selected` wants them."""
        return block_indices[0].transpose(0, 1).contiguous()

    def attention(self, q: Tensor, k: Tensor, v: Tensor, gates: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """All three branches, their means, their selection, their gates."""
        options = self.options
        windows = options["kernel_size"], options["kernel_stride"]
        o_swa, _ = fsa_compile.sliding_window_attention(q, k, v, window_size=options["window_size"])
        q, k, v = (x[0].contiguous() for x in (q, k, v))
        k_cmp, starts = self.stages.avgpool_compress(k, None, self.starts, *windows)
        v_cmp, _ = self.stages.avgpool_compress(v, None, self.starts, *windows)
        o_cmp, found = self.stages.compressed_attention(
            q, k_cmp, v_cmp, *windows, options["block_size"], options["num_selected"], self.starts, starts,
            self.longest, k_cmp.shape[0], None, options["init_blocks"], options["local_blocks"],
            parallel_topk_compute=False,
        )  # fmt: skip
        o_slc = self._sparse(q, k, v, found)
        g_cmp, g_slc, g_swa = (gate.unsqueeze(-1) for gate in gates)
        return g_cmp * o_cmp[None] + g_slc * o_slc[None] + g_swa * o_swa


class XunhaoLai(_Packed):
    """github.com/XunhaoLai/native-sparse-attention-triton, in `xunhao_lai`."""

    name = "xunhao-lai"
    folder = "xunhao_lai"
    ops = "native_sparse_attention.ops"


class OfficialFSA(_Packed):
    """github.com/Relaxed-System-Lab/Flash-Sparse-Attention, in `official_fsa`. Triton 3.6 needs the checkout mended:
    in `fsa/ops/FSA_topk_sparse_attention.py` a stray comma makes `lse_ptrs = (...,)` a tuple.
    """

    name = "official-fsa"
    folder = "official_fsa"
    ops = "nsa_ref.ops"

    def _sparse(self, q: Tensor, k: Tensor, v: Tensor, found: Tensor) -> Tensor:
        kernel = importlib.import_module("fsa.ops").FSA_topk_sparse_attention
        return kernel(q, k, v, found, self.options["block_size"], self.starts)


PEERS: tuple[Any, ...] = (ScalableFlashNSA, OfficialFSA, XunhaoLai)
STAGED = tuple(peer for peer in PEERS if hasattr(peer, "select"))  # every stage by itself
WHOLE = tuple(peer for peer in PEERS if hasattr(peer, "attention"))  # with the window, gates given


def _stand_in(name: str, **members: Any) -> None:
    if name not in sys.modules and importlib.util.find_spec(name) is None:
        module = types.ModuleType(name)
        vars(module).update(members)
        sys.modules[name] = module
