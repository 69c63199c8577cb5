"""The panels of `sampled_grad`: thin products by the vendor's GEMM, sampled into the values.

The CPU's kernel leaves them to this. A panel never exceeds what `parts.panel_lines` allows; dy and
x are read in stretches of tokens, so that what is copied and widened of them is small as well,
however many tokens there are.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..parts import ALIGNED_LENGTH, ALIGNED_LINES, Parts

# Tokens multiplied at a time, and elements of dy or of x. The GEMM cuts a longer sum into as many
# parts as there are threads (float32, 512 tokens: other bits with 1, 2 and 3; float64 on an AMD
# EPYC, 193 of a transposed operand: with 1 and 16); and what is widened stays small.
STRETCH_TOKENS, STRETCH_ELEMENTS = 192, 1 << 20

# Elements of the hot lines copied at a time; as many as the panel has where that is more, and three
# times as many at most, so fewer than the weight has. A copy serves several stretches: one for each
# takes up to a fifth more time.
HOT_COPY_ELEMENTS, HOT_COPY_PANELS = 1 << 18, 3

# Entries sampled at a time: their places and values take 3 MB, those of a full panel would take
# three times the panel itself.
SAMPLED_ENTRIES = 1 << 18


def add_panels(dy: Tensor, operand: Tensor, parts: Parts, out: Tensor) -> None:
    """Add the entries of the hot columns and rows to `out`.

    Args:
        dy: `[M, N]`.
        operand: x `[M, K]`, or its packed columns `[B, C, T]`.
        out: `[nnz]` of the accumulator's dtype.
    """
    columns = parts.hot_cols, parts.hot_col_at, parts.hot_col_slot, parts.hot_col_panels
    _add(operand, dy, dy.shape[0], *columns, out)
    rows = parts.hot_rows, parts.hot_row_at, parts.hot_row_slot, parts.hot_row_panels
    _add(dy, operand, dy.shape[0], *rows, out)


def _add(
    thin: Tensor,
    wide: Tensor,
    tokens: int,
    lines: Tensor,
    at: Tensor,
    slot: Tensor,
    pieces: Tensor,
    out: Tensor,
) -> None:
    """Add the panels of some columns of `thin` by all of `wide`; one of them may be packed."""
    length = wide.shape[1]
    for (first, begin), (last, end) in itertools.pairwise(pieces.t().tolist()):
        some = slice(begin, end)
        panel = _products(thin, lines[first:last], wide, tokens, out)
        _sample(panel, first * length, at[some], slot[some], out)
        del panel  # not to be there while the next is made


def _products(thin: Tensor, lines: Tensor, wide: Tensor, tokens: int, out: Tensor) -> Tensor:
    """`[lines or more, length]` of `out`'s dtype: columns of `thin`, transposed, times `wide`."""
    count, length = lines.numel(), wide.shape[1]
    if count == 1 or length == 1:
        panel = out.new_zeros(count, length)
        _add_products(panel, thin, lines, wide, tokens, _add_sums)
        return panel
    missing = -count % ALIGNED_LINES
    if missing:  # the last line again and again; nothing is sampled of them
        lines = torch.cat([lines, lines[-1:].expand(missing)])
    panel = out.new_zeros(lines.numel(), length + -length % ALIGNED_LENGTH)
    _add_products(panel, thin, lines, wide, tokens, _add_gemm)
    return panel[:, :length].contiguous()


