"""topk_salience: exact, sorted, ties to the lowest index; the same on every backend."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import backends, backends_and_dtypes

from speft_kernels import ops
from speft_kernels.errors import BackendError, SalienceError

BACKENDS = backends("topk_salience")

SCORES = {
    "magnitude": lambda w, g: w.abs(),
    "gradient": lambda w, g: g.abs(),
    "snip": lambda w, g: (w * g).abs(),
    "force": lambda w, g: -(w * g),
    "taylor_fo": lambda w, g: (w * g).abs(),  # the order of (w * g)^2
    "raw": lambda w, g: g,
}


def wide(tensor):
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def by_sorting(weights, grads, k, metric, scope):
    """The definition: a stable sort of (score descending, index ascending)."""
    scores = [
        SCORES[metric](wide(w), wide(g)).flatten() for w, g in zip(weights, grads, strict=True)
    ]
    if scope == "layer":
        counts = [k if isinstance(k, int) else max(1, round(k * s.numel())) for s in scores]
        flat = [score.tolist() for score in scores]
        return [
            sorted(range(len(s)), key=lambda i, s=s: (-s[i], i))[:c]
            for s, c in zip(flat, counts, strict=True)
        ]
    places = [(-v, i, j) for i, s in enumerate(scores) for j, v in enumerate(s.tolist())]
    total = k if isinstance(k, int) else max(1, round(k * len(places)))
    chosen = sorted(places)[:total]
    return [[j for _, i, j in chosen if i == m] for m in range(len(scores))]


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("metric", ops.METRICS)
@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes("topk_salience"))
def test_every_metric_against_a_sort(backend, dtype, metric, scope):
    shapes = [(20, 30), (1, 9), (40, 7)]
    weights = [torch.randn(s).to(dtype) for s in shapes]
    # Rounded gradients: many ties, zeros of both signs among them.
    exact = [torch.randn(s).to(dtype) for s in shapes]
    rounded = [torch.randn(s).round().to(dtype) for s in shapes]
    # Triton's interpreter takes 0.1 s for each matrix and k.
    few = {"exact": (0.05,), "rounded": (9, 0.999)}
    for grads, name in ((exact, "exact"), (rounded, "rounded")):
        for k in few[name] if backend == "triton" else (0, 1, 9, 0.05, 0.999):
            got = ops.topk_salience(weights, grads, k, metric=metric, scope=scope, backend=backend)
            expected = by_sorting(weights, grads, k, metric, scope)
            assert [t.tolist() for t in got] == [sorted(e) for e in expected]
            assert all(t.dtype == torch.int32 for t in got)


any_finite_scores = given(
    values=st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=60
    ),
    data=st.data(),
)


@settings(max_examples=60, deadline=None)
@any_finite_scores
def test_any_finite_scores(values, data):
    assert_selected(values, data, [name for name in BACKENDS if name != "triton"])


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton cannot run here")
@settings(max_examples=20, deadline=None)  # its interpreter takes 0.1 s a call
@any_finite_scores
def test_any_finite_scores_in_triton(values, data):
    assert_selected(values, data, ["triton"])


def assert_selected(values, data, names):
    k = data.draw(st.integers(0, len(values)))
    cut = data.draw(st.integers(0, len(values)))
    parts = [
        torch.tensor(p, dtype=torch.float32).reshape(1, -1) for p in (values[:cut], values[cut:])
    ]
    none = [None, None]
    expected = by_sorting(parts, parts, k, "raw", "global")
    for backend in names:
        got = ops.topk_salience(none, parts, k, metric="raw", scope="global", backend=backend)
        assert [t.tolist() for t in got] == [sorted(e) for e in expected]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "scores",
    [
        torch.zeros(300, 1000),
        torch.ones(300, 1000).index_fill(0, torch.tensor([7]), 2.0),
        # All in one 12-bit bin, so that every digit has to be counted.
        1.0 + torch.rand(300, 1000) * 2**-10,
        torch.full((300, 1000), 1e-42),
        torch.cat([torch.full((150, 1000), -0.0), torch.zeros(150, 1000)]),
    ],
    ids=["zeros", "one row", "one bin", "subnormal", "signed zeros"],
)
def test_crowded_bins(scores, dtype):
    scores = scores.to(dtype)
    order = torch.argsort((scores + 0.0).flatten(), descending=True, stable=True)
    for k in (1, 999, 1001, 150_000, 300_000):
        expected = order[:k].sort().values.int()
        for threads in (1, 3):
            torch.set_num_threads(threads)
            got = ops.topk_salience([None], [scores], k, metric="raw", backend="cpu")[0]
            assert torch.equal(got, expected)


def test_threads_do_not_change_the_choice():
    weights = [torch.randn(700, 300), torch.randn(5, 4), torch.randn(900, 200).round()]
    grads = [torch.randn_like(w) for w in weights]
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(ops.topk_salience(weights, grads, 0.01, metric="snip", scope="global"))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_scores_name_the_matrix(backend, bad):
    weights = [torch.randn(30, 40) for _ in range(3)]
    grads = [torch.randn(30, 40) for _ in range(3)]
    grads[1][29, 39] = bad
    for scope in ("layer", "global"):
        with pytest.raises(SalienceError, match=r"gradient score of encoder\.1 has NaN or inf"):
            ops.topk_salience(
                weights,
                grads,
                5,
                scope=scope,
                names=["encoder.0", "encoder.1", "encoder.2"],
                backend=backend,
            )
    with pytest.raises(SalienceError, match="matrix 1"):
        ops.topk_salience(weights, grads, 5, metric="snip", backend=backend)


def test_no_score_tensor_exists(memory_high_water):
    weight, grad = torch.randn(2048, 4096), torch.randn(2048, 4096)

    def select():
        return ops.topk_salience([weight], [grad], 0.005, metric="snip", backend="cpu")

    # 16 bytes for each of at most 2 k candidates (1.3 MB), int64 indices; a score would be 32 MiB.
    assert memory_high_water(select) < 8 << 20


@pytest.mark.parametrize("backend", BACKENDS)
def test_library_contract(backend):
    weights, grads = [torch.randn(6, 5), torch.randn(2, 3)], [torch.randn(6, 5), torch.randn(2, 3)]
    torch.library.opcheck(
        torch.ops.speft.topk_salience.default, (weights, grads, [7], True, "snip", backend)
    )


def test_mixed_dtypes_strides_and_absent_operands():
    weight, grad = torch.randn(30, 40).bfloat16(), torch.randn(30, 40)
    mixed = ops.topk_salience([weight], [grad], 9, metric="snip")[0]
    assert torch.equal(mixed, ops.topk_salience([weight.float()], [grad], 9, metric="snip")[0])
    strided = ops.topk_salience([None], [grad.t().contiguous().t()], 9)[0]
    assert torch.equal(strided, ops.topk_salience([None], [grad], 9)[0])
    assert ops.topk_salience([], [], 9) == []
    assert ops.topk_salience([weight], [None], 9, metric="magnitude")[0].numel() == 9


def test_ranked_apart_matrices_may_differ_in_dtype():
    matrices = [torch.randn(3, 4), torch.randn(3, 4).bfloat16()]
    assert [t.numel() for t in ops.topk_salience([None] * 2, matrices, 5)] == [5, 5]
    with pytest.raises(ValueError, match="ranked together must share dtype and device"):
        ops.topk_salience([None] * 2, matrices, 5, scope="global")


def test_bad_arguments_name_the_fact():
    w, g = torch.randn(3, 4), torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"unknown metric 'gradiant'. Did you mean 'gradient'\?"):
        ops.topk_salience([w], [g], 1, metric="gradiant")
    with pytest.raises(ValueError, match="unknown scope 'layers'"):
        ops.topk_salience([w], [g], 1, scope="layers")
    with pytest.raises(ValueError, match="k = 13 does not fit head, which has 12 entries"):
        ops.topk_salience([w], [g], 13, names=["head"])
    with pytest.raises(ValueError, match="k = 25 does not fit all matrices together"):
        ops.topk_salience([w, w], [g, g], 25, scope="global")
    for density in (0.0, 1.0, -0.5, float("nan")):
        with pytest.raises(ValueError, match=r"a density must lie in \(0, 1\)"):
            ops.topk_salience([w], [g], density)
    with pytest.raises(TypeError, match="k must be an int or a density"):
        ops.topk_salience([w], [g], "5")
    with pytest.raises(ValueError, match="needs a weight for matrix 0"):
        ops.topk_salience([None], [g], 1, metric="snip")
    with pytest.raises(ValueError, match=r"weight has shape \(3, 4\), gradient \(4, 3\)"):
        ops.topk_salience([w], [g.t()], 1, metric="snip")
    with pytest.raises(TypeError, match="the gradient of matrix 0 must be one of"):
        ops.topk_salience([None], [g.int()], 1)
    for k in (0, 1):
        with pytest.raises(BackendError, match="not a backend"):
            ops.topk_salience([w], [g], k, backend="gpu")


# Two of these multiply to less than half of the smallest number that is summed in.
SMALL = {torch.float32: 1e-30, torch.bfloat16: 1e-30, torch.float64: 1e-170}


@pytest.mark.parametrize("metric", ["force", "snip"])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [pair for pair in backends_and_dtypes("topk_salience") if pair[1] in SMALL],
)
def test_products_that_underflow_are_equal_whatever_their_sign(backend, dtype, metric):
    w = torch.tensor([[1.0, -1.0] * 40], dtype=dtype) * SMALL[dtype]
    g = torch.full_like(w, SMALL[dtype])
    (found,) = ops.topk_salience([w], [g], 3, metric=metric, backend=backend)
    assert found.tolist() == [0, 1, 2]  # the first of equal ones
