"""`CompactIndices`: entries of a sparse matrix over the rows and columns that hold any."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Whoever takes some rows of the matrix at a time takes a multiple of so many, for which the host
# knows where their entries start.
ROW_STEP = 64


def spread(starts: Tensor, size: int) -> Tensor:
    """int64 `[size]`: which part each of `size` things is in, for `[parts + 1]` starts."""
    counts = starts.long().diff()
    parts = torch.arange(counts.shape[0], device=starts.device)
    # Without the size, a device would be asked for the sum of the counts.
    return torch.repeat_interleave(parts, counts, output_size=size)


def places_in(columns: Tensor, size: int) -> Tensor:
    """`[size]`, of the dtype of `columns`: the place among them of each of `size` columns; of one
    that is not among them it is anything.
    """
    place = columns.new_empty(size)
    place[columns.long()] = torch.arange(len(columns), dtype=columns.dtype, device=columns.device)
    return place


class CompactIndices(NamedTuple):
    """Entries in CSR form over the rows and columns that hold any.

    Entry `e` of compact row `r` (`crow[r] <= e < crow[r + 1]`) lies at row `rows[r]`, column
    `cols[local[e]]`.
    """

    rows: Tensor  # int32 [R], sorted: the rows that hold an entry
    crow: Tensor  # int64 [R + 1]
    cols: Tensor  # int32 [C], sorted: the columns that hold an entry
    local: Tensor  # int32 [nnz]: position of each entry's column in `cols`
    steps: Tensor  # int64, on the host: where each ROW_STEP rows of the matrix start in the entries
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

    def rows_at_a_time(self, most: int) -> int:
        """The multiple of ROW_STEP up to `most` and to the size of the matrix, but one step."""
        all_steps = -(-(self.starts.numel() - 1) // ROW_STEP)
        return max(1, min(most // ROW_STEP, all_steps)) * ROW_STEP

    def panels(self, rows: int) -> Iterator[tuple[slice, slice]]:
        """Yield so many rows of the matrix at a time, a multiple of ROW_STEP, and their entries.
        Nothing is read back from the device.
        """
        size, starts = self.starts.numel() - 1, self.steps.tolist()
        for first in range(0, size, rows):
            last = min(first + rows, size)
            yield slice(first, last), slice(starts[first // ROW_STEP], starts[-(-last // ROW_STEP)])

    @classmethod
    def build(cls, rows: Tensor, cols: Tensor, size: int) -> CompactIndices:
        """Compact entries given as int `[nnz]` coordinates sorted by (row, column), of a matrix of
        `size` rows.
        """
        used_rows, counts = torch.unique_consecutive(rows, return_counts=True)
        crow = torch.zeros(counts.numel() + 1, dtype=torch.int64, device=rows.device)
        torch.cumsum(counts, 0, out=crow[1:])
        used_cols, local = torch.unique(cols, return_inverse=True)
        every = torch.arange(size + 1, dtype=rows.dtype, device=rows.device)
        starts = torch.searchsorted(rows.contiguous(), every, out_int32=True)
        steps = torch.cat([starts[:-1:ROW_STEP], starts[-1:]]).long().cpu()
        return cls(
            used_rows.to(torch.int32),
            crow,
            used_cols.to(torch.int32),
            local.to(torch.int32),
            steps,
            starts,
            cols.to(torch.int32),
        )

    def transpose(self, size: int) -> tuple[CompactIndices, Tensor]:
        """Return the same entries sorted by (column, row), and the int64 `[nnz]` permutation that
        sorts values so.
        """
        order = torch.argsort(self.local, stable=True)
        rows, cols = self.entry_cols[order], self.entry_rows[order]
        return CompactIndices.build(rows, cols, size), order
