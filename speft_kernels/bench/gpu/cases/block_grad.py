"""`block_grad` in bf16 against the dense gradient of the weight and a gather."""

from __future__ import annotations

from functools import partial

from .... import ops
from ...harness import Work
from ..bounds import summation_bound
from ..problems import Spec, Workbench
from ..timing import GpuCase, GpuSide
from .sampled_grad import check_entries, dense_sides, exact_entries


def setup(spec: Spec, bench: Workbench) -> GpuCase:
    pattern = bench.pattern_of(spec)
    dy, x = bench.operands(spec)
    exact = exact_entries(dy, x, pattern)
    bound = summation_bound(dy.shape[0], float(exact.abs().max()), dy.dtype)
    tokens = dy.shape[0]
    work = Work(
        {
            "dy at used rows": 2 * tokens * pattern.used_rows.numel(),
            "x at used columns": 2 * tokens * pattern.used_cols.numel(),
            "block indices": 8 * pattern.num_blocks,
            "dV": 4 * pattern.nnz,
        },
        2 * tokens * pattern.nnz,
        dy.dtype,
    )
    sides = [
        GpuSide(
            backend,
            partial(ops.block_grad, dy, x, pattern, backend=backend),
            True,
            work,
            check=partial(check_entries, exact=exact, bound=bound),
        )
        for backend in bench.backends("block_grad")
    ]
    sides += dense_sides(dy, x, pattern, exact, bound)
    return GpuCase("block_grad", bench.title(spec), sides)
