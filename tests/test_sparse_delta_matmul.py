"""sparse_delta_matmul and its input-gradient twin against float64 on every backend."""

import pytest
import torch
from kernels import (
    DTYPES,
    KINDS,
    SHAPES,
    LargestTensor,
    accumulator,
    assert_as_exact_as_torch,
    backends,
    exact_product,
    implementation,
    make_pattern,
)

from speft_kernels import SparsePattern, ops
from speft_kernels.plan import plan_of
from speft_kernels.testing import uniform_pattern

BACKENDS = backends("sparse_delta_matmul")


def operands(m, pattern, dtype):
    n, k = pattern.shape
    return {
        "x": torch.randn(m, k).to(dtype),
        "dy": torch.randn(m, n).to(dtype),
        "weight": torch.randn(n, k).to(dtype),
        "values": torch.randn(pattern.values_shape, dtype=accumulator(dtype)),
        "bias": torch.randn(n).to(dtype),
    }


def effective(weight, values, pattern):
    """W + D in the accumulator's dtype."""
    dense = weight.to(values.dtype, copy=True)
    dense.view(-1)[pattern.entry_indices.long()] += values.reshape(-1)
    return dense


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_error_is_at_most_twice_torchs(backend, dtype, kind):
    for m, n, k in SHAPES:
        pattern = make_pattern(kind, n, k)
        o = operands(m, pattern, dtype)
        kept = o["weight"].clone()
        exact_weight = effective(o["weight"].double(), o["values"].double(), pattern)
        rounded = effective(o["weight"], o["values"], pattern).to(dtype)

        y = ops.sparse_delta_matmul(
            o["x"], o["weight"], o["values"], pattern, o["bias"], backend=backend
        )
        exact = exact_product(o["x"].double(), exact_weight.t()) + o["bias"].double().numpy()
        assert_as_exact_as_torch(y, torch.nn.functional.linear(o["x"], rounded, o["bias"]), exact)
        dx = ops.sparse_delta_matmul_grad_input(
            o["dy"], o["weight"], o["values"], pattern, backend=backend
        )
        assert_as_exact_as_torch(
            dx, o["dy"] @ rounded, exact_product(o["dy"].double(), exact_weight)
        )
        assert y.dtype == dx.dtype == dtype
        assert torch.equal(o["weight"], kept)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block", [(4, 8), (1, 16), (16, 1)])
