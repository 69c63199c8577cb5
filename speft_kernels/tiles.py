"""`Tiles`: the entries of a delta by small square tiles of the weight, for kernels that add them to
a tile of the weight on its way to the tensor cores.

One list serves `x @ (W + D)^T` and its twin: a tile is square, and what is summed over in the one
are the outputs of the other.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .compact import CompactIndices

SIDE = 32  # csrc/cuda/sparse_delta_matmul.cu
# Columns of an int4 weight are stored in quarters (quantized.py): tiles lie within one.
QUARTERS = 4


class Tiles(NamedTuple):
    """Entries sorted by tile, tiles row by row."""

    starts: Tensor  # int32 [tiles + 1]: where each tile starts
    places: Tensor  # int16 [nnz]: row in the tile * SIDE + column in the tile
    order: Tensor  # int32 [nnz]: sorts values by tile that are sorted by (row, column)

    @classmethod
    def build(cls, compact: CompactIndices, columns: int, parts: int = 1) -> Tiles:
        """Sort the entries of a matrix of `columns` columns, which are parted in `parts` of one
        width with tiles of their own.
        """
        rows, cols = compact.entry_rows, compact.entry_cols
        width = columns // parts
        across = -(-width // SIDE)
        within = cols % width
        column_tile = torch.div(cols, width, rounding_mode="floor") * across + within // SIDE
        tile = rows // SIDE * (parts * across) + column_tile
        order = torch.argsort(tile, stable=True)
        every = torch.arange(
            -(-(compact.starts.shape[0] - 1) // SIDE) * parts * across + 1, device=rows.device
        )
        starts = torch.searchsorted(tile[order], every, out_int32=True)
        places = (rows % SIDE * SIDE + within % SIDE)[order]
        return cls(starts, places.to(torch.int16), order.int())
