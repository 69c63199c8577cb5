"""sampled_grad on a GPU against float64: backends, dtypes, parts of a plan, kinds of patterns."""

import functools

import pytest
import sampled as on_cpu
import torch
from plans import PARTS
from rig import (
    DEVICE,
    DRY,
    KINDS,
    LLAMA,
    SHAPES,
    backends,
    backends_and_dtypes,
    largest,
    randn,
    wide_product,
)
from sampled import FORMS, assert_not_finite_alone, poisoned, sampled

from speft_kernels import SparsePattern, ops
from speft_kernels.bench.gpu.bounds import summation_bound

plan_for = functools.partial(on_cpu.plan_for, device=DEVICE)


@functools.cache
def problem(dtype, shape):
    """dy, x, torch's product of them and the exact one."""
    m, n, k = shape
    torch.manual_seed(1)
    dy, x = randn(m, n, dtype=dtype), randn(m, k, dtype=dtype)
    return dy, x, wide_product(dy.t(), x), dy.double().t() @ x.double()


@pytest.mark.parametrize("part", [*PARTS[: 1 if DRY else None], "default"])
@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes("sampled_grad"))
def test_error_is_at_most_twice_torchs(contract, backend, dtype, part):
    cases = [(shape, kind) for shape in SHAPES for kind in KINDS]
    cases += [] if DRY else [((613, 96, 130), "mixed")]
    for shape, kind in cases:
        dy, x, theirs, exact = problem(dtype, shape)
        plan = plan_for(part, kind, *shape[1:])
        for form in FORMS:
            ours = sampled(dy, x, plan, form, backend=backend)
            assert ours.dtype == torch.float32
            facts = {"terms": shape[0], "operands": dtype, "entries": plan.pattern.entry_indices}
            contract("sampled_grad", backend, ours, theirs, exact, **facts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes("sampled_grad"))
def test_a_projection_of_a_llama(contract, backend, dtype, kind):
    dy, x, theirs, exact = problem(dtype, LLAMA)
    plan = plan_for("default", kind, *LLAMA[1:])
    for form in FORMS:
        ours = sampled(dy, x, plan, form, backend=backend)
        facts = {"terms": LLAMA[0], "operands": dtype, "entries": plan.pattern.entry_indices}
        contract("sampled_grad", backend, ours, theirs, exact, **facts)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("m", [0, 9] if DRY else [0, 9, 2100])
@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes("sampled_grad"))
def test_out_is_overwritten_or_accumulated_into(backend, dtype, m, form):
    plan = plan_for("default", "mixed", 96, 130)
    dy, x = randn(m, 96, dtype=dtype), randn(m, 130, dtype=dtype)
    alone = sampled(dy, x, plan, form, backend=backend)
    # An overwritten buffer is as torch.empty leaves it: nothing of it may be read.
    out = torch.full((plan.pattern.nnz,), torch.nan, device=DEVICE)
    assert sampled(dy, x, plan, form, out=out, backend=backend) is out
    assert torch.equal(out, alone)
    sampled(dy, x, plan, form, out=out, accumulate=True, backend=backend)
    # The products are added to what is there, at worst in stretches: a sum of twice the terms.
    bound = 2 * summation_bound(2 * m, 2 * largest(alone), dtype)
    torch.testing.assert_close(out, 2 * alone, rtol=0, atol=bound)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes("sampled_grad"))
def test_strides_and_leading_dimensions(backend, dtype, form):
    plan = plan_for("default", "mixed", 96, 130)
    dy, x = randn(3, 70, 96, dtype=dtype), randn(3, 70, 130, dtype=dtype)
    flat = dy.reshape(210, 96), x.reshape(210, 130)
    plain = sampled(*flat, plan, form, backend=backend)
    wide_dy, wide_x = randn(3, 70, 103, dtype=dtype), randn(3, 70, 132, dtype=dtype)
    views = {
        "transposed": (dy.mT.contiguous().mT, x.mT.contiguous().mT),
        "wide rows": (wide_dy[..., :96].copy_(dy), wide_x[..., 1:-1].copy_(x)),
        "every other": tuple(t.repeat_interleave(2, -1)[..., ::2] for t in (dy, x)),
    }
    bound = 2 * summation_bound(210, largest(plain), dtype)
    for name, (dy_view, x_view) in views.items():
        got = sampled(dy_view, x_view, plan, form, backend=backend)
        assert largest(got - plain) <= bound, name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("backend", backends("sampled_grad"))
def test_what_is_not_finite_reaches_its_own_entries_alone(backend, poison, form):
    plan = plan_for("default", "mixed", 96, 130)
    pattern, (dy, x) = plan.pattern, (randn(150, 96), randn(150, 130))
    clean = sampled(dy, x, plan, form, backend=backend)
    for line in (3, 7, 129):
        got = sampled(dy, poisoned(x, line, poison), plan, form, backend=backend)
        assert_not_finite_alone(got, clean, pattern.cols == line)


def test_an_index_beyond_int32_has_room():
    """Rows times stride pass 2^31: 2100 tokens of a view of rows 2^20 apart."""
    if DRY:
        pytest.skip("4.4 GB")
    memory = torch.zeros(2100, 1 << 20, dtype=torch.bfloat16, device=DEVICE)
    x = memory[:, :64].normal_()
    dy = randn(2100, 48, dtype=torch.bfloat16)
    pattern = SparsePattern.from_mask(torch.ones(48, 64, dtype=torch.bool)).to(DEVICE)
    exact = (dy.double().t() @ x.double()).view(-1)
    bound = summation_bound(2100, largest(exact), torch.bfloat16)
    for backend in backends("sampled_grad", dtype=torch.bfloat16):
        ours = ops.sampled_grad(dy, x, pattern, backend=backend)
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=bound)
