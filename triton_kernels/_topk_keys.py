"""What the kernels of `topk_salience` share: their tables, and the keys of a chunk of the data."""

from __future__ import annotations

import triton
import triton.language as tl

LEVELS = 4  # digits of a key
BINS = tl.constexpr(256)
# Columns of the tables of matrices and of segments, and of what the kernels tell of a segment.
MATRIX = tl.constexpr(5)
SEGMENT = tl.constexpr(8)
STATE = tl.constexpr(2 * (4 + 1))
# No finite score has the lowest key: it stands for "no entry".
NONE = tl.constexpr(-(2**31))

# The kernels' tables and buffers, int64 where no other type is given:
#
# | matrices_ptr     | [n, 5]        | address of w, of g (0 where it is not read), entries, first
# |                  |               | chunk, entries before it in its segment
# | segments_ptr     | [s, 8]        | k, entries, first chunk, chunks, rank of the bound in the
# |                  |               | sample, capacity, first place in keys, first place in indices
# | chunk_matrix_ptr | int32 [c]     | matrix of each chunk
# | bounds_ptr       | int32 [s]     | the key at and above which entries are set aside
# | found_ptr        | [s]           | how many those are
# | bad_ptr          | [n]           | 1 where a score is NaN or infinite
# | groups_ptr       | int16         | groups of a chunk with an entry that is set aside, at its run
# | keys_ptr         | int32         | keys set aside, segment after segment
# | places_ptr       | int16         | beside each its place in its chunk
# | run_start_ptr    | [c]           | where what a chunk has set aside begins
# | run_length_ptr   | int32 [c]     | how many those are
# | histograms_ptr   | [s, 4, 256]   | of each digit, over keys whose digits before are the k-th's
# | state_ptr        | [s, 5, 2]     | of each level the digits known of the k-th largest key, and
# |                  |               | how many of the keys with these digits are selected
#
# A key is the score's float32 bits, mapped to int32 of the same order; digits are those of the key
# with its sign bit turned, as uint32. Segment and matrix are one unless TOGETHER, when there is one
# segment.


@triton.jit
def wide(x):
    """float32 of the same value. bfloat16 by its bits: the interpreter mistakes its subnormals."""
    if x.dtype == tl.bfloat16:
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def ordered(bits, METRIC: tl.constexpr):
    """The key of a score or of its negative, given as its bits. Zeros of both signs have one."""
    if METRIC <= 2:
        return bits & 0x7FFFFFFF
    if METRIC == 3:
        bits = bits ^ (-2147483648)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(key == -1, 0, key)


@triton.jit
def score_bits(w, g, METRIC: tl.constexpr):
    """The bits of what the score is made of: w, g or their product."""
    if METRIC == 0:
        score = wide(w)
    elif METRIC == 2 or METRIC == 3:
        score = wide(w) * wide(g)
    else:
        score = wide(g)
    return score.to(tl.int32, bitcast=True)


@triton.jit
def unsigned(key):
    return (key ^ (-2147483648)).to(tl.uint32, bitcast=True)


@triton.jit
def pointer(address_ptr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    ptr = tl.load(address_ptr).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)
    return ptr


@triton.jit
def chunk_pointers(
    matrix_row, chunk,
    METRIC: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Where a chunk of w and of g begins, and how many entries it has.

    Where a metric reads one operand, both are that one.
    """
    first = (chunk - tl.load(matrix_row + 3)) * CHUNK
    size = tl.minimum(tl.load(matrix_row + 2) - first, CHUNK).to(tl.int32)
    w_ptr = pointer(matrix_row + (1 if METRIC == 1 or METRIC == 4 else 0), DTYPE, ALIGNED) + first
    g_ptr = pointer(matrix_row + (0 if METRIC == 0 else 1), DTYPE, ALIGNED) + first
    return w_ptr, g_ptr, size


@triton.jit
def some_bits(w_ptr, g_ptr, i, exists, METRIC: tl.constexpr):
    w = tl.load(w_ptr + i, mask=exists, other=0.0)
    g = tl.load(g_ptr + i, mask=exists, other=0.0) if METRIC == 2 or METRIC == 3 else w
    return score_bits(w, g, METRIC)


@triton.jit
def chunk_bits(w_ptr, g_ptr, size, i, METRIC: tl.constexpr, CHUNK: tl.constexpr):
    """The bits of a chunk's scores; 0 where there is no entry."""
    if size == CHUNK:  # a mask would make loads narrow
        w = tl.load(w_ptr + i)
        g = tl.load(g_ptr + i) if METRIC == 2 or METRIC == 3 else w
        bits = score_bits(w, g, METRIC)
    else:
        bits = some_bits(w_ptr, g_ptr, i, i < size, METRIC)
    return bits


@triton.jit
def chunk_keys(
    matrices_ptr, chunk_matrix_ptr, chunk,
    METRIC: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The keys of a chunk, and which of its entries exist."""
    w_ptr, g_ptr, size = chunk_pointers(
        matrices_ptr + tl.load(chunk_matrix_ptr + chunk) * MATRIX,
        chunk, METRIC, DTYPE, ALIGNED, CHUNK,
    )  # fmt: skip
    i = tl.arange(0, CHUNK)
    return ordered(chunk_bits(w_ptr, g_ptr, size, i, METRIC, CHUNK), METRIC), i < size
