"""sampled_grad against float64, on every backend and by every part, and what it must never do."""

import functools
import math
import sys

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
    backends_and_dtypes,
    exact_product,
    make_pattern,
    torchs_worse,
)
from plans import PARTS, drawn_keep, mixed_pattern, parts_of, plan_with
from sampled import (
    FORMS,
    assert_not_finite_alone,
    assert_same_sums,
    at,
    plan_for,
    poisoned,
    sampled,
)

from speft_kernels import SparsePattern, SparsityPlan, ops
from speft_kernels.ops import registry
from speft_kernels.plan import plan_of
from speft_kernels.testing import uniform_pattern

BACKENDS = backends("sampled_grad")
EXACT_BACKENDS = backends("sampled_grad", torch.float64)
BACKENDS_AND_PARTS = [(backend, part) for backend in BACKENDS for part in parts_of(backend)]


@functools.cache
def problem(dtype, shape):
    """dy, x, torch's own product and the exact one: the same for every test of a shape."""
    generator = torch.Generator().manual_seed(1)
    m, n, k = shape
    dy, x = (torch.randn(m, size, generator=generator).to(dtype) for size in (n, k))
    exact = exact_product(dy.t(), x)
    return dy, x, torchs_worse(dy, x, exact), exact


def check_the_numbers_contract(backend, dtype, plan, shape):
    dy, x, theirs, exact = problem(dtype, shape)
    for form in FORMS:
        ours = sampled(dy, x, plan, form, backend=backend)
        assert ours.dtype == accumulator(dtype)
        assert_as_exact_as_torch(ours, theirs, exact, plan.pattern.entry_indices)


