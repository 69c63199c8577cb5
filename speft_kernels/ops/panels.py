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

# Tokens multiplied at a time, and elements of dy or of x. The GEMM cuts a longer sum into as many
# parts as there are threads (512 tokens: other bits with 1, 2 and 3 threads); and what is widened
# stays small.
STRETCH_TOKENS, STRETCH_ELEMENTS = 256, 1 << 20


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
        thin = _columns(operand, hot)
        for tokens in _stretches(dy.shape[0], dy.shape[1]):
            _multiply(panel, thin[:, tokens], dy[tokens])
        place = parts.hot_col_at[entries] - first * dy.shape[1]
        _sample(panel, place, parts.hot_col_slot[entries], out)


def _columns(operand: Tensor, positions: Tensor) -> Tensor:
    """Some columns of x or of the packed ones, `[columns, tokens]`."""
    if operand.dim() == 3:
        return operand.index_select(1, positions).transpose(0, 1).flatten(1)
    return operand.index_select(1, positions).t()


def _add_rows(dy: Tensor, operand: Tensor, parts: Parts, out: Tensor) -> None:
    width = operand.shape[1]
    for first, last, entries in _pieces(parts.hot_row_panels):
        hot = parts.hot_rows[first:last]
        # Thin in the rows of the weight, as it is in memory.
        panel = out.new_zeros(hot.numel(), width)
        thin = dy.index_select(1, hot).t()
        if operand.dim() == 3:
            size = operand.shape[2]
            for block, some in enumerate(operand):
                tokens = slice(block * size, min((block + 1) * size, dy.shape[0]))
                _multiply(panel, thin[:, tokens], some[:, : tokens.stop - tokens.start].t())
        else:
            for tokens in _stretches(dy.shape[0], width):
                _multiply(panel, thin[:, tokens], operand[tokens])
        place = parts.hot_row_at[entries] - first * width
        _sample(panel, place, parts.hot_row_slot[entries], out)


def _pieces(pieces: Tensor) -> Iterator[tuple[int, int, slice]]:
    """Yield the first and last line of each piece of a panel, and its entries."""
    for (first, start), (last, stop) in itertools.pairwise(pieces.t().tolist()):
        yield first, last, slice(start, stop)


def _stretches(tokens: int, width: int) -> Iterator[slice]:
    """Yield stretches of tokens of a matrix that is `width` wide."""
    size = max(16, min(STRETCH_TOKENS, STRETCH_ELEMENTS // max(width, 1)))
    for start in range(0, tokens, size):
        yield slice(start, min(start + size, tokens))


def _multiply(panel: Tensor, left: Tensor, right: Tensor) -> None:
    # Products accumulate in float32 inside the GEMM, but its result has the operands' dtype: widen
    # them first.
    left, right = left.to(panel.dtype), right.to(panel.dtype)
    if 1 in panel.shape:
        # It would be a gemv, whose sums over tokens depend on the number of threads, and are up to
        # 3.7 times as far off as torch's product; torch's own sum is pairwise.
        panel.add_((left.unsqueeze(2) * right.unsqueeze(0)).sum(1))
    else:
        panel.addmm_(left, right)


def _sample(panel: Tensor, place: Tensor, slot: Tensor, out: Tensor) -> None:
    out.index_add_(0, slot, panel.view(-1).index_select(0, place))
