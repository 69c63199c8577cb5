"""`sparse_delta_matmul` in bf16: beside the frozen layer's product, which it cannot beat, a copy of
W with the delta added, and torch's sparse product added to the dense one.

On few tokens W has to be read, and nothing else counts: the floor is that. Between few and many
Triton's kernels are timed both ways, with the entries added while W is read, and with W + D written
out (`Costs.fused_tokens`). On 512 the CUDA kernel is timed in tiles of both heights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from .... import ops
from ....costs import CROSSOVER_TOKENS
from ....ops.ways import cuda_ways, triton_ways
from ...checks import close, flat
from ...harness import Work
from ..bounds import summation_bound
from ..problems import MOST_TOKENS, Spec, Workbench
from ..timing import Floor, GpuCase, GpuSide

FROZEN = "x @ W alone"
CSR = "torch.sparse CSR, added"
# Of the vendor's product on the most tokens. 1.05 is wanted of both in the end. It takes wgmma, and
# the CUDA kernel multiplies by mma.sync, so 1.6 is its first step.
PRODUCT_GOALS = {"triton": 1.05, "cuda": 1.6}
# Of reading W once on the fewest.
READING_GOAL, FEW_TOKENS = 1.15, 16
TILED_TOKENS = 512  # of which q has fewer tall tiles than an H200 multiprocessors
GOAL_MASK = ("realistic", 0.005)
Check = Callable[[Tensor], None]


def setup(spec: Spec, bench: Workbench) -> GpuCase:
    pattern = bench.pattern_of(spec)
    _, x = bench.operands(spec)
    (n, k), tokens = pattern.shape, x.shape[0]
    weight, places = bench.device.randn(n, k), pattern.entry_indices.long()
    values = bench.device.randn(*pattern.values_shape, dtype=torch.float32)
    entries = values.view(-1)

    @functools.cache
    def sparse() -> Tensor:
        starts = torch.searchsorted(pattern.rows.long(), torch.arange(n + 1, device=x.device))
        return torch.sparse_csr_tensor(starts, pattern.cols.long(), entries.to(x.dtype), (n, k))

    def copied() -> Tensor:
        effective = weight.clone()
        effective.view(-1).index_add_(0, places, entries.to(weight.dtype))
        return F.linear(x, effective)

    def added() -> Tensor:
        return F.linear(x, weight) + (sparse() @ x.t()).t()

    wide = weight.double()
    plain = x.double() @ wide.t()
    wide.view(-1)[places] += entries.double()
    exact = x.double() @ wide.t()
    del wide
    check, check_plain = checks_of_products(k, x.dtype, exact, plain)

    gemm = {"x": 2 * x.numel(), "W": 2 * n * k, "y": 2 * tokens * n}
    products = 2 * tokens * n * k
    work = Work(
        {**gemm, "values and indices": 8 * pattern.nnz},
        products + 2 * tokens * pattern.nnz,
        x.dtype,
    )
    few, most = spec.tokens <= FEW_TOKENS, spec.tokens == MOST_TOKENS
    of_goals = (spec.mask, spec.density) == GOAL_MASK
    sides = []
    backends = bench.backends("sparse_delta_matmul")
    for backend, ways, where in (
        ("triton", triton_ways, spec.tokens in CROSSOVER_TOKENS),
        ("cuda", cuda_ways, spec.tokens == TILED_TOKENS and of_goals),
    ):
        if where and backend in backends:
            sides += [
                GpuSide(f"{backend}, {way}", run, True, work, check=check)
                for way, run in ways(x, weight, values, pattern).items()
            ]
            backends.remove(backend)
    for backend in backends:
        goal = backend in PRODUCT_GOALS and of_goals
        sides.append(
            GpuSide(
                backend,
                partial(ops.sparse_delta_matmul, x, weight, values, pattern, backend=backend),
                True,
                work,
                {FROZEN: PRODUCT_GOALS[backend]} if goal and most else {},
                check=check,
                floors=[Floor("reading W once", 2 * n * k, READING_GOAL if goal else None)] * few,
            )
        )
    sides += [
        GpuSide(
            FROZEN,
            lambda: F.linear(x, weight),
            work=Work(gemm, products, x.dtype),
            check=check_plain,
        ),
        GpuSide("copy of W + D", copied, check=check),
    ]
    left_out = {}
    if pattern.is_block:
        left_out[CSR] = "the entries of blocks are in no order of rows"
    else:
        sides.append(GpuSide(CSR, added, check=check))
    return GpuCase("sparse_delta_matmul", bench.title(spec), sides, left_out)


def checks_of_products(terms: int, dtype: torch.dtype, *wanted: Tensor) -> list[Check]:
    """What checks a product of `dtype` against each of these float64 ones, of `terms` terms.

    The sum is rounded to `dtype` after the dense part, in the delta or in W + D, and at the end.
    Each rounding is worth half an eps of its result, of which the largest of any product is one. A
    quantized W is rounded in all of its entries, by half an eps at most, which adds up as roundings
    do.
    """
    largest = max(float(product.abs().max()) for product in wanted)
    bound = summation_bound(terms, largest, dtype) + 2 * torch.finfo(dtype).eps * largest

    def check(output: Tensor, product: Tensor) -> None:
        close("y", flat(output), flat(product), bound)

    return [partial(check, product=product) for product in wanted]
