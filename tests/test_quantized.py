"""QuantizedWeight, and the products with it and a sparse delta, on every backend."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import (
    DTYPES,
    accumulator,
    assert_as_exact_as_torch,
    backends,
    backends_and_dtypes,
    exact_product,
    implementation,
    make_pattern,
)

from speft_kernels import QuantizedWeight, SparsePattern, ops, quantized
from speft_kernels.ops.sparse_delta_matmul import CompiledDelta, delta_arguments
from speft_kernels.plan import plan_of
from speft_kernels.quantized import PIECE_BYTES

OP = "sparse_delta_matmul"
LEVELS = {8: 127, 4: 7}
FORMS = ((8, None), (8, 16), (4, None), (4, 32))


def written_out(weight):
    """W in float64 by the formula of the class, an entry at a time."""
    rows, columns = weight.shape
    scales = weight.scales.double()
    full = torch.empty(rows, columns, dtype=torch.float64)
    for n in range(rows):
        for k in range(columns):
            if weight.bits == 8:
                q = int(weight.data[n, k])
            else:
                place, word = divmod(k, columns // 4)
                q = (int(weight.data[n, word]) >> 4 * place & 15) - 8
            full[n, k] = q * scales[n, k // weight.group_size]
    return full


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group"), FORMS)
def test_rounds_to_the_nearest_multiple_and_back(bits, group, dtype):
    weight = torch.randn(5, 64).to(dtype)
    weight[3] = 0
    weight[4] *= 1e-3
    packed = QuantizedWeight.quantize(weight, bits, group)
    assert (packed.bits, packed.shape, packed.group_size) == (bits, (5, 64), group or 64)
    exact = written_out(packed)
    groups = weight.double().unflatten(1, (-1, packed.group_size))
    steps = packed.scales.double().unsqueeze(2)
    # A scale is rounded to its dtype, which may leave the largest numbers of a group beyond the
    # last level by that part of them; the others are off by half a step at most.
    eps = torch.finfo(packed.scales.dtype).eps
    allowed = 0.5 * steps + eps * groups.abs()
    assert ((exact.unflatten(1, (-1, packed.group_size)) - groups).abs() <= allowed).all()
    largest = groups.abs().amax(2)
    assert ((packed.scales.double() * LEVELS[bits] - largest).abs() <= eps * largest).all()
    assert packed.scales.dtype == (torch.float32 if dtype == torch.float16 else dtype)

    assert torch.equal(packed.dequantize(torch.float64), exact)
    for wanted in (torch.float32, torch.bfloat16) if dtype != torch.float64 else ():
        # One product in float32, which then is rounded: float64 multiplied exactly.
        assert torch.equal(packed.dequantize(wanted), exact.float().to(wanted))
    assert packed.dequantize().dtype == packed.scales.dtype
    whole = packed.dequantize(dtype)
    for start, stop in ((0, 64), (0, 7), (10, 55), (16, 32), (63, 64)):
        assert torch.equal(packed.columns(slice(start, stop), dtype), whole[:, start:stop])
    assert torch.equal(packed.rows(slice(1, 4), dtype), whole[1:4])


@pytest.mark.parametrize("bits", LEVELS)
def test_every_level_of_every_place_comes_back(bits):
    levels = LEVELS[bits]
    counts = torch.arange(-levels, levels + 1)
    weight = torch.stack([counts.roll(i) for i in range(4)] * 2, 1).reshape(-1, 8).float()
    packed = QuantizedWeight.quantize(weight * 0.5, bits)
    # Rows do not all hold the last level, so compare by the scales that they got.
    again = QuantizedWeight(packed.data, torch.full_like(packed.scales, 0.5))
    assert torch.equal(again.dequantize() / 0.5, written_out(again).float() / 0.5)
    full = torch.cat([weight, torch.full((len(weight), 8), float(levels))], 1)
    assert torch.equal(QuantizedWeight.quantize(full, bits).dequantize(), full)


@pytest.mark.parametrize("bits", LEVELS)
def test_numbers_too_small_for_a_scale(bits):
    """Of the smallest numbers of bfloat16: a scale is one of them, or zero, and then all is."""
    least = 2.0**-133
    weight = torch.randn(50, 16).mul(200 * least).bfloat16()
    weight[0] = 60 * least  # times 1 / 127 or 1 / 7, rounded: 0 or 9
    packed = QuantizedWeight.quantize(weight, bits)
    q = (written_out(packed) / packed.scales.double()).nan_to_num(0)
    assert q.abs().max() <= LEVELS[bits]
    lost = packed.scales[:, 0] == 0
    assert bool(lost.any()) == (bits == 8)
    assert not (packed.data[lost] != 0).any()


def test_pieces_do_not_show(monkeypatch):
    weight = torch.randn(9, 256)
    single = [QuantizedWeight.quantize(row[None], 4, 64) for row in weight]
    monkeypatch.setattr(quantized, "PIECE_BYTES", 4 * 1024)  # four rows
    packed = QuantizedWeight.quantize(weight, 4, 64)
    assert torch.equal(packed.data, torch.cat([one.data for one in single]))
    assert torch.equal(packed.dequantize(), torch.cat([one.dequantize() for one in single]))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_shape_comes_back(data):
    bits = data.draw(st.sampled_from((8, 4)))
    group = 16 * data.draw(st.integers(1, 4))
    columns = group * 4 * data.draw(st.integers(1, 3))
    rows = data.draw(st.integers(0, 5))
    packed = QuantizedWeight.quantize(torch.randn(rows, columns), bits, group)
    assert torch.equal(packed.dequantize(), written_out(packed).float())
    start = data.draw(st.integers(0, columns))
    some = slice(start, data.draw(st.integers(start, columns)))
    assert torch.equal(packed.columns(some, torch.float32), packed.dequantize()[:, some])


def operands(m, pattern, dtype, bits, group):
    n, k = pattern.shape
    packed = QuantizedWeight.quantize(torch.randn(n, k).to(dtype), bits, group)
    exact = packed.dequantize(torch.float64)
    values = torch.randn(pattern.values_shape, dtype=accumulator(dtype))
    exact.view(-1)[pattern.entry_indices.long()] += values.double()
    x, dy, bias = (torch.randn(shape).to(dtype) for shape in ((m, k), (m, n), (n,)))
    return packed, exact, values, x, dy, bias


@pytest.mark.parametrize("kind", ["realistic", "row", "empty"])
@pytest.mark.parametrize(("bits", "group"), FORMS)
@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes(OP))
def test_products_are_as_exact_as_torchs(backend, dtype, bits, group, kind):
    """Against torch's product with W + D written out in the dtype."""
    pattern = make_pattern(kind, 24, 128)
    for m in (1, 20, 140) if kind == "realistic" else (5,):
        packed, exact, values, x, dy, bias = operands(m, pattern, dtype, bits, group)
        rounded = exact.to(dtype)
        y = ops.sparse_delta_matmul(x, packed, values, pattern, bias, backend=backend)
        wanted = exact_product(x.double(), exact.t()) + bias.double().numpy()
        assert_as_exact_as_torch(y, torch.nn.functional.linear(x, rounded, bias), wanted)
        dx = ops.sparse_delta_matmul_grad_input(dy, packed, values, pattern, backend=backend)
        assert_as_exact_as_torch(dx, dy @ rounded, exact_product(dy.double(), exact))
        assert y.dtype == dx.dtype == dtype


