"""sampled_grad and keep_columns by the CUDA kernels' sources on a CPU, in their dtypes.

Beside the tests that they share with the other backends (test_sampled_grad.py, by dtype); those of
float32 do not reach them.
"""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import assert_as_exact_as_torch, exact_product
from plans import mixed_pattern

from speft_kernels import SparsePattern, SparsityPlan, _cuda_native, ops
from speft_kernels.ops import registry
from speft_kernels.ops.sampled_grad import gradient_of_entries
from speft_kernels.plan import plan_of
from speft_kernels.thin_strips import ThinStrips, build_thin_strips

pytestmark = pytest.mark.skipif(
    _cuda_native.missing("cuda-host") is not None, reason="cuda-host is not built"
)

BACKEND = "cuda-host"
FORMS = ("whole", "packed")


def sampled(dy, x, plan, form, **more):
    packed = form == "packed"
    x = ops.keep_columns(x, plan, backend=BACKEND) if packed else x
    return ops.sampled_grad(dy, x, plan.pattern, plan=plan, packed=packed, backend=BACKEND, **more)


def operands(m, plan, dtype=torch.bfloat16):
    n, k = plan.pattern.shape
    return torch.randn(m, n).to(dtype), torch.randn(m, k).to(dtype)


def assert_exact(ours, dy, x, pattern):
    theirs = dy.float().t() @ x.float()
    assert_as_exact_as_torch(ours, theirs, exact_product(dy.t(), x), pattern.entry_indices)


@pytest.fixture
def plan():
    return SparsityPlan.build(mixed_pattern(96, 130))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_sizes_and_any_pattern(data):
    """On blocks of rows and tiles that are full, cut off, or not there.

    The operands are small whole numbers, whose sums are exact in any order.
    """
    m = data.draw(st.one_of(st.integers(0, 70), st.integers(500, 600)))
    n, k = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 200))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    draws = torch.randint(n * k, (data.draw(st.integers(0, 300)),), generator=generator)
    if data.draw(st.booleans()):
        draws = torch.cat([draws, torch.arange(n) * k + data.draw(st.integers(0, k - 1))])
    plan = SparsityPlan.build(SparsePattern.from_indices((n, k), draws.unique()))
    dtype = data.draw(st.sampled_from(_cuda_native.DTYPES))
    dy, x = (torch.randint(-8, 9, (m, side), generator=generator).to(dtype) for side in (n, k))
    exact = (dy.float().t() @ x.float()).flatten()[plan.pattern.entry_indices.long()]
    for form in FORMS:
        assert torch.equal(sampled(dy, x, plan, form), exact)


@pytest.mark.parametrize("density", [0.3, 0.9])
def test_several_tiles_of_a_block(density):
    plan = SparsityPlan.build(SparsePattern.from_mask(torch.rand(270, 260) < density))
    assert plan.compiled(ThinStrips, False).tile_block.numel() > 2
    dy, x = operands(40, plan)
    assert_exact(sampled(dy, x, plan, "whole"), dy, x, plan.pattern)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("m", [0, 9, 1100])
