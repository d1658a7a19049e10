"""The loop orders of selected attention as a table: what each is called and the passes that it consists of.

A new order is a name in ``problem.LOOP_ORDERS``, an entry here, one in ``ops/selected/orders.py``, and its kernels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sympy import Expr, Integer, Max, Min, ceiling, sqrt

from .expressions import DV, HK, B, C, D, E, G, M_kv, M_q, N_t, N_w, P, Pass, S, T, Tk, U, W, X, a, bs, tensor_bytes

# What a choice can be for. A trained forward is one whose backward follows in the same graph.
STAGES = ("forward", "trained forward", "backward")


@dataclass(frozen=True)
class Order:
    """One loop order: its passes, and the bytes of its temporaries at the largest moment of each direction."""

    forward: tuple[Pass, ...]
    backward: tuple[Pass, ...]
    forward_scratch: Expr
    backward_scratch: Expr

    def passes(self, stage: str) -> tuple[Pass, ...]:
        """Of one of ``STAGES``. A trained forward is not charged for what the backward makes in any case: the lists."""
        if stage == "trained forward":
            return tuple(p for p in self.forward if p not in made_by_every_backward())
        return {"forward": self.forward, "backward": self.backward}[stage]

    def seconds(self, stage: str) -> Expr:
        """Of one of ``STAGES``, in the symbols of ``MEANING``."""
        return sum((p.time() for p in self.passes(stage)), Integer(0))

    def launches(self, stage: str) -> Expr:
        """Kernels, of one of ``STAGES``."""
        return sum((p.launches for p in self.passes(stage)), Integer(0))

    def scratch(self, stage: str) -> Expr:
        """Bytes, of one of ``STAGES``. A trained forward's lists take memory, whoever they are made for."""
        return self.backward_scratch if stage == "backward" else self.forward_scratch


def made_by_every_backward() -> tuple[Pass, ...]:
    """Passes of the backward whatever its order; a graph that holds one already does not make it again."""
    first, *others = ORDERS.values()
    return tuple(p for p in first.backward if all(p in order.backward for order in others))


def first_like(order: str, stage: str) -> str:
    """The first order of the table that takes the same passes: one measurement does for both."""
    passes = ORDERS[order].passes(stage)
    return next(name for name, one in ORDERS.items() if one.passes(stage) == passes)


_q_rows, _k_rows = B * T * HK * G, B * Tk * HK
_read_rows = Min(_k_rows, E * bs)  # rows of k and v that are selected at all
_items_q = B * T * HK
_slots = B * T * HK * Min(S, ceiling(Tk / bs))  # entries, and the slots that the first queries leave empty
# A query selects a block once, so no list is longer than the sequence.
_items_kv = E * C / Min(N_w, T)

_LISTS = Pass(
    "lists",
    "sort the entries by block: keys, a stable sort, offsets, work items",
    sorted_keys=_slots,
    launches=20,  # as many as there were when the constants were fitted; since then, twelve
)


def _cut(width: Expr) -> tuple[Expr, Expr]:
    """Parts of a call whose partials of this width take turns in the workspace, and how many pairs of dk and dv.

    As ``ops/selected/chunks.py`` cuts it, but for divisors: a query head is not cut, and a group's heads have one pair.
    """
    parts = Min(B * HK * G, Max(1, ceiling(tensor_bytes(B * T * HK * G * S, width) / X)))
    return parts, Min(parts, B * HK)


# Every part's items end by themselves, which is most of what cutting costs.
_of_d, _of_dv = _cut(D), _cut(DV)


def _cutting(cut: tuple[Expr, Expr], launches: int, lists: Expr, tiles: Expr | int = 0) -> Pass:
    """What else it costs: launches, of a part's kernels and of ``lists`` beside the first, and bytes.

    Each part of a group leaves its own ``tiles`` (bytes), the first two of which are added where they are read.
    """
    parts, pairs = cut
    of_group = parts / pairs
    return Pass(
        "parts",
        "if partials exceed the workspace: lists for parts, and the tiles of parts of a group added up",
        dram_bytes=(2 * (of_group - 1) + 3 * Max(0, of_group - 2)) * tiles,
        launches=(lists - 1) * _LISTS.launches + (parts - 1) * launches,
    )


