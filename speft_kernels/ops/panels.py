"""The panels of `sampled_grad`: thin products by the vendor's GEMM, sampled into the values.

Every backend without a kernel of its own for them calls this. A panel never exceeds
`parts.PANEL_ELEMENTS` products or a quarter of the weight; dy and x are read in stretches of
tokens, so that what is widened of them is small as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from torch import Tensor

from ..parts import Parts

# Tokens multiplied at a time where x is not packed in blocks: sums of stretches are closer to the
# exact sum than one long sum is.
STRETCH = 256


def add_panels(dy: Tensor, operand: Tensor, parts: Parts, out: Tensor) -> None:
    """Add the entries of the hot columns and rows to `out`.

    Args:
        dy: `[M, N]`.
        operand: x `[M, K]`, or its packed columns `[B, C, T]`.
        out: `[nnz]` of the accumulator's dtype.
    """
    if parts.hot_cols.numel():
        _add_columns(dy, operand, parts, out)
    if parts.hot_rows.numel():
        _add_rows(dy, operand, parts, out)


def _add_columns(dy: Tensor, operand: Tensor, parts: Parts, out: Tensor) -> None:
    for first, last, entries in _pieces(parts.hot_col_panels):
        hot = parts.hot_cols[first:last]
        panel = out.new_zeros(hot.numel(), dy.shape[1])
        for tokens, x in _stretches(operand, dy.shape[0]):
            _multiply(panel, x.index_select(0, hot), dy[tokens])
        place = parts.hot_col_at[entries] - first * dy.shape[1]
        _sample(panel, place, parts.hot_col_slot[entries], out)


def _add_rows(dy: Tensor, operand: Tensor, parts: Parts, out: Tensor) -> None:
    width = operand.shape[1]
    for first, last, entries in _pieces(parts.hot_row_panels):
        hot = parts.hot_rows[first:last]
        # Thin in the rows of the weight, as it is in memory.
        panel = out.new_zeros(hot.numel(), width)
        for tokens, x in _stretches(operand, dy.shape[0]):
            _multiply(panel, dy[tokens].index_select(1, hot).t(), x.t())
        place = parts.hot_row_at[entries] - first * width
        _sample(panel, place, parts.hot_row_slot[entries], out)


def _pieces(pieces: Tensor) -> Iterator[tuple[int, int, slice]]:
    """Yield the first and last line of each piece of a panel, and its entries."""
    for (first, start), (last, stop) in itertools.pairwise(pieces.t().tolist()):
        yield first, last, slice(start, stop)


def _stretches(operand: Tensor, tokens: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield stretches of tokens, and the operand's columns there: `[columns, tokens]`."""
    if operand.dim() == 3:
        size = operand.shape[2]
        for block in range(operand.shape[0]):
            count = min(size, tokens - block * size)
            yield slice(block * size, block * size + count), operand[block, :, :count]
    else:
        for start in range(0, tokens, STRETCH):
            stretch = slice(start, min(start + STRETCH, tokens))
            yield stretch, operand[stretch].t()


def _multiply(panel: Tensor, left: Tensor, right: Tensor) -> None:
    # Products accumulate in float32 inside the GEMM, but its result has the operands' dtype: widen
    # them first.
    left, right = left.to(panel.dtype), right.to(panel.dtype)
    if 1 in panel.shape:
        # A gemv, which may add the tokens one after the other to what is there: then the sums of
        # stretches would be one long sum (up to 3.7 times the error of torch's product).
        panel.add_(left @ right)
    else:
        panel.addmm_(left, right)


def _sample(panel: Tensor, place: Tensor, slot: Tensor, out: Tensor) -> None:
    out.index_add_(0, slot, panel.view(-1).index_select(0, place))
