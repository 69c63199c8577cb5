"""block_grad against the dense gradient: 2048 tokens, 1024 x 1024, float32, 0.5 % in blocks."""

import pytest
import torch

from speft_kernels import SparsePattern, ops

TOKENS, SIZE, DENSITY = 2048, 1024, 0.005


def setup(block):
    grid = SIZE * SIZE // (block[0] * block[1])
    chosen = torch.randperm(grid)[: round(DENSITY * grid)]
    pattern = SparsePattern.from_blocks((SIZE, SIZE), block, chosen)
    dy, x = torch.randn(TOKENS, SIZE), torch.randn(TOKENS, SIZE)
    flat = pattern.entry_indices.long()

    def ours():
        return ops.block_grad(dy, x, pattern)

    def dense():
        return (dy.t() @ x).view(-1)[flat]

    torch.testing.assert_close(ours().reshape(-1), dense(), rtol=0, atol=2e-3)
    return ours, dense


@pytest.mark.parametrize("block", [(16, 16), (32, 32), (1, 64), (64, 1)])
def test_block_grad(compare, block):
    ours, dense = setup(block)
    name = f"block_grad, {block[0]} x {block[1]} blocks, 0.5%"
    compare(name, ours, dense, "dense dy.T @ x, gather", None, 5)
