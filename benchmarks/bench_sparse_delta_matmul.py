"""sparse_delta_matmul against a copy of W with the delta added, then a GEMM, as others do it."""

import pytest
import torch

from speft_kernels import ops
from speft_kernels.testing import realistic_pattern

SIZE = 1024


def setup(tokens, density):
    pattern = realistic_pattern((SIZE, SIZE), density)
    x, weight = torch.randn(tokens, SIZE), torch.randn(SIZE, SIZE)
    values, flat = torch.randn(pattern.nnz), pattern.indices.long()

    def ours():
        return ops.sparse_delta_matmul(x, weight, values, pattern)

    def copied():
        effective = weight.clone()
        effective.view(-1).index_add_(0, flat, values)
        return x @ effective.t()

    torch.testing.assert_close(ours(), copied(), rtol=0, atol=2e-3)
    return ours, copied, lambda: x @ weight.t()


@pytest.mark.parametrize("tokens", [1, 16, 2048])
def test_sparse_delta_matmul(compare, tokens):
    ours, copied, _ = setup(tokens, 0.005)
    compare(f"sparse_delta_matmul, {tokens} tokens, realistic 0.5%", ours, copied, "copy of W + D")


@pytest.mark.parametrize("tokens", [16, 2048])
def test_against_the_frozen_layer(compare, tokens):
    ours, _, frozen = setup(tokens, 0.005)
    compare(f"sparse_delta_matmul, {tokens} tokens, realistic 0.5%", ours, frozen, "x @ W alone")