@pytest.mark.parametrize(
    ("backend", "dtype", "part"),
    [
        (backend, dtype, part)
        for backend, dtype in backends_and_dtypes("sampled_grad")
        for part in (*parts_of(backend), "default")
    ],
)
def test_error_is_at_most_twice_torchs(backend, dtype, part):
    # Triton's interpreter takes a second for the gathered entries of a large problem.
    most = 60_000 if backend == "triton" else math.inf
    for shape in SHAPES:
        for kind in KINDS:
            plan = plan_for(part, kind, *shape[1:])
            if shape[0] * plan.pattern.nnz <= most:
                check_the_numbers_contract(backend, dtype, plan, shape)
    plan = plan_for(part, "mixed", 96, 130)
    check_the_numbers_contract(backend, dtype, plan, (613, 96, 130))
    if part == "mixed":
        assert all(share > 0.01 for share in plan.shares().values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part", [*PARTS, "default"])
def test_pieces_of_any_size_serve_all_tokens(monkeypatch, part, dtype):
    """Stretches of 16 tokens and of 100, which no block ends with, and copies as small."""
    for most, copied, sampled_at_once in ((16, 1, 7), (100, 1 << 18, 1000)):
        panels = sys.modules["speft_kernels.ops.panels"]
        monkeypatch.setattr(panels, "STRETCH_TOKENS", most)
        monkeypatch.setattr(panels, "HOT_COPY_ELEMENTS", copied)
        monkeypatch.setattr(panels, "SAMPLED_ENTRIES", sampled_at_once)
        of_torch = sys.modules["speft_kernels.ops.sampled_grad"]
        monkeypatch.setattr(of_torch, "WIDENED_ELEMENTS", 130 * most)
        monkeypatch.setattr(of_torch, "USED_COPY_ELEMENTS", 130 * 3 * most)
        for shape in ((613, 96, 130), (2100, 96, 130)):
            plan = plan_for(part, "mixed", 96, 130)
            for backend in ("torch", "cpu"):
                check_the_numbers_contract(backend, dtype, plan, shape)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_sizes_and_any_pattern(data):
    m = data.draw(st.one_of(st.integers(0, 40), st.integers(120, 300)))
    n, k = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    density = data.draw(st.floats(0, 1))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    pattern = SparsePattern.from_mask(torch.rand(n, k, generator=generator) < density)
    keep = drawn_keep(data.draw, pattern, generator)
    plan = plan_with(data.draw(st.sampled_from(PARTS)), pattern, keep)
    dy = torch.randn(m, n, generator=generator, dtype=torch.float64)
    x = torch.randn(m, k, generator=generator, dtype=torch.float64)
    expected = at(dy.t() @ x, pattern)
    for backend in EXACT_BACKENDS:
        for form in FORMS:
            assert_same_sums(sampled(dy, x, plan, form, backend=backend), expected, dy, x)


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton does not run here")
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_sizes_and_any_pattern_in_triton(data):
    """On blocks of rows and groups of strips that are full, cut off, or not there."""
    m = data.draw(st.one_of(st.integers(0, 40), st.integers(1000, 1100)))
    n, k = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 200))
    wanted = data.draw(st.integers(0, 300))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    draws = torch.randint(n * k, (wanted,), generator=generator)
    if data.draw(st.booleans()):
        draws = torch.cat([draws, torch.arange(n) * k + data.draw(st.integers(0, k - 1))])
    pattern = SparsePattern.from_indices((n, k), draws.unique())
    plan = plan_with(data.draw(st.sampled_from(parts_of("triton"))), pattern)
    dy = torch.randn(m, n, generator=generator)
    x = torch.randn(m, k, generator=generator)
    expected = at(dy.double().t() @ x.double(), pattern).float()
    for form in FORMS:
        ours = sampled(dy, x, plan, form, backend="triton")
        assert_same_sums(ours, expected, dy, x)
        assert torch.equal(sampled(dy, x, plan, form, backend="triton"), ours)


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton does not run here")
@pytest.mark.parametrize("part", parts_of("triton"))
def test_gradients_of_triton_are_those_of_the_reference(part):
    """It takes no float64, so there is no gradcheck of it."""
    plan = small_plan(part)
    dy, x, up = torch.randn(4, 6), torch.randn(4, 5), torch.randn(plan.pattern.nnz)

    def gradients(backend):
        inputs = dy.clone().requires_grad_(), x.clone().requires_grad_()
        values = ops.sampled_grad(*inputs, plan.pattern, plan=plan, backend=backend)
        first = torch.autograd.grad(values @ up, inputs, create_graph=True)
        second = torch.autograd.grad((first[0] ** 2).sum() + (first[1] ** 2).sum(), inputs)
        return [*first, *second]

    # Products with the sparse matrix of `up` are summed in float32 over 6 entries at most.
    for ours, theirs in zip(gradients("triton"), gradients("reference"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("part", ["tiles", "gather"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_and_whole_activations_give_the_same_bits(dtype, part):
    """In the compiled kernel, which then sums the same numbers in the same order. The panels are
    products of the vendor's library over other stretches of tokens.
    """
    plan = plan_for(part, "realistic", 96, 130)
    assert plan.kept_width < 130
    for m in (77, 613, 2100):
        dy, x = torch.randn(m, 96).to(dtype), torch.randn(m, 130).to(dtype)
        whole, packed = (sampled(dy, x, plan, form, backend="cpu") for form in FORMS)
        assert torch.equal(whole, packed)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("m", [0, 9, 2100])
@pytest.mark.parametrize(("backend", "part"), BACKENDS_AND_PARTS)
def test_out_is_overwritten_or_accumulated_into(backend, m, part, form):
    m = 1100 if (backend, m) == ("triton", 2100) else m  # two splits of the tokens already
    plan = plan_for(part, "mixed", 96, 130)
    dy, x = torch.randn(m, 96), torch.randn(m, 130)
    alone = sampled(dy, x, plan, form, backend=backend)
    # An overwritten buffer is as torch.empty leaves it: nothing of it may be read.
    out = torch.full((plan.pattern.nnz,), torch.nan)
    assert sampled(dy, x, plan, form, out=out, backend=backend) is out
    assert torch.equal(out, alone)
    sampled(dy, x, plan, form, out=out, accumulate=True, backend=backend)
    # The products are added to what is there one stretch of tokens after the other, at worst.
    assert_same_sums(out, 2 * alone, dy.repeat(2, 1), x.repeat(2, 1))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("backend", "part"), BACKENDS_AND_PARTS)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_is_not_finite_reaches_its_own_entries_alone(poison, backend, part, form):
    plan = plan_for(part, "mixed", 96, 130)
    pattern = plan.pattern
    dy, x = torch.randn(150, 96), torch.randn(150, 130)
    clean = sampled(dy, x, plan, form, backend=backend)
    unused = torch.ones(130, dtype=torch.bool)
    unused[pattern.used_cols.long()] = False
    assert unused.sum() > 20

    bad = x.masked_fill(unused, poison)
    assert torch.equal(sampled(dy, bad, plan, form, backend=backend), clean)
    # A line that trains: its own entries, and those of no other line.
    for line in (3, 7, 129):
        got = sampled(dy, poisoned(x, line, poison), plan, form, backend=backend)
        assert_not_finite_alone(got, clean, pattern.cols == line)
    for line in (0, 60, 95):
        got = sampled(poisoned(dy, line, poison), x, plan, form, backend=backend)
        assert_not_finite_alone(got, clean, pattern.rows == line)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("backend", "part"), BACKENDS_AND_PARTS)
def test_an_output_that_trains_nothing_may_be_anything(backend, part, form):
    mask = mixed_pattern(96, 130).mask()
    mask[40:50] = False
    plan = plan_with(part, SparsePattern.from_mask(mask))
    dy, x = torch.randn(150, 96), torch.randn(150, 130)
    clean = sampled(dy, x, plan, form, backend=backend)
    dy[:, 40:50] = torch.nan
    assert torch.equal(sampled(dy, x, plan, form, backend=backend), clean)


def views(dy, x):
    """The same numbers with other strides."""
    n, k = dy.shape[-1], x.shape[-1]
    yield "transposed", dy.mT.contiguous().mT, x.mT.contiguous().mT
    wide_dy, wide_x = torch.randn(*dy.shape[:-1], n + 7), torch.randn(*x.shape[:-1], k + 2)
    yield "wide rows", wide_dy[..., :n].copy_(dy), wide_x[..., 1:-1].copy_(x)
    yield "every other", *(t.repeat_interleave(2, -1)[..., ::2] for t in (dy, x))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("backend", "part"), BACKENDS_AND_PARTS)
def test_strides_and_leading_dimensions(backend, part, form):
    plan = plan_for(part, "mixed", 96, 130)
    dy, x = torch.randn(3, 70, 96), torch.randn(3, 70, 130)
    flat = dy.reshape(210, 96), x.reshape(210, 130)
    plain = sampled(*flat, plan, form, backend=backend)
    for name, dy_view, x_view in views(dy, x):
        got = sampled(dy_view, x_view, plan, form, backend=backend)
        # Another layout may make the vendor's library sum in another order.
        assert_same_sums(got, plain, *flat)
        if backend == "cpu" and part in ("tiles", "gather"):
            assert torch.equal(got, plain), name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("part", PARTS)
def test_the_gradient_of_a_sum_has_no_strides_at_all(part, form):
    plan = plan_for(part, "mixed", 96, 130)
    dy, x = torch.ones(()).expand(150, 96), torch.randn(1, 130).expand(150, 130)
    got = sampled(dy, x, plan, form, backend="cpu")
    assert_same_sums(got, at(dy.t() @ x, plan.pattern), dy, x)


@pytest.mark.parametrize("part", ["default", *PARTS])
@pytest.mark.parametrize("density", [0.001, 0.005, 0.05, 0.25])
def test_no_dense_gradient_exists(density, part):
    n, k, m = 2048, 1024, 16
    pattern = uniform_pattern((n, k), density)
    plan = SparsityPlan.build(pattern) if part == "default" else plan_with(part, pattern)
    dy, x, out = torch.randn(m, n), torch.randn(m, k), torch.empty(pattern.nnz)
    width = plan.block_tokens(m)

    def largest(backend, form):
        operand = ops.keep_columns(x, plan) if form == "packed" else x
        serve = registry.resolve("sampled_grad", dy.device, dy.dtype, backend)
        entries = plan.compiled(serve.form, form == "packed")
        with LargestTensor() as seen:
            serve.function(dy, operand, entries, width, out, False)
        return seen.numel

    # A panel is a quarter of the weight at most, and so are the values here; torch's is a half.
    for form in FORMS:
        assert largest("torch", form) <= n * k // 2
        assert largest("cpu", form) <= n * k // 4
    assert largest("reference", "whole") == n * k  # the check sees what it is there for


@pytest.mark.parametrize("density", [0.001, 0.25])
@pytest.mark.parametrize("form", FORMS)
def test_compiled_kernels_scratch_is_bounded(memory_high_water, density, form):
    torch.set_num_threads(2)
    n = k = 4096 if density < 0.01 else 2560
    plan = SparsityPlan.build(uniform_pattern((n, k), density))
    dy, x, out = torch.randn(300, n), torch.randn(300, k), torch.empty(plan.pattern.nnz)
    sampled(dy, x, plan, form, backend="cpu")  # builds the parts beforehand, as in training
    kept = ops.keep_columns(x, plan) if form == "packed" else x
    grown = memory_high_water(
        lambda: ops.sampled_grad(
            dy, kept, plan.pattern, plan=plan, packed=form == "packed", out=out, backend="cpu"
        )
    )
    # Stated in csrc/cpu/token_sum.h and parts.py: sums of 8 MiB at most, and for each thread
    # 256 KiB of dy and 512 KiB of x; a panel has 4 MiB. The dense dW has 64 MiB, or 25.
    assert grown <= (8 << 20) + 2 * (768 << 10) + (4 << 20)


def small_plan(part):
    mask = make_pattern("uniform", 6, 5).mask()
    mask[2, :4] = mask[:, 3] = True
    return plan_with(part, SparsePattern.from_mask(mask))


@pytest.mark.parametrize("backend", BACKENDS)
def test_library_contract(backend):
    plan = small_plan("mixed")
    dtype = torch.float64 if backend in EXACT_BACKENDS else torch.float32
    form = registry.resolve("sampled_grad", torch.device("cpu"), dtype, backend).form
    parts, nnz, width = list(plan.compiled(form, False)), plan.pattern.nnz, plan.block_tokens(4)
    dy = torch.randn(4, 6, dtype=dtype, requires_grad=True)
    x = torch.randn(4, 5, dtype=dtype, requires_grad=True)
    op = torch.ops.speft.sampled_grad.default
    torch.library.opcheck(op, (dy, x, parts, nnz, width, backend))
    out = torch.zeros(nnz, dtype=dtype)
    torch.library.opcheck(
        torch.ops.speft.sampled_grad_.default,
        (dy.detach(), x.detach(), parts, width, out, True, backend),
    )


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("backend", EXACT_BACKENDS)
def test_gradients_once_and_twice(backend, part):
    plan = small_plan(part)
    dy = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)

    def call(dy, x):
        return ops.sampled_grad(dy, x, plan.pattern, plan=plan, backend=backend)

    assert torch.autograd.gradcheck(call, (dy, x))
    assert torch.autograd.gradgradcheck(call, (dy, x), fast_mode=True)


