"""sparse_delta_matmul and its input-gradient twin against float64 on every backend."""

from unittest import mock

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
    backends_and_dtypes,
    exact_product,
    implementation,
    make_pattern,
)

from speft_kernels import SparsePattern, ops
from speft_kernels.bench.checks import rounding_bound
from speft_kernels.ops.sparse_delta_matmul import CompiledDelta, delta_arguments
from speft_kernels.ops.ways import cuda_ways
from speft_kernels.plan import plan_of
from speft_kernels.quantized import QuantizedWeight
from speft_kernels.testing import uniform_pattern

OP = "sparse_delta_matmul"
# Those of the tensor cores take nothing wider than 16 bits.
BACKENDS = list(dict.fromkeys(backends(OP) + backends(OP, torch.bfloat16)))
# Around what decides the tiles of the Triton kernels, and beyond what is fused.
TOKENS = (15, 16, 17, 32, 33, 64, 65, 128, 129)
# The interpreter takes milliseconds a program.
INTERPRETED = ((0, 8, 6), (1, 5, 7), (3, 33, 17), (20, 40, 24), (140, 40, 24))
needs_triton = pytest.mark.skipif("triton" not in BACKENDS, reason="Triton cannot run here")


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


def widest(backend):
    """The dtype in which a backend is checked where its rounding does not matter."""
    wide = (torch.float64, torch.float32, torch.bfloat16)
    return next(dtype for dtype in wide if backend in backends(OP, dtype))


def assert_exact(ours, x, matrix):
    """`ours` is `x @ matrix` of their dtype up to the rounding of each product and sum, whatever
    their order.
    """
    x, matrix = x.double(), matrix.double()
    # W and D as terms of their own, and the addition of the one product to the other.
    terms = 2 * x.shape[1] + 1
    error = (ours.double() - x @ matrix).abs()
    assert (error <= rounding_bound(terms, x.abs() @ matrix.abs(), ours.dtype)).all()


def check(backend, dtype, m, pattern):
    """Both products, with a bias and over W untouched."""
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
    assert_as_exact_as_torch(dx, o["dy"] @ rounded, exact_product(o["dy"].double(), exact_weight))
    assert y.dtype == dx.dtype == dtype
    assert torch.equal(o["weight"], kept)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes(OP))
def test_error_is_at_most_twice_torchs(backend, dtype, kind):
    for m, n, k in INTERPRETED if backend == "triton" else SHAPES:
        check(backend, dtype, m, make_pattern(kind, n, k))


@pytest.mark.parametrize("m", TOKENS)
@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes(OP))
def test_any_number_of_tokens(backend, dtype, m):
    check(backend, dtype, m, make_pattern("realistic", 40, 24))


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes(OP))
def test_the_delta_alone(backend, dtype):
    """Against torch's product with D rounded to the dtype, as the contract compares."""
    for m, kind in (
        (1, "uniform"),
        (9, "row"),
        (20, "realistic"),
        (140, "realistic"),
        (5, "empty"),
    ):
        pattern = make_pattern(kind, 33, 50)
        o = operands(m, pattern, dtype)
        delta = effective(torch.zeros(33, 50, dtype=torch.float64), o["values"].double(), pattern)
        y = ops.delta_matmul(o["x"], o["values"], pattern, backend=backend)
        dx = ops.delta_matmul_grad_input(o["dy"], o["values"], pattern, backend=backend)
        rounded = delta.to(dtype)
        assert_as_exact_as_torch(y, o["x"] @ rounded.t(), exact_product(o["x"], delta.t()))
        assert_as_exact_as_torch(dx, o["dy"] @ rounded, exact_product(o["dy"], delta))


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes(OP))
def test_bits_of_values_that_the_dtype_lacks_count(backend, dtype):
    """1 + 2^-12 has 13 bits, of which bfloat16 holds 8 and float16 11; what is left of it beside -1
    is exact in both.
    """
    pattern = make_pattern("full", 3, 16)
    values = torch.tensor([1 + 2.0**-12, -1.0], dtype=accumulator(dtype)).repeat(24)
    weight = torch.zeros(3, 16, dtype=dtype)
    # The CUDA kernel rounds W + D of more than 32 tokens, Triton's of more than 128.
    for m in (2, 20 if backend == "cuda-host" else 40):
        x = torch.ones(m, 16, dtype=dtype)
        y = ops.sparse_delta_matmul(x, weight, values, pattern, backend=backend)
        assert torch.equal(y, torch.full((m, 3), 8 * 2.0**-12, dtype=dtype))


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes(OP))
def test_a_delta_far_below_the_dtypes_numbers_counts(backend, dtype):
    """Of values as small as 2^-30, at which float16 has nothing, sums of 16 tokens and fewer keep
    ten bits: they are not rounded to float16 on their way.
    """
    pattern = make_pattern("full", 3, 16)
    values = torch.full((48,), 1.5 * 2.0**-30, dtype=accumulator(dtype))
    x = torch.full((2, 16), 2.0**12, dtype=dtype)
    y = ops.delta_matmul(x, values, pattern, backend=backend)
    wanted = 16 * 1.5 * 2.0**-18
    # It is a number of bfloat16, and lies among the subnormal ones of float16.
    assert (y.double() - wanted).abs().max() <= 2.0**-10 * wanted + 2.0**-25


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block", [(4, 8), (1, 16), (16, 1)])
def test_blocks(backend, block):
    pattern = SparsePattern.from_blocks((32, 48), block, torch.tensor([7, 2, 11]))
    o = operands(19, pattern, widest(backend))
    dense = effective(o["weight"], o["values"], pattern)
    y = ops.sparse_delta_matmul(o["x"], o["weight"], o["values"], pattern, backend=backend)
    assert_exact(y, o["x"], dense.t())
    dx = ops.sparse_delta_matmul_grad_input(
        o["dy"], o["weight"], o["values"], pattern, backend=backend
    )
    assert_exact(dx, o["dy"], dense)


