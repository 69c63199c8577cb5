"""topk_salience as the GPU kernels do it: all matrices in one call, a sample and its failures."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import backends

from speft_kernels import _cuda_native, ops
from speft_kernels.errors import SalienceError
from speft_kernels.ops.ways import topk_ways

BACKENDS = backends("topk_salience")
needs_triton = pytest.mark.skipif("triton" not in BACKENDS, reason="Triton cannot run here")
# Those that take all matrices of a model in one call.
BATCHED = [name for name in BACKENDS if name in ("triton", "cuda-host")]


def in_triton(weights, grads, k, metric="snip", scope="layer"):
    return ops.topk_salience(weights, grads, k, metric=metric, scope=scope, backend="triton")


def assert_as_reference(
    weights, grads, k, metric="snip", scope="layer", got=None, backend="triton"
):
    if got is None:
        got = ops.topk_salience(weights, grads, k, metric=metric, scope=scope, backend=backend)
    expected = ops.topk_salience(weights, grads, k, metric=metric, scope=scope, backend="reference")
    assert [t.tolist() for t in got] == [t.tolist() for t in expected]


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels that `topk_salience` launches, as it does."""
    modules = [
        pytest.importorskip(f"speft_kernels.triton_kernels.{name}")
        for name in ("topk_salience", "_topk_select")
    ]
    names, launch = [], modules[0].launch

    def counted(kernel, grid, settings, **arguments):
        names.append(kernel.__name__)
        launch(kernel, grid, settings, **arguments)

    for module in modules:
        monkeypatch.setattr(module, "launch", counted)
    return names


SELECT = [*["_digits"] * 4, "_count", "_write"]
QUICK = ["_sample", "_collect", *SELECT]

# More entries than a chunk has, or a sample, or a group of 8, and less; a row and a column.
RAGGED = [(33, 301), (1, 4097), (1, 9), (1500, 1), (16, 64)]


@needs_triton
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize(
    ("dtype", "metric"),
    [(torch.float32, "force"), (torch.bfloat16, "snip"), (torch.float16, "raw")],
)
def test_a_ragged_batch_in_one_call(launches, dtype, metric, scope):
    weights = [torch.randn(s).to(dtype) for s in RAGGED]
    grads = [torch.randn(s).to(dtype) for s in RAGGED]
    batch = in_triton(weights, grads, 0.01, metric, scope)
    assert launches == QUICK  # as many as for one matrix
    assert_as_reference(weights, grads, 0.01, metric, scope, batch)
    if scope == "layer":
        single = [
            in_triton([w], [g], 0.01, metric)[0] for w, g in zip(weights[:2], grads, strict=False)
        ]
        assert all(torch.equal(a, b) for a, b in zip(batch, single, strict=False))


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("backend", BATCHED)
def test_matrices_that_are_not_aligned(backend, scope):
    def shifted(n, k):
        return torch.randn(1 + n * k).bfloat16()[1:].view(n, k)

    pairs = [(shifted(70, 61), shifted(70, 61)), (torch.randn(8, 640).bfloat16(), shifted(8, 640))]
    if backend == "cuda-host":  # its tiles are larger: one that is whole, and not aligned
        pairs.append((torch.randn(181, 182).bfloat16(), shifted(181, 182)))
    weights, grads = zip(*pairs, strict=True)
    assert_as_reference(weights, grads, 0.03, "force", scope, backend=backend)


@pytest.mark.skipif("cuda-host" not in BACKENDS, reason="cuda-host is not built")
@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 180), st.integers(1, 400)), min_size=1, max_size=4),
    st.floats(1e-4, 0.9),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_in_one_launch_as_in_five(shapes, density, dtype, together, ties, seed):
    """Blocks with several tiles each, lists, and data where equal scores leave a list no room."""
    torch.manual_seed(seed)
    weights = [torch.randn(*shape).to(dtype) for shape in shapes]
    grads = [torch.randn(*shape).to(dtype) for shape in shapes]
    if ties:
        weights, grads = ([t.round() for t in side] for side in (weights, grads))
    sizes = [weight.numel() for weight in weights]
    ks = [max(1, round(density * n)) for n in ([sum(sizes)] if together else sizes)]
    scope = "global" if together else "layer"
    for got in topk_ways(weights, grads, ks, together, "cuda-host").values():
        expected = ops.topk_salience(
            weights,
            grads,
            ks[0] if together else density,
            metric="snip",
            scope=scope,
            backend="reference",
        )
        assert [t.tolist() for t in got()] == [t.tolist() for t in expected]