@pytest.mark.parametrize("part", PARTS)
def test_packed_activations_carry_no_gradient(part):
    plan = plan_for(part, "mixed", 96, 130)
    x = torch.randn(20, 130, requires_grad=True)
    kept = ops.keep_columns(x, plan)
    assert not kept.requires_grad
    dy = torch.randn(20, 96, requires_grad=True)
    values = ops.sampled_grad(dy, kept, plan.pattern, plan=plan, packed=True)
    with pytest.raises(RuntimeError, match="not differentiable where x is packed: pass x whole"):
        values.sum().backward()


@pytest.mark.parametrize(("backend", "part"), BACKENDS_AND_PARTS)
def test_autocast_changes_nothing_inside(backend, part):
    plan = plan_for(part, "mixed", 96, 130)
    dy, x = torch.randn(50, 96), torch.randn(50, 130)
    for form in FORMS:
        plain = sampled(dy, x, plan, form, backend=backend)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(sampled(dy, x, plan, form, backend=backend), plain)


def test_out_cannot_carry_a_gradient():
    pattern = make_pattern("uniform", 6, 5)
    x = torch.randn(4, 5, requires_grad=True)
    with pytest.raises(ValueError, match="out= cannot carry a gradient"):
        ops.sampled_grad(torch.randn(4, 6), x, pattern, out=torch.zeros(pattern.nnz))