@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_dimensions_of_the_delta_alone(backend):
    pattern = make_pattern("uniform", 33, 17)
    o = operands(9, pattern, widest(backend))
    dense = effective(torch.zeros_like(o["weight"]), o["values"], pattern)
    y = ops.delta_matmul(o["x"].reshape(3, 3, 17), o["values"], pattern, backend=backend)
    assert y.shape == (3, 3, 33)
    assert_exact(y.reshape(9, 33), o["x"], dense.t())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 4, 5, 613, 2100])
def test_threads_do_not_change_a_bit(dtype, m):
    # With work for several threads, however few tokens.
    pattern = make_pattern("realistic", *((1024, 1030) if m <= 5 else (96, 130)))
    o = operands(m, pattern, dtype)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results += [ops.delta_matmul(o["x"], o["values"], pattern, backend="cpu") for _ in range(2)]
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_leading_dimensions(backend):
    pattern = make_pattern("uniform", 33, 17)
    for tokens in (10, 140):
        o = operands(tokens, pattern, widest(backend))
        dense = effective(o["weight"], o["values"], pattern).t()
        wide = (
            torch.randn(2, tokens // 2, 20)
            .to(o["x"].dtype)[..., 2:19]
            .copy_(o["x"].reshape(2, -1, 17))
        )
        tall = o["x"].t().contiguous().t()
        parted = torch.randn(33, 20).to(o["x"].dtype)[:, 3:].copy_(o["weight"])
        turned = o["weight"].t().contiguous().t()
        for x, weight in ((wide, o["weight"]), (tall, parted), (o["x"], turned)):
            y = ops.sparse_delta_matmul(x, weight, o["values"], pattern, backend=backend)
            assert_exact(y.reshape(tokens, 33), o["x"], dense)


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes(OP))
def test_every_bit_is_the_same_again_and_past_the_dispatcher(backend, dtype):
    pattern = make_pattern("realistic", 40, 24)
    for m in (3, 50, 130):
        o = operands(m, pattern, dtype)
        x, weight, values = o["x"], o["weight"], o["values"]
        _, indices = delta_arguments(values, pattern, x, weight, backend)
        direct = ops.sparse_delta_matmul(x, weight, values, pattern, o["bias"], backend=backend)
        called = torch.ops.speft.sparse_delta_matmul(
            x, weight, None, values, o["bias"], *indices, 40, False, backend
        )
        tracked = ops.sparse_delta_matmul(
            x.clone().requires_grad_(), weight, values, pattern, o["bias"], backend=backend
        )
        assert torch.equal(direct, called)
        assert torch.equal(direct, tracked)


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes(OP))
def test_a_bias_may_be_a_part_of_another_tensor(backend, dtype):
    pattern = make_pattern("realistic", 40, 24)
    for m in (3, 50):
        o = operands(m, pattern, dtype)
        x, weight, values, n = o["x"], o["weight"], o["values"], pattern.shape[0]
        for bias in (torch.randn(2 * n).to(dtype)[::2], torch.randn(1).to(dtype).expand(n)):
            ours, same = (
                ops.sparse_delta_matmul(x, weight, values, pattern, b, backend=backend)
                for b in (bias, bias.clone(memory_format=torch.contiguous_format))
            )
            assert torch.equal(ours, same)