def test_blocks(backend, block):
    pattern = SparsePattern.from_blocks((32, 48), block, torch.tensor([7, 2, 11]))
    o = operands(19, pattern, torch.float64)
    dense = effective(o["weight"], o["values"], pattern)
    y = ops.sparse_delta_matmul(o["x"], o["weight"], o["values"], pattern, backend=backend)
    torch.testing.assert_close(y, o["x"] @ dense.t(), rtol=0, atol=1e-12)
    dx = ops.sparse_delta_matmul_grad_input(
        o["dy"], o["weight"], o["values"], pattern, backend=backend
    )
    torch.testing.assert_close(dx, o["dy"] @ dense, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_delta_alone(backend):
    pattern = make_pattern("uniform", 33, 17)
    o = operands(9, pattern, torch.float64)
    dense = effective(torch.zeros_like(o["weight"]), o["values"], pattern)
    y = ops.delta_matmul(o["x"].reshape(3, 3, 17), o["values"], pattern, backend=backend)
    torch.testing.assert_close(y.reshape(9, 33), o["x"] @ dense.t(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 4, 5, 613, 2100])
def test_threads_do_not_change_a_bit(dtype, m):
    pattern = make_pattern("realistic", 96, 130)
    o = operands(m, pattern, dtype)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results += [ops.delta_matmul(o["x"], o["values"], pattern, backend="cpu") for _ in range(2)]
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_leading_dimensions(backend):
    pattern = make_pattern("uniform", 33, 17)
    o = operands(10, pattern, torch.float32)
    plain = ops.sparse_delta_matmul(o["x"], o["weight"], o["values"], pattern, backend=backend)
    x = torch.randn(2, 5, 20)[..., 2:19].copy_(o["x"].reshape(2, 5, 17))
    y = ops.sparse_delta_matmul(x, o["weight"], o["values"], pattern, backend=backend)
    # Another leading dimension may make the vendor's GEMM sum in another order.
    torch.testing.assert_close(y.reshape(10, 33), plain, rtol=1e-5, atol=1e-5)


def test_no_second_weight_exists_in_the_torch_backend():
    pattern = make_pattern("realistic", 2048, 1024)
    o = operands(8, pattern, torch.float32)
    largest = {}
    for backend in ("torch", "reference"):
        y = torch.zeros(8, 2048)
        with LargestTensor() as seen:
            implementation("sparse_delta_matmul", backend)(
                y, o["x"], o["values"], plan_of(pattern).csr
            )
        largest[backend] = seen.numel
    assert largest["torch"] <= max(2048 * 1024 // 8, pattern.nnz)
    assert largest["reference"] == 2048 * 1024


def test_no_second_weight_exists_in_the_compiled_kernel(memory_high_water):
    pattern = uniform_pattern((8192, 4096), 0.001)
    o = operands(64, pattern, torch.float32)

    def run():
        ops.sparse_delta_matmul(o["x"], o["weight"], o["values"], pattern, backend="cpu")

    # Panels of 16 tokens of all lines for each of up to 8 threads: 6 MB; y is 2 MB, W 128 MiB.
    torch.set_num_threads(min(8, torch.get_num_threads()))
    assert memory_high_water(run) < 24 << 20


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing_inside(backend):
    pattern = make_pattern("uniform", 33, 17)
    o = operands(50, pattern, torch.float32)
    arguments = (o["x"], o["weight"], o["values"], pattern, o["bias"])
    plain = ops.sparse_delta_matmul(*arguments, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ops.sparse_delta_matmul(*arguments, backend=backend), plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_library_contract_and_gradients(backend):
    pattern = make_pattern("uniform", 6, 5)
    plan = plan_of(pattern)
    by_column, order = plan.csc
    csr, csc = list(plan.csr), [*by_column, order]
    x, dy, weight, values, bias = (
        tensor.requires_grad_() for tensor in operands(4, pattern, torch.float64).values()
    )
    check = torch.library.opcheck
    op = torch.ops.speft.sparse_delta_matmul.default
    check(op, (x, weight, values, bias, csr, csc, False, backend))
    check(op, (dy, weight, values, None, csr, csc, True, backend))
    check(torch.ops.speft.delta_matmul.default, (x, values, csr, csc, 6, backend))

    gradcheck = torch.autograd.gradcheck
    assert gradcheck(
        lambda *a: ops.sparse_delta_matmul(*a[:3], pattern, a[3], backend=backend),
        (x, weight, values, bias),
    )
    assert gradcheck(
        lambda *a: ops.sparse_delta_matmul_grad_input(*a, pattern, backend=backend),
        (dy, weight, values),
    )
    assert gradcheck(lambda *a: ops.delta_matmul(*a, pattern, backend=backend), (x, values))
    blocks = SparsePattern.from_blocks((6, 6), (2, 3), torch.tensor([0, 5, 3]))
    block_values = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    square = torch.randn(6, 6, dtype=torch.float64)
    assert gradcheck(
        lambda x, v: ops.sparse_delta_matmul(x, square, v, blocks, backend=backend),
        (torch.randn(4, 6, dtype=torch.float64, requires_grad=True), block_values),
    )
    # Twice, because the backward passes are made of differentiable operations.
    assert torch.autograd.gradgradcheck(
        lambda x, v: ops.delta_matmul(x, v, pattern, backend=backend), (x, values)
    )


def test_bad_arguments_name_the_fact():
    pattern = make_pattern("uniform", 6, 5)
    o = operands(4, pattern, torch.float32)
    x, weight, values = o["x"], o["weight"], o["values"]
    with pytest.raises(ValueError, match=r"weight has shape \(5, 6\), the pattern is for \(6, 5\)"):
        ops.sparse_delta_matmul(x, weight.t(), values, pattern)
    with pytest.raises(ValueError, match=r"values must have shape \(3,\), got \(2,\)"):
        ops.sparse_delta_matmul(x, weight, values[:-1], pattern)
    with pytest.raises(TypeError, match=r"values must be torch.float32 beside torch.float32 x"):
        ops.sparse_delta_matmul(x, weight, values.double(), pattern)
    with pytest.raises(TypeError, match="x and weight must have one dtype"):
        ops.sparse_delta_matmul(x.double(), weight, values, pattern)
    with pytest.raises(ValueError, match=r"bias must have shape \(6,\), got \(5,\)"):
        ops.sparse_delta_matmul(x, weight, values, pattern, torch.randn(5))
