"""Products of 16-bit numbers that come as wide as they are summed.

A vendor's GEMM sums 16-bit numbers in float32 and rounds the sums to the operands' dtype. On CUDA
torch can have them unrounded; elsewhere the operands are widened before, by the caller, who knows
how much of them may exist at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor


def served(operand: Tensor) -> bool:
    """Whether torch multiplies such operands into float32; ROCm's torch calls its devices so, too.

    Its products of a single line are as close as those of many, which on a CPU they are not.
    """
    return operand.is_cuda and torch.version.cuda is not None


def mm(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """`left [R, M] @ right [M, C]` in `dtype`: that of the operands, or float32 where served."""
    return left @ right if left.dtype == dtype else torch.mm(left, right, out_dtype=dtype)


def bmm(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """`left [b, R, M] @ right [b, M, C]`, likewise."""
    return left @ right if left.dtype == dtype else torch.bmm(left, right, out_dtype=dtype)