CROWDED = {
    "zeros": torch.zeros(6, 1000),
    "one row": torch.ones(6, 1000).index_fill(0, torch.tensor([4]), 2.0),
    "one bin": 1.0 + torch.arange(6000.0).reshape(6, 1000).flip(0) * 2**-24,
    "subnormal": torch.full((6, 1000), 1e-42),
    "signed zeros": torch.cat([torch.full((3, 1000), -0.0), torch.zeros(3, 1000)]),
    "negative": -torch.arange(6000.0).reshape(6, 1000).remainder(3.0),
}


@needs_triton
@pytest.mark.parametrize(
    ("kind", "k", "scope", "crowded"),
    [
        ("zeros", 1, "global", True),
        ("zeros", 5_999, "layer", False),  # so many are expected that there is room for all
        ("zeros", 6_000, "global", False),
        ("one row", 999, "layer", True),
        ("one row", 1001, "global", True),
        ("one bin", 1000, "layer", False),
        ("subnormal", 3_000, "layer", True),
        ("signed zeros", 2_999, "layer", True),
        ("signed zeros", 3_001, "global", True),
        ("negative", 5, "global", True),
        ("negative", 2_001, "layer", True),
    ],
)
def test_more_equal_scores_than_there_is_room_for(launches, kind, k, scope, crowded):
    """Then all data are counted; else what was set aside is enough."""
    scores = [-10 - torch.rand(3, 70), CROWDED[kind]]
    if scope == "layer":
        scores = scores[1:]
    got = in_triton([None] * len(scores), scores, k, "raw", scope)
    assert launches == (QUICK + SELECT if crowded else QUICK)
    assert_as_reference([None] * len(scores), scores, k, "raw", scope, got)


@needs_triton
def test_a_sample_that_misleads(launches, monkeypatch):
    """A bound that leaves fewer than k entries is seen, and so is one that leaves too many."""
    module = pytest.importorskip("speft_kernels.triton_kernels.topk_salience")
    weights = [torch.randn(30, 40), torch.randn(9, 7), torch.randn(20, 20).round()]
    grads = [torch.randn_like(w) for w in weights]
    for rank, capacity in ((1, 200), (4096, 30)):
        monkeypatch.setattr(
            module,
            "_rank_and_capacity",
            lambda k, size, samples: (rank, capacity),  # noqa: B023
        )
        for scope in ("layer", "global"):
            launches.clear()
            got = in_triton(weights, grads, 20, "snip", scope)
            assert launches == QUICK + SELECT
            assert_as_reference(weights, grads, 20, "snip", scope, got)


@needs_triton
def test_the_sample_follows_its_segment():
    """What it asks for holds on skewed data: most of the large entries in one stretch of one
    matrix, rows of very different scale, many zeros.
    """
    module = pytest.importorskip("speft_kernels.triton_kernels.topk_salience")
    stretch = torch.randn(100, 90)
    stretch[17:19] *= 1000
    rows = torch.randn(100, 90) * torch.logspace(-6, 6, 100)[:, None]
    zeros = torch.randn(100, 90) * (torch.rand(100, 90) < 0.05)
    for together in (False, True):
        grads = [stretch, rows, zeros]
        ks = [135] if together else [45, 45, 45]
        call = module.Call([], grads, ks, together, "gradient")
        call.quickly()
        bad, counts, found = call.status()
        assert bad == [0, 0, 0]
        assert sum(counts) == 135
        for number, k, capacity in zip(found, ks, call.capacities, strict=True):
            assert k <= number <= capacity < stretch.numel() // 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("metric", ["raw", "force", "snip"])