_DELTA = Pass(
    "delta",
    "rowsum(grad_out * out)",
    dram_bytes=tensor_bytes(_q_rows, DV, DV) + 4 * _q_rows,
)

# An item's last matmul tile is half empty on average.
_kv_rows = E * G + W * M_kv / 2

_dkv_tiles = 4 * W * bs * (D + DV)
_TILE_SUM = Pass(
    "sum tiles",
    "add the float32 dk, dv tiles of a block's work items",
    dram_bytes=_dkv_tiles + tensor_bytes(_k_rows, D, DV),
    launches=2,
)

_DKV = Pass(
    "KV-outer dk dv",
    "s = q k', dp = do v', dv = p' do, dk = ds' q: gather q and do rows, one float32 tile for each work item",
    flops=2 * _kv_rows * bs * (2 * D + 2 * DV),
    l2_bytes=tensor_bytes(W * bs, D, DV) + tensor_bytes(P, D, DV),
    dram_bytes=tensor_bytes(P, D, DV) + 8 * P + 8 * E + _dkv_tiles,
    items=_items_kv,
)

_tiles = B * HK * Max(1, T / N_t)
_UNIONS = Pass(
    "unions",
    "sort the blocks of a query tile's tokens, and keep each once with its tokens",
    dram_bytes=4 * E + 12 * _tiles * U,
    # On chip, and the dearer the more a tile has: of 64 tokens it takes as long as the lists' entries.
    sorted_keys=E * sqrt(N_t) / 8,
)
# A block's id, the bits of its members and its addresses take as long as so many keys more, whatever its size.
_KEYS_PER_BLOCK = 8
# What a tile does before and after its walk takes as long as so many blocks (an H100, G = 1 to 8: 4 to 5).
_BLOCKS_PER_TILE = 4

_SORTED = 24 * E  # bytes, while the lists are sorted; 4 of them stay


def _walk(
    name: str, union: Expr, multiplied: Expr = D + DV, rows: tuple[Expr, ...] = (D, DV), statistics: int = 4
) -> Pass:
    """Query tiles that attend to ``union`` blocks each.

    multiplied: widths of a key's products with a row. rows, statistics: widths of what is read and written by row, and
    bytes of its numbers.
    """
    keys = _tiles * union * bs
    reckoned = keys + _tiles * (_KEYS_PER_BLOCK * union + _BLOCKS_PER_TILE * bs)
    return Pass(
        name,
        "each tile of neighbouring tokens walks the union of their blocks; a token uses those that it selected",
        flops=2 * reckoned * N_t * G * multiplied,
        l2_bytes=tensor_bytes(keys, D, DV),
        dram_bytes=tensor_bytes(_q_rows, *rows) + tensor_bytes(_read_rows, D, DV) + statistics * _q_rows,
        items=_tiles,
    )


def _partials(share: Expr | int = 1, more: Expr | int = 0) -> tuple[Pass, Pass]:
    """What meets its key blocks, and their merge: a share of the entries, and ``more`` partials a row."""
    rows, partials = share * E * G + W * M_kv / 2, share * P
    merged = partials + more * _q_rows
    return (
        Pass(
            "KV-outer partials",
            "each K/V block meets the queries that selected it: gather q rows, write a partial and statistics for each",
            flops=2 * rows * bs * (D + DV),
            l2_bytes=tensor_bytes(W * bs, D, DV) + tensor_bytes(partials, D, DV),
            dram_bytes=tensor_bytes(partials, D, DV) + tensor_bytes(_read_rows, D, DV) + 4 * partials + 8 * share * E,
            items=_items_kv / _of_dv[1],
        ),
        Pass(
            "merge",
            "weigh a token's partials by their log-sum-exp and add",
            dram_bytes=tensor_bytes(merged, DV) + 4 * merged + tensor_bytes(_q_rows, DV) + 4 * _q_rows,
        ),
    )