def new_tensors(backend, tokens, pattern, dtype=torch.float32):
    """The sizes of the tensors that an implementation makes, in order."""

    class Sizes(LargestTensor):
        def __init__(self):
            super().__init__()
            self.sizes = []

        def __torch_dispatch__(self, *args, **kwargs):
            self.numel = 0
            result = super().__torch_dispatch__(*args, **kwargs)
            self.sizes.append(self.numel)
            return result

    o, plan = operands(tokens, pattern, dtype), plan_of(pattern)
    delta = CompiledDelta(o["values"], plan.csr, *plan.csc, plan.tiles)
    with Sizes() as seen:
        implementation(OP, backend, dtype)(
            o["x"], o["weight"], delta, o["bias"], pattern.shape[0], False
        )
    return seen.sizes


def test_no_second_weight_exists_in_the_torch_backend():
    pattern = make_pattern("realistic", 2048, 1024)
    assert max(new_tensors("torch", 8, pattern)) <= 2048 * 1024 // 2
    assert max(new_tensors("torch", 300, pattern)) == 2048 * 1024 // 2
    assert max(new_tensors("reference", 8, pattern)) == 2048 * 1024


@pytest.mark.skipif("cuda-host" not in BACKENDS, reason="cuda-host is not built")
@pytest.mark.parametrize("tokens", [8, 140])
def test_no_second_weight_exists_in_cuda(tokens):
    pattern = make_pattern("realistic", 256, 512)
    most = max(new_tensors("cuda-host", tokens, pattern, torch.bfloat16))
    assert most <= max(tokens * 256, pattern.nnz) < 256 * 512


@pytest.mark.skipif("cuda-host" not in BACKENDS, reason="cuda-host is not built")
@pytest.mark.parametrize("twin", [False, True], ids=("product", "twin"))
@pytest.mark.parametrize("bits", [16, 8, 4, 0])
def test_the_height_of_the_tiles_in_cuda_changes_no_bit(bits, twin):
    """More turns than stages; the last tile of either height, of both sides and the last turn are
    parts of one.
    """
    pattern = make_pattern("uniform", 264, 320)
    o = operands(290, pattern, torch.bfloat16)
    base = o["weight"] if bits else None
    if bits in (8, 4):
        base = QuantizedWeight.quantize(o["weight"], bits, 16)
    operand = o["dy" if twin else "x"]
    ways = cuda_ways(operand, base, o["values"], pattern, twin, "cuda-host")
    tall, short = (way() for way in ways.values())
    assert torch.equal(tall, short)


