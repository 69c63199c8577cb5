"""`block_grad` in Triton: each block a small product over the tokens.

L2 bytes of a block of h x w and a token, for elements of s bytes: the 32-byte sectors of its h
elements of dy and of its w elements of x, about s (h + w) and 64 at least; where a block is cut
into tiles, each tile reads its own sides. 2 h w operations. Memory is read once: neighbouring
programs take neighbouring blocks, which share rows.

Arithmetic for an H200 (7 TB/s of L2, 4.3 TB/s of memory), a 4096 x 4096 weight, 8192 tokens,
0.5 % in bf16, 84 k entries:

    block      blocks   L2 bytes a block and token   L2       operations
    16 x 16       328      64                        172 MB     1.4 GFLOP
    1 x 64       1311     160                        1.7 GB     1.4
    4 x 4        5243      64                        2.7 GB     1.4
    128 x 128       5     512                         21 MB     1.4

So the L2 cache decides: 25 us at 16 x 16, beside the 31 of reading dy and x from memory, and 0.4 ms
at 4 x 4. A product may be padded: in the time of 64 bytes tensor cores at 700 TFLOP/s make 6 k
operations, and a tile of 16 x 16 takes 512. Without tensor cores, and for the smallest blocks,
entries are multiplied one by one, in 12 instructions for 32 of them and a token: 0.28 ms for 84 k
entries of 1 x 64 in float32, whose 288 bytes take 0.44 ms.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, Machine, dot, launch, machine, precision, token_splits

# float32 sums of all splits together, at most: 8 MB.
SCRATCH_ELEMENTS = 1 << 21
# Tokens of a split, at least: below, the second stage costs what the split gains.
SPLIT_TOKENS = 512
MOST_SPLITS = 64
# Programs that a multiprocessor is given at a time; more add no speed where each has enough reads
# under way.
RESIDENT = 4
# The smallest side of a product on tensor cores, in Triton.
SIDE = 16


@dataclass(frozen=True)
class TileLaunch(Launch):
    """Of the products by `tl.dot`.

    Attributes:
        tile_h, tile_w: the part of a block that a program takes, padded to powers of two.
        block_t: tokens of a step.
    """

    tile_h: int = 16
    tile_w: int = 16
    block_t: int = 128

    def shared(self, itemsize: int) -> int:
        """Bytes of the steps in flight."""
        return self.num_stages * self.block_t * (self.tile_h + self.tile_w) * itemsize

    def is_valid(self, itemsize: int, machine: Machine) -> bool:
        """Whether the steps in flight fit into shared memory, and the sums take at most half of a
        thread's registers.
        """
        fits = self.shared(itemsize) <= machine.shared_memory
        return fits and self.tile_h * self.tile_w <= 128 * 32 * self.num_warps

    def resident(self, itemsize: int, machine: Machine) -> int:
        """Programs that a multiprocessor holds at a time: by shared memory, and by registers, of
        which a thread takes 128 or more.
        """
        held = machine.shared_memory // self.shared(itemsize)
        return max(1, min(RESIDENT, held, 16 // self.num_warps))

    @classmethod
    def candidates(
        cls, block: tuple[int, int], itemsize: int, machine: Machine
    ) -> Iterator[TileLaunch]:
        """All that is worth trying: tiles of a block, of halves and quarters of it, with 4 sums a
        thread and more.
        """

        def sides(side: int) -> list[int]:
            whole = min(256, max(SIDE, triton.next_power_of_2(side)))
            return [part for part in (whole, whole // 2, whole // 4) if part >= SIDE]

        for tile_h in sides(block[0]):
            for tile_w in sides(block[1]):
                for num_warps in (1, 2, 4, 8):
                    for block_t in (32, 64, 128):
                        for num_stages in (2, 3, 4):
                            settings = cls(num_warps, num_stages, tile_h, tile_w, block_t)
                            full = tile_h * tile_w >= 4 * 32 * num_warps
                            if full and settings.is_valid(itemsize, machine):
                                yield settings

    @classmethod
    def default(cls, block: tuple[int, int], itemsize: int, tensor_cores: bool) -> TileLaunch:
        """The largest tile that registers hold, for a step reads its sides alone: 16 to 64 sums a
        thread, and steps of 8 to 32 KB, so that a multiprocessor has 24 KB and more under way.
        Without tensor cores a thread multiplies from registers; 16 sums are what it takes.
        """
        largest = 128 if tensor_cores else 64
        h, w = (min(largest, max(SIDE, triton.next_power_of_2(side))) for side in block)
        if h * w <= 1024 and h < 64:
            num_warps = 1 if h * w <= 256 else 2
        else:
            num_warps = 4 if h * w < 4096 else 8
        step = 256 if tensor_cores and h + w < 128 else 128
        return cls(num_warps, 3, h, w, step // itemsize)


@dataclass(frozen=True)
class EntryLaunch(Launch):
    """Of the products entry by entry: entries of a program, and tokens of a step."""

    block_e: int = 64
    block_t: int = 16

    @classmethod
    def candidates(cls) -> Iterator[EntryLaunch]:
        """All that is worth trying: 4 to 32 sums a thread."""
        for num_warps in (1, 2, 4):
            for block_e in (32, 64, 128):
                for block_t in (8, 16, 32, 64):
                    if 4 <= block_e * block_t // (32 * num_warps) <= 32:
                        yield cls(num_warps, 2, block_e, block_t)

    @classmethod
    def default(cls) -> EntryLaunch:
        """Eight sums a thread: sixteen reads under way, in 72 registers at most, so that seven
        programs share a multiprocessor.
        """
        return cls()


@dataclass(frozen=True)
class AddLaunch(Launch):
    block_e: int = 1024

    @classmethod
    def default(cls, splits: int) -> AddLaunch:
        """32 sums a thread, all read at once."""
        return cls(block_e=4096 // triton.next_power_of_2(splits))


def uses_dot(block: tuple[int, int], tensor_cores: bool) -> bool:
    """Whether a block is multiplied by `tl.dot`, padded to 16 x 16 at least.

    Tensor cores take a sixteenth of a padded tile faster than single entries are read. Without
    them padding is paid for, and half of it must be used.
    """
    h, w = (max(SIDE, triton.next_power_of_2(side)) for side in block)
    return block[0] * block[1] * (16 if tensor_cores else 2) >= h * w


def block_grad(
    dy: Tensor, x: Tensor, rows: Tensor, cols: Tensor, out: Tensor, accumulate: bool
) -> None:
    """Write `out [B, h, w]`, or add to it.

    Args:
        dy: `[M, N]`, rows contiguous.
        x: `[M, K]`, or some groups of its columns `[M, C]`; rows contiguous.
        rows: int32 `[B]`, which group of h columns of dy each block takes.
        cols: int32 `[B]`, which group of w columns of x.
        out: float32, contiguous.
    """
    blocks, block = out.shape[0], (out.shape[1], out.shape[2])
    tokens, nnz = dy.shape[0], out.numel()
    here, itemsize, mode = machine(dy.device), dy.element_size(), precision(dy.dtype)
    tensor_cores = itemsize == 2 or mode == "tf32"
    settings: TileLaunch | EntryLaunch
    if uses_dot(block, tensor_cores):
        settings = TileLaunch.default(block, itemsize, tensor_cores)
        tiles = triton.cdiv(block[0], settings.tile_h) * triton.cdiv(block[1], settings.tile_w)
        programs, resident = blocks * tiles, settings.resident(itemsize, here)
    else:
        settings = EntryLaunch.default()
        programs, resident = triton.cdiv(nnz, settings.block_e), RESIDENT
    splits = token_splits(triton.cdiv(programs, resident), tokens, SPLIT_TOKENS, here)
    splits = min(splits, MOST_SPLITS, max(1, SCRATCH_ELEMENTS // max(nnz, 1)))
    length = max(1, triton.cdiv(tokens, splits * settings.block_t)) * settings.block_t
    splits = max(1, triton.cdiv(tokens, length))
    # With one split the sums go where they belong; else each split's beside the others', and a
    # second stage adds them.
    sums = out if splits == 1 else out.new_empty(splits, nnz)
    unit_dy, unit_x = _unit(dy.stride(0)), _unit(x.stride(0))
    arguments = {
        "dy_ptr": dy,
        "stride_dy": dy.stride(0) // unit_dy,
        "x_ptr": x,
        "stride_x": x.stride(0) // unit_x,
        "rows_ptr": rows,
        "cols_ptr": cols,
        "sums_ptr": sums,
        "stride_sums": nnz,
        "M": tokens,
        "LENGTH": length,
        "BLOCK_H": block[0],
        "BLOCK_W": block[1],
        "BLOCK_T": settings.block_t,
        "UNIT_DY": unit_dy,
        "UNIT_X": unit_x,
        "ACCUMULATE": accumulate and splits == 1,
    }
    if isinstance(settings, TileLaunch):
        launch(
            _tile_products,
            (programs, splits),
            settings,
            **arguments,
            TILE_H=settings.tile_h,
            TILE_W=settings.tile_w,
            PRECISION=mode,
        )
    else:
        launch(_entry_products, (programs, splits), settings, **arguments, BLOCK_E=settings.block_e)
    if splits > 1:
        adding = AddLaunch.default(splits)
        launch(
            _add,
            (triton.cdiv(nnz, adding.block_e),),
            adding,
            sums_ptr=sums,
            stride_sums=nnz,
            out_ptr=out,
            splits=splits,
            SPLITS=triton.next_power_of_2(splits),
            ACCUMULATE=accumulate,
            BLOCK_E=adding.block_e,
        )


def _unit(stride: int) -> int:
    """Strides are passed in multiples of 8, where they are such: the compiler then knows that rows
    begin where 16 bytes do. Groups of 8 columns make rows of an odd number of groups.
    """
    return 8 if stride % 8 == 0 else 1


@triton.jit
def _tile_products(
    dy_ptr, stride_dy,
    x_ptr, stride_x,
    rows_ptr,
    cols_ptr,
    sums_ptr, stride_sums,
    M, LENGTH,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_T: tl.constexpr,
    UNIT_DY: tl.constexpr, UNIT_X: tl.constexpr, ACCUMULATE: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`sums[split, b, i, j] = sum over t of dy[t, rows[b] H + i] x[t, cols[b] W + j]`, t in the
    split.

    | argument   | shape              | |
    |------------|--------------------|-|
    | dy_ptr     | [M, N]             | rows `stride_dy UNIT_DY` apart |
    | x_ptr      | [M, K]             | rows `stride_x UNIT_X` apart |
    | rows_ptr   | int32 [B]          | |
    | cols_ptr   | int32 [B]          | |
    | sums_ptr   | [splits, B, H, W]  | float32, splits `stride_sums` apart |
    | LENGTH     |                    | tokens of a split |
    | ACCUMULATE |                    | add to sums |

    Grid: tiles of blocks, splits.
    """
    ACROSS: tl.constexpr = (BLOCK_W + TILE_W - 1) // TILE_W
    TILES: tl.constexpr = (BLOCK_H + TILE_H - 1) // TILE_H * ACROSS
    block = tl.program_id(0) // TILES
    tile = tl.program_id(0) % TILES
    split = tl.program_id(1)
    i = tile // ACROSS * TILE_H + tl.arange(0, TILE_H)
    j = tile % ACROSS * TILE_W + tl.arange(0, TILE_W)
    start = split * LENGTH
    stop = min(start + LENGTH, M)
    t = tl.arange(0, BLOCK_T)
    m = (start + t).to(tl.int64)
    # A side of one is read once a token, and padded with zeros after that.
    h = tl.zeros((1,), tl.int32) if BLOCK_H == 1 else i
    w = tl.zeros((1,), tl.int32) if BLOCK_W == 1 else j
    row = tl.load(rows_ptr + block) * BLOCK_H + h
    col = tl.load(cols_ptr + block) * BLOCK_W + w
    # dy comes turned: read so, it goes to shared memory past the registers, as x does.
    dy_ptrs = dy_ptr + row[:, None] + (m * stride_dy * UNIT_DY)[None, :]
    x_ptrs = x_ptr + (m * stride_x * UNIT_X)[:, None] + col[None, :]
    acc = tl.zeros((TILE_H, TILE_W), tl.float32)
    for first in range(start, stop, BLOCK_T):
        inside = first + t < stop
        dy = tl.load(dy_ptrs, mask=(h < BLOCK_H)[:, None] & inside[None, :], other=0.0)
        x = tl.load(x_ptrs, mask=inside[:, None] & (w < BLOCK_W)[None, :], other=0.0)
        if BLOCK_H == 1:
            dy = tl.where((i == 0)[:, None], dy, 0.0)
        if BLOCK_W == 1:
            x = tl.where((j == 0)[None, :], x, 0.0)
        acc = dot(dy, x, acc, PRECISION)
        dy_ptrs += tl.cast(stride_dy, tl.int64) * (BLOCK_T * UNIT_DY)
        x_ptrs += tl.cast(stride_x, tl.int64) * (BLOCK_T * UNIT_X)
    place = split.to(tl.int64) * stride_sums + block.to(tl.int64) * (BLOCK_H * BLOCK_W)
    sums_ptrs = sums_ptr + place + i[:, None] * BLOCK_W + j[None, :]
    mask = (i < BLOCK_H)[:, None] & (j < BLOCK_W)[None, :]
    if ACCUMULATE:
        acc += tl.load(sums_ptrs, mask=mask, other=0.0)
    tl.store(sums_ptrs, acc, mask=mask)


