"""`x @ (W + D)^T + b` and its twin `dy @ (W + D)` in Triton, over a weight of 32, 16, 8 or 4 bits.

Few tokens are bound by reading W once. One kernel streams it through the tensor cores and adds the
entries to the same sums, which are rounded once. Bytes, for M tokens, q bytes an element of W and s
one of x: N K q, 8 an entry (16 in the twin), s M (N + K); out of the L2 cache also s M K once for
each BLOCK_N outputs, and 32 for each entry and token. M = 16, N = K = 4096, bf16, 0.5 %:
34 + 0.7 + 0.3 MB, 8.0 us at 4.3 TB/s, of which W alone is 7.8; int8 4.1 us, int4 2.2 (arithmetic
for an H200). Operations: 2 M N K, and 4 M BLOCK_N an entry, because tensor cores multiply it as a
line of zeros around it: 2.1 and 1.4 GFLOP for 64 tokens, 5 us at 700 TFLOP/s.

Many tokens are bound by the product: `effective_weight` writes W + D, and the vendor's GEMM reads
it. The sparse part alone is made dense over its used columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._fused_settings import LONGEST_SIDE, FusedLaunch, shape_of
from .effective_weight import (
    FLOAT,
    INT4,
    INT8,
    NONE,
    four_bits,
    group_size,
    kind,
    times_dense_delta,
    times_effective_weight,
    turned,
)
from .launch import INTERPRETING, Launch, dot, launch, machine, precision

# For more tokens the used columns of x are transposed first: a launch more, 2 us, against a sector
# of 32 bytes for each entry and token. Those of 16 tokens are 43 MB in the shape above, 6 us, which
# W's 8 hide; those of 32 they do not.
STRAIGHT_TOKENS = 16


@dataclass(frozen=True)
class SumLaunch(Launch):
    """`block`: outputs of a program."""

    num_stages: int = 1
    block: int = 256


def sparse_delta_matmul(
    x: Tensor,
    weight: Tensor | None,
    scales: Tensor | None,
    bias: Tensor | None,
    values: Tensor,
    by_row: Any,
    by_column: Any,
    order: Tensor,
    out_features: int,
    twin: bool,
    fused_tokens: int,
) -> Tensor:
    """Return `x @ (W + D)^T + b`, or `x @ (W + D)` for the twin; without a weight of D alone.

    Args:
        x: `[M, K]` (`[M, N]` for the twin), rows contiguous.
        weight: `[N, K]` of x's dtype; with scales int8 `[N, K]`, or int16 `[N, K / 4]`.
        scales: `[N, groups]`, contiguous, or None.
        bias: of x's dtype, or None.
        values: float32 `[nnz]`, contiguous, sorted by (row, column).
        by_row, by_column: the entries so sorted, `speft_kernels.compact.CompactIndices`.
        order: int64 `[nnz]`; `values[order]` are sorted by (column, row).
        out_features: of the result.
        fused_tokens: for more tokens W + D is written out.
    """
    lines, place = (by_column, order) if twin else (by_row, None)
    # Offsets within a tile of W, and steps to the next, have 32 bits; where it is written out, 64.
    near = weight is None or LONGEST_SIDE * sum(weight.stride()) < 2**31
    if x.shape[0] <= fused_tokens and near:
        return _few(x, weight, scales, bias, values, lines, place, out_features, twin)
    if weight is None:
        return times_dense_delta(x, values, lines, place, out_features)
    return times_effective_weight(x, weight, scales, bias, values, by_row, out_features, twin)


def _few(
    x: Tensor,
    weight: Tensor | None,
    scales: Tensor | None,
    bias: Tensor | None,
    values: Tensor,
    lines: Any,
    order: Tensor | None,
    out_features: int,
    twin: bool,
) -> Tensor:
    tokens, base = x.shape[0], kind(weight, scales)
    shape = shape_of(x, weight, scales, out_features, twin)
    settings = FusedLaunch.default(shape, machine(x.device))
    splits = settings.splits
    direct = splits == 1
    gathered = x if tokens <= STRAIGHT_TOKENS else turned(x, lines.cols).t()
    y = x.new_empty(tokens, out_features)
    sums = y if direct else x.new_empty(splits, tokens, out_features, dtype=torch.float32)
    parts = 4 if twin and base == INT4.value else 1
    tiles = parts * triton.cdiv(out_features // parts, settings.block_n)
    strides = (0, 0) if weight is None else weight.stride()[:: -1 if twin else 1]
    launch(
        _fused,
        (triton.cdiv(tokens, settings.block_m), tiles, splits),
        settings,
        x_ptr=x,
        stride_x=x.stride(0),
        gathered_ptr=gathered,
        stride_token=gathered.stride(0),
        stride_feature=gathered.stride(1),
        weight_ptr=weight,
        stride_out=strides[0],
        stride_in=strides[1],
        scales_ptr=scales,
        stride_scales=0 if scales is None else scales.stride(0),
        values_ptr=values,
        order_ptr=order,
        at_ptr=lines.columns if gathered is x else lines.local,
        starts_ptr=lines.starts,
        bias_ptr=bias if direct else None,
        y_ptr=sums,
        stride_split=0 if direct else sums.stride(0),
        stride_y=out_features,
        M=tokens,
        GATHERED=gathered.shape[0],
        OUT=out_features,
        IN=shape.width,
        PER_SPLIT=triton.cdiv(triton.cdiv(shape.width, splits), settings.block_k)
        * settings.block_k,
        KIND=base,
        GROUP=group_size(out_features if twin else x.shape[1], scales),
        TWIN=twin,
        HAS_ORDER=order is not None,
        HAS_BIAS=direct and bias is not None,
        SPLITS=splits,
        BLOCK_M=settings.block_m,
        BLOCK_N=settings.block_n,
        BLOCK_K=settings.block_k,
        BLOCK_E=settings.block_e,
        PRECISION=precision(x.dtype),
    )
    if not direct:
        final = SumLaunch()
        launch(
            _add_splits,
            (triton.cdiv(out_features, final.block), tokens),
            final,
            sums_ptr=sums,
            stride_split=sums.stride(0),
            bias_ptr=bias,
            y_ptr=y,
            OUT=out_features,
            SPLITS=splits,
            HAS_BIAS=bias is not None,
            BLOCK=final.block,
        )
    return y


@triton.jit
def _fused(
    x_ptr, stride_x,
    gathered_ptr, stride_token, stride_feature,
    weight_ptr, stride_out, stride_in,
    scales_ptr, stride_scales,
    values_ptr,
    order_ptr,
    at_ptr,
    starts_ptr,
    bias_ptr,
    y_ptr, stride_split, stride_y,
    M, GATHERED, OUT, IN, PER_SPLIT,
    KIND: tl.constexpr, GROUP: tl.constexpr, TWIN: tl.constexpr, HAS_ORDER: tl.constexpr,
    HAS_BIAS: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`y[m, n] = sum over k of x[m, k] (W + D)[n, k] + b[n]`, of a split its part of the sum.

    Named by what the product makes of them: outputs n are rows of W, and in the TWIN its columns.

    | argument     | shape            | |
    |--------------|------------------|-|
    | x_ptr        | [M, in]          | rows `stride_x` apart |
    | gathered_ptr | [GATHERED, C]    | x, or its used columns turned, zero padded |
    | weight_ptr   | [out, in]        | KIND: NONE, FLOAT, INT8 |
    |              | int16            | INT4: columns j + i K / 4 of W in word j |
    | scales_ptr   | [N, K / GROUP]   | rows `stride_scales` apart; [N, 1] with GROUP 0 |
    | values_ptr   | float32 [nnz]    | |
    | order_ptr    | int64 [nnz]      | HAS_ORDER: the value of each entry |
    | at_ptr       | int32 [nnz]      | column of `gathered` |
    | starts_ptr   | int32 [OUT + 1]  | where each output starts in the entries |
    | bias_ptr     | [OUT]            | HAS_BIAS |
    | y_ptr        | [SPLITS, M, OUT] | splits `stride_split` apart, rows `stride_y` |

    IN counts columns or words of W, PER_SPLIT those of a split. Grid: blocks of tokens, which share
    a tile of W in the L2 cache; tiles of outputs; splits.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    tile = tl.program_id(1)
    split = tl.program_id(2)
    # The outputs of a program lie in one quarter of a twin's four-bit columns.
    PARTS: tl.constexpr = 4 if KIND == INT4 and TWIN else 1
    width = OUT // PARTS
    tiles = tl.num_programs(1) // PARTS
    quarter = tile // tiles
    first = (tile - quarter * tiles) * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    wanted = n < width
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    delta = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # Gathering waits, streaming does not: half of the programs gather first and the others last, so
    # that memory is read throughout.
    late = 2 * tile >= tl.num_programs(1)
    for phase in range(2):
        if (phase == 1) == late:
            delta = _add_entries(
                gathered_ptr, stride_token, stride_feature,
                values_ptr, order_ptr, at_ptr, starts_ptr,
                m, quarter * width + first, split, delta, GATHERED, OUT,
                HAS_ORDER, SPLITS, BLOCK_N, BLOCK_E, PRECISION,
            )  # fmt: skip
        elif KIND != NONE:
            acc = _add_base(
                x_ptr, stride_x, weight_ptr, stride_out, stride_in, scales_ptr, stride_scales,
                m, first, wanted, quarter, split, acc, M, width, IN, PER_SPLIT,
                KIND, GROUP, TWIN, BLOCK_N, BLOCK_K, PRECISION,
            )  # fmt: skip
    out = quarter * width + n
    if KIND >= INT8 and not TWIN and GROUP == 0:
        s = tl.load(scales_ptr + out, mask=wanted, other=0.0)
        acc *= s.to(tl.float32)[None, :]
    acc += delta
    if HAS_BIAS:
        acc += tl.load(bias_ptr + out, mask=wanted, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + split.to(tl.int64) * stride_split + m.to(tl.int64)[:, None] * stride_y
    tl.store(y_ptrs + out[None, :], acc, mask=(m < M)[:, None] & wanted[None, :])


@triton.jit
def _add_base(
    x_ptr, stride_x,
    weight_ptr, stride_out, stride_in,
    scales_ptr, stride_scales,
    m, first, wanted, quarter, split, acc, M, width, IN, PER_SPLIT,
    KIND: tl.constexpr, GROUP: tl.constexpr, TWIN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return `acc + x @ W^T` over the split's columns; where a row of W has one scale, the caller
    multiplies by it.
    """
    begin = split * PER_SPLIT
    end = tl.minimum(begin + PER_SPLIT, IN)
    k = tl.arange(0, BLOCK_K)
    n = first + tl.arange(0, BLOCK_N)
    x_ptrs = x_ptr + m.to(tl.int64)[:, None] * stride_x + (begin + k)[None, :]
    # Offsets within a tile take one register each, pointers two.
    w_ptr = weight_ptr + first.to(tl.int64) * stride_out + begin.to(tl.int64) * stride_in
    offsets = tl.arange(0, BLOCK_N)[None, :] * stride_out + k[:, None] * stride_in
    tokens = (m < M)[:, None]
    for i in range(begin, end, BLOCK_K):
        inside = i + k < IN
        x = tl.load(x_ptrs, mask=tokens & inside[None, :], other=0.0)
        w = tl.load(w_ptr + offsets, mask=inside[:, None] & wanted[None, :], other=0)
        if KIND == FLOAT:
            acc = dot(x, w, acc, PRECISION)
        elif TWIN:
            # Each line of the tile has its scale. W is rounded, as the vendor would read it; scaled
            # gradients instead might leave float16's range.
            s_ptrs = scales_ptr + (i + k) * stride_scales
            if GROUP > 0:
                s_ptrs += (quarter * width + first) // GROUP
            s = tl.load(s_ptrs, mask=inside, other=0.0).to(tl.float32)
            q = four_bits(w, quarter) if KIND == INT4 else w
            acc = dot(x, (q.to(tl.float32) * s[:, None]).to(x.dtype), acc, PRECISION)
        else:
            for place in tl.static_range(4 if KIND == INT4 else 1):
                if place > 0:
                    x = tl.load(x_ptrs + place * IN, mask=tokens & inside[None, :], other=0.0)
                q = _widened(w, place, x.dtype, KIND)
                if GROUP == 0:
                    acc = dot(x, q, acc, PRECISION)
                else:
                    s_ptrs = scales_ptr + n * stride_scales + (place * IN + i) // GROUP
                    s = tl.load(s_ptrs, mask=wanted, other=0.0).to(tl.float32)
                    acc += dot(x, q, tl.zeros_like(acc), PRECISION) * s[None, :]
        x_ptrs += BLOCK_K
        w_ptr += BLOCK_K * stride_in
    return acc


