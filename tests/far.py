"""Operands whose rows lie so far apart that offsets pass 2^31, in memory that is hardly touched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from kernels import make_pattern
from torch import Tensor

from speft_kernels import SparsePattern, SparsityPlan, ops
from speft_kernels.bench.gpu.bounds import summation_bound

DTYPE = torch.bfloat16
N, K = 48, 64
# Rows and how many elements lie between them: of all tokens in one step, in several, and in several
# that are as long; and rows of W, of which a tile alone passes 2^31.
FEW, MORE, MANY, LONG = (9, 1 << 28), (20, 1 << 27), (150, 1 << 24), (100, 1 << 25)
TILE = (40, 1 << 26)


@dataclass(frozen=True)
class Far:
    """A call with one such operand `[rows, width]`, `gap` elements apart.

    Attributes:
        run: takes the operand, the backend, and `tensors`, all on one device.
        tensors: makes what else the call needs.
        terms: how many products a result sums; 0 where numbers are only moved.
    """

    op: str
    width: int
    apart: tuple[int, int]
    tensors: Callable[[int], dict[str, Any]]
    run: Callable[..., Tensor]
    terms: int

    def check(self, backend: str, device: torch.device | str) -> None:
        """The result is that of the same rows side by side."""
        rows, gap = self.apart
        assert (rows - 1) * gap >= 1 << 31
        memory = torch.empty((rows - 1) * gap + self.width, dtype=DTYPE, device=device)
        operand = memory.as_strided((rows, self.width), (gap, 1)).normal_()
        others = {name: thing.to(device) for name, thing in self.tensors(rows).items()}
        found = self.run(operand, backend, **others)
        wanted = self.run(operand.contiguous(), backend, **others)
        largest = float(wanted.abs().max())
        assert largest > 0
        # Another way to the same sum may be taken, each within its bound, and each rounded.
        bound = 2 * summation_bound(self.terms, largest, DTYPE) if self.terms else 0.0
        bound += torch.finfo(found.dtype).eps * largest if self.terms else 0.0
        assert float((found - wanted).abs().max()) <= bound


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape).to(DTYPE)


def _entries() -> SparsePattern:
    return make_pattern("realistic", N, K)


def _blocks(block: tuple[int, int]) -> SparsePattern:
    return SparsePattern.from_blocks((N, K), block, torch.tensor([0, 3, 7, 11]))


def _gradient(op: str, far: str, pattern: SparsePattern, apart: tuple[int, int]) -> Far:
    def tensors(rows: int) -> dict[str, Any]:
        return {"other": _randn(rows, K if far == "dy" else N), "pattern": pattern}

    def run(operand: Tensor, backend: str, other: Tensor, pattern: SparsePattern) -> Tensor:
        dy, x = (operand, other) if far == "dy" else (other, operand)
        found: Tensor = getattr(ops, op)(dy, x, pattern, backend=backend)
        return found

    return Far(op, N if far == "dy" else K, apart, tensors, run, apart[0])


def _product(far: str, twin: bool, tokens: int, apart: tuple[int, int]) -> Far:
    product = ops.sparse_delta_matmul_grad_input if twin else ops.sparse_delta_matmul
    n = apart[0] if far == "W" else N
    width = K if far == "W" or not twin else N

    def tensors(rows: int) -> dict[str, Any]:
        pattern = make_pattern("realistic", n, K)
        other = _randn(tokens, n if twin else K) if far == "W" else _randn(N, K)
        return {"other": other, "values": torch.randn(pattern.nnz), "pattern": pattern}

    def run(
        operand: Tensor, backend: str, other: Tensor, values: Tensor, pattern: SparsePattern
    ) -> Tensor:
        x, weight = (other, operand) if far == "W" else (operand, other)
        return product(x, weight, values, pattern, backend=backend)

    return Far("sparse_delta_matmul", width, apart, tensors, run, n if twin else K)


def _kept(apart: tuple[int, int]) -> Far:
    def run(x: Tensor, backend: str, pattern: SparsePattern) -> Tensor:
        plan = SparsityPlan.build(pattern, keep=pattern.used_cols)
        return ops.keep_columns(x, plan, backend=backend)

    return Far("keep_columns", K, apart, lambda rows: {"pattern": _entries()}, run, 0)


CASES = {
    **{f"keep_columns, {apart[0]} tokens": _kept(apart) for apart in (FEW, MANY)},
    **{
        f"sampled_grad, {far}, {apart[0]} tokens": _gradient("sampled_grad", far, _entries(), apart)
        for far in ("dy", "x")
        for apart in (FEW, LONG)
    },
    **{
        f"block_grad of {block[0]} x {block[1]}, {far}, {apart[0]} tokens": _gradient(
            "block_grad", far, _blocks(block), apart
        )
        for block in ((16, 16), (1, 4))
        for far in ("dy", "x")
        for apart in (FEW, LONG)
    },
    **{
        f"sparse_delta_matmul{', twin' * twin}, x, {apart[0]} tokens": _product(
            "x", twin, apart[0], apart
        )
        for twin in (False, True)
        for apart in (FEW, MORE, MANY)
    },
    **{
        f"sparse_delta_matmul{', twin' * twin}, W of {apart[0]} rows, {tokens} tokens": _product(
            "W", twin, tokens, apart
        )
        for twin, tokens in ((False, 5), (True, 5), (False, 140))
        for apart in ((600, 1 << 22), TILE)
    },
}