@triton.jit
def _entry_products(
    dy_ptr, stride_dy,
    x_ptr, stride_x,
    rows_ptr,
    cols_ptr,
    sums_ptr, stride_sums,
    M, LENGTH,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_T: tl.constexpr,
    UNIT_DY: tl.constexpr, UNIT_X: tl.constexpr, ACCUMULATE: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """As `_tile_products`, for `BLOCK_E` entries in the order of the sums, whatever their blocks.

    A thread sums an entry over every `BLOCK_T`-th token; the sums are then added as a tree.

    Grid: entries, splits.
    """
    AREA: tl.constexpr = BLOCK_H * BLOCK_W
    split = tl.program_id(1)
    begin = tl.program_id(0).to(tl.int64) * BLOCK_E
    e = tl.arange(0, BLOCK_E)
    present = begin + e < stride_sums
    at = (begin % AREA).to(tl.int32) + e
    block = (begin // AREA).to(tl.int32) + at // AREA
    row = tl.load(rows_ptr + block, mask=present, other=0) * BLOCK_H + at % AREA // BLOCK_W
    col = tl.load(cols_ptr + block, mask=present, other=0) * BLOCK_W + at % BLOCK_W
    start = split * LENGTH
    stop = min(start + LENGTH, M)
    t = tl.arange(0, BLOCK_T)
    m = (start + t).to(tl.int64)
    dy_ptrs = dy_ptr + (m * stride_dy * UNIT_DY)[:, None] + row[None, :]
    x_ptrs = x_ptr + (m * stride_x * UNIT_X)[:, None] + col[None, :]
    acc = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for first in range(start, stop, BLOCK_T):
        mask = (first + t < stop)[:, None] & present[None, :]
        dy = tl.load(dy_ptrs, mask=mask, other=0.0)
        x = tl.load(x_ptrs, mask=mask, other=0.0)
        acc += dy.to(tl.float32) * x.to(tl.float32)
        dy_ptrs += tl.cast(stride_dy, tl.int64) * (BLOCK_T * UNIT_DY)
        x_ptrs += tl.cast(stride_x, tl.int64) * (BLOCK_T * UNIT_X)
    total = tl.sum(acc, 0)
    sums_ptrs = sums_ptr + split.to(tl.int64) * stride_sums + begin + e
    if ACCUMULATE:
        total += tl.load(sums_ptrs, mask=present, other=0.0)
    tl.store(sums_ptrs, total, mask=present)


@triton.jit
def _add(
    sums_ptr, stride_sums,
    out_ptr,
    splits,
    SPLITS: tl.constexpr, ACCUMULATE: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """`out[e] = sum over splits of sums[split, e]`; `ACCUMULATE`: plus `out[e]`.

    | argument | shape                 | |
    |----------|-----------------------|-|
    | sums_ptr | [splits, stride_sums] | contiguous |
    | out_ptr  | [stride_sums]         | |
    | SPLITS   |                       | splits, up to a power of two |

    Grid: entries.
    """
    e = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    split = tl.arange(0, SPLITS)
    present = e < stride_sums
    sums = tl.load(
        sums_ptr + split.to(tl.int64)[:, None] * stride_sums + e[None, :],
        mask=(split < splits)[:, None] & present[None, :],
        other=0.0,
    )
    total = tl.sum(sums, 0)
    if ACCUMULATE:
        total += tl.load(out_ptr + e, mask=present, other=0.0)
    tl.store(out_ptr + e, total, mask=present)
