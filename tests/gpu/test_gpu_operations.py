"""The other operations on a GPU against float64, or bit for bit where they only move numbers."""

import itertools

import pytest
import torch
from kernels import accumulator, make_pattern
from rig import (
    DEVICE,
    DRY,
    EVERY_DTYPE,
    KINDS,
    LLAMA,
    SHAPES,
    backends,
    backends_and_dtypes,
    largest,
    randn,
    wide_product,
)
from torch.nn import functional as F

from speft_kernels import SparsePattern, SparsityPlan, ops
from speft_kernels._cuda_native import MODULES
from speft_kernels.bench.gpu.bounds import summation_bound
from speft_kernels.errors import SalienceError
from speft_kernels.ops.keep_columns import unpack
from speft_kernels.ops.ways import topk_ways
from speft_kernels.plan import plan_of

BLOCKS = ((4, 4), (1, 8)) if DRY else ((4, 4), (16, 16), (32, 32), (1, 64), (64, 1), (8, 24))
TOKENS = (0, 9) if DRY else (0, 1, 19, 700, 3000)


def block_pattern(n, k, block, share=0.2):
    grid = (n // block[0]) * (k // block[1])
    chosen = torch.randperm(grid)[: max(1, round(share * grid))]
    return SparsePattern.from_blocks((n, k), block, chosen).to(DEVICE)


# block_grad


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes("block_grad"))
def test_block_grad(contract, backend, dtype, block):
    n, k = (32, 24) if DRY else (128, 192)
    cases = [(m, block_pattern(n, k, block)) for m in TOKENS]
    # The projection of a Llama, cut to what the blocks tile.
    large = (size // side * side for size, side in zip(LLAMA[1:], block, strict=True))
    cases.append((LLAMA[0], block_pattern(*large, block, 0.02)))
    for m, pattern in cases:
        dy, x = (randn(m, size, dtype=dtype) for size in pattern.shape)
        plan = plan_of(pattern)
        theirs, exact = wide_product(dy.t(), x), dy.double().t() @ x.double()
        kept = ops.keep_columns(x, plan)
        facts = {"terms": m, "operands": dtype, "entries": pattern.entry_indices}
        for packed, operand in ((False, x), (True, kept)):
            ours = ops.block_grad(dy, operand, pattern, packed=packed, backend=backend)
            assert ours.dtype == torch.float32
            contract("block_grad", backend, ours, theirs, exact, **facts)


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes("block_grad"))
def test_block_grad_accumulates_and_takes_strides(backend, dtype):
    pattern = block_pattern(64, 48, (16, 8))
    dy, x = randn(2, 15, 64, dtype=dtype), randn(2, 15, 48, dtype=dtype)
    alone = ops.block_grad(dy, x, pattern, backend=backend)
    out = torch.full_like(alone, torch.nan)
    assert ops.block_grad(dy, x, pattern, out=out, backend=backend) is out
    assert torch.equal(out, alone)
    ops.block_grad(dy, x, pattern, out=out, accumulate=True, backend=backend)
    bound = 2 * summation_bound(60, 2 * largest(alone), dtype)
    assert largest(out - 2 * alone) <= bound
    wide = randn(2, 15, 50, dtype=dtype)[..., 1:49].copy_(x)
    got = ops.block_grad(dy.mT.contiguous().mT, wide, pattern, backend=backend)
    assert largest(got - alone) <= bound
    empty = SparsePattern.from_blocks((64, 48), (16, 8), torch.empty(0, dtype=torch.int64))
    assert ops.block_grad(dy, x, empty.to(DEVICE), backend=backend).shape == (0, 16, 8)


# keep_columns


@pytest.mark.parametrize("kind", ["uniform", "realistic", "column", "empty"])
@pytest.mark.parametrize(
    ("backend", "dtype"), backends_and_dtypes("keep_columns", dtypes=EVERY_DTYPE)
)
def test_keep_columns(backend, dtype, kind):
    for m, n, k in (*SHAPES, LLAMA):
        pattern = make_pattern("realistic" if kind == "uniform" else kind, n, k).to(DEVICE)
        keep = pattern.used_cols
        if kind == "uniform":  # in no order
            keep = keep[torch.randperm(keep.numel(), device=DEVICE)]
        plan = SparsityPlan.build(pattern, keep=keep)
        if plan.kept_columns is None:
            continue
        x = randn(m, k, dtype=dtype)
        wide = randn(m, k + 3, dtype=dtype)[:, 1:-2].copy_(x)
        for view in (x, wide, x.t().contiguous().t()):
            kept = ops.keep_columns(view, plan, backend=backend)
            assert torch.equal(unpack(kept, m), x[:, plan.kept_columns.long()])
            assert not unpack(kept, kept.shape[0] * kept.shape[2])[m:].any()


