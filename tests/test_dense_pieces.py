"""sparse_delta_matmul by torch's products: of few tokens and of many, pieces make one product."""

import sys

import pytest
import torch
from kernels import DTYPES, accumulator, assert_as_exact_as_torch, exact_product, make_pattern

from speft_kernels import ops
from speft_kernels.compact import ROW_STEP
from speft_kernels.ops import dense_pieces
from speft_kernels.quantized import QuantizedWeight

# Of both products there are three pieces, the last of which is a part of one.
N, K = 2 * ROW_STEP + 22, 2 * ROW_STEP + 36


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("few", [True, False], ids=["D beside", "W + D"])
@pytest.mark.parametrize("base", ["plain", "rows apart", 8, 4, None])
def test_pieces_of_either_way_are_as_exact_as_torch(monkeypatch, base, few, dtype):
    monkeypatch.setattr(dense_pieces, "PIECE_BYTES", 1)
    monkeypatch.setattr(dense_pieces, "DENSE_BYTES", 1)
    # As an attribute of the package, this name is the function.
    module = sys.modules["speft_kernels.ops.sparse_delta_matmul"]
    monkeypatch.setattr(module, "TORCH_FEW_TOKENS", 1000 if few else 0)
    taken = []
    real = dense_pieces._outputs_at_a_time
    monkeypatch.setattr(
        dense_pieces, "_outputs_at_a_time", lambda *of: taken.append(real(*of)) or taken[-1]
    )
    pattern = make_pattern("realistic", N, K)
    x, dy, bias = (torch.randn(*shape).to(dtype) for shape in ((41, K), (41, N), (N,)))
    values = torch.randn(pattern.nnz, dtype=accumulator(dtype))
    weight = torch.randn(N, K).to(dtype)
    if base in (8, 4):
        weight = QuantizedWeight.quantize(weight, base)
        exact = weight.dequantize(torch.float64)
    elif base is None:
        weight, bias, exact = None, torch.zeros_like(bias), torch.zeros(N, K, dtype=torch.float64)
    else:
        if base == "rows apart":
            weight = weight.repeat(1, 2)[:, :K]
        exact = weight.to(torch.float64, copy=True, memory_format=torch.contiguous_format)
    exact.view(-1)[pattern.indices.long()] += values.double()
    rounded = exact.to(dtype)
    if base is None:
        y = ops.delta_matmul(x, values, pattern, backend="torch")
        dx = ops.delta_matmul_grad_input(dy, values, pattern, backend="torch")
    else:
        y = ops.sparse_delta_matmul(x, weight, values, pattern, bias, backend="torch")
        dx = ops.sparse_delta_matmul_grad_input(dy, weight, values, pattern, backend="torch")
    wanted = exact_product(x, exact.t()) + bias.double().numpy()
    assert_as_exact_as_torch(y, torch.nn.functional.linear(x, rounded, bias), wanted)
    assert_as_exact_as_torch(dx, dy @ rounded, exact_product(dy, exact))
    assert taken == [ROW_STEP] * 2
