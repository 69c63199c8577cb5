"""In which dtype numbers are summed, and entries counted."""

from __future__ import annotations

import torch


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 accumulates in float64, everything else in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def index_dtype(entries: int) -> torch.dtype:
    """Of flat indices into a matrix of so many entries: int32 unless they are 2^31 or more."""
    return torch.int32 if entries < 2**31 else torch.int64
