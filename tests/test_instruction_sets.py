"""The CPU kernels on every instruction set this processor has, not on the widest alone."""

import pytest
import torch
from kernels import DTYPES, accumulator, assert_as_exact_as_torch, exact_product, torchs_worse
from plans import mixed_pattern, plan_with

from speft_kernels import SparsePattern, SparsityPlan, _native, ops

pytestmark = pytest.mark.skipif(_native.missing() is not None, reason="no compiled kernels")
SETS = _native.kernels().instruction_sets() if _native.missing() is None else []


@pytest.fixture(params=SETS)
def instruction_set(request):
    kernels = _native.kernels()
    usual = kernels.instruction_set()
    kernels.use_instruction_set(request.param)
    yield request.param
    kernels.use_instruction_set(usual)


def operands(dtype, m=613, n=96, k=130):
    torch.manual_seed(0)
    return torch.randn(m, n).to(dtype), torch.randn(m, k).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part", ["gather", "tiles", "mixed"])
def test_sampled_grad(instruction_set, part, dtype):
    dy, x = operands(dtype)
    plan = plan_with(part, mixed_pattern(96, 130))
    exact = exact_product(dy.t(), x)
    kept = ops.keep_columns(x, plan, backend="cpu")
    for given, packed in ((x, False), (kept, True)):
        ours = ops.sampled_grad(dy, given, plan.pattern, plan=plan, packed=packed, backend="cpu")
        torchs = torchs_worse(dy, x, exact)
        assert_as_exact_as_torch(ours, torchs, exact, plan.pattern.entry_indices)


@pytest.mark.parametrize("dtype", DTYPES)
def test_keep_columns(instruction_set, dtype):
    _, x = operands(dtype)
    # Alone, in pairs, in groups that fill a square of each width, and beside the last column.
    for columns in ([0], [1, 2, 64], [*range(3, 40), 77, *range(90, 130)], list(range(130))):
        mask = torch.zeros(96, 130, dtype=torch.bool)
        mask[0, columns] = True
        plan = SparsityPlan.build(SparsePattern.from_mask(mask))
        ours = ops.keep_columns(x, plan, backend="cpu")
        assert torch.equal(ours, ops.keep_columns(x, plan, backend="reference"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [(1, 1), (4, 4), (2, 7), (16, 16), (13, 5), (24, 8)])
def test_block_grad(instruction_set, block, dtype):
    n, k = 96 - 96 % block[0], 130 - 130 % block[1]
    dy, x = operands(dtype, n=n, k=k)
    chosen = torch.arange(0, (n // block[0]) * (k // block[1]), 3)
    pattern = SparsePattern.from_blocks((n, k), block, chosen)
    exact = exact_product(dy.t(), x)
    ours = ops.block_grad(dy, x, pattern, backend="cpu")
    assert_as_exact_as_torch(ours, torchs_worse(dy, x, exact), exact, pattern.entry_indices)


@pytest.mark.parametrize("dtype", DTYPES)
def test_delta_matmul(instruction_set, dtype):
    _, x = operands(dtype)
    pattern = mixed_pattern(96, 130)
    values = torch.randn(pattern.nnz, dtype=accumulator(dtype))
    delta = torch.zeros(96, 130, dtype=accumulator(dtype))
    delta.view(-1)[pattern.entry_indices.long()] = values
    exact = exact_product(x.to(accumulator(dtype)), delta.t())
    ours = ops.delta_matmul(x, values, pattern, backend="cpu")
    theirs = (x.to(accumulator(dtype)) @ delta.t()).to(dtype)
    assert_as_exact_as_torch(ours, theirs, exact)


@pytest.mark.parametrize("poison", [-0.0, torch.nan])
@pytest.mark.parametrize("dtype", DTYPES)
def test_delta_matmul_changes_its_own_columns_alone(instruction_set, dtype, poison):
    """Whole groups of columns of y are read and written, but what is not used keeps its bits."""
    x = torch.randn(43, 130).to(dtype)
    mask = torch.zeros(96, 130, dtype=torch.bool)
    mask[[*range(3, 40, 2), 50, 66, 67, 68, 93, 94, 95]] = torch.rand(26, 130) < 0.2
    pattern = SparsePattern.from_mask(mask)
    values = torch.randn(pattern.nnz, dtype=accumulator(dtype))
    csr = SparsityPlan.build(pattern).csr
    memory = -torch.full((45, 101), poison).abs().to(dtype)
    y, wanted = memory[1:44, 2:98], memory.clone()
    used = csr.rows.long()
    y[:, used] = 0
    wanted[1:44, 2 + used] = ops.delta_matmul(x, values, pattern, backend="cpu")[:, used]
    _native.kernels().sparse_delta_matmul(
        *(y.data_ptr(), y.stride(0), x.data_ptr(), x.stride(0), x.shape[1], x.shape[0]),
        *(csr.rows.data_ptr(), csr.crow.data_ptr(), csr.rows.numel()),
        *(csr.cols.data_ptr(), csr.local.data_ptr(), csr.cols.numel()),
        *(values.data_ptr(), _native.dtype_code(x), 1),
    )
    assert torch.equal(memory.view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_topk_salience(instruction_set, dtype):
    weight, grad = operands(dtype)[0], operands(dtype, m=96, n=613)[0].reshape(613, 96)
    for metric in ("magnitude", "gradient", "snip", "force"):
        ours, wanted = (
            ops.topk_salience([weight], [grad], 500, metric=metric, backend=backend)
            for backend in ("cpu", "reference")
        )
        assert torch.equal(ours[0], wanted[0])


@pytest.mark.skipif(len(SETS) < 3, reason="AVX2 and AVX-512 are not both here")
def test_sums_are_the_same_to_the_bit_on_both_wide_sets():
    dy, x = operands(torch.float32)
    plan = plan_with("mixed", mixed_pattern(96, 130))
    kernels, usual, sums = _native.kernels(), _native.kernels().instruction_set(), []
    for name in ("AVX-512", "AVX2"):
        kernels.use_instruction_set(name)
        sums.append(ops.sampled_grad(dy, x, plan.pattern, plan=plan, backend="cpu"))
    kernels.use_instruction_set(usual)
    assert torch.equal(*sums)


def test_a_dtype_that_the_kernels_do_not_know_is_refused():
    with pytest.raises(ValueError, match="no dtype has the code 4"):
        _native.kernels().keep_columns(0, 0, 0, 0, 0, 0, 16, 0, 4, 1)


def test_one_that_is_not_here_is_refused():
    with pytest.raises(ValueError, match="no instruction set SSE9"):
        _native.kernels().use_instruction_set("SSE9")
    assert _native.kernels().instruction_set() == SETS[0]
