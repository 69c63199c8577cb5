"""write_delta: rounded once as torch rounds, idempotent, and exactly undone."""

import pytest
import torch
from kernels import DTYPES, KINDS, accumulator, backends, make_pattern

from speft_kernels import SparsePattern, ops

BACKENDS = backends("write_delta")


def take(weight, pattern):
    return weight.view(-1)[pattern.entry_indices.long()].reshape(pattern.values_shape)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_written_idempotent_and_undone_bit_for_bit(backend, dtype, kind):
    pattern = make_pattern(kind, 33, 17)
    original = torch.randn(33, 17).to(dtype)
    weight, base = original.clone(), take(original, pattern).clone()
    values = torch.randn(pattern.values_shape, dtype=accumulator(dtype))
    for _ in range(2):
        ops.write_delta(weight, pattern, base, values, backend=backend)
        assert torch.equal(take(weight, pattern), (base.to(values.dtype) + values).to(dtype))
        assert torch.equal(weight[~pattern.mask()], original[~pattern.mask()])
    ops.write_delta(weight, pattern, base, None, backend=backend)
    assert torch.equal(weight, original)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_torchs_for_every_float16_and_every_midpoint(dtype):
    # All finite values of the 16-bit type, the midpoints to their neighbours, and a hair beside.
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    every = bits.view(dtype)
    every = every[every.isfinite()].float()
    up = torch.nextafter(every, torch.tensor(torch.inf))
    half = (every + every.sort().values.roll(-1)[every.argsort().argsort()]) / 2
    wanted = torch.cat([every, up, half, torch.nextafter(half, torch.tensor(0.0))])
    wanted = torch.cat([wanted, torch.tensor([torch.inf, -torch.inf, torch.nan, 7e4, 3.4e38])])
    pattern = SparsePattern.from_mask(torch.ones(1, wanted.numel(), dtype=torch.bool))
    weight = torch.zeros(1, wanted.numel(), dtype=dtype)
    ops.write_delta(weight, pattern, weight[0].clone(), wanted, backend="cpu")
    expected = wanted.to(dtype)
    assert torch.equal(weight[0].isnan(), expected.isnan())
    fine = ~expected.isnan()
    assert torch.equal(weight[0][fine], expected[fine])
    # And the way back: reading the 16-bit values as float32 loses nothing.
    again = torch.empty_like(weight)
    ops.write_delta(again, pattern, weight[0].clone(), torch.zeros_like(wanted), backend="cpu")
    assert torch.equal(again[0][fine], weight[0][fine])


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks(backend):
    pattern = SparsePattern.from_blocks((6, 8), (3, 2), torch.tensor([1, 6]))
    weight = torch.zeros(6, 8)
    values = torch.arange(12.0).reshape(2, 3, 2) + 1
    ops.write_delta(weight, pattern, torch.zeros(2, 3, 2), values, backend=backend)
    assert torch.equal(weight[0:3, 2:4], values[0])
    assert torch.equal(weight[3:6, 4:6], values[1])
    assert int(weight.count_nonzero()) == 12


@pytest.mark.parametrize("backend", BACKENDS)
def test_library_contract(backend):
    pattern = make_pattern("uniform", 6, 5)
    weight = torch.randn(6, 5)
    base = take(weight, pattern).clone()
    for values in (torch.randn(pattern.nnz), None):
        torch.library.opcheck(
            torch.ops.speft.write_delta.default,
            (weight, pattern.entry_indices, base, values, backend),
        )


def test_float16_subnormals_survive_flushed_denormals():
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        base = torch.tensor([1, 0x8001, 0x3FF, 0x400], dtype=torch.int32).to(torch.int16)
        base = base.view(torch.float16)
        pattern = SparsePattern.from_mask(torch.ones(1, 4, dtype=torch.bool))
        weight = torch.zeros(1, 4, dtype=torch.float16)
        ops.write_delta(weight, pattern, base, torch.zeros(4), backend="cpu")
        assert weight[0].view(torch.int16).tolist() == base.view(torch.int16).tolist()
    finally:
        torch.set_flush_denormal(False)


def test_indices_beyond_int32():
    pattern = SparsePattern((1 << 16, 1 << 15), torch.tensor([5, (1 << 31) - 1]))
    weight = torch.empty(1 << 16, 1 << 15, dtype=torch.bfloat16)  # 4 GiB, of which 2 pages are used
    base = torch.zeros(2, dtype=torch.bfloat16)
    for backend in BACKENDS:
        ops.write_delta(weight, pattern, base, torch.tensor([1.0, 2.0]), backend=backend)
        assert [weight[0, 5].item(), weight[-1, -1].item()] == [1.0, 2.0]
        ops.write_delta(weight, pattern, base, None, backend=backend)
        assert [weight[0, 5].item(), weight[-1, -1].item()] == [0.0, 0.0]


def test_the_weights_version_tells_of_the_write():
    pattern = make_pattern("uniform", 6, 5)
    weight = torch.randn(6, 5)
    before = weight._version
    ops.write_delta(weight, pattern, take(weight, pattern).clone(), torch.randn(pattern.nnz))
    assert weight._version > before


def test_bad_arguments_name_the_fact():
    pattern = make_pattern("uniform", 6, 5)
    weight, base, values = torch.randn(6, 5), torch.randn(3), torch.randn(3)
    with pytest.raises(ValueError, match=r"weight has shape \(5, 6\)"):
        ops.write_delta(torch.randn(5, 6), pattern, base, values)
    with pytest.raises(ValueError, match=r"weight must be contiguous, got strides \(1, 6\)"):
        ops.write_delta(torch.randn(5, 6).t(), pattern, base, values)
    with pytest.raises(TypeError, match="base_values and weight must have one dtype"):
        ops.write_delta(weight, pattern, base.double(), values)
    with pytest.raises(TypeError, match="values must be torch.float32 beside a torch.float32"):
        ops.write_delta(weight, pattern, base, values.double())
    with pytest.raises(ValueError, match=r"base_values must have shape \(3,\), got \(4,\)"):
        ops.write_delta(weight, pattern, torch.randn(4), values)