@triton.jit
def _widened(q, place: tl.constexpr, dtype: tl.constexpr, KIND: tl.constexpr):
    """Small integers as numbers of a type, which holds them exactly.

    Those of four bits in two instructions and one that brings them into place: below the leading
    bit of 128 or 1024 they count in ones.
    """
    if KIND == INT8:
        if INTERPRETING:  # it knows no bfloat16 but as bits that are widened or rounded to
            q = q.to(tl.float32)
    elif dtype == tl.float32:
        q = four_bits(q, place)
    elif dtype == tl.float16:
        q = ((q >> 4 * place & 15) | 0x6400).to(dtype, bitcast=True) - 1032.0
    else:
        q = ((q >> 4 * place & 15) | 0x4300).to(dtype, bitcast=True)
        if INTERPRETING:
            q = q.to(tl.float32)
        q -= 136.0
    return q.to(dtype)


@triton.jit
def _add_entries(
    gathered_ptr, stride_token, stride_feature,
    values_ptr, order_ptr, at_ptr, starts_ptr,
    m, first, split, delta, GATHERED, OUT,
    HAS_ORDER: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return `delta + x @ D^T` over the split's part of the entries of outputs `first` on."""
    n = first + tl.arange(0, BLOCK_N)
    row_begin = tl.load(starts_ptr + tl.minimum(n, OUT))[None, :]
    row_end = tl.load(starts_ptr + tl.minimum(n + 1, OUT))[None, :]
    begin = tl.load(starts_ptr + first)
    end = tl.load(starts_ptr + tl.minimum(first + BLOCK_N, OUT))
    part = tl.cdiv(end - begin, SPLITS)
    begin += split * part
    end = tl.minimum(begin + part, end)
    tokens = (m < GATHERED)[:, None]
    x_ptrs = gathered_ptr + m.to(tl.int64)[:, None] * stride_token
    for i in range(begin, end, BLOCK_E):
        e = i + tl.arange(0, BLOCK_E)
        present = e < end
        at = tl.load(at_ptr + e, mask=present, other=0).to(tl.int64)
        place = tl.load(order_ptr + e, mask=present, other=0) if HAS_ORDER else e
        v = tl.load(values_ptr + place, mask=present, other=0.0)
        x = tl.load(
            x_ptrs + at[None, :] * stride_feature, mask=tokens & present[None, :], other=0.0
        )
        of_row = (row_begin <= e[:, None]) & (e[:, None] < row_end)
        delta = _add_lines(x, v, of_row, delta, PRECISION)
    return delta


@triton.jit
def _add_lines(x, v, of_row, acc, PRECISION: tl.constexpr):
    """Return `acc + x @ V`, where line e of V has v[e] in the row that it belongs to.

    Beside an x of 16 bits v is a sum of two parts that keeps 16 bits or more of it. Parts in
    float16 would lose what lies below 2^-25, as small as a delta may be; tf32 has the exponents of
    float32 and holds numbers of float16 exactly.
    """
    if x.dtype == tl.bfloat16:
        high = (v.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
        low = (v - high.to(tl.float32)).to(tl.bfloat16)
        acc = dot(x, tl.where(of_row, high[:, None], 0.0), acc, PRECISION)
        acc = dot(x, tl.where(of_row, low[:, None], 0.0), acc, PRECISION)
    elif x.dtype == tl.float16:
        x = x.to(tl.float32)
        high = (v.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        acc = dot(x, tl.where(of_row, high[:, None], 0.0), acc, "tf32")
        acc = dot(x, tl.where(of_row, (v - high)[:, None], 0.0), acc, "tf32")
    else:
        acc = dot(x, tl.where(of_row, v[:, None], 0.0), acc, PRECISION)
    return acc


@triton.jit
def _add_splits(
    sums_ptr, stride_split,
    bias_ptr,
    y_ptr,
    OUT,
    SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`y[m, n] = sum over splits of sums[split, m, n] + b[n]`, in order.

    | argument | shape                    | |
    |----------|--------------------------|-|
    | sums_ptr | float32 [SPLITS, M, OUT] | splits `stride_split` apart, else contiguous |
    | bias_ptr | [OUT]                    | HAS_BIAS |
    | y_ptr    | [M, OUT]                 | contiguous |

    Grid: blocks of outputs, tokens.
    """
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wanted = n < OUT
    row = tl.program_id(1).to(tl.int64) * OUT
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(sums_ptr + split * stride_split + row + n, mask=wanted, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + n, mask=wanted, other=0.0).to(tl.float32)
    tl.store(y_ptr + row + n, total, mask=wanted)
