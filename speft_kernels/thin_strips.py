"""`ThinStrips`: the entries of a pattern, as the CUDA kernel of `sampled_grad` reads them.

A thin strip is one column of x under STRIP_ROWS neighbouring rows of the weight: of it the tensor
cores compute every product, eight strips at a time, and those of the entries are taken. The strips
of a block of BLOCK_ROWS rows are cut into tiles, one for each thread block of the kernel, which
keeps the tile's lines of x and its rows of dy in shared memory, some tokens at a time: all strips
of a column, one above the other, read the same line there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .compact import places_in, spread

# kStripRows, kBlockStrips, kTileLines and kTileGroups of csrc/cuda/kernels.h.
STRIP_ROWS = 32
BLOCK_STRIPS = 8  # of one column
BLOCK_ROWS = STRIP_ROWS * BLOCK_STRIPS
TILE_LINES = 512
TILE_GROUPS = 128
GROUP = 8  # strips of one product, all of the same rows
# Strips that surely fit: the last group of each of the BLOCK_STRIPS rows of strips is filled up.
TILE_STRIPS = GROUP * TILE_GROUPS - (GROUP - 1) * BLOCK_STRIPS


class ThinStrips(NamedTuple):
    """Index tensors are int32 where nothing else is said. `position` is a line of the packed
    operand.
    """

    columns: Tensor  # [C]: columns of x to pack; empty where x comes packed
    tile_block: Tensor  # [tiles]: the block of rows of each
    tile_lines: Tensor  # [tiles + 1]: where the lines of each start
    tile_groups: Tensor  # [tiles + 1]: likewise its groups
    tile_entries: Tensor  # [tiles + 1]: likewise its entries
    line: Tensor  # [lines]: positions
    group_rows: Tensor  # uint8 [groups]: which STRIP_ROWS rows of the block
    strip_line: Tensor  # int16 [groups, GROUP]: a line of the tile, 0 where a group is filled up
    at: Tensor  # int16 [nnz]: strip of the tile, counting those that fill up, * STRIP_ROWS + row
    slot: Tensor  # [nnz]: place among the values

    def each_entry(self, out_features: int, width: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield (row of the weight, position or column of x, slot), int64, of all entries.

        For gradients and for tests.
        """
        tile = spread(self.tile_entries, self.slot.shape[0])
        strip, row = self.at.long() // STRIP_ROWS, self.at.long() % STRIP_ROWS
        strip = strip + GROUP * self.tile_groups.long()[tile]
        rows = self.tile_block.long()[tile] * BLOCK_STRIPS + self.group_rows.long()[strip // GROUP]
        line = self.tile_lines.long()[tile] + self.strip_line.flatten().long()[strip]
        position = self.line.long()[line]
        column = self.columns.long()[position] if self.columns.numel() else position
        yield rows * STRIP_ROWS + row, column, self.slot.long()


def build_thin_strips(
    rows: Tensor, cols: Tensor, slots: Tensor | None, in_features: int, operand: Tensor | None
) -> ThinStrips:
    """Compile entries, given as int64 `[nnz]` coordinates sorted by (row, column).

    Args:
        slots: int64 `[nnz]`, the place of each entry among the values; None where entry e is value
            e.
        operand: int32 `[C]`, the columns of x behind each position of the packed operand; None
            where x comes whole: its used columns are packed then.
    """
    device = rows.device
    slot = torch.arange(rows.numel(), device=device) if slots is None else slots
    columns = torch.unique(cols) if operand is None else operand.long()
    position, width = places_in(columns, in_features)[cols], max(columns.numel(), 1)

    line, of_line = torch.unique(rows // BLOCK_ROWS * width + position, return_inverse=True)
    strip, of_strip = torch.unique(
        of_line * BLOCK_STRIPS + rows // STRIP_ROWS % BLOCK_STRIPS, return_inverse=True
    )
    line_block, strip_line = line // width, strip // BLOCK_STRIPS
    line_tile = _tiles(line_block, torch.bincount(strip_line, minlength=line.numel()))
    tiles = int(line_tile[-1]) + 1 if line.numel() else 0
    every = torch.arange(tiles + 1, device=device)
    tile_lines = torch.searchsorted(line_tile, every)

    # Strips in groups of the same rows of the same tile. The kernel reads them two by two: of an
    # even and an odd line where there are such, for those lie in different halves of the banks.
    strip_tile = line_tile[strip_line]
    within = strip_line - tile_lines[strip_tile]
    key = strip_tile * BLOCK_STRIPS + strip % BLOCK_STRIPS
    pair = _rank(key * 2 + within % 2) * 2 + within % 2
    rank = _rank(key, pair)
    groups = (torch.bincount(key, minlength=tiles * BLOCK_STRIPS) + GROUP - 1) // GROUP
    before = groups.cumsum(0) - groups
    number = before[key] * GROUP + rank
    filled = torch.zeros(int(groups.sum()) * GROUP, dtype=torch.int16, device=device)
    filled[number] = within.to(torch.int16)
    tile_groups = torch.cat([before, groups.sum().reshape(1)])[::BLOCK_STRIPS]
    group_rows = torch.arange(groups.numel(), device=device) % BLOCK_STRIPS

    tile = line_tile[of_line]
    at = (number[of_strip] - GROUP * tile_groups[tile]) * STRIP_ROWS + rows % STRIP_ROWS
    order = torch.argsort(tile, stable=True)
    return ThinStrips(
        (columns if operand is None else columns[:0]).int(),
        line_block[tile_lines[:-1]].int(),
        tile_lines.int(),
        tile_groups.int(),
        torch.searchsorted(tile[order], every).int(),
        (line % width).int(),
        torch.repeat_interleave(group_rows, groups).to(torch.uint8),
        filled.reshape(-1, GROUP),
        at[order].to(torch.int16),
        slot[order].int(),
    )


_SHARES = 64  # of what a tile holds, in which tiles of like size are sought: 2^6
_HALVINGS = 6


def _tiles(block: Tensor, strips: Tensor) -> Tensor:
    """The tile of each line, for the block that each is in (sorted) and its number of strips.

    A tile takes lines until either its lines or its strips are full, which makes the fewest tiles.
    That leaves little for the last one of a block; so all of a block hold the smallest share of
    what fits with which they are no more. The loops are over the tiles of a block, of all blocks
    at once.
    """
    counts = torch.unique_consecutive(block, return_counts=True)[1]
    end = counts.cumsum(0)
    start = end - counts
    before = torch.cat([strips.new_zeros(1), strips.cumsum(0)])

    def next_tile(first: Tensor, share: Tensor) -> Tensor:
        by_lines = first + TILE_LINES * share // _SHARES
        most = before[first] + TILE_STRIPS * share // _SHARES
        by_strips = torch.searchsorted(before, most, right=True) - 1
        return torch.minimum(torch.minimum(by_lines, by_strips), end)

    share, first = torch.full_like(end, _SHARES), start
    fewest, turns = torch.zeros_like(end), 0
    while bool((first < end).any()):
        fewest, turns = fewest + (first < end), turns + 1
        first = next_tile(first, share)
    too_small = torch.zeros_like(end)
    for _ in range(_HALVINGS):
        middle, first, found = (share + too_small) // 2, start, torch.zeros_like(end)
        for _ in range(turns):
            found, first = found + (first < end), next_tile(first, middle)
        enough = (first == end) & (found <= fewest)
        share = torch.where(enough, middle, share)
        too_small = torch.where(enough, too_small, middle)

    # Where a block has no more tiles, its end is where the next one starts, or the end of all.
    starts, first = torch.zeros(block.numel() + 1, dtype=torch.int64, device=block.device), start
    for _ in range(turns):
        starts[first] = 1
        first = next_tile(first, share)
    return starts[:-1].cumsum(0) - 1


def _rank(key: Tensor, by: Tensor | None = None) -> Tensor:
    """The place of each among those of its key, as they come or by a number below 2^20."""
    order = torch.argsort(key if by is None else key << 20 | by, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.numel(), device=order.device)
    counts = torch.bincount(key)
    return rank - (counts.cumsum(0) - counts)[key]
