"""`RowPanels`: the entries of a pattern, as the `sampled_grad` of torch's own operators reads them.

A panel is the product of some neighbouring rows of the weight, as dy has them, with all used
columns of x; the entries are taken from it. That computes the share of the dense gradient that the
used columns are of all, by the vendor's GEMM, in three launches a panel. Rows that no entry uses
are left out where so many are unused that their products would take far longer than to pick the
others out of dy: on a CPU soon, on an H200 where a global ranking leaves a layer few rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .compact import ROW_STEP, CompactIndices, places_in
from .costs import Costs

# Products of a panel: 16 MB in float32, and as many tiles of 256 x 128 as one wave of a large GPU.
# Of a smaller weight, half as many as it has elements.
PRODUCTS = 1 << 22

# A copy of more columns than this share of all saves too little, of memory or of products, to be
# worth its traffic: x is kept, and read, as it is.
KEEP_COLUMNS_SHARE = 0.9


class RowPanels(NamedTuple):
    """All that the torch backend reads of a plan. Entry e is value e. `position` is a column of x,
    or of its packed columns.
    """

    rows: Tensor  # int32 [R]: those to pick for the products; empty where all are multiplied
    positions: Tensor  # int32 [C]: likewise
    panels: Tensor  # int64 [P, 4], on the host: first and last row, first and last entry (beyond)
    at: Tensor  # int32 [nnz]: row within its panel * columns that are multiplied + column of them

    @classmethod
    def build(
        cls,
        csr: CompactIndices,
        in_features: int,
        operand: Tensor | None = None,
        costs: Costs | None = None,
    ) -> RowPanels:
        """Part the entries of `csr`. Without costs nothing is read back from the device.

        Args:
            operand: int32 `[C]`, the columns of x behind each position where x comes packed, which
                may be more than this pattern uses; None where it comes whole.
            costs: what picking rows is weighed with; None multiplies all.
        """
        width, used, column = in_features, csr.cols, csr.columns
        if operand is not None:
            width = operand.numel()
            place = places_in(operand, in_features)
            used, column = place[used.long()], place[column.long()]
        if used.numel() <= KEEP_COLUMNS_SHARE * width:
            width, column = used.numel(), csr.local
        else:
            used = used[:0]
        size, rows, row = csr.starts.numel() - 1, csr.rows[:0], csr.entry_rows
        most = min(PRODUCTS, size * in_features // 2) // max(width, 1)
        step, starts = csr.rows_at_a_time(most), csr.steps
        if costs is not None and _few(csr.rows.numel(), size, width, costs):
            rows, row, size = csr.rows, csr.compact_rows, csr.rows.numel()
            starts = torch.cat([csr.crow[:-1:ROW_STEP], csr.crow[-1:]]).cpu()
        # By operations on tensors alone, for these may be fakes.
        first, begin = torch.arange(0, size, step, device="cpu"), starts[:: step // ROW_STEP]
        last = (first + step).clamp(max=size)
        end = torch.cat([begin[1:], starts[-1:]])
        return cls(
            rows,
            used,
            torch.stack([first, last, begin[: first.numel()], end[: first.numel()]], 1),
            (row % step * width + column).int(),
        )

    def each_entry(self, out_features: int, width: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield (row of the weight, position or column of x, slot), int64, of the entries of each
        part in turn.
        """
        positions, at = self.positions.long(), self.at.long()
        width = positions.numel() or width
        for first, _, begin, end in self.panels.tolist():
            row, column = first + at[begin:end] // width, at[begin:end] % width
            yield (
                self.rows.long()[row] if self.rows.numel() else row,
                positions[column] if positions.numel() else column,
                torch.arange(begin, end, device=at.device),
            )


def _few(used: int, rows: int, width: int, costs: Costs) -> bool:
    """Whether used rows are so few that the products of the others take twice the time in which all
    of dy is read and these are written; what is nearer is not worth the memory of the copy.
    """
    return (rows - used) * width * costs.panel > (rows + used) * costs.pack
