"""`RowPanels`: the entries of a pattern, as the `sampled_grad` of torch's own operators reads them.

A panel is the product of some neighbouring rows of the weight, as dy has them, with all used
columns of x; the entries are taken from it. That computes the share of the dense gradient that the
used columns are of all, by the vendor's GEMM, in three launches a panel. Rows that no entry uses
are computed, too: to leave them out dy would be read and written first, and that takes an H200
about as long as the products of the fifth of the rows that real masks do not use.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .compact import ROW_STEP, CompactIndices

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

    positions: Tensor  # int32 [C]: those to pick for the products; empty where all are multiplied
    panels: Tensor  # int64 [P, 4], on the host: first and last row, first and last entry (beyond)
    at: Tensor  # int32 [nnz]: row within its panel * columns that are multiplied + column of them

    @classmethod
    def build(
        cls, csr: CompactIndices, in_features: int, operand: Tensor | None = None
    ) -> RowPanels:
        """Part the entries of `csr`. Nothing is read back from the device.

        Args:
            operand: int32 `[C]`, the columns of x behind each position where x comes packed, which
                may be more than this pattern uses; None where it comes whole.
        """
        width, used, column = in_features, csr.cols, csr.columns
        if operand is not None:
            width = operand.numel()
            place = csr.cols.new_empty(in_features)
            place[operand.long()] = torch.arange(width, dtype=place.dtype, device=place.device)
            used, column = place[used.long()], place[column.long()]
        if used.numel() <= KEEP_COLUMNS_SHARE * width:
            width, column = used.numel(), csr.local
        else:
            used = used[:0]
        size = csr.starts.numel() - 1
        step = csr.rows_at_a_time(min(PRODUCTS, size * in_features // 2) // max(width, 1))
        # By operations on tensors alone, for these may be fakes.
        first, begin = torch.arange(0, size, step, device="cpu"), csr.steps[:: step // ROW_STEP]
        last = (first + step).clamp(max=size)
        end = torch.cat([begin[1:], csr.steps[-1:]])
        return cls(
            used,
            torch.stack([first, last, begin[: first.numel()], end[: first.numel()]], 1),
            (csr.entry_rows % step * width + column).int(),
        )

    def each_entry(self, out_features: int, width: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield (row of the weight, position or column of x, slot), int64, of the entries of each
        part in turn.
        """
        positions, at = self.positions.long(), self.at.long()
        width = positions.numel() or width
        for first, _, begin, end in self.panels.tolist():
            row, column = first + at[begin:end] // width, at[begin:end] % width
            slot = torch.arange(begin, end, device=at.device)
            yield row, positions[column] if positions.numel() else column, slot