def some_of_all_scales(dtype):
    """Of either sign: zero, the smallest and the largest numbers, and some of each magnitude."""
    ints = torch.int16 if dtype.itemsize == 2 else torch.int32
    last = int(torch.tensor(torch.finfo(dtype).max, dtype=dtype).view(ints))
    magnitudes = torch.linspace(0, last, 300, dtype=torch.float64).long()
    ends = torch.arange(20)
    scales = torch.cat([ends, magnitudes, last - ends]).to(ints).view(dtype)
    return torch.cat([scales, -scales])


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("bits", LEVELS)
@pytest.mark.parametrize(
    ("backend", "dtype"), [way for way in backends_and_dtypes(OP) if way[0] == "cuda-host"]
)
def test_every_number_times_any_scale_is_rounded_once(backend, dtype, bits, wide):
    """Bit for bit: a token that is one feature alone reads a column of W."""
    scales = some_of_all_scales(torch.float32 if wide else dtype)
    if bits == 8:
        some = torch.arange(-128, 128, dtype=torch.int8)
    else:  # in each quarter of 16 words
        some = sum((torch.arange(16) + 5 * place) % 16 << 4 * place for place in range(4))
        some = torch.where(some < 1 << 15, some, some - (1 << 16)).to(torch.int16)
    rows, groups = (8, 16) if bits == 8 else (1, 1)
    down = QuantizedWeight(
        some.view(rows, -1).repeat(len(scales), 1), scales.repeat_interleave(rows)[:, None]
    )
    across = QuantizedWeight(
        some.view(groups, 16).repeat(1, len(scales) // (1 if bits == 8 else 4)),
        scales.expand(groups, -1).contiguous(),
    )
    for packed, product, features in (
        (down, ops.sparse_delta_matmul, down.shape[1]),
        (across, ops.sparse_delta_matmul_grad_input, across.shape[0]),
    ):
        pattern, nothing = make_pattern("empty", *packed.shape), torch.zeros(0)
        whole = packed.dequantize(dtype).float()
        if features == packed.shape[1]:
            whole = whole.t()
        # Few tokens at a time, and many.
        alone = torch.cat([torch.eye(features), torch.zeros(33, features)]).to(dtype)
        for x in (*alone[:features].split(32), alone):
            y = product(x, packed, nothing, pattern, backend=backend)
            wanted = (x.float() @ whole).to(dtype)  # NaN where a number beside it is infinite
            torch.testing.assert_close(y, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes(OP))
def test_odd_shapes_and_pieces(backend, dtype, monkeypatch):
    """Neither rows, nor columns or words of columns, are a multiple of anything, and the backends
    that widen a piece at a time take several.
    """
    pieces = importlib.import_module("speft_kernels.ops.dense_pieces")
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1000)
    for bits, columns in ((8, 37), (4, 4 * 37)):
        pattern = make_pattern("uniform", 33, columns)
        packed, exact, values, x, dy, bias = operands(3, pattern, dtype, bits, None)
        y = ops.sparse_delta_matmul(x, packed, values, pattern, bias, backend=backend)
        wanted = exact_product(x.double(), exact.t()) + bias.double().numpy()
        rounded = exact.to(dtype)
        assert_as_exact_as_torch(y, torch.nn.functional.linear(x, rounded, bias), wanted)
        dx = ops.sparse_delta_matmul_grad_input(dy, packed, values, pattern, backend=backend)
        assert_as_exact_as_torch(dx, dy @ exact.to(dtype), exact_product(dy, exact))


