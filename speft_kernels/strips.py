"""`Strips`: the entries of a pattern, as the Triton kernels of `sampled_grad` read them.

- strips: a strip is one column of x under STRIP_ROWS neighbouring rows of the weight. All its
  products are computed by tensor cores, and those of the entries are taken from the accumulators;
- the rest: gathered, one dot product of two lines over the tokens for each entry.

A strip reads one line of x, as a gathered entry does, and leaves dy where it is: neither its rows
are sought out nor is it transposed. On a GPU whose tensor cores make 128 products in the time that
a line takes from the L2 cache, that is worth it for a single entry (see `costs.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .compact import CompactIndices, places_in, spread
from .costs import Costs

STRIP_ROWS = 128  # two tiles of wgmma, and about what balances tensor cores and the L2 cache
GROUP_STRIPS = 64
TILE_WIDTHS = (1, 2, 4)  # groups of strips that a tile of the kernel may have side by side


class Strips(NamedTuple):
    """All that Triton's kernels read of a plan. Index tensors are int32 where nothing else is said.

    The strips of a block of STRIP_ROWS rows stand in groups of GROUP_STRIPS, the last of a block
    filled up with position 0. `position` is a line of the packed operand.
    """

    columns: Tensor  # [C]: columns of x to pack; empty where x comes packed
    block_groups: Tensor  # [blocks + 1]: where the groups of each block of rows start
    group_cols: Tensor  # [groups, GROUP_STRIPS]: positions
    group_entries: Tensor  # [groups + 1]: where the entries of each group start
    most_groups: Tensor  # int64 [1], on the host: groups of the block that has most
    tiles: Tensor  # int64 [3], on the host: tiles of all blocks, for each of TILE_WIDTHS
    entry_at: Tensor  # int16: row in the block * GROUP_STRIPS + strip in the group
    rows: Tensor  # [R], sorted: rows of the weight that gathered entries read
    entry_row: Tensor  # [G], sorted: index into `rows`
    entry_col: Tensor  # [G]: position
    slot: Tensor  # [nnz]: place among the values, of the strips' entries and then the gathered

    def tiles_of(self, groups: int) -> int:
        """How many tiles of so many groups there are, the last of each block of rows among them."""
        return int(self.tiles[TILE_WIDTHS.index(groups)])

    @property
    def strip_rows(self) -> int:
        """For Triton's kernels, which import nothing of this package."""
        return STRIP_ROWS

    def each_entry(self, out_features: int, width: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield (row of the weight, position or column of x, slot), int64, of the entries of each
        part in turn.

        Reads back from the device: for the reference and for tests.
        """
        inside = self.entry_at.shape[0]
        group = spread(self.group_entries, inside)
        block = spread(self.block_groups, self.group_cols.shape[0])
        at, slot = self.entry_at.long(), self.slot.long()
        row = block[group] * STRIP_ROWS + at // GROUP_STRIPS
        position = self.group_cols.long()[group, at % GROUP_STRIPS]
        yield row, self._column(position), slot[:inside]
        row = self.rows.long()[self.entry_row.long()]
        yield row, self._column(self.entry_col.long()), slot[inside:]

    def _column(self, position: Tensor) -> Tensor:
        return self.columns.long()[position] if self.columns.numel() else position


def build_strips(
    rows: Tensor,
    cols: Tensor,
    slots: Tensor | None,
    shape: tuple[int, int],
    costs: Costs,
    operand: Tensor | None,
    tokens: int,
) -> Strips:
    """Compile entries, given as int64 `[nnz]` coordinates sorted by (row, column).

    Args:
        slots: int64 `[nnz]`, the place of each entry among the values; None where entry e is value
            e.
        operand: int32 `[C]`, the columns of x behind each position of the packed operand; None
            where x comes whole: its used columns are packed then.
        tokens: for how many tokens the parts are weighed.
    """
    slot = torch.arange(rows.numel(), device=rows.device) if slots is None else slots
    columns = torch.unique(cols) if operand is None else operand.long()
    position, width = places_in(columns, shape[1])[cols], max(columns.numel(), 1)

    strip, of_strip, counts = torch.unique(
        (rows // STRIP_ROWS) * width + position, return_inverse=True, return_counts=True
    )
    computed = _computed(counts, rows, of_strip, costs, tokens)
    in_strip = computed[of_strip]
    number = torch.cumsum(computed, 0) - 1
    groups, order = _grouped(
        strip[computed], width, number[of_strip[in_strip]], rows[in_strip] % STRIP_ROWS, shape[0]
    )
    used, entry_row = torch.unique(rows[~in_strip], return_inverse=True)
    return Strips(
        (columns if operand is None else columns[:0]).int(),
        *groups,
        used.int(),
        entry_row.int(),
        position[~in_strip].int(),
        torch.cat([slot[in_strip][order], slot[~in_strip]]).int(),
    )


def _computed(counts: Tensor, rows: Tensor, of_strip: Tensor, costs: Costs, tokens: int) -> Tensor:
    """Which strips are computed whole, for their numbers of entries."""
    gain = STRIP_ROWS * costs.panel - counts * costs.gather
    gathered = gain > 0
    # For the sake of one gathered entry or of many, the rows of dy that they read are packed.
    packed = torch.unique(rows[gathered[of_strip]]).numel()
    if float(gain[gathered].sum()) * tokens <= packed * costs.pack * tokens + costs.call:
        return torch.ones_like(gathered)
    return ~gathered


def _grouped(
    strip: Tensor, width: int, of_strip: Tensor, row: Tensor, out_features: int
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The fields `block_groups` to `entry_at`, and the order of the entries in them.

    Args:
        strip: int64, sorted: block of rows * width + position.
        of_strip: the strip of each entry.
        row: the row of each entry within its block.
    """
    device = strip.device
    blocks = (out_features + STRIP_ROWS - 1) // STRIP_ROWS
    block = strip // width
    strips_of = torch.bincount(block, minlength=blocks)
    groups_of = (strips_of + GROUP_STRIPS - 1) // GROUP_STRIPS
    block_groups = torch.cat([groups_of.new_zeros(1), groups_of.cumsum(0)])
    first = torch.cat([strips_of.new_zeros(1), strips_of.cumsum(0)])
    within = torch.arange(strip.numel(), device=device) - first[block]
    group = block_groups[block] + within // GROUP_STRIPS
    total = int(block_groups[-1])
    group_cols = torch.zeros(total, GROUP_STRIPS, dtype=torch.int32, device=device)
    group_cols[group, within % GROUP_STRIPS] = (strip % width).int()

    entry_group = group[of_strip]
    order = torch.argsort(entry_group, stable=True)
    at = row * GROUP_STRIPS + (within % GROUP_STRIPS)[of_strip]
    starts = torch.bincount(entry_group, minlength=total).cumsum(0)
    of_block = groups_of.cpu()
    most = of_block.max().reshape(1) if blocks else of_block.new_zeros(1)
    tiles = torch.stack([((of_block + w - 1) // w).sum() for w in TILE_WIDTHS])
    fields = (
        block_groups.int(),
        group_cols,
        torch.cat([starts.new_zeros(1), starts]).int(),
        most,
        tiles,
        at[order].to(torch.int16),
    )
    return fields, order


def gathered_strips(csr: CompactIndices) -> Strips:
    """The strips of a sparse matrix all of whose entries are gathered, in the order of `csr`."""
    none = csr.rows[:0]
    nnz = csr.local.numel()
    return Strips(
        csr.cols,
        torch.zeros(1, dtype=torch.int32, device=none.device),
        none.reshape(0, GROUP_STRIPS),
        torch.zeros(1, dtype=torch.int32, device=none.device),
        torch.zeros(1, dtype=torch.int64, device="cpu"),
        torch.zeros(len(TILE_WIDTHS), dtype=torch.int64, device="cpu"),
        none.to(torch.int16),
        *(csr.rows, csr.compact_rows.int(), csr.local),
        torch.arange(nnz, dtype=torch.int32, device=none.device),
    )
