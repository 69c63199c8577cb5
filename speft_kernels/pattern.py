"""`SparsePattern`: which entries of a weight train.

A pattern is immutable and validated once, here; every kernel trusts it afterwards, so nothing else
may build one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, wraps
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from .dtypes import index_dtype
from .errors import PatternError

_T = TypeVar("_T")


def lazy_tensor(method: Callable[[Any], _T]) -> cached_property[_T]:
    """A `cached_property` whose tensors autograd may save, even if an inference asked first."""

    @wraps(method)
    def compute(owner: Any) -> _T:
        with torch.inference_mode(False):
            return method(owner)

    return cached_property(compute)


class SparsePattern:
    """The trained entries of a weight `[out_features, in_features]`, as sorted flat indices.

    Args:
        shape: `(N, K)` = `(out_features, in_features)` of the weight.
        indices: 1-D int32 or int64, strictly increasing. Flat row-major element indices into the
            weight; for a block pattern, flat row-major indices into its grid of `(N / bh, K / bw)`
            blocks.
        block_shape: `(bh, bw)`; `(1, 1)` trains single entries.

    Attributes:
        indices: the indices, int32 unless `N * K >= 2**31`.

    Raises:
        PatternError: an index is out of range, duplicated or out of order; a dtype or a shape is
            wrong; the blocks do not tile the weight.
    """

    shape: tuple[int, int]
    block_shape: tuple[int, int]
    indices: Tensor

    def __init__(
        self, shape: tuple[int, int], indices: Tensor, block_shape: tuple[int, int] = (1, 1)
    ) -> None:
        shape = _pair("shape", shape, smallest=0)
        block_shape = _pair("block_shape", block_shape, smallest=1)
        if shape[0] % block_shape[0] or shape[1] % block_shape[1]:
            raise PatternError(
                f"blocks of {block_shape} do not tile a weight of shape {shape}: each side of "
                "the weight must be a "
                "multiple of the block's side"
            )
        if not isinstance(indices, Tensor):
            raise PatternError(f"indices must be a torch.Tensor, got {type(indices).__name__}")
        if indices.dtype not in (torch.int32, torch.int64):
            raise PatternError(f"indices must be int32 or int64, got {indices.dtype}")
        if indices.dim() != 1:
            raise PatternError(f"indices must be 1-D, got shape {tuple(indices.shape)}")
        grid = (shape[0] // block_shape[0], shape[1] // block_shape[1])
        _check_sorted_unique_in_range(indices, grid[0] * grid[1])
        # The pattern must not change when the caller later writes into the tensor that was handed
        # in.
        with torch.inference_mode(False):
            owned = indices.detach().to(index_dtype(shape[0] * shape[1]), copy=True).contiguous()
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "block_shape", block_shape)
        object.__setattr__(self, "indices", owned)

    @classmethod
    def from_mask(cls, mask: Tensor, block_shape: tuple[int, int] = (1, 1)) -> SparsePattern:
        """Build a pattern from a boolean mask `[N, K]`; with a block shape, each block must be all
        True or all False.

        Raises:
            PatternError: the mask is not 2-D boolean, or a block is only partly set.
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 2:
            found = (
                f"{mask.dtype} of shape {tuple(mask.shape)}"
                if isinstance(mask, Tensor)
                else type(mask).__name__
            )
            raise PatternError(f"mask must be a 2-D bool tensor, got {found}")
        shape = (mask.shape[0], mask.shape[1])
        bh, bw = _pair("block_shape", block_shape, smallest=1)
        if shape[0] % bh or shape[1] % bw:
            return cls(shape, torch.empty(0, dtype=torch.int64), (bh, bw))  # raises: no tiling
        blocks = mask.reshape(shape[0] // bh, bh, shape[1] // bw, bw)
        full = blocks.all(dim=3).all(dim=1)
        partial = blocks.any(dim=3).any(dim=1) & ~full
        if bool(partial.any()):
            row, col = (int(i) for i in partial.nonzero()[0])
            raise PatternError(
                f"block ({row}, {col}) of shape {(bh, bw)} is only partly set in the mask; a "
                "block trains as a whole"
            )
        return cls(shape, full.flatten().nonzero().flatten(), (bh, bw))

    @classmethod
    def from_indices(cls, shape: tuple[int, int], indices: Tensor) -> SparsePattern:
        """Build a pattern from flat row-major element indices in any order.

        Raises:
            PatternError: as the constructor; duplicates are refused, not merged.
        """
        return cls(shape, _sorted(indices))

    @classmethod
    def from_blocks(
        cls, shape: tuple[int, int], block_shape: tuple[int, int], block_indices: Tensor
    ) -> SparsePattern:
        """Build a block pattern from flat row-major indices, in any order, into the grid of blocks.

        Raises:
            PatternError: as the constructor.
        """
        return cls(shape, _sorted(block_indices), block_shape)

    @property
    def num_blocks(self) -> int:
        """Number of blocks (of single entries where the block shape is (1, 1))."""
        return self.indices.numel()

    @property
    def nnz(self) -> int:
        """Number of trained scalars."""
        return self.num_blocks * self.block_shape[0] * self.block_shape[1]

    @property
    def density(self) -> float:
        """Share of the weight's entries that train, in [0, 1]."""
        numel = self.shape[0] * self.shape[1]
        return self.nnz / numel if numel else 0.0

    @property
    def is_block(self) -> bool:
        return self.block_shape != (1, 1)

    @property
    def is_empty(self) -> bool:
        return self.num_blocks == 0

    @property
    def device(self) -> torch.device:
        return self.indices.device

    @property
    def values_shape(self) -> tuple[int, ...]:
        """Shape of the trained values: `[nnz]`, or `[num_blocks, bh, bw]` for a block pattern."""
        return (self.num_blocks, *self.block_shape) if self.is_block else (self.num_blocks,)

    @lazy_tensor
    def block_rows(self) -> Tensor:
        """int32 `[num_blocks]`: the row of each block in the grid of blocks."""
        return torch.div(self.indices, self._grid_width, rounding_mode="floor").to(torch.int32)

    @lazy_tensor
    def block_cols(self) -> Tensor:
        """int32 `[num_blocks]`: the column of each block in the grid of blocks."""
        return torch.remainder(self.indices, self._grid_width).to(torch.int32)

    @lazy_tensor
    def entry_indices(self) -> Tensor:
        """`[nnz]`: the flat index into the weight of each trained scalar, in the order of
        `values.reshape(-1)`.
        """
        if not self.is_block or self.is_empty:
            return self.indices
        (bh, bw), dtype = self.block_shape, self.indices.dtype
        row = self.block_rows.to(dtype)[:, None] * bh + torch.arange(
            bh, dtype=dtype, device=self.device
        )
        col = self.block_cols.to(dtype)[:, None] * bw + torch.arange(
            bw, dtype=dtype, device=self.device
        )
        return (row[:, :, None] * self.shape[1] + col[:, None, :]).flatten()

    @property
    def rows(self) -> Tensor:
        """int32 `[nnz]`: the out_feature of each trained scalar."""
        return torch.div(self.entry_indices, max(self.shape[1], 1), rounding_mode="floor").to(
            torch.int32
        )

    @property
    def cols(self) -> Tensor:
        """int32 `[nnz]`: the in_feature of each trained scalar."""
        return torch.remainder(self.entry_indices, max(self.shape[1], 1)).to(torch.int32)

    @lazy_tensor
    def used_rows(self) -> Tensor:
        """int32, sorted: the out_features that hold any trained scalar."""
        return _expand(torch.unique(self.block_rows), self.block_shape[0])

    @lazy_tensor
    def used_cols(self) -> Tensor:
        """int32, sorted: the in_features that hold any trained scalar."""
        return _expand(torch.unique(self.block_cols), self.block_shape[1])

    def mask(self) -> Tensor:
        """Return the boolean mask `[N, K]`. It is as large as the weight: for inspection and
        tests.
        """
        mask = torch.zeros(self.shape[0] * self.shape[1], dtype=torch.bool, device=self.device)
        mask[self.entry_indices.long()] = True
        return mask.reshape(self.shape)

    def to(self, device: torch.device | str) -> SparsePattern:
        """Return the same pattern with its indices on `device` (itself when they are there
        already).
        """
        device = torch.device(device)
        if device == self.device or (device.type == self.device.type and device.index is None):
            return self
        moved = object.__new__(SparsePattern)
        object.__setattr__(moved, "shape", self.shape)
        object.__setattr__(moved, "block_shape", self.block_shape)
        object.__setattr__(moved, "indices", self.indices.to(device))
        return moved

    @property
    def _grid_width(self) -> int:
        return max(self.shape[1] // self.block_shape[1], 1)

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise AttributeError(f"a SparsePattern is immutable: cannot set {name!r}; build a new one")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SparsePattern):
            return NotImplemented
        return self is other or (
            self.shape == other.shape
            and self.block_shape == other.block_shape
            and torch.equal(self.indices.cpu(), other.indices.cpu())
        )

    __hash__ = None  # type: ignore[assignment]  # equality compares contents; hashing them would copy off the device

    def __copy__(self) -> SparsePattern:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> SparsePattern:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return SparsePattern, (self.shape, self.indices, self.block_shape)

    def __repr__(self) -> str:
        block = f", block_shape={self.block_shape}" if self.is_block else ""
        return (
            f"SparsePattern(shape={self.shape}, nnz={self.nnz}, density={self.density:.4%}{block})"
        )


def _pair(name: str, value: tuple[int, int], *, smallest: int) -> tuple[int, int]:
    try:
        first, second = (int(v) for v in value)
        exact = (first, second) == tuple(value)
    except (TypeError, ValueError, OverflowError):  # the last of an infinity
        exact = False
    if not exact or first < smallest or second < smallest:
        raise PatternError(f"{name} must be two integers of at least {smallest}, got {value!r}")
    return first, second


def _check_sorted_unique_in_range(indices: Tensor, limit: int) -> None:
    if indices.numel() == 0:
        return
    if indices.numel() > 1:
        bad = indices[1:] <= indices[:-1]
        if bool(bad.any()):
            at = int(bad.nonzero()[0])
            first, second = int(indices[at]), int(indices[at + 1])
            fact = "is duplicated" if first == second else f"comes before {second}"
            raise PatternError(
                f"indices must be strictly increasing: index {first} at position {at} {fact}"
            )
    # Sorted, so the two ends bound them all.
    for value in (int(indices[0]), int(indices[-1])):
        if not 0 <= value < limit:
            raise PatternError(f"index {value} is out of range: the pattern has {limit} places")


def _sorted(indices: Tensor) -> Tensor:
    if isinstance(indices, Tensor) and indices.dim() == 1 and indices.numel():
        return torch.sort(indices).values
    return indices


def _expand(blocks: Tensor, size: int) -> Tensor:
    if size == 1 or not blocks.numel():  # of a file that holds none, blocks may be of any size
        return blocks
    return (
        blocks[:, None] * size + torch.arange(size, dtype=blocks.dtype, device=blocks.device)
    ).flatten()