@pytest.mark.parametrize("backend", backends(OP))
def test_scales_of_another_dtype(backend):
    pattern = make_pattern("uniform", 16, 32)
    packed, exact, values, x, _, _ = operands(3, pattern, torch.bfloat16, 8, None)
    scales = torch.rand(16, 1) / 127  # no numbers of bfloat16
    packed = QuantizedWeight(packed.data, scales)
    exact = written_out(packed)
    exact.view(-1)[pattern.indices.long()] += values.double()
    y = ops.sparse_delta_matmul(x, packed, values, pattern, backend=backend)
    assert_as_exact_as_torch(y, x @ exact.bfloat16().t(), exact_product(x, exact.t()))


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes(OP))
def test_gradients(backend, dtype):
    if backend not in backends("sampled_grad", dtype):
        pytest.skip(f"{backend} has no sampled_grad")
    pattern = make_pattern("realistic", 24, 128)
    packed, exact, values, x, dy, bias = operands(6, pattern, dtype, 4, 32)
    x, values, bias = (tensor.requires_grad_() for tensor in (x, values, bias))
    ops.sparse_delta_matmul(x, packed, values, pattern, bias, backend=backend).backward(dy)
    assert_as_exact_as_torch(x.grad, dy @ exact.to(dtype), exact_product(dy, exact))
    wide = accumulator(dtype)
    dense = dy.to(wide).t() @ x.detach().to(wide)
    exact = exact_product(dy.t(), x.detach())
    assert_as_exact_as_torch(values.grad, dense, exact, pattern.indices)
    assert_as_exact_as_torch(bias.grad, dy.sum(0), exact_product(torch.ones(6, dtype=dtype), dy))


