"""block_grad against float64 on every backend, for square, flat and tall blocks."""

import pytest
import torch
from kernels import (
    TF32_SETTINGS,
    LargestTensor,
    accumulator,
    assert_as_exact_as_torch,
    backends,
    backends_and_dtypes,
    exact_product,
    implementation,
    tf32,
    torchs_worse,
)

from speft_kernels import SparsePattern, ops
from speft_kernels.plan import SparsityPlan

BACKENDS = backends("block_grad")
BLOCKS = ((1, 1), (2, 2), (1, 8), (4, 4), (5, 3), (16, 16), (32, 32), (8, 24), (24, 8))
# A whole weight, and a part, of which the Triton kernels take tiles, the last ones padded.
BLOCKS += ((1, 64), (64, 1), (128, 192), (128, 96))

triton_only = pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not here")


def make_pattern(n, k, block, share=0.2):
    grid = (n // block[0]) * (k // block[1])
    chosen = torch.randperm(grid)[: max(1, round(share * grid))]
    return SparsePattern.from_blocks((n, k), block, chosen)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes("block_grad"))
def test_error_is_at_most_twice_torchs(backend, dtype, block):
    n, k = 128 - 128 % block[0], 192 - 192 % block[1]
    # Triton's interpreter takes a millisecond for 16 tokens of 64 entries, and a thread of the CUDA
    # kernels on a CPU a microsecond for each step that it waits in.
    few = backend in ("triton", "cuda-host")
    pattern = make_pattern(n, k, block, share=0.02 if few else 0.2)
    if backend == "cuda-host" and pattern.num_blocks > 40:
        pattern = make_pattern(n, k, block, share=40 / (n // block[0] * (k // block[1])))
    tokens = {"triton": (0, 1, 19, 1100), "cuda-host": (0, 1, 19, 64, 1100)}
    for m in tokens.get(backend, (0, 1, 19, 700, 3000)):
        dy, x = torch.randn(m, n).to(dtype), torch.randn(m, k).to(dtype)
        ours = ops.block_grad(dy, x, pattern, backend=backend)
        assert ours.dtype == accumulator(dtype)
        exact = exact_product(dy.t(), x)
        assert_as_exact_as_torch(ours, torchs_worse(dy, x, exact), exact, pattern.entry_indices)


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


@pytest.mark.parametrize("block", [(16, 16), (1, 64), (3, 2), (8, 8), (1, 1)])
@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes("block_grad"))
def test_kept_columns_are_read_as_whole_ones(backend, dtype, block):
    n, k = 4 * block[0], 5 * block[1]
    pattern = SparsePattern.from_blocks((n, k), block, torch.tensor([1, 4, 6, 13, 16]))
    plan = SparsityPlan.build(pattern)
    assert plan.kept_width == 3 * block[1]  # groups 1, 3 and 4
    dy, x = torch.randn(2, 15, n).to(dtype), torch.randn(2, 15, k).to(dtype)
    kept = ops.keep_columns(x, plan)
    assert kept.shape == ((30, plan.kept_width) if pattern.is_block else (1, 3, 32))
    packed = ops.block_grad(dy, kept, pattern, plan=plan, packed=True, backend=backend)
    whole = ops.block_grad(dy, x, pattern, backend=backend)
    if backend == "reference":
        # One of the vendor's products each, whose sums may be split by how x lies in memory: 30
        # products of unit normals, each off by a few roundings of at most 16.
        torch.testing.assert_close(packed, whole, rtol=0, atol=64 * torch.finfo(packed.dtype).eps)
    else:
        assert torch.equal(packed, whole)


@pytest.mark.parametrize("block", [(16, 16), (1, 64), (64, 1), (5, 3), (24, 8), (40, 40)])
@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes("block_grad"))
def test_nothing_beside_the_blocks_and_the_tokens_is_used(backend, dtype, block):
    """Everything else is NaN, in the rows and columns of larger matrices too."""
    n, k, m = 3 * block[0], 4 * block[1], 37
    pattern = SparsePattern.from_blocks((n, k), block, torch.tensor([5, 6]))  # in row 1
    dy, x = torch.randn(m, n).to(dtype), torch.randn(m, k).to(dtype)
    plain = ops.block_grad(dy, x, pattern, backend=backend)
    surrounded = []
    for tensor, first, last in ((dy, 1, 2), (x, 1, 3)):
        side = tensor.shape[1] // (3 if tensor is dy else 4)
        large = torch.full((m + 100, tensor.shape[1] + 8), torch.nan, dtype=dtype)
        used = slice(first * side, last * side)
        large[:m, used] = tensor[:, used]
        surrounded.append(large[:m, : tensor.shape[1]])
    assert torch.equal(ops.block_grad(*surrounded, pattern, backend=backend), plain)


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
    where = (pattern.block_rows, pattern.block_cols)
    dy = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    if backend == "triton":  # which takes no float64, and so has no check of gradients
        dy, x = (tensor.detach().float().requires_grad_() for tensor in (dy, x))
    torch.library.opcheck(torch.ops.speft.block_grad.default, (dy, x, *where, 3, 2, backend))
    out = torch.zeros(pattern.num_blocks, 3, 2, dtype=dy.dtype)
    torch.library.opcheck(
        torch.ops.speft.block_grad_.default,
        (dy.detach(), x.detach(), *where, out, True, backend),
    )
    if backend != "triton":
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