_KV_OUTER_BACKWARD = (
    _DELTA,
    _LISTS,
    Pass(
        "KV-outer dq dk dv",
        "s, dp, dv, dk as for nsa, and dq = ds k as one partial per entry",
        flops=2 * _kv_rows * bs * (3 * D + 2 * DV),
        l2_bytes=tensor_bytes(W * bs, D, DV) + tensor_bytes(P, D, DV, D),
        dram_bytes=tensor_bytes(P, D, DV, D) + 8 * P + 8 * E + _dkv_tiles,
        items=_items_kv / _of_d[1],
    ),
    Pass(
        "sum dq partials",
        "add a token's S dq partials",
        dram_bytes=tensor_bytes(P, D) + tensor_bytes(_q_rows, D),
    ),
    _TILE_SUM,
    _cutting(_of_d, launches=3, lists=_of_d[1], tiles=_dkv_tiles),
)
_kv_outer_forward_scratch = Max(
    _SORTED / Min(_of_dv[0], B), 4 * E / Min(_of_dv[0], B) + (tensor_bytes(P, DV) + 8 * P) / _of_dv[0]
)
_kv_outer_backward_scratch = Max(_SORTED / _of_d[1], (4 * E + _dkv_tiles) / _of_d[1] + tensor_bytes(P, D) / _of_d[0])

# Blocks that all of a tile's tokens share are agreed on, and hardly any of those that they draw by themselves.
_agreed = a * S


ORDERS: dict[str, Order] = {
    "nsa": Order(
        forward=(
            Pass(
                "query-outer",
                "each (token, KV head) walks its S blocks; every K/V block read again for every token",
                flops=2 * _slots * bs * M_q * (D + DV),
                l2_bytes=tensor_bytes(_slots * bs, D, DV),
                dram_bytes=tensor_bytes(_q_rows, D, DV) + tensor_bytes(_read_rows, D, DV) + 4 * _q_rows + 4 * E,
                items=_items_q,
            ),
        ),
        backward=(
            _DELTA,
            _LISTS,
            _DKV,
            Pass(
                "query-outer dq",
                "s, dp, dq = ds k; K/V blocks read again for every token",
                flops=2 * _slots * bs * M_q * (2 * D + DV),
                l2_bytes=tensor_bytes(_slots * bs, D, DV),
                dram_bytes=tensor_bytes(_q_rows, D, DV, D) + tensor_bytes(_read_rows, D, DV) + 8 * _q_rows + 4 * E,
                items=_items_q,
            ),
            _TILE_SUM,
        ),
        forward_scratch=Integer(0),
        backward_scratch=_SORTED + _dkv_tiles,
    ),
    "fsa": Order(
        forward=(_LISTS, *_partials(), _cutting(_of_dv, launches=2, lists=Min(_of_dv[0], B))),
        backward=_KV_OUTER_BACKWARD,
        forward_scratch=_kv_outer_forward_scratch,
        backward_scratch=_kv_outer_backward_scratch,
    ),
    "tile": Order(
        forward=(
            _UNIONS,
            _walk("query-tile", U),
        ),
        backward=(
            _DELTA,
            _LISTS,
            _UNIONS,
            _DKV,
            _walk("query-tile dq", U, 2 * D + DV, (D, DV, D), 8),
            _TILE_SUM,
        ),
        forward_scratch=12 * _tiles * N_t * S,
        backward_scratch=_SORTED + _dkv_tiles + 12 * _tiles * N_t * S,
    ),
    "mixed": Order(
        forward=(
            replace(_UNIONS, name="agreement", dram_bytes=8 * E + 12 * _tiles * _agreed),
            replace(_walk("agreed blocks", _agreed), kernel="query-tile"),
            replace(_LISTS, name="lists of the rest"),
            *_partials(1 - a, 1),
            _cutting(_of_dv, launches=2, lists=Min(_of_dv[0], B)),
        ),
        backward=_KV_OUTER_BACKWARD,
        forward_scratch=_kv_outer_forward_scratch + 12 * _tiles * S * 4 + 4 * E + tensor_bytes(_q_rows, DV),
        backward_scratch=_kv_outer_backward_scratch,
    ),
}