@needs_triton
def test_one_second_weight_exists_in_triton_and_of_few_tokens_none():
    pattern = make_pattern("realistic", 128, 256)
    assert max(new_tensors("triton", 32, pattern)) <= 2 * 32 * 256
    sizes = sorted(new_tensors("triton", 140, pattern))
    assert sizes[-1] == 128 * 256
    assert sizes[-2] <= 140 * 128


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
    o = operands(50, pattern, widest(backend))
    arguments = (o["x"], o["weight"], o["values"], pattern, o["bias"])
    plain = ops.sparse_delta_matmul(*arguments, backend=backend)
    with torch.autocast(
        "cpu", dtype=torch.float16 if o["x"].dtype == torch.bfloat16 else torch.bfloat16
    ):
        assert torch.equal(ops.sparse_delta_matmul(*arguments, backend=backend), plain)


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes(OP))
def test_gradients(backend, dtype):
    if backend not in backends("sampled_grad", dtype):
        pytest.skip(f"{backend} has no sampled_grad")
    pattern = make_pattern("realistic", 40, 24)
    for m in (7, 140):
        o = operands(m, pattern, dtype)
        x, values, bias = (o[name].requires_grad_() for name in ("x", "values", "bias"))
        y = ops.sparse_delta_matmul(x, o["weight"], values, pattern, bias, backend=backend)
        y.backward(o["dy"])
        exact_weight = effective(o["weight"].double(), values.detach().double(), pattern)
        rounded = effective(o["weight"], values.detach(), pattern).to(dtype)
        exact = exact_product(o["dy"], exact_weight)
        assert_as_exact_as_torch(x.grad, o["dy"] @ rounded, exact)
        wide = accumulator(dtype)
        dense = o["dy"].to(wide).t() @ x.detach().to(wide)
        exact = exact_product(o["dy"].t(), x.detach())
        assert_as_exact_as_torch(values.grad, dense, exact, pattern.indices)
        assert_as_exact_as_torch(
            bias.grad, o["dy"].sum(0), exact_product(torch.ones(m, dtype=dtype), o["dy"])
        )
        # The delta alone, and the twin's twin.
        x.grad = values.grad = None
        ops.delta_matmul_grad_input(
            x_like_dy := o["dy"].requires_grad_(), values, pattern, backend=backend
        ).backward(x.detach())
        delta = effective(torch.zeros_like(exact_weight), values.detach().double(), pattern)
        assert_as_exact_as_torch(
            x_like_dy.grad, x.detach() @ delta.to(dtype).t(), exact_product(x.detach(), delta.t())
        )
        assert_as_exact_as_torch(
            values.grad, dense, exact_product(o["dy"].t(), x.detach()), pattern.indices
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_library_contract(backend):
    pattern = make_pattern("uniform", 6, 5)
    x, dy, weight, values, bias = (
        tensor.requires_grad_() for tensor in operands(4, pattern, widest(backend)).values()
    )
    _, indices = delta_arguments(values, pattern, x, weight, backend)
    check = torch.library.opcheck
    op = torch.ops.speft.sparse_delta_matmul.default
    check(op, (x, weight, None, values, bias, *indices, 6, False, backend))
    check(op, (dy, weight, None, values, None, *indices, 5, True, backend))
    check(op, (x, None, None, values, None, *indices, 6, False, backend))
    check(op, (dy, None, None, values, None, *indices, 5, True, backend))


@pytest.mark.parametrize("backend", backends(OP, torch.float64))
def test_gradients_by_differences(backend):
    pattern = make_pattern("uniform", 6, 5)
    x, dy, weight, values, bias = (
        tensor.requires_grad_() for tensor in operands(4, pattern, torch.float64).values()
    )
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
    assert gradcheck(
        lambda *a: ops.delta_matmul_grad_input(*a, pattern, backend=backend), (dy, values)
    )
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


def test_starts_and_columns_tell_the_entries_of_each_row():
    for kind in KINDS:
        pattern = make_pattern(kind, 33, 17)
        mask = pattern.mask()
        for lines, wanted in ((plan_of(pattern).csr, mask), (plan_of(pattern).csc[0], mask.t())):
            starts = lines.starts.tolist()
            assert len(starts) == wanted.shape[0] + 1
            for row in range(wanted.shape[0]):
                found = lines.columns[starts[row] : starts[row + 1]]
                assert found.tolist() == wanted[row].nonzero().flatten().tolist()
            assert starts[-1] == pattern.nnz


@needs_triton
@pytest.mark.parametrize(
    "changes",
    [
        {"splits": 2},
        {"splits": 4, "block_e": 16},
        {"block_n": 64, "block_k": 16},
        {"block_n": 128, "block_e": 32, "splits": 3},
        {"block_m": 64},
    ],
)
def test_settings_do_not_matter(changes):
    from dataclasses import replace

    from speft_kernels.triton_kernels._fused_settings import FusedLaunch

    default = FusedLaunch.default
    with mock.patch.object(FusedLaunch, "default", lambda *a: replace(default(*a), **changes)):
        for kind in ("realistic", "row", "column"):
            check("triton", torch.bfloat16, 20, make_pattern(kind, 70, 100))
