"""`sparse_delta_matmul` against a copy of W with the delta added, then a GEMM, as others do it.

The frozen layer's product stands beside it: what it would cost without a delta.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ... import ops
from ...testing import realistic_pattern
from ..checks import agree, rounding_bound
from ..harness import Case, Side, Work

SIZE, DENSITY = 1024, 0.005


def setup(tokens: int) -> Case:
    torch.manual_seed(0)
    pattern = realistic_pattern((SIZE, SIZE), DENSITY)
    x, weight = torch.randn(tokens, SIZE), torch.randn(SIZE, SIZE)
    values, flat = torch.randn(pattern.nnz), pattern.indices.long()

    def ours() -> Tensor:
        return ops.sparse_delta_matmul(x, weight, values, pattern)

    def copied() -> Tensor:
        effective = weight.clone()
        effective.view(-1).index_add_(0, flat, values)
        return x @ effective.t()

    def frozen() -> Tensor:
        return x @ weight.t()

    def check() -> None:
        delta = torch.zeros(SIZE * SIZE, dtype=torch.float64).index_add_(0, flat, values.double())
        delta = delta.view(SIZE, SIZE)
        exact = x.double() @ (weight.double() + delta).t()
        # W and the delta as terms of their own, at the trained entries twice as many.
        magnitude = x.double().abs() @ (weight.double().abs() + delta.abs()).t()
        agree(sides[:2], exact.view(-1), rounding_bound(2 * SIZE, magnitude.view(-1)))

    gemm = {"x": 4 * x.numel(), "W": 4 * weight.numel(), "y": 4 * tokens * SIZE}
    products = 2 * tokens * SIZE * SIZE
    delta = {"values and indices": 8 * pattern.nnz}
    sides = [
        Side("ours", ours, True, Work({**gemm, **delta}, products + 2 * tokens * pattern.nnz)),
        Side(
            "copy of W + D",
            copied,
            False,
            Work({**gemm, **delta, "copy of W": 8 * weight.numel()}, products + pattern.nnz),
        ),
        Side("x @ W alone", frozen, False, Work(gemm, products)),
    ]
    name = f"{tokens} tokens, realistic {DENSITY:.1%}, {SIZE} x {SIZE}"
    return Case("sparse_delta_matmul", name, sides, check)


CASES = {f"{tokens} tokens": partial(setup, tokens) for tokens in (1, 16, 2048)}
QUICK = ("16 tokens",)
