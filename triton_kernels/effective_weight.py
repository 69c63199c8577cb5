"""`W + D` written out, for many tokens: the vendor's product reads it then.

Bytes, for elements of s bytes and q of the base: N K q are read, N K s written; an entry reads 8
and changes a 32-byte sector that was just written, in the L2 cache. N = K = 4096, bf16, 0.5 %:
34 + 34 + 3 MB, 16 us at 4.3 TB/s, beside 390 us for a product of 8192 tokens at 700 TFLOP/s: 1.04
of it (arithmetic for an H200). One addition an entry; two operations an element of a quantised
base.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from .keep_columns import keep_columns
from .launch import Launch, launch

PADDING = 16  # tokens and columns come in multiples of it, so that loads are 16 bytes wide

# What a base is made of.
NONE = tl.constexpr(0)
FLOAT = tl.constexpr(1)
INT8 = tl.constexpr(2)
INT4 = tl.constexpr(3)


def kind(weight: Tensor | None, scales: Tensor | None) -> int:
    """Return what a base is made of."""
    if weight is None:
        return NONE.value
    if scales is None:
        return FLOAT.value
    return INT4.value if weight.dtype == torch.int16 else INT8.value


def group_size(columns: int, scales: Tensor | None) -> int:
    """Return how many columns share a scale; 0 where a whole row does, or there are none."""
    return 0 if scales is None or scales.shape[1] == 1 else columns // scales.shape[1]


@dataclass(frozen=True)
class RowLaunch(Launch):
    """Attributes:
    block: columns (of four bits: words of four) written at a time.
    block_e: entries added at a time.
    """

    num_stages: int = 1
    block: int = 4096
    block_e: int = 128

    @property
    def is_valid(self) -> bool:
        """Whether a thread holds at most 32 columns at a time, of at most four bytes each."""
        return self.block <= 32 * 32 * self.num_warps

    @classmethod
    def candidates(cls) -> Iterator[RowLaunch]:
        """All that is worth trying."""
        for block in (1024, 2048, 4096, 8192):
            for num_warps in (2, 4, 8):
                for block_e in (32, 128):
                    settings = cls(num_warps, 1, block, block_e)
                    if settings.is_valid:
                        yield settings

    @classmethod
    def default(cls, width: int, quantized: bool) -> RowLaunch:
        """A row at once: in 16 bits 4096 columns are four loads of 16 bytes a thread, all under way
        together. Half as many of a quantized weight, whose scales take as many registers.
        """
        most = 2048 if quantized else 4096
        return cls(block=min(most, triton.next_power_of_2(max(width, 16))))


def times_effective_weight(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    values: Tensor,
    by_row: Any,
    out_features: int,
    twin: bool,
) -> Tensor:
    """`x @ (W + D)^T + b`, or `x @ (W + D)` for the twin; arguments as `sparse_delta_matmul`."""
    # A new tensor at each call, not a buffer that is kept: torch's allocator hands the same memory
    # to the next layer as soon as this product is under way, in the order of its stream, in a CUDA
    # graph too; and between steps others may have it. No product that autograd keeps refers to it.
    shape = (x.shape[1], out_features) if twin else (out_features, x.shape[1])
    effective = x.new_empty(shape)
    effective_weight(weight, scales, values, None, by_row.columns, by_row.starts, effective)
    return x @ effective if twin else F.linear(x, effective, bias)


def times_dense_delta(
    x: Tensor, values: Tensor, lines: Any, order: Tensor | None, out_features: int
) -> Tensor:
    """`x @ D^T`, with D dense over its used columns: in real masks a quarter of all."""
    # The vendor's fast products want lines of a multiple of 16 bytes.
    width = triton.cdiv(lines.cols.numel(), PADDING) * PADDING
    dense = x.new_empty(out_features, width)
    effective_weight(None, None, values, order, lines.local, lines.starts, dense)
    return turned(x, lines.cols, width)[:, : x.shape[0]].t() @ dense.t()


def turned(x: Tensor, columns: Tensor, width: int | None = None) -> Tensor:
    """Return columns of x as lines `[width, tokens]`, with zeros beyond the columns and, up to a
    multiple of PADDING, beyond the tokens.
    """
    used = columns.numel()
    width = used if width is None else width
    lines = x.new_empty(1, width, triton.cdiv(x.shape[0], PADDING) * PADDING)
    if width > used:
        lines[:, used:].zero_()
    keep_columns(x, columns, lines[:, :used])
    return lines[0]


def effective_weight(
    weight: Tensor | None,
    scales: Tensor | None,
    values: Tensor,
    order: Tensor | None,
    at: Tensor,
    starts: Tensor,
    out: Tensor,
) -> None:
    """Write `out = W + D`, or D alone without a weight.

    Args:
        weight: `[N, K]` of out's dtype; with scales int8 `[N, K]`, or int16 `[N, K / 4]`.
        scales: `[N, groups]`, contiguous, or None.
        values: float32 `[nnz]`, contiguous.
        order: int64 `[nnz]`, the value of each entry; None where entry e has value e.
        at: int32 `[nnz]`, the column of each entry in `out`.
        starts: int32 `[N + 1]`, where each row starts in the entries.
        out: `[N, K]`, rows contiguous.
    """
    rows, columns = out.shape
    base = kind(weight, scales)
    width = columns // 4 if base == INT4.value else columns
    settings = RowLaunch.default(width, scales is not None)
    launch(
        _write_row,
        (rows,),
        settings,
        weight_ptr=weight,
        stride_row=0 if weight is None else weight.stride(0),
        stride_column=0 if weight is None else weight.stride(1),
        scales_ptr=scales,
        stride_scales=0 if scales is None else scales.stride(0),
        values_ptr=values,
        order_ptr=order,
        at_ptr=at,
        starts_ptr=starts,
        out_ptr=out,
        stride_out=out.stride(0),
        WIDTH=width,
        KIND=base,
        GROUP=group_size(columns, scales),
        HAS_ORDER=order is not None,
        BLOCK=settings.block,
        BLOCK_E=settings.block_e,
    )


@triton.jit
def four_bits(word, place):
    """Return number `place` of the four in a word, each of which is stored as q + 8."""
    return ((word >> 4 * place) & 15) - 8


@triton.jit
def _write_row(
    weight_ptr, stride_row, stride_column,
    scales_ptr, stride_scales,
    values_ptr,
    order_ptr,
    at_ptr,
    starts_ptr,
    out_ptr, stride_out,
    WIDTH,
    KIND: tl.constexpr, GROUP: tl.constexpr, HAS_ORDER: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """`out[n, k] = W[n, k]`, then `out[n, at[e]] += v[e]` for the entries e of row n; each sum in
    float32, rounded once.

    | argument   | shape         | |
    |------------|---------------|-|
    | weight_ptr | [N, K]        | strides `stride_row`, `stride_column`; KIND: NONE, FLOAT, INT8 |
    |            | int16 [N, K / 4] | INT4: columns j + i K / 4 in word j |
    | scales_ptr | [N, K / GROUP] | rows `stride_scales` apart; [N, 1] with GROUP 0 |
    | values_ptr | float32 [nnz] | |
    | order_ptr  | int64 [nnz]   | HAS_ORDER: the value of each entry |
    | at_ptr     | int32 [nnz]   | column in `out` |
    | starts_ptr | int32 [N + 1] | where each row starts in the entries |
    | out_ptr    | [N, K]        | rows `stride_out` apart; K is WIDTH, INT4: 4 WIDTH |

    Grid: rows.
    """
    n = tl.program_id(0)
    row = weight_ptr if KIND == NONE else weight_ptr + n.to(tl.int64) * stride_row
    scales = scales_ptr if KIND < INT8 else scales_ptr + n.to(tl.int64) * stride_scales
    out = out_ptr + n.to(tl.int64) * stride_out
    ty: tl.constexpr = out_ptr.dtype.element_ty
    for first in range(0, WIDTH, BLOCK):
        k = first + tl.arange(0, BLOCK)
        inside = k < WIDTH
        if KIND == NONE:
            tl.store(out + k, tl.zeros((BLOCK,), ty), mask=inside)
        else:
            w = tl.load(row + k.to(tl.int64) * stride_column, mask=inside, other=0)
            if KIND == FLOAT:
                tl.store(out + k, w, mask=inside)
            else:
                for place in tl.static_range(4 if KIND == INT4 else 1):
                    q = four_bits(w, place) if KIND == INT4 else w
                    column = place * WIDTH + k
                    s = _scale(scales, column, inside, GROUP)
                    tl.store(out + column, (q.to(tl.float32) * s).to(ty), mask=inside)
    # Other threads wrote what the entries are about to replace.
    tl.debug_barrier()
    begin = tl.load(starts_ptr + n)
    end = tl.load(starts_ptr + n + 1)
    for i in range(begin, end, BLOCK_E):
        e = i + tl.arange(0, BLOCK_E)
        present = e < end
        k = tl.load(at_ptr + e, mask=present, other=0)
        if HAS_ORDER:
            e = tl.load(order_ptr + e, mask=present, other=0)
        total = tl.load(values_ptr + e, mask=present, other=0.0)
        if KIND == FLOAT:
            w = tl.load(row + k.to(tl.int64) * stride_column, mask=present, other=0.0)
            total += w.to(tl.float32)
        elif KIND != NONE:
            quarter = k // WIDTH
            w = tl.load(row + (k - quarter * WIDTH) * stride_column, mask=present, other=0)
            q = four_bits(w, quarter) if KIND == INT4 else w
            total += q.to(tl.float32) * _scale(scales, k, present, GROUP)
        tl.store(out + k, total.to(ty), mask=present)


@triton.jit
def _scale(scales_ptr, column, mask, GROUP: tl.constexpr):
    if GROUP == 0:
        s = tl.load(scales_ptr)
    else:
        s = tl.load(scales_ptr + column // GROUP, mask=mask, other=0.0)
    return s.to(tl.float32)