# sparse_delta_matmul


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes("sparse_delta_matmul"))
def test_sparse_delta_matmul(contract, backend, dtype, kind):
    shapes = [*SHAPES, LLAMA] if DRY else [*SHAPES, LLAMA, (1, *LLAMA[1:]), (16, *LLAMA[1:])]
    for m, n, k in shapes:
        pattern = make_pattern(kind, n, k).to(DEVICE)
        places = pattern.entry_indices.long()
        x, dy, weight = (randn(*s, dtype=dtype) for s in ((m, k), (m, n), (n, k)))
        bias, values = randn(n, dtype=dtype), randn(pattern.nnz)
        kept, exact_weight = weight.clone(), weight.double()
        exact_weight.view(-1)[places] += values.double()
        rounded = exact_weight.to(dtype)

        y = ops.sparse_delta_matmul(x, weight, values, pattern, bias, backend=backend)
        exact = x.double() @ exact_weight.t() + bias.double()
        theirs = F.linear(x, rounded, bias)
        contract("sparse_delta_matmul", backend, y, theirs, exact, terms=k, operands=dtype)
        dx = ops.sparse_delta_matmul_grad_input(dy, weight, values, pattern, backend=backend)
        exact = dy.double() @ exact_weight
        contract("sparse_delta_matmul", backend, dx, dy @ rounded, exact, terms=n, operands=dtype)
        assert y.dtype == dx.dtype == dtype
        assert torch.equal(weight, kept)


@pytest.mark.parametrize("m", [5] if DRY else [5, 100, 700])
@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes("sparse_delta_matmul"))
def test_a_weight_in_other_strides(contract, backend, dtype, m):
    n, k = (33, 24) if DRY else (130, 264)
    pattern = make_pattern("uniform", n, k).to(DEVICE)
    x, dy, weight = (randn(*shape, dtype=dtype) for shape in ((m, k), (m, n), (n, k)))
    values, exact = randn(pattern.nnz), weight.double()
    exact.view(-1)[pattern.entry_indices.long()] += values.double()
    rounded = exact.to(dtype)
    for view in (
        weight.t().contiguous().t(),
        randn(n, k + 11, dtype=dtype)[:, 3:-8].copy_(weight),
        weight.repeat_interleave(2, 1)[:, ::2],
    ):
        assert torch.equal(view, weight)
        assert not view.is_contiguous()
        y = ops.sparse_delta_matmul(x, view, values, pattern, backend=backend)
        facts = {"terms": k, "operands": dtype}
        contract(
            "sparse_delta_matmul", backend, y, x @ rounded.t(), x.double() @ exact.t(), **facts
        )
        dx = ops.sparse_delta_matmul_grad_input(dy, view, values, pattern, backend=backend)
        facts["terms"] = n
        contract("sparse_delta_matmul", backend, dx, dy @ rounded, dy.double() @ exact, **facts)


@pytest.mark.parametrize("backend", backends("sparse_delta_matmul"))
def test_delta_alone_and_strides(backend):
    pattern = make_pattern("uniform", 33, 17).to(DEVICE)
    x, values = randn(3, 3, 17), randn(pattern.nnz)
    dense = torch.zeros(33, 17, device=DEVICE)
    dense.view(-1)[pattern.entry_indices.long()] = values
    wanted = x.double() @ dense.double().t()
    bound = 2 * summation_bound(17, largest(wanted), torch.float32)
    for view in (x, randn(3, 3, 20)[..., 2:19].copy_(x)):
        y = ops.delta_matmul(view, values, pattern, backend=backend)
        assert largest(y.double() - wanted) <= bound


# write_delta


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("backend", "dtype"), backends_and_dtypes("write_delta", dtypes=EVERY_DTYPE)
)
def test_write_delta(backend, dtype, kind):
    """Several weights in one call, written as torch rounds, and put back bit for bit."""
    shapes = ((33, 17), (40, 24), LLAMA[1:])
    patterns = [make_pattern(kind, *shape).to(DEVICE) for shape in shapes]
    patterns.append(block_pattern(32, 24, (4, 8)))
    weights = [randn(*pattern.shape, dtype=dtype) for pattern in patterns]
    original = [weight.clone() for weight in weights]
    places = [pattern.entry_indices.long() for pattern in patterns]
    base = [
        weight.view(-1)[place].reshape(pattern.values_shape)
        for weight, place, pattern in zip(weights, places, patterns, strict=True)
    ]
    wide = accumulator(dtype)
    values = [randn(*pattern.values_shape, dtype=wide) for pattern in patterns]
    wanted = [weight.clone() for weight in weights]
    for weight, place, taken, value in zip(wanted, places, base, values, strict=True):
        weight.view(-1)[place] = (taken.to(wide) + value).to(dtype).reshape(-1)
    for _ in range(2):
        ops.write_deltas(weights, patterns, base, values, backend=backend)
        assert all(map(torch.equal, weights, wanted))
    ops.write_deltas(weights, patterns, base, None, backend=backend)
    assert all(map(torch.equal, weights, original))


