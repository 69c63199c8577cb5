"""write_delta: rounded once as torch rounds, idempotent, and exactly undone, for one weight or many
in a call.
"""

from dataclasses import replace

import pytest
import torch
from kernels import DTYPES, KINDS, accumulator, backends, make_pattern
from written import make_weights, take

from speft_kernels import SparsePattern, ops
from speft_kernels.errors import BackendError
from speft_kernels.ops import registry

BACKENDS = backends("write_delta")


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


# What the processor says of 7e4 in float16 and of a signalling NaN, in Triton's interpreter.
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rounding_is_torchs_for_every_float16_and_every_midpoint(backend, dtype):
    # All finite values of the 16-bit type, the midpoints to their neighbours, and a hair beside.
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    every = bits.view(dtype)
    every = every[every.isfinite()].float()
    up = torch.nextafter(every, torch.tensor(torch.inf))
    half = (every + every.sort().values.roll(-1)[every.argsort().argsort()]) / 2
    wanted = torch.cat([every, up, half, torch.nextafter(half, torch.tensor(0.0))])
    nans = torch.tensor([0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    wanted = torch.cat([wanted, nans, torch.tensor([torch.inf, -torch.inf, 7e4, 3.4e38])])
    pattern = SparsePattern.from_mask(torch.ones(1, wanted.numel(), dtype=torch.bool))
    weight = torch.zeros(1, wanted.numel(), dtype=dtype)
    ops.write_delta(weight, pattern, weight[0].clone(), wanted, backend=backend)
    expected = wanted.to(dtype)
    assert torch.equal(weight[0].isnan(), expected.isnan())
    fine = ~expected.isnan()
    assert torch.equal(weight[0][fine], expected[fine])
    # And the way back: reading the 16-bit values as float32 loses nothing.
    if backend == "triton" and dtype == torch.bfloat16:  # its interpreter misreads subnormal ones
        fine &= (weight[0] == 0) | (weight[0].abs() >= torch.finfo(dtype).tiny)
    again = torch.empty_like(weight)
    ops.write_delta(again, pattern, weight[0].clone(), torch.zeros_like(wanted), backend=backend)
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
    some = make_weights(torch.float32)
    for values in (some.values, []):
        flat = [tensor.reshape(-1) for tensor in values]
        torch.library.opcheck(
            torch.ops.speft.write_delta.default,
            (
                some.weights,
                [pattern.entry_indices for pattern in some.patterns],
                [base.reshape(-1) for base in some.base],
                flat,
                backend,
            ),
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
    with pytest.raises(ValueError, match="the pattern is on cpu and weight on meta"):
        ops.write_delta(weight.to("meta"), pattern, base.to("meta"), None)
    with pytest.raises(TypeError, match="weight must be one of .* got torch.int32"):
        ops.write_delta(weight.int(), pattern, base.int(), None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_many_weights_in_one_call_are_written_as_one_by_one(backend, dtype):
    some = make_weights(dtype)
    before = [weight.clone() for weight in some.weights]
    alone = [weight.clone() for weight in some.weights]
    for weight, pattern, base, values in zip(alone, *some[1:], strict=True):
        ops.write_delta(weight, pattern, base, values, backend=backend)
    for _ in range(2):
        ops.write_deltas(*some, backend=backend)
        assert all(map(torch.equal, some.weights, alone))
    changed = [not torch.equal(a, b) for a, b in zip(alone, before, strict=True)]
    assert changed == [not pattern.is_empty for pattern in some.patterns]
    ops.write_deltas(*some[:3], None, backend=backend)
    assert all(map(torch.equal, some.weights, before))


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_share_the_entries_of_all_weights(dtype):
    """Entries enough for seven threads, whose shares begin and end within weights."""
    shapes = [(64, 48), (3, 9), (200, 160), (64, 64), (1, 1), (128, 100)] * 3
    some = make_weights(dtype, shapes)
    total = sum(pattern.nnz for pattern in some.patterns)
    assert total > 7 * 4096  # csrc/cpu/write_delta.cpp
    before = [weight.clone() for weight in some.weights]
    ops.write_deltas(*some, backend="reference")
    wanted = [weight.clone() for weight in some.weights]
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        ops.write_deltas(*some[:3], None, backend="cpu")
        assert all(map(torch.equal, some.weights, before))
        ops.write_deltas(*some, backend="cpu")
        assert all(map(torch.equal, some.weights, wanted))


@pytest.mark.parametrize("backend", BACKENDS)
def test_wide_indices_beside_narrow_ones(backend):
    large = SparsePattern((1 << 16, 1 << 15), torch.tensor([5, (1 << 31) - 1]))
    small = make_pattern("uniform", 33, 17)
    assert large.entry_indices.dtype != small.entry_indices.dtype
    weights = [torch.zeros(33, 17, dtype=torch.bfloat16) for _ in range(3)]
    # 4 GiB, of which 2 pages are used.
    weights[1] = torch.empty(large.shape, dtype=torch.bfloat16)
    patterns = [small, large, small]
    base = [torch.zeros(p.nnz, dtype=torch.bfloat16) for p in patterns]
    values = [torch.arange(1.0, p.nnz + 1) for p in patterns]
    ops.write_deltas(weights, patterns, base, values, backend=backend)
    for i in (0, 2):
        assert torch.equal(take(weights[i], small), values[i].bfloat16())
    assert [weights[1][0, 5].item(), weights[1][-1, -1].item()] == [1.0, 2.0]


def test_strided_base_values_and_values():
    some = make_weights(torch.float32)
    wanted = [weight.clone() for weight in some.weights]
    ops.write_deltas(wanted, *some[1:])
    base, values = (
        [t.unsqueeze(-1).repeat_interleave(2, -1)[..., 0] for t in tensors]
        for tensors in (some.base, some.values)
    )
    assert not any(t.is_contiguous() for t in base if t.numel() > 1)
    for backend in BACKENDS:
        ops.write_deltas(some.weights, some.patterns, base, values, backend=backend)
        assert all(map(torch.equal, some.weights, wanted))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("values", [True, False])
def test_autograd_sees_that_every_weight_was_written(values, backend):
    some = make_weights(torch.float32)
    before = [weight._version for weight in some.weights]
    leaf = torch.nn.Parameter(some.weights[0])
    graph = (leaf.square().sum(), leaf)
    weights = [leaf, *some.weights[1:]]
    delta = some.values if values else None
    ops.write_deltas(weights, some.patterns, some.base, delta, backend=backend)
    assert all(w._version > v for w, v in zip(weights, before, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        graph[0].backward()


def test_nothing_is_written_where_any_argument_is_refused():
    """Each mistake comes last, behind weights that could have been written."""
    some = make_weights(torch.float32)
    before = [weight.clone() for weight in some.weights]
    good = make_pattern("row", 6, 5)
    weight, base, values = torch.randn(6, 5), torch.randn(5), torch.randn(5)
    mistakes = {
        r"weight has shape \(5, 6\), the pattern is for \(6, 5\)": (weight.t(), base, values),
        "weight must be contiguous": (torch.randn(5, 6).t(), base, values),
        r"base_values must have shape \(5,\), got \(4,\)": (weight, base[:4], values),
        r"values must have shape \(5,\), got \(4,\)": (weight, base, values[:4]),
        "values must be torch.float32 beside a torch.float32": (weight, base, values.double()),
        "base_values and weight must have one dtype": (weight, base.double(), values),
        "values must be torch.float64 beside a torch.float64": (
            weight.double(),
            base.double(),
            values,
        ),
        "weight must be one of": (weight.int(), base.int(), values),
    }
    for message, (w, b, v) in mistakes.items():
        untouched = w.clone()
        with pytest.raises((ValueError, TypeError), match=message):
            ops.write_deltas(
                [*some.weights, w], [*some.patterns, good], [*some.base, b], [*some.values, v]
            )
        assert torch.equal(w, untouched)
        assert all(map(torch.equal, some.weights, before))
    for lengths in (
        (some.weights[:-1], *some[1:]),
        (*some[:3], some.values[1:]),
        (*some[:2], some.base[1:], None),
    ):
        with pytest.raises(ValueError, match="the sequences must have one length"):
            ops.write_deltas(*lengths)
        assert all(map(torch.equal, some.weights, before))


def test_each_dtype_and_direction_is_one_call(write_sizes):
    """Weights of three dtypes in turn, every fourth without values: its base comes back."""
    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    shapes = [(33, 17), (64, 48), (20, 20), (5, 4), (1, 5), (9, 11), (30, 7), (8, 8)]
    patterns = [make_pattern("uniform", *shape) for shape in shapes]
    weights = [torch.randn(p.shape).to(dtypes[i % 3]) for i, p in enumerate(patterns)]
    base = [torch.randn(p.nnz).to(w.dtype) for p, w in zip(patterns, weights, strict=True)]
    values = [
        torch.randn(p.nnz, dtype=accumulator(b.dtype)) for p, b in zip(patterns, base, strict=True)
    ]
    values = [None if i % 4 == 3 else value for i, value in enumerate(values)]
    wanted = [weight.clone() for weight in weights]
    for weight, *operands in zip(wanted, patterns, base, values, strict=True):
        ops.write_delta(weight, *operands, backend="reference")
    ops.write_deltas(weights, patterns, base, values)
    assert all(map(torch.equal, weights, wanted))
    assert write_sizes == [2, 2, 2, 1, 1]  # weights 0 and 6, 1 and 4, 2 and 5; 3; 7


def test_no_call_is_made_where_the_backend_refuses_one(monkeypatch):
    monkeypatch.setattr(registry, "_resolved", {})
    found = registry._implementations["write_delta", "torch"]
    narrow = replace(found, dtypes=(torch.float32,))
    monkeypatch.setitem(registry._implementations, ("write_delta", "torch"), narrow)
    pattern = make_pattern("full", 4, 3)
    weights = [torch.ones(4, 3), torch.ones(4, 3).double()]
    base = [torch.zeros(12), torch.zeros(12).double()]
    for write in (ops.write_deltas, ops.check_deltas):
        with pytest.raises(BackendError, match="not torch.float64"):
            write(weights, [pattern] * 2, base, None, backend="torch")
        assert bool((weights[0] == 1).all())
    ops.check_deltas(weights[:1], [pattern], base[:1], None, backend="torch")
    assert bool((weights[0] == 1).all())
    ops.write_deltas(weights[:1], [pattern], base[:1], None, backend="torch")
    assert bool((weights[0] == 0).all())


def test_no_weights_are_no_work():
    ops.write_deltas([], [], [], [])
    ops.write_deltas([], [], [], None)
