"""keep_columns: the activations a backward pass reads, packed without a change of any bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import DTYPES, backends, make_pattern
from plans import mixed_pattern, plan_with

from speft_kernels import SparsePattern, SparsityPlan, ops
from speft_kernels.errors import BackendError
from speft_kernels.ops.keep_columns import unpack
from speft_kernels.plan import plan_of
from speft_kernels.testing import realistic_pattern

BACKENDS = backends("keep_columns")
TOKENS = (0, 1, 15, 16, 17, 129, 613)
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor):
    return tensor.contiguous().view(BITS[tensor.element_size()])


def assert_same_bits(ours, wanted):
    """Equal bit for bit; of a NaN only that it is one, for a processor may quieten it."""
    assert (ours.shape, ours.dtype) == (wanted.shape, wanted.dtype)
    nan = wanted.isnan()
    assert torch.equal(ours.isnan(), nan)
    assert torch.equal(bits(ours)[~nan], bits(wanted)[~nan])


def packed(x, columns, width):
    """What the docstring of keep_columns says, element by element where it says zero."""
    blocks = -(-x.shape[0] // width)
    kept = torch.zeros(blocks * width, columns.numel(), dtype=x.dtype)
    kept[: x.shape[0]] = x[:, columns.long()]
    return kept.reshape(blocks, width, columns.numel()).transpose(1, 2).contiguous()


def extreme(m, k, dtype):
    """Random bits, so of every exponent, and what is special in numbers."""
    info = torch.finfo(dtype)
    low, high = -(1 << (info.bits - 1)), (1 << (info.bits - 1)) - 1
    x = torch.randint(low, high, (m, k), dtype=BITS[info.bits // 8]).view(dtype)
    special = [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, info.tiny, info.smallest_normal / 2]
    special += [info.smallest_normal * info.eps, -info.smallest_normal * info.eps, info.max]
    x.view(-1)[: len(special)] = torch.tensor(special, dtype=torch.float64).to(dtype)[: x.numel()]
    return x


@pytest.mark.parametrize("m", TOKENS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", [*BACKENDS, None])
def test_every_bit_is_kept_and_padding_is_zero(backend, dtype, m):
    plan = plan_with("mixed", mixed_pattern(96, 130))
    x = extreme(m, 130, dtype)
    wanted = packed(x, plan.kept_columns, plan.block_tokens(m))
    for _ in range(2):  # what a plan remembers of a call serves the second
        kept = ops.keep_columns(x, plan, backend=backend)
        assert_same_bits(kept, wanted)
        assert torch.equal(bits(unpack(kept, m)[:, :0]), bits(x[:, :0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_number_of_sixteen_bits_survives_even_flushed_denormals(backend, dtype):
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x.reshape(512, 128)
    columns = torch.arange(1, 128, dtype=torch.int32)
    flushed = torch.set_flush_denormal(True)
    try:
        for dense in (columns, columns[::3].contiguous()):  # by squares, and one by one
            kept = torch.ops.speft.keep_columns(x, dense, 128, backend)
            assert_same_bits(kept, packed(x, dense, 128))
    finally:
        torch.set_flush_denormal(False)
    if not flushed:
        pytest.skip("this processor cannot flush denormals")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_columns_in_any_order(data):
    m, k = data.draw(st.integers(0, 70)), data.draw(st.integers(1, 70))
    width = 16 * data.draw(st.integers(1, 8))
    dtype = data.draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    chosen = torch.rand(k, generator=generator) < data.draw(st.floats(0, 1))
    columns = chosen.nonzero().flatten().int()
    order = data.draw(st.sampled_from(["sorted", "hot first", "shuffled", "falling"]))
    if order == "hot first":
        hot = torch.rand(columns.numel(), generator=generator) < 0.3
        columns = torch.cat([columns[hot], columns[~hot]])
    elif order == "shuffled":
        columns = columns[torch.randperm(columns.numel(), generator=generator)]
    elif order == "falling":
        columns = columns.flip(0)
    x = torch.randn(m, k, generator=generator, dtype=torch.float64).to(dtype)
    wanted = packed(x, columns, width)
    for backend in BACKENDS:
        kept = torch.ops.speft.keep_columns(x, columns, width, backend)
        assert_same_bits(kept, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_leading_dimensions(backend, dtype):
    plan = plan_with("gather", realistic_pattern((96, 130), 0.02))
    x = torch.randn(3, 70, 130).to(dtype)
    plain = ops.keep_columns(x.reshape(210, 130), plan, backend=backend)
    wide = torch.randn(3, 70, 140).to(dtype)
    wide[..., 3:133] = x
    views = {
        "leading": x,
        "transposed": x.mT.contiguous().mT,
        "rows apart": wide[..., 3:133],
        "every other": x.repeat_interleave(2, -1)[..., ::2],
        "tokens apart": x.repeat_interleave(2, 1)[:, ::2],
    }
    for name, view in views.items():
        for more in ({"backend": backend}, {}):
            assert torch.equal(ops.keep_columns(view, plan, **more), plain), name
    one = x[:1, :1].expand(3, 70, 130)
    assert_same_bits(
        ops.keep_columns(one, plan, backend=backend),
        packed(one.reshape(210, 130), plan.kept_columns, plan.block_tokens(210)),
    )


def test_nothing_beyond_the_matrix_is_read():
    """Its last columns lie where a square of the matrix would reach over the end."""
    memory = torch.full((64 * 20 + 64,), torch.nan)
    for k in (17, 18, 19):
        x = memory[: 48 * 20].view(48, 20)[:, :k]
        x.copy_(torch.randn(48, k))
        columns = torch.arange(k, dtype=torch.int32)
        kept = torch.ops.speft.keep_columns(x, columns, 32, "cpu")
        assert_same_bits(kept, packed(x, columns, 32))


@pytest.mark.parametrize("m", [1, 130, 613, 4000])
def test_threads_change_nothing(m):
    plan = plan_with("mixed", mixed_pattern(96, 130))
    x = torch.randn(m, 130)
    wanted = packed(x, plan.kept_columns, plan.block_tokens(m))
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        assert torch.equal(ops.keep_columns(x, plan, backend="cpu"), wanted)


def test_a_plan_that_keeps_x_whole_keeps_the_very_memory():
    plan = plan_of(make_pattern("full", 33, 17))
    x = torch.randn(2, 5, 17, requires_grad=True)
    kept = ops.keep_columns(x, plan)
    assert kept.shape == (10, 17)
    assert kept.data_ptr() == x.data_ptr()
    assert not kept.requires_grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", TOKENS)
def test_blocks_keep_their_columns_as_they_are(m, dtype):
    pattern = SparsePattern.from_blocks((32, 48), (4, 8), torch.tensor([1, 7, 20, 32]))
    x = extreme(m, 48, dtype)
    used = pattern.used_cols.long()
    assert used.numel() < 48 * 0.9
    assert_same_bits(ops.keep_columns(x, plan_of(pattern)), x[:, used])
    turned = torch.cat([torch.arange(16, 24), torch.arange(8, 16), torch.arange(8)]).int()
    plan = SparsityPlan.build(pattern, keep=turned)
    assert_same_bits(ops.keep_columns(x, plan), x[:, turned.long()])


def test_what_is_kept_is_a_copy_without_a_gradient():
    plan = plan_with("gather", realistic_pattern((96, 130), 0.02))
    x = torch.randn(20, 130, requires_grad=True)
    for _ in range(2):
        kept = ops.keep_columns(x, plan)
        assert not kept.requires_grad
        before = kept.clone()
        with torch.no_grad():
            x.add_(1)
        assert torch.equal(kept, before)


def test_an_empty_pattern_keeps_nothing():
    kept = ops.keep_columns(torch.randn(20, 17), plan_of(make_pattern("empty", 33, 17)))
    assert kept.numel() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_changes_nothing_inside(dtype):
    plan = plan_with("gather", realistic_pattern((96, 130), 0.02))
    x = torch.randn(20, 130, dtype=dtype)
    plain = ops.keep_columns(x, plan)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ops.keep_columns(x, plan), plain)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("m", [0, 20])
def test_library_contract(backend, m):
    columns = torch.tensor([4, 0, 2], dtype=torch.int32)
    arguments = (torch.randn(m, 5), columns, 16, backend)
    torch.library.opcheck(torch.ops.speft.keep_columns.default, arguments)


def test_fakes_have_the_real_ones_shape():
    from torch._subclasses.fake_tensor import FakeTensorMode

    columns = torch.tensor([4, 0, 2], dtype=torch.int32)
    for m in TOKENS:
        real = torch.ops.speft.keep_columns(torch.randn(m, 5), columns, 32, None)
        with FakeTensorMode() as mode:
            x, cols = torch.empty(m, 5), mode.from_tensor(columns)
            fake = torch.ops.speft.keep_columns(x, cols, 32, None)
        assert (fake.shape, fake.dtype) == (real.shape, real.dtype)


def test_bad_arguments_name_the_fact():
    plan = plan_with("gather", make_pattern("row", 6, 5))
    plan = plan_with("gather", make_pattern("column", 6, 5)) if plan.kept_columns is None else plan
    ops.keep_columns(torch.randn(4, 5), plan)  # a wrong x of as many tokens comes after a right one
    with pytest.raises(ValueError, match=r"x must have shape \[\.\.\., 5\], got \(4, 7\)"):
        ops.keep_columns(torch.randn(4, 7), plan)
    with pytest.raises(ValueError, match=r"x must have shape \[\.\.\., 5\], got \(\)"):
        ops.keep_columns(torch.tensor(1.0), plan)
    with pytest.raises(TypeError, match="x must be one of .* got torch.int64"):
        ops.keep_columns(torch.randn(4, 5).long(), plan)
    with pytest.raises(ValueError, match="the pattern is on cpu and x on meta"):
        ops.keep_columns(torch.randn(4, 5, device="meta"), plan)


@pytest.mark.parametrize(
    "pattern",
    [
        SparsePattern.from_indices((8, 64), torch.tensor([3, 70])),
        SparsePattern.from_mask(torch.ones(8, 64, dtype=torch.bool)),
        SparsePattern.from_blocks((8, 64), (4, 4), torch.tensor([1, 9])),
    ],
    ids=["packed", "whole", "blocks"],
)
def test_a_backend_that_there_is_not_is_refused_also_where_none_is_needed(pattern):
    with pytest.raises(BackendError, match="not a backend"):
        ops.keep_columns(torch.randn(4, 64), plan_of(pattern), backend="gpu")
