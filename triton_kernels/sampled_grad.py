"""`sampled_grad` in Triton: strips on tensor cores, the rest gathered, over packed activations.

Count, for M tokens, elements of s bytes, tiles of 128 rows by 256 strips (the last of a block of
rows by 128 where that is enough):

    strips   128 x 2 M operations each, and those that fill up the last tile of a block; from the L2
             cache (128 + 256) s M bytes a tile; dy once from memory, s M N
    rest     2 M operations an entry; 2 s M bytes from L1, half of them from L2 where neighbouring
             entries share a row; dy at the rows of the rest transposed before, 2 s M R
    entries  a tile's accumulators laid out in shared memory once for each 2048 of its entries:
             4 x 128 x 256 bytes, whose rows meet in the same banks, about 2 us
    second   4 bytes written and read for each entry and split of the tokens, at most 8 MB

Arithmetic, not measured, for an H200 (700 TFLOP/s in such tiles, 4.3 TB/s of memory, 7 TB/s of L2),
M = 8192, N = K = 4096, bf16, realistic masks; the dense gradient takes 275 GFLOP, 348 us:

    0.1 %    5,636 strips    17 GFLOP, 25 us    201 MB of L2, 29 us    dy 16 us    0.08 of dense
    0.5 %   18,748 strips    44 GFLOP, 63 us    539 MB of L2, 77 us    dy 16 us    0.22 of dense
    5 %     31,456 strips    69 GFLOP, 98 us    805 MB of L2, 115 us   dy 16 us    0.33 of dense

Not in these: the entries, once a tile in the first two and 3.7 times in the third; and the waves in
which 132 multiprocessors take 128, 376 and 128 programs.

The L2 cache bounds it. A gathered entry reads 28 KB there, 4 ns, and a strip 24 KB, 3.5 ns: with
these figures nothing is gathered, were it one entry of a strip. Blocks of 256 rows by 128 strips
read more (18 bytes a row and token in place of 14.5, at 0.5 %); 256 by 256 does not fit the
registers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .keep_columns import keep_columns
from .launch import Launch, Machine, dot, launch, machine, precision, token_splits

# float32 sums of all splits together, at most: 8 MB.
SCRATCH_ELEMENTS = 1 << 21
# Tokens of a split, at least: below, the second stage costs what the split gains.
SPLIT_TOKENS = 512
PADDING = 16  # packed tokens come in multiples of it, so that loads are 16 bytes wide


@dataclass(frozen=True)
class StripLaunch(Launch):
    """Of the strips' kernel.

    Attributes:
        groups: groups of 64 strips in a tile, side by side.
        block_t: tokens of a step.
        block_e: entries taken from the accumulators at a time.
    """

    groups: int = 4
    block_t: int = 64
    block_e: int = 2048

    def is_valid(self, rows: int, strips: int, itemsize: int, machine: Machine) -> bool:
        """Whether the tiles in flight and the accumulators, which the epilogue lays out in the same
        shared memory, fit, and the accumulators take half of a thread's registers at most.
        """
        wide = self.groups * strips
        stages = self.num_stages * (rows + wide) * self.block_t * itemsize
        shared = max(stages, 4 * rows * wide)
        return shared <= machine.shared_memory and rows * wide <= 128 * 32 * self.num_warps

    @classmethod
    def candidates(
        cls, rows: int, strips: int, itemsize: int, machine: Machine
    ) -> Iterator[StripLaunch]:
        """All that is worth trying."""
        for groups in (1, 2, 4):
            for block_t in (32, 64, 128):
                for num_warps in (4, 8):
                    for num_stages in (2, 3, 4):
                        settings = cls(num_warps, num_stages, groups, block_t)
                        if settings.is_valid(rows, strips, itemsize, machine):
                            yield settings

    @classmethod
    def default(
        cls, itemsize: int, tf32: bool, groups: float, aligned: bool, machine: Machine
    ) -> StripLaunch:
        """Tiles as wide as registers allow, for each step reads `128 + 64 groups` lines.

        Args:
            groups: of a block of rows, on average: no wider than these.
            aligned: rows of dy begin at multiples of 16 bytes; else each element has an address,
                and the widest tiles would spill with steps of 64 tokens.
        """
        if itemsize == 4:  # without tensor cores a tile is held and multiplied in registers
            return cls(8, 2, 1, 32) if not tf32 else cls(8, 3, 2 if groups > 1 else 1, 32)
        if machine.capability[0] == 8:  # 256 strips would spill: mma.sync keeps operands there too
            return cls(8, 3, 2 if groups > 1 else 1, 64)
        if groups > 2:
            return cls(8, 3, 4, 64 if aligned else 32)
        return cls(8, 4, 2 if groups > 1 else 1, 64)


@dataclass(frozen=True)
class GatherLaunch(Launch):
    """Of the gathered entries' kernel: entries of a program, and tokens of a step."""

    block_e: int = 64
    block_t: int = 128

    @classmethod
    def default(cls, itemsize: int) -> GatherLaunch:
        """A step reads 256 bytes of each line, so that sectors are whole and loads are wide."""
        return cls(8, 2, 64, 256 // itemsize)


@dataclass(frozen=True)
class PlaceLaunch(Launch):
    block_e: int = 1024


def sampled_grad(dy: Tensor, x: Tensor, strips: Any, out: Tensor, accumulate: bool) -> None:
    """Write `out [nnz]`, or add to it.

    Args:
        dy: `[M, N]`, rows contiguous.
        x: `[M, K]`, rows contiguous, or its packed columns `[B, C, T]`, contiguous.
        strips: the compiled pattern, `speft_kernels.strips.Strips`.
        out: float32.
    """
    nnz = strips.slot.numel()
    if nnz == 0 or dy.shape[0] == 0:
        if not accumulate:
            out.zero_()
        return
    packed = _lines(x) if x.dim() == 3 else _pack(x, strips.columns)
    num_groups, strip_count = strips.group_cols.shape
    here, itemsize = machine(dy.device), dy.element_size()
    blocks = strips.block_groups.numel() - 1
    mode = precision(dy.dtype)
    groups = num_groups / max(blocks, 1)
    # As Triton's JIT sees it.
    aligned = dy.data_ptr() % 16 == 0 and dy.stride(0) % 16 == 0
    wide = StripLaunch.default(itemsize, mode == "tf32", groups, aligned, here)
    thin = GatherLaunch.default(itemsize)
    inside, gathered = strips.entry_at.numel(), strips.entry_row.numel()
    programs = strips.tiles_of(wide.groups) + triton.cdiv(gathered, thin.block_e)
    splits = token_splits(programs, dy.shape[0], SPLIT_TOKENS, here)
    splits = min(splits, max(1, SCRATCH_ELEMENTS // nnz))
    step = max(wide.block_t, thin.block_t)
    tokens = triton.cdiv(triton.cdiv(dy.shape[0], splits), step) * step
    splits = triton.cdiv(dy.shape[0], tokens)
    # With one split the sums go where they belong; else each split's into its own line, in the
    # order of the strips, and a second stage adds the lines.
    direct = splits == 1
    sums = out if direct else out.new_empty(splits, nnz)
    where = {
        "slot_ptr": strips.slot,
        "sums_ptr": sums,
        "M": dy.shape[0],
        "TOKENS": tokens,
        "nnz": nnz,
        "DIRECT": direct,
        "ACCUMULATE": accumulate,
    }
    if inside:
        most = triton.cdiv(int(strips.most_groups), wide.groups)
        launch(
            _strip_products,
            (blocks, most, splits),
            wide,
            dy_ptr=dy,
            stride_dy=dy.stride(0),
            x_ptr=packed,
            stride_x=packed.stride(0),
            block_groups_ptr=strips.block_groups,
            group_cols_ptr=strips.group_cols,
            group_entries_ptr=strips.group_entries,
            entry_at_ptr=strips.entry_at,
            N=dy.shape[1],
            **where,
            ROWS=strips.strip_rows,
            STRIPS=strip_count,
            GROUPS=wide.groups,
            BLOCK_T=wide.block_t,
            BLOCK_E=wide.block_e,
            PRECISION=mode,
        )
    if gathered:
        lines = _pack(dy, strips.rows)
        launch(
            _gathered_products,
            (triton.cdiv(gathered, thin.block_e), splits),
            thin,
            dy_ptr=lines,
            stride_dy=lines.stride(0),
            x_ptr=packed,
            stride_x=packed.stride(0),
            entry_row_ptr=strips.entry_row,
            entry_col_ptr=strips.entry_col,
            E=gathered,
            first=inside,
            **where,
            BLOCK_E=thin.block_e,
            BLOCK_T=thin.block_t,
        )
    if not direct:
        settings = PlaceLaunch()
        launch(
            _place,
            (triton.cdiv(nnz, settings.block_e),),
            settings,
            sums_ptr=sums,
            slot_ptr=strips.slot,
            out_ptr=out,
            nnz=nnz,
            splits=splits,
            ACCUMULATE=accumulate,
            BLOCK_E=settings.block_e,
        )


def _pack(matrix: Tensor, columns: Tensor) -> Tensor:
    """The columns as lines over the tokens, `[C, T]`."""
    tokens = triton.cdiv(matrix.shape[0], PADDING) * PADDING
    packed = matrix.new_empty(1, columns.numel(), tokens)
    keep_columns(matrix, columns, packed)
    return packed[0]


def _lines(packed: Tensor) -> Tensor:
    """`[B, C, T]` as lines over all tokens; a plan made for a GPU has them in one block."""
    if packed.shape[0] == 1:
        return packed[0]
    return packed.transpose(0, 1).flatten(1)


@triton.jit
def _strip_products(
    dy_ptr, stride_dy,
    x_ptr, stride_x,
    block_groups_ptr,
    group_cols_ptr,
    group_entries_ptr,
    entry_at_ptr,
    slot_ptr,
    sums_ptr,
    M, N, TOKENS, nnz,
    DIRECT: tl.constexpr, ACCUMULATE: tl.constexpr,
    ROWS: tl.constexpr, STRIPS: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`dy^T x` of a block of rows and some of its strips over a split of the tokens; the entries'.

    | argument          | shape               | |
    |-------------------|---------------------|-|
    | dy_ptr            | [M, N]              | rows `stride_dy` apart |
    | x_ptr             | [C, T]              | lines `stride_x` apart, zero padded to 16 tokens |
    | block_groups_ptr  | int32 [blocks + 1]  | groups of a block of rows |
    | group_cols_ptr    | int32 [groups, STRIPS] | lines of x |
    | group_entries_ptr | int32 [groups + 1]  | entries of a group |
    | entry_at_ptr      | int16               | row in the block * STRIPS + strip in the group |
    | slot_ptr          | int32 [nnz]         | place of an entry in the result |
    | sums_ptr          | float32 [splits, nnz]; [nnz] | by entry; DIRECT: by slot |

    Grid: blocks of rows, tiles of GROUPS groups, splits of TOKENS tokens. Programs beyond the last
    tile of their block end at once.
    """
    block = tl.program_id(0)
    group = tl.load(block_groups_ptr + block) + tl.program_id(1) * GROUPS
    last = tl.load(block_groups_ptr + block + 1)
    split = tl.program_id(2)
    start = split * TOKENS
    stop = tl.minimum(start + TOKENS, M)
    # The last tile of a block is as wide as it must be, by halves: half of the products of a mask
    # of few strips would be padding.
    HALF: tl.constexpr = GROUPS // 2
    if last - group > HALF:
        _tile(
            dy_ptr, stride_dy, x_ptr, stride_x, group_cols_ptr, group_entries_ptr, entry_at_ptr,
            slot_ptr, sums_ptr, block, group, last, split, start, stop, N, nnz,
            DIRECT, ACCUMULATE, ROWS, STRIPS, GROUPS, BLOCK_T, BLOCK_E, PRECISION,
        )  # fmt: skip
    elif last > group:
        if HALF > 0:
            _tile(
                dy_ptr, stride_dy, x_ptr, stride_x, group_cols_ptr, group_entries_ptr, entry_at_ptr,
                slot_ptr, sums_ptr, block, group, last, split, start, stop, N, nnz,
                DIRECT, ACCUMULATE, ROWS, STRIPS, HALF, BLOCK_T, BLOCK_E, PRECISION,
            )  # fmt: skip


@triton.jit
def _tile(
    dy_ptr, stride_dy, x_ptr, stride_x, group_cols_ptr, group_entries_ptr, entry_at_ptr,
    slot_ptr, sums_ptr, block, group, last, split, start, stop, N, nnz,
    DIRECT: tl.constexpr, ACCUMULATE: tl.constexpr,
    ROWS: tl.constexpr, STRIPS: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The groups from `group` to `group + GROUPS` or `last`, for tokens from `start` to `stop`."""
    COLS: tl.constexpr = GROUPS * STRIPS
    n = block * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, COLS)
    line = tl.load(group_cols_ptr + group * STRIPS + c, mask=c < (last - group) * STRIPS, other=0)
    t = tl.arange(0, BLOCK_T)
    dy_ptrs = dy_ptr + (start + t).to(tl.int64)[:, None] * stride_dy + n[None, :]
    x_ptrs = x_ptr + line.to(tl.int64)[:, None] * stride_x + (start + t)[None, :]
    # A bound that is a multiple of 16 leaves the loads of x wide; what lies past `stop` is padding.
    x_stop = (stop + 15) // 16 * 16
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for m in range(start, stop, BLOCK_T):
        dy = tl.load(dy_ptrs, mask=(m + t < stop)[:, None] & (n < N)[None, :], other=0.0)
        x = tl.load(x_ptrs, mask=(m + t < x_stop)[None, :], other=0.0)
        acc = dot(tl.trans(dy), tl.trans(x), acc, PRECISION)
        dy_ptrs += tl.cast(stride_dy, tl.int64) * BLOCK_T
        x_ptrs += BLOCK_T
    # Each gather lays all accumulators out in shared memory, where an entry's is found by its
    # place: so it takes as many entries as there are, of all groups of the tile.
    flat = tl.reshape(acc, (ROWS * COLS,))
    end = tl.load(group_entries_ptr + tl.minimum(group + GROUPS, last))
    for i in range(tl.load(group_entries_ptr + group), end, BLOCK_E):
        e = i + tl.arange(0, BLOCK_E)
        present = e < end
        at = tl.load(entry_at_ptr + e, mask=present, other=0).to(tl.int32)
        strip = at % STRIPS
        for j in tl.static_range(1, GROUPS):
            later = e >= tl.load(group_entries_ptr + tl.minimum(group + j, last))
            strip += tl.where(later & present, STRIPS, 0)
        value = tl.gather(flat, at // STRIPS * COLS + strip, 0)
        _put(sums_ptr, slot_ptr, e, value, present, split, nnz, DIRECT, ACCUMULATE)


@triton.jit
def _gathered_products(
    dy_ptr, stride_dy,
    x_ptr, stride_x,
    entry_row_ptr,
    entry_col_ptr,
    slot_ptr,
    sums_ptr,
    M, E, first, TOKENS, nnz,
    DIRECT: tl.constexpr, ACCUMULATE: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """`sum over t of dy[row_e, t] x[col_e, t]` of some entries over a split of the tokens.

    | argument      | shape     | |
    |---------------|-----------|-|
    | dy_ptr        | [R, T]    | lines `stride_dy` apart, zero padded |
    | x_ptr         | [C, T]    | lines `stride_x` apart, zero padded |
    | entry_row_ptr | int32 [E] | lines of dy, sorted: neighbours find theirs in L1 |
    | entry_col_ptr | int32 [E] | lines of x |
    | slot_ptr      | int32 [nnz] | place of an entry in the result; entry e here is `first + e` |
    | sums_ptr      | float32 [splits, nnz]; [nnz] | by entry; DIRECT: by slot |

    Grid: groups of BLOCK_E entries, splits of TOKENS tokens.
    """
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    split = tl.program_id(1)
    start = split * TOKENS
    stop = tl.minimum(start + TOKENS, (M + 15) // 16 * 16)
    present = e < E
    row = tl.load(entry_row_ptr + e, mask=present, other=0).to(tl.int64)
    col = tl.load(entry_col_ptr + e, mask=present, other=0).to(tl.int64)
    t = tl.arange(0, BLOCK_T)
    acc = tl.zeros((BLOCK_E, BLOCK_T), tl.float32)
    for m in range(start, stop, BLOCK_T):
        inside = present[:, None] & (m + t < stop)[None, :]
        dy = tl.load(dy_ptr + row[:, None] * stride_dy + (m + t)[None, :], mask=inside, other=0.0)
        x = tl.load(x_ptr + col[:, None] * stride_x + (m + t)[None, :], mask=inside, other=0.0)
        acc += dy.to(tl.float32) * x.to(tl.float32)
    value = tl.sum(acc, axis=1)
    _put(sums_ptr, slot_ptr, first + e, value, present, split, nnz, DIRECT, ACCUMULATE)


@triton.jit
def _put(
    sums_ptr, slot_ptr,
    e, value, present, split, nnz,
    DIRECT: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """Write the values of entries e to their slots, or into the line of this split."""
    if DIRECT:
        to = sums_ptr + tl.load(slot_ptr + e, mask=present, other=0)
        if ACCUMULATE:
            value += tl.load(to, mask=present, other=0.0)
    else:
        to = sums_ptr + split.to(tl.int64) * nnz + e
    tl.store(to, value, mask=present)


@triton.jit
def _place(
    sums_ptr,
    slot_ptr,
    out_ptr,
    nnz,
    splits,
    ACCUMULATE: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """`out[slot[e]] = sum over splits of sums[split, e]`, in order; added with ACCUMULATE.

    Grid: groups of BLOCK_E entries.
    """
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    present = e < nnz
    value = tl.zeros((BLOCK_E,), tl.float32)
    line = sums_ptr + e
    for _ in range(splits):
        value += tl.load(line, mask=present, other=0.0)
        line += nnz
    to = out_ptr + tl.load(slot_ptr + e, mask=present, other=0)
    if ACCUMULATE:
        value += tl.load(to, mask=present, other=0.0)
    tl.store(to, value, mask=present)
