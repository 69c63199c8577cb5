"""`CompactIndices`: entries of a sparse matrix over the rows and columns that hold any."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Rows of dW or of the delta that the torch backend makes dense at a time, over the used columns
# only: at most 14 MB in float32 for K = 14336.
PANEL_ROWS = 256


def spread(starts: Tensor, size: int) -> Tensor:
    """int64 `[size]`: which part each of `size` things is in, for `[parts + 1]` starts."""
    counts = starts.long().diff()
    parts = torch.arange(counts.shape[0], device=starts.device)
    # Without the size, a device would be asked for the sum of the counts.
    return torch.repeat_interleave(parts, counts, output_size=size)


class CompactIndices(NamedTuple):
    """Entries in CSR form over the rows and columns that hold any.

    Entry `e` of compact row `r` (`crow[r] <= e < crow[r + 1]`) lies at row `rows[r]`, column
    `cols[local[e]]`.
    """

    rows: Tensor  # int32 [R], sorted: the rows that hold an entry
    crow: Tensor  # int64 [R + 1]
    cols: Tensor  # int32 [C], sorted: the columns that hold an entry
    local: Tensor  # int32 [nnz]: position of each entry's column in `cols`
    panels: Tensor  # int64, on the host: where each panel of PANEL_ROWS rows starts in the entries
    # For kernels that go through all rows of the matrix, used or not:
    starts: Tensor  # int32 [rows of the matrix + 1]: where each row starts in the entries
    columns: Tensor  # int32 [nnz]: the column of each entry

    @property
    def compact_rows(self) -> Tensor:
        """int64 `[nnz]`: position of each entry's row in `rows`."""
        return spread(self.crow, self.local.numel())

    @property
    def entry_rows(self) -> Tensor:
        """int64 `[nnz]`: the row of each entry."""
        return self.rows.long()[self.compact_rows]

    @property
    def entry_cols(self) -> Tensor:
        """int64 `[nnz]`: the column of each entry."""
        return self.columns.long()

    def row_panels(self) -> Iterator[tuple[Tensor, slice, Tensor]]:
        """Yield, for each panel of PANEL_ROWS compact rows: the rows, the entries, and each
        entry's row within the panel. Nothing is read back from the device.
        """
        row_of_entry = self.compact_rows
        for i, (start, stop) in enumerate(itertools.pairwise(self.panels.tolist())):
            first = i * PANEL_ROWS
            entries = slice(start, stop)
            yield self.rows[first : first + PANEL_ROWS], entries, row_of_entry[entries] - first

    @classmethod
    def build(cls, rows: Tensor, cols: Tensor, size: int) -> CompactIndices:
        """Compact entries given as int `[nnz]` coordinates sorted by (row, column), of a matrix of
        `size` rows.
        """
        used_rows, counts = torch.unique_consecutive(rows, return_counts=True)
        crow = torch.zeros(counts.numel() + 1, dtype=torch.int64, device=rows.device)
        torch.cumsum(counts, 0, out=crow[1:])
        used_cols, local = torch.unique(cols, return_inverse=True)
        panels = torch.cat([crow[:-1:PANEL_ROWS], crow[-1:]]).cpu()
        every = torch.arange(size + 1, dtype=rows.dtype, device=rows.device)
        return cls(
            used_rows.to(torch.int32),
            crow,
            used_cols.to(torch.int32),
            local.to(torch.int32),
            panels,
            torch.searchsorted(rows.contiguous(), every, out_int32=True),
            cols.to(torch.int32),
        )

    def transpose(self, size: int) -> tuple[CompactIndices, Tensor]:
        """Return the same entries sorted by (column, row), and the int64 `[nnz]` permutation that
        sorts values so.
        """
        order = torch.argsort(self.local, stable=True)
        rows, cols = self.entry_cols[order], self.entry_rows[order]
        return CompactIndices.build(rows, cols, size), order
