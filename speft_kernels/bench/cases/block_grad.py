"""`block_grad` against the dense gradient and a gather: 2048 tokens, 1024 x 1024, 0.5 %.

Everything is float32.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ... import ops
from ...pattern import SparsePattern
from ..checks import agree, rounding_bound
from ..harness import Case, Side, Work

TOKENS, SIZE, DENSITY = 2048, 1024, 0.005


def setup(block: tuple[int, int]) -> Case:
    torch.manual_seed(0)
    grid = SIZE * SIZE // (block[0] * block[1])
    chosen = torch.randperm(grid)[: round(DENSITY * grid)]
    pattern = SparsePattern.from_blocks((SIZE, SIZE), block, chosen)
    dy, x = torch.randn(TOKENS, SIZE), torch.randn(TOKENS, SIZE)
    flat = pattern.entry_indices.long()

    def ours() -> Tensor:
        return ops.block_grad(dy, x, pattern)

    def dense() -> Tensor:
        return (dy.t() @ x).view(-1)[flat]

    def check() -> None:
        wide, wide_x = dy.double(), x.double()
        magnitude = (wide.abs().t() @ wide_x.abs()).view(-1)[flat]
        agree(sides, (wide.t() @ wide_x).view(-1)[flat], rounding_bound(TOKENS, magnitude))

    rows, cols = block[0] * pattern.block_rows.unique().numel(), pattern.used_cols.numel()
    work = Work(
        {
            "dy at used rows": 4 * TOKENS * rows,
            "x at used columns": 4 * TOKENS * cols,
            "block indices": 8 * pattern.num_blocks,
            "dV": 4 * pattern.nnz,
        },
        2 * TOKENS * pattern.nnz,
    )
    dense_work = Work(
        {"dy": 4 * dy.numel(), "x": 4 * x.numel(), "dW": 4 * SIZE * SIZE, "dv": 12 * pattern.nnz},
        2 * TOKENS * SIZE * SIZE,
    )
    sides = [
        Side("ours", ours, True, work),
        Side("dense dW, gather", dense, False, dense_work),
    ]
    name = f"{block[0]} x {block[1]} blocks, {DENSITY:.1%}, {SIZE} x {SIZE}"
    return Case("block_grad", name, sides, check, rounds=5)


CASES = {
    f"{h} x {w}": partial(setup, (h, w))
    for h, w in ((16, 16), (32, 32), (1, 64), (64, 1), (4, 4), (2, 2))
}
QUICK = ("16 x 16",)
