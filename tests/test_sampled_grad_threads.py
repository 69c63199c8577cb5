"""sampled_grad's bits do not depend on the number of threads."""

import functools
import platform

import pytest
import torch
from kernels import DTYPES
from plans import PARTS, plan_with
from sampled import FORMS, assert_same_sums, at, error_bound, plan_for, sampled

from speft_kernels import SparsePattern
from speft_kernels.parts import Parts
from speft_kernels.testing import uniform_pattern


def assert_threads_change_nothing(run):
    results = []
    for threads in (1, 2, 3, 7, 16):
        torch.set_num_threads(threads)
        results += [run() for _ in range(2)]
    bits = [result.view(torch.uint8) for result in results]
    assert all(torch.equal(those, bits[0]) for those in bits)
    return results[0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_a_bit(dtype, part, form):
    plan = plan_for(part, "mixed", 96, 130)
    # One block, whose sums go straight to the result; several blocks; many.
    for m in (100, 613, 2100):
        dy, x = torch.randn(m, 96).to(dtype), torch.randn(m, 130).to(dtype)
        run = functools.partial(sampled, dy, x, plan, form, backend="cpu")
        assert_threads_change_nothing(run)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("part", ["gather", "tiles", "mixed"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_a_bit_of_many_rows(dtype, part, form):
    """More threads cut the rows into more parts, which must not change the sum of any entry."""
    plan = plan_for(part, "mixed", 1100, 90)
    for m in (128, 300):
        dy, x = torch.randn(m, 1100).to(dtype), torch.randn(m, 90).to(dtype)
        run = functools.partial(sampled, dy, x, plan, form, backend="cpu")
        assert_threads_change_nothing(run)


def test_threads_do_not_change_the_sign_of_a_zero():
    """Products too small for float32, which a fused multiply-add takes for -0, added to -0."""
    plan = plan_for("gather", "uniform", 1100, 90)
    dy, x = torch.full((128, 1100), -1e-30), torch.full((128, 90), 1e-30)
    run = functools.partial(sampled, dy, x, plan, "whole", backend="cpu", accumulate=True)
    assert_threads_change_nothing(lambda: run(out=torch.full((plan.pattern.nnz,), -0.0)))


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="the caller's way is passed on on x86"
)
def test_threads_flush_denormals_where_their_caller_does():
    """Which each thread does or does not by itself."""
    plan = plan_for("gather", "uniform", 1100, 90)
    dy, x = torch.randn(2100, 1100) * 1e-40, torch.randn(2100, 90)
    run = functools.partial(sampled, dy, x, plan, "whole", backend="cpu")
    try:
        assert torch.set_flush_denormal(True)
        flushed = assert_threads_change_nothing(run)
    finally:
        torch.set_flush_denormal(False)
    assert not flushed.any()
    assert assert_threads_change_nothing(run).any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("part", ["columns", "rows"])
@pytest.mark.parametrize(
    ("lines", "shape"),
    [
        (1, (96, 1024)),
        (2, (96, 1024)),
        (26, (96, 1024)),
        (2, (65, 33)),
        (17, (33, 65)),
        (4, (45, 7)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_threads_do_not_change_a_bit_of_thin_panels(dtype, lines, shape, part, form):
    """The vendor's library cuts long sums among threads where a product is thin, and on AMD's
    processors sums in another order at the edges of odd ones.
    """
    mask = torch.zeros(shape, dtype=torch.bool)
    if part == "columns":
        mask[:, 3 : 3 + lines] = True
    else:
        mask[5 : 5 + lines, ::3] = True
    plan = plan_with(part, SparsePattern.from_mask(mask))
    for m in (100, 300, 2100):
        dy, x = (torch.randn(m, size, dtype=dtype) for size in shape)
        run = functools.partial(sampled, dy, x, plan, form, backend="cpu")
        got = assert_threads_change_nothing(run)
        assert_same_sums(got, at(dy.t() @ x, plan.pattern), dy, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_threads_do_not_change_a_bit_of_panels_of_transposed_operands(dtype):
    """MKL cuts sums in float64 earlier where the tokens of the wide operand are contiguous."""
    mask = torch.zeros(96, 208, dtype=torch.bool)
    mask[5:21] = True
    plan = plan_with("rows", SparsePattern.from_mask(mask))
    dy, x = torch.randn(96, 256, dtype=dtype).t(), torch.randn(208, 256, dtype=dtype).t()
    run = functools.partial(sampled, dy, x, plan, "whole", backend="cpu")
    assert_same_sums(assert_threads_change_nothing(run), at(dy.t() @ x, plan.pattern), dy, x)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("part", "density"), [("gather", 0.4), ("gather", 0.6), ("tiles", 0.3)])
def test_threads_do_not_change_a_bit_of_many_sums(part, density, form):
    """Sums of one split above 4 MiB are added where they belong by the task that has them: there is
    no second split, however many blocks of tokens. 0.4 makes two of the three blocks.
    """
    n, k, m = 2048, 1024, 300
    plan = plan_with(part, uniform_pattern((n, k), density))
    sums = (
        plan.compiled(Parts, False).entry_row.numel()
        + plan.compiled(Parts, False).tile_slot.numel()
    )
    splits = (8 << 20) // (4 * sums)
    assert splits == 2 if density == 0.4 else splits <= 1
    assert -(-m // plan.block_tokens(m)) == 3
    dy, x = torch.randn(m, n), torch.randn(m, k)
    got = assert_threads_change_nothing(lambda: sampled(dy, x, plan, form, backend="cpu"))
    expected = at(dy.t() @ x, plan.pattern)
    assert_same_sums(got, expected, dy, x)

    def accumulated():
        out = torch.ones(plan.pattern.nnz)
        return sampled(dy, x, plan, form, backend="cpu", out=out, accumulate=True)

    torch.testing.assert_close(
        assert_threads_change_nothing(accumulated), got + 1, rtol=0, atol=error_bound(dy, x)
    )
    out = torch.full((plan.pattern.nnz,), torch.nan)
    assert torch.equal(sampled(dy, x, plan, form, backend="cpu", out=out), got)
