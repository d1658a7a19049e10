"""The models of `benchmarks.recognised`: layers with an attention that is written by hand, and MiniMax-M3's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from fsa_compile.testing import handwritten

SELECTED = ("fsa::selected_attention",)
INDEXED = ("fsa::select_blocks", *SELECTED)
WHOLE = ("fsa::compressed_attention", *INDEXED, "fsa::sliding_window_attention")


@dataclass(frozen=True)
class Sizes:
    """Of a model, and the length at which it is checked."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    num_selected: int
    hidden: int
    check_length: int
    window_size: int = 512


@dataclass(frozen=True)
class Model:
    """What is compiled: `make(sizes)` with weights, called with what `inputs` gives."""

    make: Callable[[Sizes], nn.Module]
    sizes: Sizes
    operators: tuple[str, ...]  # that its attention becomes
    uncompiled: Callable[[Sizes], nn.Module] | None = None  # if another program, with the same weights


class Layer(nn.Module):
    """Projections around an attention; all weights are random normal."""

    def __init__(self, attention: Callable[..., Tensor], sizes: Sizes, gated: bool) -> None:
        super().__init__()
        self.attention, self.head_dim = attention, sizes.head_dim
        heads, kv_heads = sizes.num_q_heads, sizes.num_kv_heads
        widths = {"q": heads * sizes.head_dim, "k": kv_heads * sizes.head_dim, "v": kv_heads * sizes.head_dim}
        self.projections = nn.ModuleDict({name: nn.Linear(sizes.hidden, n, bias=False) for name, n in widths.items()})
        self.out = nn.Linear(widths["q"], sizes.hidden, bias=False)
        self.gates = nn.Linear(sizes.hidden, 3 * heads) if gated else None
        for weight in self.parameters():
            nn.init.normal_(weight, std=sizes.hidden**-0.5)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        """x: (batch, seq_len, hidden)."""
        q, k, v = (projection(x).unflatten(-1, (-1, self.head_dim)) for projection in self.projections.values())
        last = ids if self.gates is None else self.gates(x).unflatten(-1, (-1, 3)).sigmoid()
        return self.out(self.attention(q, k, v, last).flatten(2))


def layer(name: str) -> Callable[[Sizes], nn.Module]:
    """With an attention of `handwritten`."""

    def make(sizes: Sizes) -> nn.Module:
        options = {"block_size": sizes.block_size}
        if name == "whole":
            options |= {"num_selected": sizes.num_selected, "window_size": sizes.window_size}
        return Layer(partial(getattr(handwritten, name), **options), sizes, gated=name == "whole")

    return make


class MiniMaxM3(nn.Module):
    """transformers' text model with one sparse layer; its MLP is small and dense."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        from transformers.models.minimax_m3_vl.configuration_minimax_m3_vl import MiniMaxM3VLTextConfig
        from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLTextModel

        config = MiniMaxM3VLTextConfig(
            vocab_size=64, hidden_size=sizes.hidden, num_hidden_layers=1, dense_intermediate_size=sizes.hidden,
            num_attention_heads=sizes.num_q_heads, num_key_value_heads=sizes.num_kv_heads, head_dim=sizes.head_dim,
            rotary_dim=sizes.head_dim // 2, index_n_heads=sizes.num_kv_heads, index_head_dim=sizes.head_dim,
            index_block_size=sizes.block_size, index_topk_blocks=sizes.num_selected, bos_token_id=1, eos_token_id=2,
            layer_types=["minimax_m3_sparse"], mlp_layer_types=["dense"], attn_implementation="sdpa",
        )  # fmt: skip
        self.text = MiniMaxM3VLTextModel(config)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        """x: (batch, seq_len, hidden); it selects its blocks itself."""
        out: Tensor = self.text(inputs_embeds=x, use_cache=False).last_hidden_state
        return out


LAYER = Sizes(4, 1, 128, 64, 16, hidden=512, check_length=8192)
M3 = Sizes(64, 4, 128, 128, 16, hidden=1024, check_length=3072)
MODELS = {
    "sdpa": Model(layer("sdpa_mask"), LAYER, SELECTED),
    "softmax": Model(layer("softmax_by_hand"), LAYER, SELECTED),
    "einsum": Model(layer("einsum_grouped"), LAYER, SELECTED),
    "bmm": Model(layer("bmm_added_mask"), LAYER, SELECTED),
    "flex": Model(layer("flex"), LAYER, SELECTED, layer("sdpa_mask")),
    "whole": Model(layer("whole"), LAYER, WHOLE),
    "minimax-m3": Model(MiniMaxM3, M3, INDEXED),
}
