"""write_delta against the same write by torch: 4096 x 4096 bf16, realistic 0.5 %."""

import torch

from speft_kernels import ops
from speft_kernels.testing import realistic_pattern


def setup():
    pattern = realistic_pattern((4096, 4096), 0.005)
    weight = torch.randn(4096, 4096).bfloat16()
    flat = pattern.indices.long()
    base, values = weight.view(-1)[flat], torch.randn(pattern.nnz)

    def ours():
        ops.write_delta(weight, pattern, base, values)

    def by_torch():
        weight.view(-1).index_copy_(0, flat, (base.float() + values).bfloat16())

    by_torch()
    expected = weight.clone()
    ours()
    assert torch.equal(weight, expected)
    return ours, by_torch


def test_write_delta(compare):
    ours, by_torch = setup()
    compare("write_delta, 84 k entries of 4096 x 4096 bf16", ours, by_torch, "index_copy_")
