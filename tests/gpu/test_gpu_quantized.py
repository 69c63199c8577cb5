"""Products with a weight of eight or four bits and a sparse delta, on a GPU against float64."""

import functools

import pytest
import torch
from kernels import make_pattern
from rig import DEVICE, DRY, backends_and_dtypes, randn
from torch.nn import functional as F

from speft_kernels import QuantizedWeight, ops

SHAPE = (24, 128) if DRY else (1000, 4096)
TOKENS = (1, 16) if DRY else (1, 16, 64, 200)  # beyond 128 W + D is written out
FORMS = [(8, None), (8, 64), (4, None), (4, 32 if DRY else 128)]


@functools.cache
def pattern_of(shape):
    return make_pattern("realistic", *shape).to(DEVICE)


def as_exact_as_torch(contract, backend, packed, dtype, tokens, twin):
    """Against torch's product with W + D written out in the dtype."""
    n, k = packed.shape
    pattern = pattern_of((n, k))
    values, bias = randn(pattern.nnz), randn(n, dtype=dtype)
    exact = packed.dequantize(torch.float64)
    exact.view(-1)[pattern.entry_indices.long()] += values.double()
    x = randn(tokens, n if twin else k, dtype=dtype)
    if twin:
        ours = ops.sparse_delta_matmul_grad_input(x, packed, values, pattern, backend=backend)
        theirs, wanted = x @ exact.to(dtype), x.double() @ exact
    else:
        ours = ops.sparse_delta_matmul(x, packed, values, pattern, bias, backend=backend)
        theirs = F.linear(x, exact.to(dtype), bias)
        wanted = x.double() @ exact.t() + bias.double()
    assert ours.dtype == dtype
    facts = {"terms": x.shape[1], "operands": dtype}
    contract(f"sparse_delta_matmul, int{packed.bits}", backend, ours, theirs, wanted, **facts)


@pytest.mark.parametrize("twin", [False, True], ids=["forward", "twin"])
@pytest.mark.parametrize(("bits", "group"), FORMS)
@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes("sparse_delta_matmul"))
def test_products(contract, backend, dtype, bits, group, twin):
    packed = QuantizedWeight.quantize(randn(*SHAPE, dtype=dtype), bits, group)
    for tokens in TOKENS:
        as_exact_as_torch(contract, backend, packed, dtype, tokens, twin)


@pytest.mark.parametrize("twin", [False, True], ids=["forward", "twin"])
@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes("sparse_delta_matmul"))
def test_lines_of_no_whole_vectors(contract, backend, dtype, twin):
    for bits, shape in ((8, (33, 37)), (4, (33, 4 * 37))):
        packed = QuantizedWeight.quantize(randn(*shape, dtype=dtype), bits)
        for tokens in (3, 150):
            as_exact_as_torch(contract, backend, packed, dtype, tokens, twin)