@pytest.mark.parametrize("backend", backends("write_delta"))
def test_write_delta_beyond_int32(backend):
    if DRY:
        pytest.skip("4 GiB")
    pattern = SparsePattern((1 << 16, 1 << 15), torch.tensor([5, (1 << 31) - 1])).to(DEVICE)
    assert pattern.entry_indices.dtype == torch.int64
    weight = torch.zeros(pattern.shape, dtype=torch.bfloat16, device=DEVICE)
    base = torch.zeros(2, dtype=torch.bfloat16, device=DEVICE)
    values = torch.tensor([1.0, 2.0], device=DEVICE)
    ops.write_delta(weight, pattern, base, values, backend=backend)
    assert [weight[0, 5].item(), weight[-1, -1].item()] == [1.0, 2.0]
    assert int(weight.count_nonzero()) == 2


# topk_salience

SCORES = {
    "magnitude": lambda w, g: w.abs(),
    "gradient": lambda w, g: g.abs(),
    "snip": lambda w, g: (w * g).abs(),
    "force": lambda w, g: -(w * g),
    "taylor_fo": lambda w, g: (w * g).abs(),
    "raw": lambda w, g: g,
}


def by_sorting(weights, grads, k, metric):
    """The definition: a stable sort of all scores, which puts the lowest index first."""
    pairs = zip(weights, grads, strict=True)
    scores = [SCORES[metric](w.float(), g.float()).flatten() + 0.0 for w, g in pairs]
    order = torch.sort(torch.cat(scores), descending=True, stable=True).indices[:k].sort().values
    starts = torch.tensor([0, *(s.numel() for s in scores)]).cumsum(0).tolist()
    return [
        order[(order >= start) & (order < stop)] - start
        for start, stop in itertools.pairwise(starts)
    ]


@pytest.mark.parametrize("metric", ["snip", "force"] if DRY else ops.METRICS)
@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes("topk_salience"))
def test_topk_salience(backend, dtype, metric):
    shapes = [(20, 30), (1, 9), (40, 7)] if DRY else [(20, 30), (1, 9), (700, 300), (1024, 2048)]
    weights = [randn(*shape, dtype=dtype) for shape in shapes]
    total = sum(weight.numel() for weight in weights)
    for grads in (
        [randn(*shape, dtype=dtype) for shape in shapes],
        [randn(*shape).round().to(dtype) for shape in shapes],  # many ties, zeros of both signs
        [torch.zeros_like(weight) for weight in weights],  # nothing but ties
    ):
        for k in (1, 9, total // 200, total - 1):
            settings = {"metric": metric, "scope": "global", "backend": backend}
            got = ops.topk_salience(weights, grads, k, **settings)
            wanted = by_sorting(weights, grads, k, metric)
            for found, expected in zip(got, wanted, strict=True):
                assert torch.equal(found.long(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", [b for b in backends("topk_salience") if b in MODULES])
def test_topk_salience_in_either_number_of_launches(backend, dtype):
    """Fewer tiles than a GPU holds blocks, and several for each of them."""
    for shapes in ([(20, 30), (1, 9)], [(90, 401)] if DRY else [(700, 300), (4096, 8192)]):
        weights = [randn(*shape, dtype=dtype) for shape in shapes]
        grads = [randn(*shape, dtype=dtype) for shape in shapes]
        k = sum(weight.numel() for weight in weights) // 200
        wanted = by_sorting(weights, grads, k, "snip")
        for select in topk_ways(weights, grads, [k], True, backend).values():
            for found, expected in zip(select(), wanted, strict=True):
                assert torch.equal(found, expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("backend", backends("topk_salience"))
def test_non_finite_scores_name_the_matrix(backend, bad):
    weights, grads = ([randn(30, 40) for _ in range(3)] for _ in range(2))
    grads[1][29, 39] = bad
    for scope in ("layer", "global"):
        with pytest.raises(SalienceError, match=r"gradient score of matrix 1 has NaN or inf"):
            ops.topk_salience(weights, grads, 5, scope=scope, backend=backend)