@pytest.mark.parametrize("backend", BATCHED)
def test_subnormal_numbers_and_products(backend, dtype, metric):
    """Numbers of 16 bits and products of them that are subnormal, or vanish, in float32."""
    if dtype == torch.float32:
        numbers = torch.randn(4096) * torch.logspace(-45, -15, 4096)
    else:
        numbers = torch.arange(-(2**15), 2**15, 16).to(torch.int16).view(dtype)
        numbers = numbers[numbers.isfinite()]
    other = torch.tensor([1e-30, -1e-20, 1.0, -1e-38]).to(dtype).repeat(numbers.numel())
    count = numbers.numel() // 2 * 2
    numbers, other = numbers[:count].view(2, -1), other[:count].view(2, -1)
    smallest = (numbers.float() * other.float()).abs()
    assert (smallest == 0).any()
    for k in (count // 3, count // 2, count - 100):
        scores = [other if metric != "raw" else numbers]
        assert_as_reference([numbers], scores, k, metric, backend=backend)


@needs_triton
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_empty_matrices_none_and_all(launches, scope):
    shapes = [(0, 5), (30, 41), (7, 0), (3, 3), (0, 0)]
    grads = [torch.randn(s) for s in shapes]
    none = [None] * len(grads)
    assert_as_reference(none, grads, 0.1, "gradient", scope)
    assert [t.numel() for t in in_triton(none, grads, 0, "gradient", scope)] == [0] * 5
    assert launches == QUICK
    sizes = [g.numel() for g in grads]
    if scope == "global":
        assert [t.numel() for t in in_triton(none, grads, sum(sizes), "raw", scope)] == sizes
    else:
        got = in_triton([None], [grads[1]], sizes[1], "raw")
        assert got[0].tolist() == list(range(sizes[1]))


@pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy, in Triton's interpreter
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_of_several_bad_matrices_is_named(backend):
    """Also where matrices are ranked apart in the order of their dtypes."""
    grads = [torch.randn(40, 30) for _ in range(4)]
    grads[1] = grads[1].bfloat16()
    grads[1][3, 4] = torch.inf
    grads[2][0, 0] = torch.nan
    with pytest.raises(SalienceError, match="matrix 1 has NaN"):
        ops.topk_salience([None] * 4, grads, 5, backend=backend)
    grads[3][39, 29] = -torch.inf
    later = [torch.empty(0, 7), grads[0], grads[2], grads[3]]
    for scope in ("layer", "global"):
        with pytest.raises(SalienceError, match="matrix 2 has NaN"):
            ops.topk_salience([None] * 4, later, 0.1, scope=scope, backend=backend)
    # A product may be out of range where its factors are not.
    weights = [torch.full_like(g, 1e30) for g in grads[:1]]
    with pytest.raises(SalienceError, match="matrix 0 has NaN or infinite"):
        ops.topk_salience(weights, weights, 5, metric="force", backend=backend)


@pytest.mark.parametrize("backend", BATCHED)
@settings(max_examples=12, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 60)), min_size=1, max_size=4),
    levels=st.sampled_from([1, 3, 1000]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    metric=st.sampled_from(ops.METRICS),
    scope=st.sampled_from(["layer", "global"]),
    density=st.floats(0.001, 0.999),
    seed=st.integers(0, 2**31),
)
def test_any_batch_as_the_reference(backend, shapes, levels, dtype, metric, scope, density, seed):
    generator = torch.Generator().manual_seed(seed)

    def some(shape):
        return (torch.randint(-levels, levels + 1, shape, generator=generator) / 8).to(dtype)

    weights, grads = [some(s) for s in shapes], [some(s) for s in shapes]
    assert_as_reference(weights, grads, density, metric, scope, backend=backend)


@needs_triton
def test_both_ways_are_recorded():
    launch = pytest.importorskip("speft_kernels.triton_kernels.launch")
    module = pytest.importorskip("speft_kernels.triton_kernels.topk_salience")
    grads = [torch.randn(30, 40), torch.randn(5, 4)]
    with launch.recording(launch.MACHINES[90]) as recorded:
        indices, counts, bad = module.topk_salience([], grads, [9, 3], False, "raw")
    assert [r.kernel.__name__ for r in recorded] == QUICK + SELECT
    assert (indices.numel(), len(counts), bad) == (12, 2, -1)


needs_cuda_host = pytest.mark.skipif("cuda-host" not in BACKENDS, reason="cuda-host is not built")


def assert_in_cuda(weights, grads, k, metric="raw", scope="layer"):
    assert_as_reference(weights, grads, k, metric, scope, backend="cuda-host")


@pytest.fixture
def over_data(monkeypatch):
    """Of each call of the CUDA kernels how many segments it took from their data, as it is made."""
    calls, launch = [], _cuda_native.launch

    def counted(backend, name, tensor, *arguments):
        calls.append(arguments[-2])
        launch(backend, name, tensor, *arguments)

    monkeypatch.setattr(_cuda_native, "launch", counted)
    return calls


