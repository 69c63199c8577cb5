"""sampled_grad against the dense gradient and a gather: 2048 tokens, 1024 x 1024, float32."""

import pytest
import torch

from speft_kernels import ops
from speft_kernels.testing import realistic_pattern, uniform_pattern

TOKENS, SIZE = 2048, 1024


def setup(mask, density):
    make = uniform_pattern if mask == "uniform" else realistic_pattern
    pattern = make((SIZE, SIZE), density)
    dy, x = torch.randn(TOKENS, SIZE), torch.randn(TOKENS, SIZE)
    flat = pattern.indices.long()

    def ours():
        return ops.sampled_grad(dy, x, pattern)

    def dense():
        return (dy.t() @ x).view(-1)[flat]

    # Sums of 2048 products of unit normals, in float32, in two orders.
    torch.testing.assert_close(ours(), dense(), rtol=0, atol=2e-3)
    return ours, dense


@pytest.mark.parametrize(
    ("mask", "density", "goal"),
    [
        ("realistic", 0.005, 8),
        ("realistic", 0.001, 20),
        ("uniform", 0.005, 3),
        ("uniform", 0.001, 6),
    ],
)
def test_sampled_grad(compare, mask, density, goal):
    ours, dense = setup(mask, density)
    compare(f"sampled_grad, {mask} {density:.1%}", ours, dense, "dense dy.T @ x, gather", goal)