def test_what_is_written_raises_the_version():
    pattern = make_pattern("uniform", 6, 5)
    out = torch.zeros(pattern.nnz)
    ops.sampled_grad(torch.randn(4, 6), torch.randn(4, 5), pattern, out=out)
    assert out._version > 0


def test_packed_means_nothing_where_x_is_kept_whole():
    plan = plan_of(make_pattern("full", 6, 5))
    dy, x = torch.randn(4, 6), torch.randn(4, 5)
    kept = ops.keep_columns(x, plan)
    assert torch.equal(
        ops.sampled_grad(dy, kept, plan.pattern, plan=plan, packed=True),
        ops.sampled_grad(dy, x, plan.pattern),
    )


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


def test_packed_activations_of_another_shape_are_refused():
    plan = plan_for("gather", "mixed", 96, 130)
    dy, kept = torch.randn(20, 96), ops.keep_columns(torch.randn(20, 130), plan)
    width = plan.kept_width

    def call(dy, x):
        return ops.sampled_grad(dy, x, plan.pattern, plan=plan, packed=True)

    wanted = rf"the packed x of 20 tokens must have shape \(1, {width}, 32\), got "
    for wrong in (kept[:, :-1], kept[..., :16], torch.randn(20, 130), kept.repeat(2, 1, 1)):
        with pytest.raises(ValueError, match=wanted):
            call(dy, wrong)
    with pytest.raises(ValueError, match="the packed x of 40 tokens"):
        call(dy.repeat(2, 1), kept)