@needs_cuda_host
def test_cuda_finds_the_threshold_of_a_list_of_several_parts(over_data):
    """Scores that differ much, that lie in one tile, in the last bits only, and in a few values."""
    scores = [
        torch.randn(120, 300),
        torch.arange(36_000.0).reshape(120, 300) / 1000,
        1 + torch.randperm(36_000).reshape(120, 300) * 2.0**-20,
        torch.randint(0, 40, (120, 300)) / 40,
    ]
    for some in (*scores, scores[0].bfloat16(), scores[3].half()):
        assert_in_cuda([None], [some], 3_500, "gradient")
    assert over_data == [0] * 6


@needs_cuda_host
def test_cuda_takes_tiles_of_several_groups(over_data):
    """Of 64 tiles; equal scores too many to keep among all of them, and two matrices."""
    scores = [torch.randint(0, 300, (530, 8192)).float(), torch.randint(0, 300, (9, 9)).float()]
    for scope in ("layer", "global"):
        assert_in_cuda([None] * 2, scores, 0.005, "raw", scope)
    assert over_data == [0] * 2


@needs_cuda_host
def test_cuda_takes_more_tiles_than_a_sum_has(over_data):
    """4,096, of a list, and of data of which too many are equal: some of these beyond that tile."""
    apart = torch.rand(4_110, 1, 1)
    equal = (torch.arange(4_110).view(-1, 1, 1) % 6 == 0).float()
    for scores, k in ((apart, 60), (equal, 684)):
        assert_in_cuda([None] * 4_110, list(scores), k, "raw", "global")
    assert over_data == [0, 0, 1]


@needs_cuda_host
@pytest.mark.parametrize("times", [2.0**15, 2.0**17])
def test_cuda_counts_the_data_where_the_kth_score_is_far_beyond_the_bound(over_data, times):
    """The bound is that of some hundred scores, of which a few are much larger."""
    scores = 1 + torch.rand(60_000)
    scores[torch.randperm(60_000)[:30]] *= times
    assert_in_cuda([None], [scores.view(200, -1)], 20)
    assert over_data == ([0] if times == 2.0**15 else [0, 1])


@needs_cuda_host
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize(
    ("dtype", "metric"),
    [(torch.float32, "force"), (torch.bfloat16, "snip"), (torch.float16, "raw")],
)
def test_cuda_takes_a_ragged_batch(dtype, metric, scope):
    """Several tiles and a part of one, fewer entries than are sampled, none."""
    shapes = [*RAGGED, (0, 7), (90, 390), (7, 0)]
    weights = [torch.randn(s).to(dtype) for s in shapes]
    grads = [torch.randn(s).to(dtype) for s in shapes]
    assert_in_cuda(weights, grads, 0.01, metric, scope)
    assert_in_cuda(weights, grads, 0.9, metric, scope)  # more than is set aside


@needs_cuda_host
@pytest.mark.parametrize("kind", CROWDED)
def test_cuda_counts_the_data_where_equal_scores_leave_no_room(over_data, kind):
    """In one segment, while the others take what was set aside."""
    few = -10 - torch.rand(30, 100)
    for k in (1, 999, 2_999):
        assert_in_cuda([None] * 2, [few, CROWDED[kind]], k)
    assert sum(map(bool, over_data)) == (2 if kind == "one bin" else 3)
    for k in (999, 6_000, 6_003):
        assert_in_cuda([None] * 2, [few, CROWDED[kind]], k, scope="global")


@needs_cuda_host
def test_cuda_sees_that_its_sample_misleads():
    """Where every sampled entry is larger than all others, the bound leaves fewer than k."""
    samples, width = 2048, 4
    mixed = torch.arange(samples) * 0x9E3779B1 & 0xFFFFFFFF
    mixed = (mixed ^ mixed >> 15) * 0x85EBCA6B & 0xFFFFFFFF
    mixed = mixed ^ mixed >> 13
    scores = torch.rand(samples * width)
    scores[torch.arange(samples) * width + (mixed * width >> 32)] += 1
    assert_in_cuda([None], [scores.view(8, -1)], 900)


@needs_cuda_host
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_cuda_takes_none_and_all(scope):
    grads = [torch.randn(s) for s in [(0, 5), (30, 41), (7, 0), (3, 3), (70, 130)]]
    none, sizes = [None] * len(grads), [g.numel() for g in grads]
    got = ops.topk_salience(none, grads, 0, scope=scope, backend="cuda-host")
    assert [t.numel() for t in got] == [0] * len(grads)
    if scope == "global":
        got = ops.topk_salience(none, grads, sum(sizes), scope=scope, backend="cuda-host")
        assert [t.tolist() for t in got] == [list(range(size)) for size in sizes]
    else:
        assert_in_cuda([None], grads[-1:], sizes[-1])
