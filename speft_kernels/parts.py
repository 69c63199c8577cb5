"""`Parts`: the entries of a pattern, split by the method that serves each best.

- hot columns: so full that a thin GEMM over all rows costs less than gathering their entries;
- hot rows: the same for rows, among what the columns left;
- tiles: squares of TILE x TILE used lines, full enough for all their products to be computed;
- the rest: gathered, one dot product of two lines over the tokens for each entry.

Each entry is in exactly one part. Which it is follows from the cost model alone (`costs.py`), so a
pattern is always split alike on one machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _native
from .compact import CompactIndices, places_in
from .costs import Costs

TILE = 16

# Elements of a panel, which holds products that are then sampled: 4 MB in float32.
PANEL_ELEMENTS = 1 << 20

# A panel is padded to a multiple of this many lines, and each line to one of this length. On AMD's
# processors MKL serves what is left over at the edges of a product by kernels that sum in another
# order, and where the edges lie depends on the number of threads.
ALIGNED_LINES, ALIGNED_LENGTH = 4, 16


def panel_lines(length: int, other: int) -> int:
    """How many lines of `length` products a panel holds: a quarter of the `other` side at most, so
    that no panel is as large as the weight, but no fewer than are multiplied anyway.
    """
    lines = min(PANEL_ELEMENTS // max(length, 1), other // 4)
    return max(lines - lines % ALIGNED_LINES, ALIGNED_LINES)


# Apart from Parts, as a NamedTuple itself has no room for what is cached.
class _Tensors(NamedTuple):
    # Tiles and rest.
    rows: Tensor  # [R], sorted: rows of the weight
    cols: Tensor  # [C]: positions
    entry_row: Tensor  # [E], sorted: index into `rows`
    entry_col: Tensor  # [E]: index into `cols`
    entry_slot: Tensor  # [E]; empty where entry e is value e
    tile_row: Tensor  # [T], sorted: rows TILE * tile_row and on, as indices into `rows`
    tile_col: Tensor  # [T]: likewise into `cols`
    tile_slot: Tensor  # [T, TILE, TILE], -1 where nothing trains
    # Panels, a few lines at a time.
    hot_cols: Tensor  # [H]: positions
    hot_col_at: Tensor  # [n]: index into `hot_cols` * N + row of the weight, sorted
    hot_col_slot: Tensor  # [n]
    hot_col_panels: Tensor  # int64 [2, P + 1], on the host: first line and entry of each panel
    hot_rows: Tensor  # [G]: rows of the weight
    hot_row_at: Tensor  # [n]: index into `hot_rows` * width of the operand + position, sorted
    hot_row_slot: Tensor  # [n]
    hot_row_panels: Tensor  # likewise


class Parts(_Tensors):
    """All that `sampled_grad` reads of a plan. The operand of a plan is the matrix that stands for
    x: x itself, or the packed columns; `position` is a column of it.

    Index tensors are int32, places in a flattened panel int64. `slot` is the place of an entry
    among the values.
    """

    def __getstate__(self) -> None:
        """Nothing but the tensors: `native` holds addresses, which a copy has others of."""

    @cached_property
    def has_panels(self) -> bool:
        return self.hot_cols.numel() + self.hot_rows.numel() > 0

    @cached_property
    def native(self) -> Any:
        """What the compiled CPU kernel reads of tiles and rest: addresses, kept once, because a
        call that asks for each takes longer than a small kernel.
        """
        return _native.kernels().SampledEntries(
            *(self.rows.data_ptr(), self.rows.numel(), self.cols.data_ptr(), self.cols.numel()),
            *(self.entry_row.data_ptr(), self.entry_col.data_ptr()),
            self.entry_slot.data_ptr() if self.entry_slot.numel() else 0,
            self.entry_row.numel(),
            *(self.tile_row.data_ptr(), self.tile_col.data_ptr(), self.tile_slot.data_ptr()),
            self.tile_row.numel(),
        )

    def each_entry(self, out_features: int, width: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield (row of the weight, position, slot), int64, of the entries of each part in turn.

        Reads back from the device: for the reference and for tests.
        """
        rows, cols = self.rows.long(), self.cols.long()
        slot = self.entry_slot
        if slot.numel() == 0:
            slot = torch.arange(self.entry_row.numel(), device=rows.device)
        yield rows[self.entry_row.long()], cols[self.entry_col.long()], slot.long()
        which, i, j = (self.tile_slot >= 0).nonzero(as_tuple=True)
        row = rows[self.tile_row[which].long() * TILE + i]
        yield row, cols[self.tile_col[which].long() * TILE + j], self.tile_slot[which, i, j].long()
        at = self.hot_col_at
        yield at % out_features, self.hot_cols.long()[at // out_features], self.hot_col_slot.long()
        at = self.hot_row_at
        yield self.hot_rows.long()[at // width], at % width, self.hot_row_slot.long()


def gathered(csr: CompactIndices) -> Parts:
    """The parts of a sparse matrix all of whose entries are gathered, in the order of `csr`."""
    none = csr.rows[:0]
    nowhere, no_tiles = none.long(), none.reshape(0, TILE, TILE)
    pieces = torch.zeros(2, 1, dtype=torch.int64, device="cpu")
    return Parts(
        *(csr.rows, csr.cols, csr.compact_rows.int(), csr.local, none),
        *(none, none, no_tiles, none, nowhere, none, pieces, none, nowhere, none, pieces),
    )


class HotLines(NamedTuple):
    """The columns and rows of a weight that panels serve, int64 and sorted."""

    cols: Tensor
    rows: Tensor


def choose_hot_lines(
    rows: Tensor, cols: Tensor, shape: tuple[int, int], width: int, costs: Costs, tokens: int
) -> HotLines:
    """Choose the lines that cost less as a panel, for int64 `[nnz]` coordinates of the entries.

    Args:
        width: columns of the operand, over which a panel of rows extends.
    """
    hot_cols = _hot(torch.bincount(cols, minlength=shape[1]), shape[0], costs, tokens)
    left = ~torch.isin(cols, hot_cols)
    hot_rows = _hot(torch.bincount(rows[left], minlength=shape[0]), width, costs, tokens)
    return HotLines(hot_cols, hot_rows)


def _hot(counts: Tensor, length: int, costs: Costs, tokens: int) -> Tensor:
    gain = counts * costs.gather - length * costs.panel
    hot = gain > 0
    # The whole of dy, or of the operand, is read for the sake of one line or of many.
    if float(gain[hot].sum()) * tokens <= length * costs.read * tokens + costs.call:
        return counts.new_empty(0)
    return hot.nonzero().flatten()


def build_parts(
    rows: Tensor,
    cols: Tensor,
    slots: Tensor | None,
    shape: tuple[int, int],
    hot: HotLines,
    costs: Costs,
    operand: Tensor | None,
) -> Parts:
    """Compile entries, given as int64 `[nnz]` coordinates sorted by (row, column).

    Args:
        slots: int64 `[nnz]`, the place of each entry among the values; None where entry e is value
            e.
        operand: int32 `[C]`, the columns of x behind each position of the packed operand; None
            where the operand is x itself.
    """
    device = rows.device
    width = shape[1] if operand is None else operand.numel()
    slot = torch.arange(rows.numel(), device=device) if slots is None else slots
    position = cols
    if operand is not None:
        place = places_in(operand.long(), shape[1])
        position = place[cols]

    in_cols = torch.isin(cols, hot.cols)
    in_rows = torch.isin(rows, hot.rows) & ~in_cols
    rest = ~(in_cols | in_rows)
    hot_cols = hot.cols if operand is None else place[hot.cols]
    column_panel = _panel(
        torch.searchsorted(hot.cols, cols[in_cols]), rows[in_cols], slot[in_cols], *shape
    )
    row_panel = _panel(
        torch.searchsorted(hot.rows, rows[in_rows]), position[in_rows], slot[in_rows], width,
        shape[0],
    )  # fmt: skip

    used_rows, entry_row = torch.unique(rows[rest], return_inverse=True)
    if operand is None:
        used_cols, entry_col = torch.unique(cols[rest], return_inverse=True)
    else:
        used_cols, entry_col = torch.arange(width, device=device), position[rest]
    slot = slot[rest]
    tiles, in_tile = _tiles(entry_row, entry_col, slot, used_cols.numel(), costs)
    entry_row, entry_col, slot = entry_row[~in_tile], entry_col[~in_tile], slot[~in_tile]
    identity = slots is None and slot.numel() == rows.numel()
    return Parts(
        used_rows.int(),
        used_cols.int(),
        entry_row.int(),
        entry_col.int(),
        slot[:0].int() if identity else slot.int(),
        *tiles,
        hot_cols.int(),
        *column_panel,
        hot.rows.int(),
        *row_panel,
    )


def _panel(
    line: Tensor, along: Tensor, slot: Tensor, length: int, other: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Places in the flattened panel, sorted; their slots; and its pieces, see `Parts`."""
    at, order = torch.sort(line * length + along)
    step = panel_lines(length, other)
    count = int(line.max()) + 1 if line.numel() else 0
    first = torch.arange(0, count + step, step, device=line.device).clamp(max=count)
    pieces = torch.stack([first, torch.searchsorted(at, first * length)])
    return at, slot[order].int(), pieces.cpu()


def _tiles(
    entry_row: Tensor, entry_col: Tensor, slot: Tensor, num_cols: int, costs: Costs
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """The tiles (row, column, slots) that cost less than gathering, and which entries they hold."""
    across = (num_cols + TILE - 1) // TILE
    tile = (entry_row // TILE) * across + entry_col // TILE
    found, which, counts = torch.unique(tile, return_inverse=True, return_counts=True)
    dense = counts * costs.gather > TILE * TILE * costs.tile
    number = torch.cumsum(dense, 0) - 1
    in_tile = dense[which]
    kept = found[dense]
    tile_slot = torch.full((kept.numel(), TILE, TILE), -1, dtype=torch.int32, device=tile.device)
    inside = number[which[in_tile]], entry_row[in_tile] % TILE, entry_col[in_tile] % TILE
    tile_slot[inside] = slot[in_tile].int()
    across = max(across, 1)
    return ((kept // across).int(), (kept % across).int(), tile_slot), in_tile