def _add_products(
    panel: Tensor,
    thin: Tensor,
    lines: Tensor,
    wide: Tensor,
    tokens: int,
    add: Callable[[Tensor, Tensor, Tensor], None],
) -> None:
    """Call `add(panel, left, right)` for a stretch of t tokens at a time.

    left is `[lines, t]`, of `thin`; right `[t, length]`, of `wide`.
    """
    count, length = lines.numel(), wide.shape[1]
    at_once = min(max(HOT_COPY_ELEMENTS // count, length), HOT_COPY_PANELS * length)
    copied, start, stop = None, 0, 0
    for some, right in _stretches(wide, tokens, max(count, length)):
        if copied is None or some.stop > stop:
            copied = None  # no two of them at a time
            start, stop = some.start, max(some.stop, min(some.start + at_once, tokens))
            copied = columns_of(thin, lines, slice(start, stop))
        add(panel, copied[:, some.start - start : some.stop - start], right)


def _add_sums(panel: Tensor, left: Tensor, right: Tensor) -> None:
    # As a product it would be a gemv, whose sums over tokens depend on the number of threads, and
    # are up to 3.7 times as far off as torch's product; torch's own sum is pairwise.
    left, right = left.to(panel.dtype), right.to(panel.dtype)
    panel.add_((left.unsqueeze(2) * right.unsqueeze(0)).sum(1))


def _add_gemm(panel: Tensor, left: Tensor, right: Tensor) -> None:
    # Products accumulate in float32 inside the GEMM, but its result has the operands' dtype: widen
    # them first.
    panel.addmm_(left.to(panel.dtype), _widened(right, panel))


def _widened(right: Tensor, panel: Tensor) -> Tensor:
    """`right` `[t, length]` in the dtype of `panel`, with zeros up to the panel's length.

    Its rows are contiguous. Where its columns are, as those of packed operands, MKL cuts a thin
    product's sums among the threads from 52 tokens on (an Intel Xeon with AVX-512 and AMX: 86 of
    3,024 products; of those with contiguous rows, none).
    """
    if right.shape[1] != panel.shape[1]:
        padded = panel.new_zeros(right.shape[0], panel.shape[1])
        padded[:, : right.shape[1]] = right
        return padded
    return right.to(panel.dtype).contiguous()


def columns_of(operand: Tensor, positions: Tensor | None, tokens: slice) -> Tensor:
    """`[columns, tokens]`: some columns, or all, for some tokens, of x `[M, K]` or the packed ones
    `[B, C, T]`.
    """
    if operand.dim() == 2:
        some = operand[tokens]
        return (some if positions is None else some.index_select(1, positions)).t()
    size = operand.shape[2]
    first, last = tokens.start // size, (tokens.stop - 1) // size
    inside = slice(tokens.start - first * size, tokens.stop - first * size)
    if first == last:  # a block may hold all tokens: copy no more than is wanted of it
        lines = operand[first, :, inside]
        return lines if positions is None else lines.index_select(0, positions)
    blocks = operand[first : last + 1].transpose(0, 1)
    if positions is not None:
        blocks = blocks.index_select(0, positions)
    return blocks.flatten(1)[:, inside]


def stretch(width: int) -> int:
    """Tokens multiplied at a time where the widest operand has `width` columns."""
    return max(16, min(STRETCH_TOKENS, STRETCH_ELEMENTS // width))


def _stretches(matrix: Tensor, tokens: int, width: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield stretches of tokens, and `[tokens, C]`, what `matrix`, which may be packed, holds of
    them; `width` is of the widest operand.
    """
    step = stretch(width)
    if matrix.dim() == 2:
        for start in range(0, tokens, step):
            some = slice(start, min(start + step, tokens))
            yield some, matrix[some]
        return
    size = matrix.shape[2]
    for block, first in zip(matrix, range(0, tokens, size), strict=True):
        for start in range(first, min(first + size, tokens), step):
            some = slice(start, min(start + step, first + size, tokens))
            yield some, block[:, some.start - first : some.stop - first].t()


def _sample(panel: Tensor, start: int, at: Tensor, slot: Tensor, out: Tensor) -> None:
    """Add the products at the places `at`, of which the panel's first is `start`, to `out`."""
    parts = at.split(SAMPLED_ENTRIES), slot.split(SAMPLED_ENTRIES)
    for places, slots in zip(*parts, strict=True):
        out.index_add_(0, slots, panel.view(-1).index_select(0, places - start))
