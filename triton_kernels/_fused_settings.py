"""What the fused kernel of `sparse_delta_matmul` is launched with."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from .effective_weight import INT4, group_size, kind
from .launch import Launch, Machine, precision

# W in flight on a multiprocessor: 4.3 TB/s for a latency of 1 us are 33 KB each of 132.
IN_FLIGHT = 48 << 10
OTHER_SHARED = 4 << 10  # shared memory for barriers and for numbers that change threads

# Of a tile of W, in outputs or columns: offsets in it have 32 bits.
LONGEST_SIDE = 256


@dataclass(frozen=True)
class Shape:
    """What the settings of the fused kernel are chosen for.

    Attributes:
        width: columns of W to sum over (of four bits: words of four columns).
        columns: of x, in such a column or word.
        weight_bytes: of such a column or word.
        full: float32 is multiplied in full, without tensor cores.
        quantized: W is widened to x's type.
        twin: W is read along the outputs.
        most: columns that share a scale, at most; of outputs in the twin.
    """

    tokens: int
    outputs: int
    width: int
    columns: int
    weight_bytes: int
    x_bytes: int
    full: bool
    quantized: bool
    twin: bool
    most: int


def shape_of(
    x: Tensor, weight: Tensor | None, scales: Tensor | None, out_features: int, twin: bool
) -> Shape:
    """Return what a call's settings are chosen for."""
    columns = out_features if twin else x.shape[1]
    group = group_size(columns, scales)
    quarters = 4 if kind(weight, scales) == INT4.value else 1
    in_word = 1 if twin else quarters
    return Shape(
        tokens=x.shape[0],
        outputs=out_features,
        width=x.shape[1] // in_word,
        columns=in_word,
        weight_bytes=(x if weight is None else weight).element_size(),
        x_bytes=x.element_size(),
        full=x.dtype == torch.float32 and precision(x.dtype) == "ieee",
        quantized=scales is not None,
        twin=twin,
        # A tile lies within one group, and of four bits within a quarter of the columns. Both have
        # a multiple of 16 columns.
        most=_power_of_two(math.gcd(group, columns // quarters)) if group else 1 << 20,
    )


def _power_of_two(number: int) -> int:
    """The largest that divides the number."""
    return number & -number


@dataclass(frozen=True)
class FusedLaunch(Launch):
    """Attributes:
    block_m: tokens of a program; 16 are the least that tensor cores take.
    block_n: outputs of a program.
    block_k: columns or words of W in a step.
    block_e: entries in a step.
    splits: programs that share the sums of a tile, each with its part of W's columns and of the
        entries.
    """

    block_m: int = 16
    block_n: int = 32
    block_k: int = 256
    block_e: int = 128
    splits: int = 1

    def is_valid(self, shape: Shape, machine: Machine) -> bool:
        """Whether the tiles in flight of W and x, or those of the entries, fit into shared memory,
        and what a thread holds of them and of the sums into its registers; and whether a tile has
        one scale where the kernel takes it to.
        """
        threads, columns = 32 * self.num_warps, self.block_k * shape.columns
        return (
            self.shared_memory(shape) <= machine.shared_memory
            and max(self.block_n, self.block_k) <= LONGEST_SIDE
            and self.block_n * columns <= 64 * threads
            and self.block_n * max(self.block_e, self.block_m) <= 32 * threads
            # Without tensor cores a thread holds the lines of a step from end to end.
            and (not shape.full or max(self.block_k, self.block_e) <= 16)
            and (self.block_n if shape.twin else self.block_k) <= shape.most
            and (self.splits == 1 or self.splits * self.block_k <= shape.width)
        )

    def shared_memory(self, shape: Shape) -> int:
        """Bytes at most: the tiles in flight, or else those of the entries in float32."""
        lines = self.block_n * shape.weight_bytes + self.block_m * shape.columns * shape.x_bytes
        entries = 4 * self.block_e * (self.block_m + 2 * self.block_n)
        return max(self.num_stages * self.block_k * lines, entries) + OTHER_SHARED

    @classmethod
    def candidates(cls, shape: Shape, machine: Machine) -> Iterator[FusedLaunch]:
        """All that is worth trying."""
        block_m = _tokens(shape.tokens)
        sizes = itertools.product((32, 64, 128), (16, 32, 64, 128, 256), (16, 32, 64, 128))
        for block_n, block_k, block_e in sizes:
            for num_warps, num_stages, splits in itertools.product((4, 8), range(2, 8), (1, 2, 4)):
                settings = cls(num_warps, num_stages, block_m, block_n, block_k, block_e, splits)
                if settings.is_valid(shape, machine):
                    yield settings

    @classmethod
    def default(cls, shape: Shape, machine: Machine) -> FusedLaunch:
        """A tile of W of 16 KB in 16 bits. Few outputs a program, so that without splits, which
        cost a second stage, there is a program for each multiprocessor; for more tokens more, so
        that x is not read more often than W. As many stages as keep IN_FLIGHT under way.
        """
        block_m = _tokens(shape.tokens)
        # Before Hopper a product has its operands in registers, beside what is widened.
        tight = machine.capability < (9, 0)
        enough = triton.cdiv(shape.outputs, 64) >= 0.75 * machine.multiprocessors
        # The twin's lines of W run along the outputs: 64 are 128 bytes in 16 bits.
        wide = block_m > 16 or enough or shape.twin
        narrow = shape.full or (tight and shape.quantized)
        block_n = 64 if wide and not narrow else 32
        if shape.twin:
            block_n = min(block_n, shape.most)
        # Eight warps share 32 outputs of 16 tokens two and two: with tensor cores they would widen
        # a quantized weight twice.
        warps = 4 if block_m == 16 and block_n == 32 and shape.quantized != shape.full else 8
        # Columns of a tile of W. Fewer than 128 bytes of x for each of 16 tokens, or half of it for
        # more, leave the threads narrow loads.
        held, least = 16384 // shape.x_bytes, (128 if block_m == 16 else 64) // shape.x_bytes
        if shape.twin and (shape.quantized or shape.x_bytes == 4):
            held //= 2
        if tight and shape.quantized:
            held, least = held // 2, least // 2
        elif tight and block_m == 64:
            held //= 2
        block_k = block_e = 16
        if not shape.full:
            block_k = max(least, held // (block_n * shape.columns))
            # 32 bytes a thread, less where it also holds many sums, or operands.
            each = 32 // shape.x_bytes // (2 if tight else 1) // (2 if block_m == 64 else 1)
            block_e = max(16, each * 32 * warps // block_n)
            if block_m == 32:  # 128 beside 32 outputs, which the twin's groups of 32 ask for, spill
                block_e = min(block_e, 64)
        if not shape.twin:
            block_k = min(block_k, shape.most)
        tiles = triton.cdiv(shape.tokens, block_m) * triton.cdiv(shape.outputs, block_n)
        # Steps of 16 columns of float32 keep too little under way for one program to do.
        programs = machine.multiprocessors * (4 if shape.full else 1)
        splits = min(programs // max(tiles, 1), shape.width // (4 * block_k))
        chosen = cls(warps, 1, block_m, block_n, block_k, block_e, max(splits, 1))
        wanted = 1 + triton.cdiv(IN_FLIGHT, block_n * block_k * shape.weight_bytes)
        # In 32 bits the addresses of more stages than these would take too many registers.
        most = 3 if shape.x_bytes == 4 else 7
        for stages in range(min(wanted, most), 1, -1):
            chosen = replace(chosen, num_stages=stages)
            if chosen.is_valid(shape, machine):
                break
        return chosen


def _tokens(tokens: int) -> int:
    return 16 if tokens <= 16 else 32 if tokens <= 32 else 64
