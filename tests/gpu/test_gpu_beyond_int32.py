"""Offsets that do not fit into 32 bits, on a GPU: of far rows, of a whole weight, of what is
packed, of scores. Each test takes 4 to 9 GB; a dry run goes through them at tiny sizes.
"""

import far
import pytest
import torch
from rig import DEVICE, DRY, fast_backends, largest, randn

from speft_kernels import SparsePattern, SparsityPlan, ops
from speft_kernels.bench.gpu.bounds import summation_bound
from speft_kernels.ops.keep_columns import unpack

BF16 = torch.bfloat16
BEYOND = 1 << 31


def kernels(op):
    """Not torch's operators: they take copies that are as large, and are not ours to judge."""
    return [name for name in fast_backends(op) if name != "torch"]


@pytest.fixture(autouse=True)
def _given_back():
    yield
    if not DRY:
        torch.cuda.empty_cache()  # the other processes' tests share the memory


@pytest.mark.parametrize(
    ("name", "backend"),
    [(name, backend) for name, case in far.CASES.items() for backend in fast_backends(case.op)],
)
def test_rows_far_apart(name, backend):
    if DRY:
        pytest.skip("tests/test_beyond_int32.py does this on a CPU")
    far.CASES[name].check(backend, DEVICE)


@pytest.mark.parametrize("tokens", [16, 200])
@pytest.mark.parametrize("backend", kernels("sparse_delta_matmul"))
def test_a_weight_of_more_entries(backend, tokens):
    """Read once for few tokens, and written out once more for many."""
    n, k = (72, 96) if DRY else ((1 << 16) + 64, 1 << 15)
    assert n * k > BEYOND or DRY
    weight = torch.empty(n, k, dtype=BF16, device=DEVICE).normal_()
    entries = torch.tensor([(0, 5), (n // 2, 0), (n - 3, k - 1), (n - 1, 7), (n - 1, k - 2)])
    rows, cols = entries.t()
    pattern = SparsePattern((n, k), rows * k + cols).to(DEVICE)
    values = 100 * randn(len(entries))
    x, dy = randn(tokens, k, dtype=BF16), randn(tokens, n, dtype=BF16)

    y = ops.sparse_delta_matmul(x, weight, values, pattern, backend=backend)
    dx = ops.sparse_delta_matmul_grad_input(dy, weight, values, pattern, backend=backend)
    exact_y, exact_dx = [], torch.zeros(tokens, k, dtype=torch.float64, device=DEVICE)
    for start in range(0, n, 4096):
        part = weight[start : start + 4096].double()
        for i, (row, col) in enumerate(entries.tolist()):
            if start <= row < start + 4096:
                part[row - start, col] += values[i]
        exact_y.append(x.double() @ part.t())
        exact_dx += dy[:, start : start + 4096].double() @ part
    # Rounded in the result, in W + D where that is written out, and in D where it is not.
    for found, exact, terms in ((y, torch.cat(exact_y, 1), k), (dx, exact_dx, n)):
        bound = summation_bound(terms, largest(exact), BF16)
        bound += 2 * torch.finfo(BF16).eps * largest(exact)
        assert largest(found.double() - exact) <= bound


@pytest.mark.parametrize("backend", kernels("keep_columns"))
def test_more_that_is_packed(backend):
    """Rows that overlap, each one element further: x takes no memory."""
    tokens, width, used = (50, 40, 21) if DRY else (1 << 19, 1 << 13, 4100)
    assert tokens * used > BEYOND or DRY
    columns = torch.randperm(width)[:used].sort().values
    pattern = SparsePattern.from_indices((1, width), columns).to(DEVICE)
    plan = SparsityPlan.build(pattern, keep=pattern.used_cols)
    numbers = randn(tokens + width - 1, dtype=BF16)
    x = numbers.as_strided((tokens, width), (1, 1))
    kept = unpack(ops.keep_columns(x, plan, backend=backend), tokens)
    for i in (0, used // 2, *range(used - 20, used)):
        column = int(plan.kept_columns[i])
        assert torch.equal(kept[:, i], numbers[column : column + tokens])


@pytest.mark.parametrize("backend", kernels("topk_salience"))
def test_a_matrix_of_more_scores(backend):
    """By the definition: all above the least that is chosen, and the first of those equal to it."""
    shape = (40, 70) if DRY else ((1 << 16) + 1, 1 << 15)
    weight = torch.empty(shape, dtype=BF16, device=DEVICE).normal_()
    assert weight.numel() > BEYOND or DRY
    weight[-1, -50:] = torch.arange(100, 150)
    k = 1000
    (found,) = ops.topk_salience([weight], [None], k, metric="magnitude", backend=backend)
    assert found.dtype == (torch.int32 if DRY else torch.int64)
    flat = weight.view(-1)
    found = found.long()
    least = flat[found].abs().min()
    above, equal = [], []
    for start in range(0, flat.numel(), 1 << 28):
        scores = flat[start : start + (1 << 28)].abs()
        above.append((scores > least).nonzero().flatten() + start)
        equal.append((scores == least).nonzero().flatten()[:k] + start)
    above, equal = torch.cat(above), torch.cat(equal)
    assert above.numel() < k
    wanted = torch.cat([above, equal[: k - above.numel()]]).sort().values
    assert torch.equal(found, wanted)