@pytest.mark.parametrize("backend", backends(OP, torch.float64))
def test_gradients_by_differences(backend):
    pattern = make_pattern("uniform", 6, 8)
    packed = QuantizedWeight.quantize(torch.randn(6, 8, dtype=torch.float64), 4)
    values = torch.randn(pattern.nnz, dtype=torch.float64, requires_grad=True)
    for width, product in (
        (8, ops.sparse_delta_matmul),
        (6, ops.sparse_delta_matmul_grad_input),
    ):
        x = torch.randn(3, width, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(
            lambda x, v, product=product: product(x, packed, v, pattern, backend=backend),
            (x, values),
        )


@pytest.mark.parametrize("backend", backends(OP))
def test_library_contract(backend):
    pattern = make_pattern("uniform", 6, 8)
    for bits in (8, 4):
        packed = QuantizedWeight.quantize(torch.randn(6, 8), bits)
        x, dy = torch.randn(4, 8, requires_grad=True), torch.randn(4, 6, requires_grad=True)
        values = torch.randn(pattern.nnz, requires_grad=True)
        _, indices = delta_arguments(values, pattern, x, packed, backend)
        op, parts = torch.ops.speft.sparse_delta_matmul.default, (packed.data, packed.scales)
        torch.library.opcheck(op, (x, *parts, values, None, *indices, 6, False, backend))
        torch.library.opcheck(op, (dy, *parts, values, None, *indices, 8, True, backend))


def test_torch_widens_a_piece_at_a_time(memory_high_water):
    pattern = SparsePattern((4096, 4096), torch.arange(0, 4096 * 4096, 997))
    packed = QuantizedWeight(torch.ones(4096, 4096, dtype=torch.int8), torch.rand(4096, 1))
    plan, x = plan_of(pattern), torch.randn(8, 4096)
    delta = CompiledDelta(torch.randn(pattern.nnz), plan.csr, *plan.csc)
    serve = implementation(OP, "torch")
    # A piece, its integers as float32, and the torch backend's own panels of D, 4 MB; W is 64 MiB
    # in float32.
    for twin in (False, True):
        grown = memory_high_water(lambda twin=twin: serve(x, packed, delta, None, 4096, twin))
        assert grown < 10 * PIECE_BYTES


def test_moving_and_saying_what_it_is():
    packed = QuantizedWeight.quantize(torch.randn(4, 64), 4, 16)
    assert repr(packed) == (
        "QuantizedWeight(shape=(4, 64), bits=4, group_size=16, scales=torch.float32, device=cpu)"
    )
    moved = packed.to("meta")
    assert moved.device.type == moved.scales.device.type == "meta"
    assert packed.nbytes == 4 * 32 + 4 * 4 * 4


def test_bad_arguments_name_the_fact():
    quantize, weight = QuantizedWeight.quantize, torch.randn(6, 32)
    with pytest.raises(TypeError, match=r"must be floating point, got torch.int32"):
        quantize(weight.int(), 8)
    with pytest.raises(ValueError, match=r"must be \[N, K\], got shape \(32,\)"):
        quantize(weight[0], 8)
    with pytest.raises(ValueError, match="bits must be 8 or 4, got 3"):
        quantize(weight, 3)
    with pytest.raises(ValueError, match="multiple of four columns, got 30"):
        quantize(weight[:, :30], 4)
    with pytest.raises(ValueError, match="groups of 24 do not part 32 columns"):
        quantize(weight, 8, 24)
    with pytest.raises(ValueError, match="multiple of 16 columns, got 8"):
        quantize(weight, 8, 8)
    with pytest.raises(ValueError, match="multiple of 64 columns, got 32"):
        quantize(weight, 4, 16)
    for bad in (torch.nan, torch.inf):
        broken = weight.clone()
        broken[2, 3] = bad
        with pytest.raises(ValueError, match="not finite"):
            quantize(broken, 8)

    data, scales = torch.zeros(6, 32, dtype=torch.int8), torch.ones(6, 1)
    with pytest.raises(TypeError, match="int8, or int16 of four columns each, got torch.uint8"):
        QuantizedWeight(data.view(torch.uint8), scales)
    with pytest.raises(TypeError, match=r"scales must be floating point, got torch.int64"):
        QuantizedWeight(data, scales.long())
    with pytest.raises(ValueError, match="a quantized weight is frozen"):
        QuantizedWeight(data, scales.clone().requires_grad_())
    with pytest.raises(ValueError, match="data is on cpu and scales on meta"):
        QuantizedWeight(data, scales.to("meta"))
    with pytest.raises(ValueError, match=r"data \(6, 32\) and scales \(5, 1\)"):
        QuantizedWeight(data, scales[:5])
    with pytest.raises(ValueError, match=r"got strides \(1, 32\)"):
        QuantizedWeight(data.t(), torch.ones(32, 1))
    with pytest.raises(ValueError, match="32 columns do not part into 3 equal groups"):
        QuantizedWeight(data, torch.ones(6, 3))
    with pytest.raises(ValueError, match="multiple of 16 columns, got 8"):
        QuantizedWeight(data, torch.ones(6, 4))

    pattern = make_pattern("uniform", 6, 32)
    x, values = torch.randn(3, 32), torch.randn(pattern.nnz)
    packed = QuantizedWeight(data, scales)
    few, half = make_pattern("uniform", 5, 32), QuantizedWeight(data, scales.half())
    with pytest.raises(ValueError, match=r"weight has shape \(6, 32\), the pattern is for \(5, 32"):
        ops.sparse_delta_matmul(x, packed, values[: few.nnz], few)
    with pytest.raises(TypeError, match="scales must be torch.bfloat16 or torch.float32 beside"):
        ops.sparse_delta_matmul(x.bfloat16(), half, values, pattern)
    with pytest.raises(ValueError, match="the quantized weight is on meta and x on cpu"):
        ops.sparse_delta_matmul(x, packed.to("meta"), values, pattern)
