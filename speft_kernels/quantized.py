"""`QuantizedWeight`: a frozen weight in eight or four bits, the base of a sparse delta.

    W[n, k] = scales[n, k // group_size] * q[n, k]          q in -127..127 or -7..7

Weight-only and symmetric: activations and the delta stay as they are, and zero is exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .dtypes import accumulator_dtype

# The kernel multiplies 16 columns at a time at least, which must share one scale.
GROUP_STEP = 16
# What is widened at a time where a whole weight would be too much.
PIECE_BYTES = 4 << 20

_LEVELS = {8: 127, 4: 7}


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight `[N, K]` as small integers and their scales. Make one with `quantize`, or from
    tensors in the form below; they are not copied and must not change.

    Attributes:
        data: int8 `[N, K]`; or, of four bits, int16 `[N, K / 4]`: word j of a row holds columns
            j, K / 4 + j, K / 2 + j and 3 K / 4 + j from its lowest four bits up, each as q + 8.
            Neighbouring words then meet neighbouring columns of x, which are read 16 bytes at a
            time, and 16 bits are as wide as what a number is widened to.
        scales: `[N, K / group_size]`, floating point.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape, stride or device does not fit.
    """

    data: Tensor
    scales: Tensor

    def __post_init__(self) -> None:
        data, scales = self.data, self.scales
        if data.dtype not in (torch.int8, torch.int16):
            raise TypeError(f"data must be int8, or int16 of four columns each, got {data.dtype}")
        if not scales.is_floating_point():
            raise TypeError(f"scales must be floating point, got {scales.dtype}")
        if scales.requires_grad:
            raise ValueError("scales require a gradient, but a quantized weight is frozen")
        if data.device != scales.device:
            raise ValueError(
                f"data is on {data.device} and scales on {scales.device}; they must share one "
                "device"
            )
        shapes = f"data {tuple(data.shape)} and scales {tuple(scales.shape)}"
        if data.dim() != 2 or scales.dim() != 2 or data.shape[0] != scales.shape[0]:
            raise ValueError(f"data and scales must be [N, ...] both, got {shapes}")
        if not (data.is_contiguous() and scales.is_contiguous()):
            raise ValueError(
                f"data and scales must be contiguous, got strides {data.stride()} and "
                f"{scales.stride()}"
            )
        columns, groups = self.shape[1], scales.shape[1]
        if groups < 1 or columns % groups:
            raise ValueError(f"{columns} columns do not part into {groups} equal groups: {shapes}")
        if groups > 1:
            _check_groups(columns, columns // groups, self.bits)

    @classmethod
    def quantize(cls, weight: Tensor, bits: int, group_size: int | None = None) -> QuantizedWeight:
        """Round `weight [N, K]` to the nearest multiples of the largest magnitude / 127 (8 bits) or
        / 7 (4 bits) of each row, or of each group of `group_size` columns of a row. The scales have
        the weight's dtype, for float16 float32: below 2^-14 float16 has few bits, and the scales of
        small weights lie there.

        Raises:
            TypeError: the weight is not floating point.
            ValueError: bits other than 8 and 4; a weight that is not 2-D, not finite, or, for 4
                bits, has no multiple of four columns; groups that do not fit.
        """
        if not weight.is_floating_point():
            raise TypeError(f"the weight must be floating point, got {weight.dtype}")
        if weight.dim() != 2 or weight.shape[1] == 0:
            raise ValueError(f"the weight must be [N, K], got shape {tuple(weight.shape)}")
        if bits not in _LEVELS:
            raise ValueError(f"bits must be 8 or 4, got {bits!r}")
        rows, columns = weight.shape
        if bits == 4 and columns % 4:
            raise ValueError(f"4 bits need a multiple of four columns, got {columns}")
        group = columns if group_size is None else group_size
        if group < 1 or columns % group:
            raise ValueError(f"groups of {group} do not part {columns} columns")
        if group < columns:
            _check_groups(columns, group, bits)
        weight = weight.detach()
        packed = (rows, columns if bits == 8 else columns // 4)
        data = weight.new_empty(packed, dtype=torch.int8 if bits == 8 else torch.int16)
        kept = torch.float32 if weight.dtype == torch.float16 else weight.dtype
        scales = weight.new_empty(rows, columns // group, dtype=kept)
        for some in _pieces(rows, columns * 4):
            data[some], scales[some] = _round(weight[some], bits, group, kept)
        return cls(data, scales)

    @property
    def bits(self) -> int:
        return 8 if self.data.dtype == torch.int8 else 4

    @property
    def shape(self) -> tuple[int, int]:
        """`(N, K)` of the weight."""
        rows, width = self.data.shape
        return rows, width if self.bits == 8 else 4 * width

    @property
    def group_size(self) -> int:
        """Columns that share a scale: K where each row has one."""
        return self.shape[1] // self.scales.shape[1]

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.scales.nbytes

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """Return the same weight on `device`."""
        return QuantizedWeight(self.data.to(device), self.scales.to(device))

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight as a new tensor `[N, K]` of `dtype` (by default that of the scales),
        multiplied in float32 (float64 for float64) and rounded once.
        """
        dtype = self.scales.dtype if dtype is None else dtype
        weight = self.data.new_empty(self.shape, dtype=dtype)
        for some in _pieces(self.shape[0], self.shape[1] * 4):
            weight[some] = self.rows(some, dtype)
        return weight

    def rows(self, some: slice, dtype: torch.dtype) -> Tensor:
        """Return some rows of the weight, `[rows, K]`."""
        data, scales = self.data[some], self.scales[some]
        if self.bits == 4:
            data = torch.cat([_number(data, place) for place in range(4)], 1)
        wide = accumulator_dtype(dtype)
        groups = data.to(wide).unflatten(1, (scales.shape[1], -1))
        return (groups * scales.to(wide).unsqueeze(2)).flatten(1).to(dtype)

    def columns(self, some: slice, dtype: torch.dtype) -> Tensor:
        """Return some columns of the weight, `[N, columns]`."""
        start, stop, _ = some.indices(self.shape[1])
        data, width = self.data, self.data.shape[1]
        if self.bits == 8:
            data = data[:, start:stop]
        else:
            ends = (
                (max(start - p * width, 0), max(min(stop - p * width, width), 0)) for p in range(4)
            )
            data = torch.cat([_number(data[:, a:b], p) for p, (a, b) in enumerate(ends)], 1)
        wide, scales = accumulator_dtype(dtype), self.scales
        if scales.shape[1] > 1:
            group = torch.arange(start, stop, device=self.device) // self.group_size
            scales = scales.index_select(1, group)
        return (data.to(wide) * scales.to(wide)).to(dtype)

    def __repr__(self) -> str:
        return (
            f"QuantizedWeight(shape={self.shape}, bits={self.bits}, group_size={self.group_size}, "
            f"scales={self.scales.dtype}, device={self.device})"
        )


def _check_groups(columns: int, group: int, bits: int) -> None:
    if group % GROUP_STEP:
        raise ValueError(f"a group must have a multiple of {GROUP_STEP} columns, got {group}")
    if bits == 4 and columns % (4 * GROUP_STEP):
        raise ValueError(
            f"4 bits in groups need a multiple of {4 * GROUP_STEP} columns, got {columns}"
        )


def _pieces(lines: int, line_bytes: int) -> Iterator[slice]:
    step = max(1, PIECE_BYTES // max(line_bytes, 1))
    for start in range(0, lines, step):
        yield slice(start, min(start + step, lines))


def _round(weight: Tensor, bits: int, group: int, kept: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return data and scales of some rows."""
    levels, wide = _LEVELS[bits], accumulator_dtype(weight.dtype)
    groups = weight.to(wide).unflatten(1, (-1, group))
    largest = groups.abs().amax(2)
    if not bool(torch.isfinite(largest).all()):
        raise ValueError("the weight has entries that are not finite: they have no scale")
    scales = (largest / levels).to(kept)
    # The scale as it is kept, so that rounding it moves no entry. A group of zeros, or of numbers
    # too small for a scale, is zero.
    steps = torch.where(scales == 0, torch.inf, scales.to(wide)).unsqueeze(2)
    q = (groups / steps).round().clamp(-levels, levels).flatten(1)
    if bits == 8:
        return q.to(torch.int8), scales
    words = [quarter << 4 * place for place, quarter in enumerate((q + 8).int().chunk(4, 1))]
    return sum(words[1:], words[0]).to(torch.int16), scales


def _number(words: Tensor, place: int) -> Tensor:
    return (words >> 4 * place & 15) - 8