def test_out_is_overwritten_or_accumulated_into(plan, m, form):
    dy, x = operands(m, plan)
    alone = sampled(dy, x, plan, form)
    # An overwritten buffer is as torch.empty leaves it: nothing of it may be read.
    out = torch.full((plan.pattern.nnz,), torch.nan)
    assert sampled(dy, x, plan, form, out=out) is out
    assert torch.equal(out, alone)
    sampled(dy, x, plan, form, out=out, accumulate=True)
    # The splits of the tokens, two at 1100, are added to what is there one after the other.
    torch.testing.assert_close(out, 2 * alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_is_not_finite_reaches_its_own_entries_alone(plan, poison, form):
    pattern = plan.pattern
    dy, x = operands(150, plan)
    clean = sampled(dy, x, plan, form)
    unused = torch.ones(130, dtype=torch.bool)
    unused[pattern.used_cols.long()] = False
    assert torch.equal(sampled(dy, x.masked_fill(unused, poison), plan, form), clean)
    for line in (3, 129):
        bad = x.clone()
        bad[140, line] = poison
        got, own = sampled(dy, bad, plan, form), pattern.cols == line
        assert not got[own].isfinite().any()
        assert torch.equal(got[~own], clean[~own])
    for line in (0, 60, 95):
        bad = dy.clone()
        bad[140, line] = poison
        got, own = sampled(bad, x, plan, form), pattern.rows == line
        assert not got[own].isfinite().any()
        assert torch.equal(got[~own], clean[~own])


@pytest.mark.parametrize("form", FORMS)
def test_strides_and_leading_dimensions_change_no_bit(plan, form):
    dy, x = torch.randn(3, 30, 96).half(), torch.randn(3, 30, 130).half()
    plain = sampled(dy.reshape(90, 96), x.reshape(90, 130), plan, form)
    wide_dy, wide_x = torch.randn(3, 30, 103).half(), torch.randn(3, 30, 132).half()
    for dy_view, x_view in (
        (dy, x),
        (dy.mT.contiguous().mT, x.mT.contiguous().mT),
        (wide_dy[..., 3:99].copy_(dy), wide_x[..., 1:-1].copy_(x)),
        (dy.repeat_interleave(2, -1)[..., ::2], x.repeat_interleave(2, -1)[..., ::2]),
    ):
        assert torch.equal(sampled(dy_view, x_view, plan, form), plain)


def test_packed_lines_may_lie_anywhere(plan):
    dy, x = operands(100, plan)
    kept = ops.keep_columns(x, plan, backend=BACKEND)
    moved = torch.empty(kept.numel() + 1, dtype=kept.dtype)[1:].view_as(kept).copy_(kept)
    assert moved.data_ptr() % 16
    call = {"plan": plan, "packed": True, "backend": BACKEND}
    wanted = ops.sampled_grad(dy, kept, plan.pattern, **call)
    assert torch.equal(ops.sampled_grad(dy, moved, plan.pattern, **call), wanted)


def test_library_contract(plan):
    dy, x = operands(4, plan)
    form = registry.resolve("sampled_grad", dy.device, dy.dtype, BACKEND).form
    assert form is ThinStrips
    parts, nnz = list(plan.compiled(form, False)), plan.pattern.nnz
    op = torch.ops.speft.sampled_grad.default
    torch.library.opcheck(op, (dy, x, parts, nnz, 16, BACKEND))
    out = torch.zeros(nnz)
    torch.library.opcheck(
        torch.ops.speft.sampled_grad_.default, (dy, x, parts, 16, out, True, BACKEND)
    )


@pytest.mark.parametrize("twin", [False, True])
@pytest.mark.parametrize("blocks", [False, True])
def test_the_gradient_of_a_product_reads_the_plans_thin_strips(blocks, twin, monkeypatch):
    """Making them asks the device for counts, which a backward pass is not to wait for. Without a
    plan's they are made, and never does another backend take the place of this one.
    """
    pattern = mixed_pattern(96, 130)
    if blocks:
        pattern = SparsePattern.from_blocks((96, 130), (4, 5), torch.tensor([7, 2, 90]))
    plan = plan_of(pattern)
    dy, x = operands(40, plan)
    weight, values = torch.randn(96, 130).bfloat16(), torch.randn(pattern.values_shape)
    values.requires_grad_()
    plan.thin_strips_by_row  # noqa: B018 -- made once, as by the first call
    module = sys.modules["speft_kernels.ops.sampled_grad"]
    monkeypatch.delattr(module, "build_thin_strips")
    monkeypatch.delattr(module, "gathered")
    monkeypatch.delattr(module, "gathered_strips")
    if twin:
        product, operand, gradient = ops.sparse_delta_matmul_grad_input, dy, x
    else:
        product, operand, gradient = ops.sparse_delta_matmul, x, dy
    product(operand, weight, values, pattern, backend=BACKEND).backward(gradient)
    assert_exact(values.grad.reshape(-1), dy, x, pattern)
    monkeypatch.setattr(module, "build_thin_strips", build_thin_strips, raising=False)
    by_row = gradient_of_entries(dy, x, list(plan.csr), [], BACKEND)
    found = values.grad.reshape(-1)
    assert torch.equal(by_row, found if plan.row_order is None else found[plan.row_order])


@pytest.mark.parametrize("dtype", _cuda_native.DTYPES)
@pytest.mark.parametrize("m", [0, 1, 15, 17, 129, 300])
def test_columns_are_kept_bit_for_bit(dtype, m):
    x = torch.randint(-(1 << 15), 1 << 15, (m, 150), dtype=torch.int32).to(torch.int16).view(dtype)
    for columns in (torch.arange(150), torch.arange(3, 150, 7), torch.randperm(150)[:65]):
        for width in (16, 128, 304):
            if width == 16 and m > 20:
                continue
            packed = (
                torch.ops.speft.keep_columns(x, columns.int(), width, backend).view(torch.int16)
                for backend in (BACKEND, "reference")
            )
            assert torch.equal(*packed)