@pytest.fixture
def triton_kernels():
    from speft_kernels.triton_kernels import block_grad

    return block_grad


def launches(dy, x, pattern):
    """What would be launched on a GPU."""
    from speft_kernels.triton_kernels.launch import MACHINES, recording

    with recording(MACHINES[90]) as recorded:
        ops.block_grad(dy, x, pattern, backend="triton")
    return recorded


@triton_only
@pytest.mark.parametrize("block", [(16, 16), (5, 3), (1, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_split_where_blocks_are_few(triton_kernels, monkeypatch, dtype, block):
    monkeypatch.setattr(triton_kernels, "token_splits", lambda *_: 3)
    pattern = make_pattern(2 * block[0], 3 * block[1], block, share=0.2)
    # Nothing for the others, three splits, and three of which the last is a part of a step.
    for m, stages in ((9, 1), (300, 2), (2 * 128 + 3, 2)):
        dy = torch.randn(m, pattern.shape[0]).to(dtype)
        x = torch.randn(m, pattern.shape[1]).to(dtype)
        assert len(launches(dy, x, pattern)) == stages
        ours = ops.block_grad(dy, x, pattern, backend="triton")
        assert torch.equal(ours, ops.block_grad(dy, x, pattern, backend="triton"))
        theirs = dy.float().t() @ x.float()
        exact = exact_product(dy.t(), x)
        assert_as_exact_as_torch(ours, theirs, exact, pattern.entry_indices)
        out = torch.full_like(ours, 5.0)
        ops.block_grad(dy, x, pattern, out=out, accumulate=True, backend="triton")
        # Of |5 + sum| < 64, rounded once more.
        torch.testing.assert_close(out, ours + 5, rtol=0, atol=64 * torch.finfo().eps)


@triton_only
@pytest.mark.parametrize("block", [(16, 16), (5, 3), (8, 24), (1, 40), (40, 1), (3, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_both_kernels_serve_every_block(triton_kernels, monkeypatch, dtype, block):
    pattern = make_pattern(4 * block[0], 4 * block[1], block)
    dy, x = torch.randn(150, pattern.shape[0]), torch.randn(150, pattern.shape[1])
    dy, x = dy.to(dtype), x.to(dtype)
    for by_dot in (True, False):
        monkeypatch.setattr(triton_kernels, "uses_dot", lambda *_, by_dot=by_dot: by_dot)
        (launched,) = launches(dy, x, pattern)
        assert launched.kernel is (
            triton_kernels._tile_products if by_dot else triton_kernels._entry_products
        )
        ours = ops.block_grad(dy, x, pattern, backend="triton")
        theirs = dy.float().t() @ x.float()
        assert_as_exact_as_torch(ours, theirs, exact_product(dy.t(), x), pattern.entry_indices)


@triton_only
def test_every_default_is_a_candidate(triton_kernels):
    from speft_kernels.triton_kernels.launch import MACHINES

    sides = (1, 2, 5, 16, 24, 64, 100, 256, 1024, 4096)
    for block in [(h, w) for h in sides for w in sides]:
        for itemsize, tensor_cores in ((2, True), (4, True), (4, False)):
            chosen = triton_kernels.TileLaunch.default(block, itemsize, tensor_cores)
            for machine in MACHINES.values():
                tried = set(triton_kernels.TileLaunch.candidates(block, itemsize, machine))
                assert chosen in tried, (block, itemsize, tensor_cores)
    assert triton_kernels.EntryLaunch.default() in triton_kernels.EntryLaunch.candidates()


@triton_only
def test_sums_of_splits_and_grids_are_bounded():
    def launched(m, blocks, block):
        n, k = 4096, 4096
        pattern = make_pattern(n, k, block, share=blocks * block[0] * block[1] / (n * k))
        return launches(torch.empty(m, n).bfloat16(), torch.empty(m, k).bfloat16(), pattern)

    (products,) = launched(8192, 2000, (16, 16))
    assert products.grid == (2000, 1)
    products, sums = launched(1 << 16, 1, (16, 16))
    assert products.grid == (1, 64)
    assert sums.arguments["sums_ptr"].shape == (64, 256)
    products, sums = launched(1 << 14, 1, (256, 1024))
    assert products.grid[0] == 2 * 8
    assert 1 < products.grid[1] <= 8  # of 2**18 sums in 8 MB
    (products,) = launched(1 << 14, 1, (1024, 2048))
    assert products.grid == (8 * 16, 1)


@triton_only
@pytest.mark.parametrize("setting", TF32_SETTINGS)
def test_float32_is_multiplied_on_tensor_cores_where_the_user_allows_it(setting):
    pattern = make_pattern(64, 64, (4, 16))
    dy, x = torch.randn(40, 64), torch.randn(40, 64)
    (launched,) = launches(dy, x, pattern)
    assert launched.kernel.__name__ == "_entry_products"
    with tf32(setting):
        (launched,) = launches(dy, x, pattern)
    assert launched.kernel.__name__ == "_tile_products"
    assert launched.arguments["PRECISION"] == "tf32"
