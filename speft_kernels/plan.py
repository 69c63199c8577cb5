"""`SparsityPlan`: a static pattern compiled into the form that the kernels read.

The pattern never changes during training, so everything that depends on it alone is computed once:
the compact index form of each direction, and which columns of the activations a backward pass has
to keep.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .pattern import SparsePattern, lazy_tensor

# Copying x[:, used] costs a read and a write of the copy; keeping x costs nothing now but holds M *
# K elements until the backward pass. Half is where copying stops saving memory worth its traffic.
KEEP_COLUMNS_SHARE = 0.5

# Rows of dW or of the delta that the torch backend makes dense at a time, over the used columns
# only: at most 14 MB in float32 for K = 14336.
PANEL_ROWS = 256


class CompactIndices(NamedTuple):
    """Entries of a sparse matrix in CSR form over the rows and columns that hold any.

    Entry `e` of compact row `r` (`crow[r] <= e < crow[r + 1]`) lies at row `rows[r]`, column
    `cols[local[e]]`.
    """

    rows: Tensor  # int32 [R], sorted: the rows that hold an entry
    crow: Tensor  # int64 [R + 1]
    cols: Tensor  # int32 [C], sorted: the columns that hold an entry
    local: Tensor  # int32 [nnz]: position of each entry's column in `cols`
    panels: Tensor  # int64, on the host: where each panel of PANEL_ROWS rows starts in the entries

    @property
    def entry_rows(self) -> Tensor:
        """int64 `[nnz]`: the row of each entry."""
        return self._spread(self.rows.long())

    def _spread(self, of_row: Tensor) -> Tensor:
        # Without the size, a device would be asked for the sum of the counts.
        return torch.repeat_interleave(of_row, self.crow.diff(), output_size=self.local.numel())

    def row_panels(self) -> Iterator[tuple[Tensor, slice, Tensor]]:
        """Yield, for each panel of PANEL_ROWS compact rows: the rows, the entries, and each
        entry's row within the panel. Nothing is read back from the device.
        """
        row_of_entry = self._spread(torch.arange(self.rows.numel(), device=self.rows.device))
        for i, (start, stop) in enumerate(itertools.pairwise(self.panels.tolist())):
            first = i * PANEL_ROWS
            entries = slice(start, stop)
            yield self.rows[first : first + PANEL_ROWS], entries, row_of_entry[entries] - first

    @property
    def entry_cols(self) -> Tensor:
        """int64 `[nnz]`: the column of each entry."""
        return self.cols.long()[self.local.long()]

    @classmethod
    def build(cls, rows: Tensor, cols: Tensor) -> CompactIndices:
        """Compact entries given as int `[nnz]` coordinates sorted by (row, column)."""
        used_rows, counts = torch.unique_consecutive(rows, return_counts=True)
        crow = torch.zeros(counts.numel() + 1, dtype=torch.int64, device=rows.device)
        torch.cumsum(counts, 0, out=crow[1:])
        used_cols, local = torch.unique(cols, return_inverse=True)
        panels = torch.cat([crow[:-1:PANEL_ROWS], crow[-1:]]).cpu()
        return cls(
            used_rows.to(torch.int32),
            crow,
            used_cols.to(torch.int32),
            local.to(torch.int32),
            panels,
        )

    def transpose(self) -> tuple[CompactIndices, Tensor]:
        """Return the same entries sorted by (column, row), and the int64 `[nnz]` permutation that
        sorts values so.
        """
        order = torch.argsort(self.local, stable=True)
        rows, cols = self.entry_cols[order], self.entry_rows[order]
        return CompactIndices.build(rows, cols), order


@dataclass(frozen=True)
class SparsityPlan:
    """A pattern compiled for one device. Build it with `SparsityPlan.build`; it is data and never
    changes.
    """

    pattern: SparsePattern
    kept_columns: (
        Tensor | None
    )  # int32 [C]: columns of x that the backward pass keeps; None keeps x whole

    @classmethod
    def build(
        cls, pattern: SparsePattern, device: torch.device | str | None = None
    ) -> SparsityPlan:
        """Compile `pattern` for `device` (the pattern's own by default)."""
        pattern = pattern.to(device) if device is not None else pattern
        used = pattern.used_cols
        keep = None if used.numel() > KEEP_COLUMNS_SHARE * pattern.shape[1] else used
        return cls(pattern, keep)

    @property
    def kept_width(self) -> int:
        """Number of activation columns kept for the backward pass."""
        return self.pattern.shape[1] if self.kept_columns is None else self.kept_columns.numel()

    def keep(self, x: Tensor) -> Tensor:
        """Return the part of the activations `x [M, K]` that the backward pass needs: `[M,
        kept_width]`.

        It is `x` itself where copying would not pay.
        """
        return x if self.kept_columns is None else x.index_select(1, self.kept_columns)

    @lazy_tensor
    def row_order(self) -> Tensor | None:
        """int64 `[nnz]`: sorts `values.reshape(-1)` by (row, column); None where they are sorted
        already.
        """
        return torch.argsort(self.pattern.entry_indices) if self.pattern.is_block else None

    @lazy_tensor
    def csr(self) -> CompactIndices:
        """Entries by row, columns as in the weight."""
        rows, cols = self.pattern.rows, self.pattern.cols
        if self.row_order is not None:
            rows, cols = rows[self.row_order], cols[self.row_order]
        return CompactIndices.build(rows, cols)

    @lazy_tensor
    def csc(self) -> tuple[CompactIndices, Tensor]:
        """Entries by column, for the input-gradient twin, and the permutation of values sorted by
        row.
        """
        return self.csr.transpose()

    @lazy_tensor
    def kept_csr(self) -> CompactIndices:
        """Entries by row, columns as in the kept activations."""
        if self.kept_columns is None:
            return self.csr
        width = torch.arange(self.kept_width, dtype=torch.int32, device=self.pattern.device)
        return self.csr._replace(cols=width)


def plan_of(pattern: SparsePattern) -> SparsityPlan:
    """Return the pattern's plan, built on the first call and kept with the pattern, which never
    changes.
    """
    plan = pattern.__dict__.get("_plan")
    if plan is None:
        plan = pattern.__dict__["_plan"] = SparsityPlan.build(pattern)
    return plan
