"""How far a sum over tokens may be from the exact one on a GPU, whatever its order."""

from __future__ import annotations

import torch

# Tokens that one instruction of the tensor cores adds to an accumulator, in 16-bit operands.
_TENSOR_CORE_STEP = 16


def summation_bound(tokens: int, largest: float, dtype: torch.dtype) -> float:
    """The error of a float32 sum of `tokens` products of random signs, for operands of `dtype`.

    A running sum is seldom larger than the largest result, so a rounding is worth at most half an
    eps of that. In float32 roundings have random signs, and M of them add up like sqrt(M). Tensor
    cores cut off instead: every 16 tokens up to a whole eps, always toward zero, so that these add
    up like their number. One rounding more is that of the result.

    Args:
        largest: the largest absolute value among all exact sums.
    """
    eps = torch.finfo(torch.float32).eps
    cut = tokens / _TENSOR_CORE_STEP if dtype in (torch.bfloat16, torch.float16) else 0.0
    return float(eps * largest * (1 + tokens**0.5 / 2 + cut))
