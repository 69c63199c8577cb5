"""block_grad against float64 on every backend, for square, flat and tall blocks."""

import pytest
import torch
from kernels import (
    DTYPES,
    LargestTensor,
    accumulator,
    assert_as_exact_as_torch,
    backends,
    exact_product,
    implementation,
)

from speft_kernels import SparsePattern, ops

BACKENDS = backends("block_grad")
BLOCKS = ((1, 1), (4, 4), (16, 16), (32, 32), (1, 64), (64, 1), (8, 24), (24, 8), (5, 3))


def make_pattern(n, k, block, share=0.2):
    grid = (n // block[0]) * (k // block[1])
    chosen = torch.randperm(grid)[: max(1, round(share * grid))]
    return SparsePattern.from_blocks((n, k), block, chosen)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_error_is_at_most_twice_torchs(backend, dtype, block):
    n, k = 128 - 128 % block[0], 192 - 192 % block[1]
    pattern = make_pattern(n, k, block)
    for m in (0, 1, 19, 700, 3000):
        dy, x = torch.randn(m, n).to(dtype), torch.randn(m, k).to(dtype)
        ours = ops.block_grad(dy, x, pattern, backend=backend)
        assert ours.dtype == accumulator(dtype)
        wide = accumulator(dtype)
        theirs = dy.to(wide).t() @ x.to(wide)
        assert_as_exact_as_torch(ours, theirs, exact_product(dy.t(), x), pattern.entry_indices)


@pytest.mark.parametrize("backend", BACKENDS)
def test_micro_batches_accumulate_into_one_buffer(backend):
    pattern = make_pattern(64, 48, (16, 8))
    dy, x = torch.randn(30, 64), torch.randn(30, 48)
    whole = ops.block_grad(dy, x, pattern, backend=backend)
    out = torch.full_like(whole, 5.0)
    for i, part in enumerate((slice(0, 7), slice(7, 30))):
        ops.block_grad(dy[part], x[part], pattern, out=out, accumulate=i > 0, backend=backend)
    # Sums of 30 products of unit normals: each is off by a few of float32's 1.2e-7.
    torch.testing.assert_close(out, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_empty_patterns(backend):
    pattern = make_pattern(64, 48, (16, 8))
    dy, x = torch.randn(2, 15, 64), torch.randn(2, 15, 48)
    plain = ops.block_grad(dy, x, pattern, backend=backend)
    strided = ops.block_grad(
        dy.mT.contiguous().mT, torch.randn(2, 15, 50)[..., 1:49].copy_(x), pattern, backend=backend
    )
    assert torch.equal(strided, plain)
    empty = SparsePattern.from_blocks((64, 48), (16, 8), torch.empty(0, dtype=torch.int64))
    assert ops.block_grad(dy, x, empty, backend=backend).shape == (0, 16, 8)


@pytest.mark.parametrize("m", [700, 3000])
@pytest.mark.parametrize("block", [(16, 16), (64, 1), (1, 64)])
def test_threads_do_not_change_a_bit(block, m):
    pattern = make_pattern(128, 192, block)
    dy, x = torch.randn(m, 128), torch.randn(m, 192)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results += [ops.block_grad(dy, x, pattern, backend="cpu") for _ in range(2)]
    assert all(torch.equal(result, results[0]) for result in results)


def test_no_dense_gradient_exists_in_the_torch_backend():
    pattern = make_pattern(2048, 1024, (16, 16), share=0.01)
    dy, x = torch.randn(8, 2048), torch.randn(8, 1024)
    out = torch.empty(pattern.values_shape)
    largest = {}
    for backend in ("torch", "reference"):
        run = implementation("block_grad", backend)
        with LargestTensor() as seen:
            run(dy, x, pattern.block_rows, pattern.block_cols, out, False)
        largest[backend] = seen.numel
    assert largest["torch"] <= 2048 * 1024 // 8
    assert largest["reference"] == 2048 * 1024


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing_inside(backend):
    pattern = make_pattern(64, 48, (16, 8))
    dy, x = torch.randn(30, 64), torch.randn(30, 48)
    plain = ops.block_grad(dy, x, pattern, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ops.block_grad(dy, x, pattern, backend=backend), plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_library_contract_and_gradients(backend):
    pattern = make_pattern(6, 4, (3, 2))
    where = (pattern.block_rows, pattern.block_cols, 3, 2)
    dy = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(torch.ops.speft.block_grad.default, (dy, x, *where, backend))
    out = torch.zeros(pattern.num_blocks, 3, 2, dtype=torch.float64)
    torch.library.opcheck(
        torch.ops.speft.block_grad_.default,
        (dy.detach(), x.detach(), *where, out, True, backend),
    )
    assert torch.autograd.gradcheck(
        lambda dy, x: ops.block_grad(dy, x, pattern, backend=backend), (dy, x)
    )


def test_bad_arguments_name_the_fact():
    pattern = make_pattern(6, 4, (3, 2))
    dy, x = torch.randn(5, 6), torch.randn(5, 4)
    with pytest.raises(ValueError, match=r"x must have shape \[\.\.\., 4\], got \(5, 6\)"):
        ops.block_grad(dy, dy, pattern)
    with pytest.raises(ValueError, match="dy has 5 tokens and x has 4"):
        ops.block_grad(dy, x[:4], pattern)
    with pytest.raises(ValueError, match="out must be a contiguous"):
        ops.block_grad(dy, x, pattern, out=torch.zeros(3, 2))
    with pytest.raises(ValueError, match="pass out="):
        ops.block_grad(dy, x, pattern, accumulate=True)
