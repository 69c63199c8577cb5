"""write_delta in Triton: one launch for all weights, and its kept tables of addresses."""

from types import SimpleNamespace

import pytest
import torch
from kernels import backends, make_pattern
from written import make_weights, take

from speft_kernels import SparsePattern, ops

triton_only = pytest.mark.skipif(
    "triton" not in backends("write_delta"), reason="Triton is not here"
)


@pytest.fixture
def triton_kernels():
    """The module of the Triton kernels, without tables of earlier calls."""
    from speft_kernels.triton_kernels import write_delta

    write_delta._tables.clear()
    return write_delta


@pytest.fixture
def tables(triton_kernels, monkeypatch):
    """The tables that are built from here on."""
    built = []
    build = triton_kernels._build

    def counted(*args):
        built.append(build(*args))
        return built[-1]

    monkeypatch.setattr(triton_kernels, "_build", counted)
    return built


def launches(some, values):
    from speft_kernels.triton_kernels.launch import MACHINES, recording

    with recording(MACHINES[90]) as recorded:
        ops.write_deltas(*some[:3], values, backend="triton")
    return recorded


@triton_only
def test_all_weights_are_one_launch_or_one_for_each_type_of_index():
    some = make_weights(torch.bfloat16)
    for values in (some.values, None):
        (launched,) = launches(some, values)
        block = launched.settings.block
        assert launched.grid == (sum(-(-p.nnz // block) for p in some.patterns),)
    wide = SparsePattern((1 << 16, 1 << 15), torch.tensor([5, (1 << 31) - 1]))
    weight = torch.empty(wide.shape, dtype=torch.bfloat16)
    more = (weight, wide, torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2))
    mixed = [[*of, extra] for of, extra in zip(some, more, strict=True)]
    assert [launched.grid for launched in launches(mixed, mixed[3])] == [launched.grid, (1,)]
    empty = make_pattern("empty", 7, 7)
    nothing = ([torch.zeros(7, 7)], [empty], [torch.zeros(0)], [torch.zeros(0)])
    assert launches(nothing, nothing[3]) == []


@triton_only
def test_every_setting_writes_the_same(triton_kernels, monkeypatch):
    """Weights of several programs and of a part of one, in each setting that tuning would try."""
    some = make_weights(torch.float32, [(64, 48), (1, 3), (130, 71), (1, 1)])
    wanted = [weight.clone() for weight in some.weights]
    ops.write_deltas(wanted, *some[1:], backend="reference")
    candidates = list(triton_kernels.WriteLaunch.candidates())
    assert triton_kernels.WriteLaunch() in candidates
    assert triton_kernels.WriteLaunch(block=128) in candidates
    for settings in {one.block: one for one in candidates}.values():
        monkeypatch.setattr(triton_kernels.WriteLaunch, "default", lambda *_, s=settings: s)
        weights = [weight.clone() for weight in some.weights]
        ops.write_deltas(weights, *some[1:], backend="triton")
        assert all(map(torch.equal, weights, wanted))


@triton_only
def test_addresses_are_looked_up_once(tables):
    some = make_weights(torch.float32)
    for values in (some.values, None):
        for _ in range(3):
            ops.write_deltas(*some[:3], values, backend="triton")
    assert len(tables) == 2


@triton_only
def test_the_default_device_plays_no_part(tables):
    some = make_weights(torch.float32)
    wanted = [weight.clone() for weight in some.weights]
    ops.write_deltas(wanted, *some[1:], backend="reference")
    with torch.device("meta"):
        ops.write_deltas(*some, backend="triton")
    assert len(tables) == 1
    assert all(map(torch.equal, some.weights, wanted))


@triton_only
@pytest.mark.parametrize("what", ["weights", "base", "values", "indices", "sizes"])
def test_no_call_reads_a_table_of_other_tensors(tables, what):
    """What a table was made from changes, one thing at a time."""
    some = make_weights(torch.float32, [(64, 48), (20, 30), (9, 11)])
    ops.write_deltas(*some, backend="triton")
    weights, patterns, base, values = (list(of) for of in some)
    if what == "weights":
        weights[2] = weights[2].clone()
    elif what == "base":
        base[2] = base[2] + 1
    elif what == "values":
        values[2] = values[2] + 1
    elif what == "indices":
        size = patterns[0].nnz
        patterns[0] = SparsePattern.from_indices((64, 48), torch.randperm(64 * 48)[:size])
    else:
        patterns[2] = SparsePattern((9, 11), patterns[2].indices[:-1])
        # The same addresses: only the sizes tell the calls apart.
        object.__setattr__(patterns[2], "indices", some.patterns[2].indices[:-1])
        base[2], values[2] = base[2][:-1], values[2][:-1]
    for weight in some.weights + weights:
        weight.fill_(7)
    ops.write_deltas(weights, patterns, base, values, backend="triton")
    for weight, pattern, b, v in zip(weights, patterns, base, values, strict=True):
        assert torch.equal(take(weight, pattern), b + v)
        assert (weight[~pattern.mask()] == 7).all()
    assert len(tables) == 2


@triton_only
def test_tables_of_other_dtypes_sizes_of_blocks_and_streams_are_apart(triton_kernels, monkeypatch):
    made = []
    monkeypatch.setattr(triton_kernels, "_to", lambda device, table: made.append(table) or table)
    addresses, sizes, steps = ((16,), (32,), (64,), (128,)), (300,), (0, 4, 2, 4)
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    streams = [SimpleNamespace(cuda_stream=i) for i in (1, 2)]
    for stream in (*streams, streams[0]):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device, stream=stream: stream)
        table = triton_kernels._table(addresses, sizes, steps, 128, device)
    assert len(made) == 2
    assert table is made[0]
    assert table.tolist() == [
        [16, 32, 64, 128, 300],
        [16, 32 + 128 * 4, 64 + 128 * 2, 128 + 128 * 4, 172],
        [16, 32 + 256 * 4, 64 + 256 * 2, 128 + 256 * 4, 44],
    ]
    triton_kernels._table(addresses, sizes, (0, 8, 2, 4), 128, device)
    triton_kernels._table(addresses, sizes, steps, 256, device)
    assert len(made) == 4


@triton_only
def test_a_cuda_graph_takes_a_table_that_is_there_and_is_never_dropped(
    triton_kernels, tables, monkeypatch
):
    addresses, sizes, steps = ((16,), (32,), (64,), (128,)), (300,), (0, 4, 2, 4)
    device = torch.device("cuda", 0)
    monkeypatch.setattr(triton_kernels, "_to", lambda device, table: table)
    monkeypatch.setattr(triton_kernels, "_captured", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="must have run once with these very tensors before"):
        triton_kernels._table(addresses, sizes, steps, 128, device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    stream = SimpleNamespace(cuda_stream=5)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    table = triton_kernels._table(addresses, sizes, steps, 128, device)
    other = triton_kernels._table(addresses, sizes, steps, 256, device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert triton_kernels._table(addresses, sizes, steps, 128, device) is table
    kept = list(triton_kernels._captured.values())
    assert any(t is table for t in kept)
    assert not any(t is other for t in kept)


@triton_only
def test_few_tables_are_kept_and_the_last_used_ones(triton_kernels, tables):
    device = torch.device("cpu")

    def use(address):
        return triton_kernels._table(((address,),) * 4, (1,), (0, 4, 4, 4), 128, device)

    first = use(0)
    for address in range(1, 3 * triton_kernels.TABLES):
        use(address)
        assert use(0) is first
    assert len(triton_kernels._tables) == triton_kernels.TABLES
    assert len(tables) == 3 * triton_kernels.TABLES
