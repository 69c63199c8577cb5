"""`sparse_delta_matmul` by torch's products, with W, D or W + D made dense a piece at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..compact import CompactIndices
from ..quantized import PIECE_BYTES, QuantizedWeight

# Of W + D: for a large GPU a wave of tiles, or more. Of D alone, and of a quantized W, PIECE_BYTES.
DENSE_BYTES = 16 << 20


def quantized_product(
    x: Tensor, base: QuantizedWeight, bias: Tensor | None, out_features: int, twin: bool
) -> Tensor:
    """The base's product, some outputs at a time: what is widened of it stays small, and each sum
    is torch's own.
    """
    y = x.new_empty(x.shape[0], out_features)
    step = max(1, PIECE_BYTES // max(1, x.shape[1] * x.element_size()))
    for start in range(0, out_features, step):
        some = slice(start, min(start + step, out_features))
        if twin:
            y[:, some] = x @ base.columns(some, x.dtype)
        else:
            y[:, some] = F.linear(x, base.rows(some, x.dtype), None if bias is None else bias[some])
    return y


def add_delta(y: Tensor, x: Tensor, values: Tensor, sparse: CompactIndices) -> None:
    """Add `x @ D^T` to y, some outputs at a time, in the dtype of the values."""
    x_used = x.index_select(1, sparse.cols).to(values.dtype)
    output, column = sparse.entry_rows, sparse.local.long()
    rows = _outputs_at_a_time(sparse, x_used.shape[1] * values.element_size(), PIECE_BYTES)
    for some, part in sparse.panels(rows):
        dense = values.new_zeros(some.stop - some.start, sparse.cols.numel())
        dense[output[part] - some.start, column[part]] = values[part]
        y[:, some] = (x_used @ dense.t()).add_(y[:, some])


def by_effective_weight(
    x: Tensor,
    base: Tensor | QuantizedWeight | None,
    values: Tensor,
    entries: CompactIndices,
    bias: Tensor | None,
    twin: bool,
) -> Tensor:
    """`x @ (W + D)^T + b`: W + D is made for some outputs at a time, rounded to x's dtype, and
    torch's product reads it.

    Args:
        base: W; for the twin, its columns are the outputs.
        values: `[nnz]`, in the order of `entries`, which are sorted by output.
    """
    output, summed = entries.entry_rows, entries.entry_cols
    if base is None:  # D alone has the columns that it uses
        x, summed = x.index_select(1, entries.cols), entries.local.long()
    y = x.new_empty(x.shape[0], entries.starts.numel() - 1)
    # A quantized weight is widened first.
    size = 4 if isinstance(base, QuantizedWeight) else x.element_size()
    for some, part in entries.panels(_outputs_at_a_time(entries, x.shape[1] * size, DENSE_BYTES)):
        lines = _lines(x, base, some, twin)
        at = output[part] - some.start, summed[part]
        lines[at] = (lines[at] + values[part]).to(lines.dtype)  # summed in float32
        if bias is None:
            torch.mm(x, lines.t(), out=y[:, some])
        else:
            torch.addmm(bias[some], x, lines.t(), out=y[:, some])
    return y


def _outputs_at_a_time(entries: CompactIndices, line_bytes: int, most_bytes: int) -> int:
    """How many lines may exist at a time: half of all at most, but one step."""
    half = entries.starts.numel() // 2
    return entries.rows_at_a_time(min(most_bytes // max(line_bytes, 1), half))


def _lines(x: Tensor, base: Tensor | QuantizedWeight | None, some: slice, twin: bool) -> Tensor:
    """`[outputs, summed]`: some rows of W, copied, or for the twin some columns, transposed."""
    if base is None:
        return x.new_zeros(some.stop - some.start, x.shape[1])
    if isinstance(base, QuantizedWeight):
        return base.columns(some, x.dtype).t() if twin else base.rows(some, x.dtype)
    return base[:, some].clone().t() if twin else base[some].clone()
