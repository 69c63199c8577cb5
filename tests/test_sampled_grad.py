"""sampled_grad against float64, on every backend, and what it must never do."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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

from speft_kernels import SparsePattern, SparsityPlan, ops
from speft_kernels.plan import plan_of
from speft_kernels.testing import uniform_pattern

BACKENDS = backends("sampled_grad")


def at(dense, pattern):
    return dense.reshape(-1)[pattern.entry_indices.long()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_error_is_at_most_twice_torchs(backend, dtype, kind):
    for m, n, k in SHAPES:
        pattern = make_pattern(kind, n, k)
        dy, x = torch.randn(m, n).to(dtype), torch.randn(m, k).to(dtype)
        ours = ops.sampled_grad(dy, x, pattern, backend=backend)
        assert ours.dtype == accumulator(dtype)
        wide = accumulator(dtype)
        theirs = dy.to(wide).t() @ x.to(wide)
        assert_as_exact_as_torch(ours, theirs, exact_product(dy.t(), x), pattern.entry_indices)


@pytest.mark.parametrize("backend", BACKENDS)
def test_kept_activations_give_the_same_bits(backend):
    pattern = make_pattern("realistic", 96, 130)
    plan = plan_of(pattern)
    assert plan.kept_width < 130
    dy, x = torch.randn(77, 96), torch.randn(77, 130)
    whole = ops.sampled_grad(dy, x, pattern, backend=backend)
    kept = ops.sampled_grad(dy, plan.keep(x), pattern, plan=plan, backend=backend)
    # Same entries, same order of summation: only the reference multiplies other columns beside.
    if backend == "reference":
        torch.testing.assert_close(kept, whole)
    else:
        assert torch.equal(kept, whole)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("m", [9, 2100])
def test_out_is_overwritten_or_accumulated_into(backend, m):
    pattern = make_pattern("uniform", 33, 17)
    dy, x = torch.randn(m, 33), torch.randn(m, 17)
    alone = ops.sampled_grad(dy, x, pattern, backend=backend)
    out = torch.full((pattern.nnz,), 3.0)
    assert ops.sampled_grad(dy, x, pattern, out=out, backend=backend) is out
    assert torch.equal(out, alone)
    ops.sampled_grad(dy, x, pattern, out=out, accumulate=True, backend=backend)
    # The sums of up to 32 splits are added to what is there, each rounded at twice the result.
    tolerance = 32 * torch.finfo(torch.float32).eps * 2 * float(alone.abs().max())
    torch.testing.assert_close(out, 2 * alone, rtol=0, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_leading_dimensions(backend):
    pattern = make_pattern("uniform", 33, 17)
    dy, x = torch.randn(2, 5, 33), torch.randn(2, 5, 17)
    plain = ops.sampled_grad(dy, x, pattern, backend=backend)
    views = {
        "transposed": (dy.mT.contiguous().mT, x.mT.contiguous().mT),
        "wide rows": (torch.randn(2, 5, 40)[..., :33].copy_(dy), torch.randn(2, 5, 19)[..., 1:18]),
        "every other": (
            dy.repeat_interleave(2, -1)[..., ::2],
            x.repeat_interleave(2, -1)[..., ::2],
        ),
    }
    views["wide rows"][1].copy_(x)
    for dy_view, x_view in views.values():
        assert torch.equal(ops.sampled_grad(dy_view, x_view, pattern, backend=backend), plain)


@pytest.mark.parametrize("m", [613, 2100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_a_bit(dtype, m):
    pattern = make_pattern("realistic", 96, 130)
    dy, x = torch.randn(m, 96).to(dtype), torch.randn(m, 130).to(dtype)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results += [ops.sampled_grad(dy, x, pattern, backend="cpu") for _ in range(2)]
    assert all(torch.equal(result, results[0]) for result in results)


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_any_pattern(data):
    m, n, k = (data.draw(st.integers(0, 40)), *(data.draw(st.integers(1, 40)) for _ in "nk"))
    seed, density = data.draw(st.integers(0, 99)), data.draw(st.floats(0, 1))
    generator = torch.Generator().manual_seed(seed)
    pattern = SparsePattern.from_mask(torch.rand(n, k, generator=generator) < density)
    dy = torch.randn(m, n, generator=generator, dtype=torch.float64)
    x = torch.randn(m, k, generator=generator, dtype=torch.float64)
    expected = at(dy.t() @ x, pattern)
    for backend in BACKENDS:
        got = ops.sampled_grad(dy, x, pattern, backend=backend)
        # Sums of at most 40 products of unit normals, in float64, in another order.
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("density", [0.001, 0.005, 0.25])
def test_no_dense_gradient_exists_in_the_torch_backend(density):
    n, k, m = 2048, 1024, 16
    pattern = uniform_pattern((n, k), density)
    csr, out = plan_of(pattern).csr, torch.empty(pattern.nnz)
    dy, x = torch.randn(m, n), torch.randn(m, k)
    largest = {}
    for backend in ("torch", "reference"):
        with LargestTensor() as seen:
            implementation("sampled_grad", backend)(dy, x, csr, out, False)
        largest[backend] = seen.numel
    # A panel of 256 of the 2048 rows, or the values themselves.
    assert largest["torch"] <= max(n * k // 8, pattern.nnz)
    assert largest["reference"] == n * k  # the check sees what it is there for


def test_compiled_kernels_scratch_is_bounded(memory_high_water):
    n = k = 8192
    pattern = uniform_pattern((n, k), 0.001)
    assert plan_of(pattern).csr is not None  # built beforehand, as in training
    dy, x = torch.randn(64, n), torch.randn(64, k)
    grown = memory_high_water(lambda: ops.sampled_grad(dy, x, pattern, backend="cpu"))
    # Panels of 16 tokens of all 16384 lines are 1 MiB, the result 0.27 MB; the dense dW is 256 MiB.
    assert grown < 16 << 20


@pytest.mark.parametrize("backend", BACKENDS)
def test_library_contract_and_gradients(backend):
    pattern = make_pattern("uniform", 6, 5)
    csr = list(plan_of(pattern).csr)
    dy = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(torch.ops.speft.sampled_grad.default, (dy, x, csr, backend))
    out = torch.zeros(pattern.nnz, dtype=torch.float64)
    torch.library.opcheck(
        torch.ops.speft.sampled_grad_.default,
        (dy.detach(), x.detach(), csr, out, True, backend),
    )
    assert torch.autograd.gradcheck(
        lambda dy, x: ops.sampled_grad(dy, x, pattern, backend=backend), (dy, x)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing_inside(backend):
    pattern = make_pattern("uniform", 33, 17)
    dy, x = torch.randn(50, 33), torch.randn(50, 17)
    plain = ops.sampled_grad(dy, x, pattern, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ops.sampled_grad(dy, x, pattern, backend=backend), plain)


def test_out_cannot_carry_a_gradient():
    pattern = make_pattern("uniform", 6, 5)
    x = torch.randn(4, 5, requires_grad=True)
    with pytest.raises(ValueError, match="out= cannot carry a gradient"):
        ops.sampled_grad(torch.randn(4, 6), x, pattern, out=torch.zeros(pattern.nnz))


def test_bad_arguments_name_the_fact():
    pattern = make_pattern("uniform", 6, 5)
    dy, x = torch.randn(4, 6), torch.randn(4, 5)
    with pytest.raises(ValueError, match=r"dy must have shape \[\.\.\., 6\], got \(4, 7\)"):
        ops.sampled_grad(torch.randn(4, 7), x, pattern)
    with pytest.raises(ValueError, match="dy has 4 tokens and x has 3"):
        ops.sampled_grad(dy, x[:3], pattern)
    with pytest.raises(TypeError, match=r"one dtype, got torch.float32 and torch.bfloat16"):
        ops.sampled_grad(dy, x.bfloat16(), pattern)
    with pytest.raises(TypeError, match="dy must be one of .* got torch.int64"):
        ops.sampled_grad(dy.long(), x.long(), pattern)
    with pytest.raises(ValueError, match="pass out="):
        ops.sampled_grad(dy, x, pattern, accumulate=True)
    with pytest.raises(ValueError, match="out must be a contiguous torch.float32"):
        ops.sampled_grad(dy, x, pattern, out=torch.zeros(pattern.nnz + 1))
    with pytest.raises(ValueError, match="use block_grad"):
        ops.sampled_grad(dy, x, SparsePattern.from_blocks((6, 5), (2, 5), torch.tensor([0])))
    other = SparsityPlan.build(make_pattern("row", 6, 5))
    with pytest.raises(ValueError, match="the plan was built for another pattern"):
        ops.sampled_grad(dy, x, pattern, plan=other)