@pytest.mark.parametrize("tokens", [64, 600])
@pytest.mark.parametrize("threads", [1, 2])
def test_tiles_of_the_last_rows_are_not_zeroed_by_a_part_without_rows(tokens, threads):
    """Most of the work in the last rows, no multiple of 16: parts end up behind them."""
    mask = torch.zeros(140, 2048, dtype=torch.bool)
    mask[range(128), range(128)] = True
    mask[128:, :256] = True
    mask[128:, 256:1024] = torch.rand(12, 768, generator=torch.Generator().manual_seed(0)) < 0.3
    pattern = SparsePattern.from_mask(mask)
    plan = SparsityPlan.build(pattern)
    assert plan.shares()["tiles"] > 0.5
    dy, x = torch.randn(tokens, 140), torch.randn(tokens, 2048)
    wanted = (dy.double().t() @ x.double())[mask]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for packed in (False, True):
            operand = ops.keep_columns(x, plan) if packed else x
            found = ops.sampled_grad(dy, operand, pattern, plan=plan, packed=packed)
            assert float((found - wanted).abs().max()) < 1e-3  # of sums of some 30
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("op", ["sampled_grad", "block_grad"])
@pytest.mark.parametrize("which", ["dy", "x"])
def test_a_result_over_its_own_operands_is_refused(op, which):
    pattern = SparsePattern.from_blocks((16, 16), (4, 4), torch.tensor([0, 3, 7]))
    if op == "sampled_grad":
        pattern = make_pattern("uniform", 16, 16)
    dy, x = torch.randn(8, 16), torch.randn(8, 16)
    call = getattr(ops, op)
    wanted = call(dy, x, pattern)
    memory = {"dy": dy, "x": x}[which].view(-1)
    with pytest.raises(ValueError, match=f"out overlaps {which} in memory"):
        call(dy, x, pattern, out=memory[: wanted.numel()].view_as(wanted))
    beside = torch.cat([dy.flatten(), torch.empty(wanted.numel())])
    own, dy = beside[128:].view_as(wanted), beside[:128].view(8, 16)  # of one storage, apart
    torch.testing.assert_close(call(dy, x, pattern, out=own), wanted)
