"""`keep_columns` in bf16, what the layer's forward pass adds, against torch's gather of the columns
and turning of the result.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from .... import ops
from ....ops.keep_columns import unpack
from ....plan import plan_of
from ...checks import close, flat
from ...harness import Work
from ..problems import Spec, Workbench
from ..timing import GpuCase, GpuSide


def setup(spec: Spec, bench: Workbench) -> GpuCase:
    plan = plan_of(bench.pattern_of(spec))
    _, x = bench.operands(spec)
    columns = plan.kept_columns
    if columns is None:
        raise ValueError("the plan keeps x whole: there is nothing to pack")
    some = x.index_select(1, columns)

    def check(packed: Tensor) -> None:
        close("kept", flat(unpack(packed, x.shape[0])), flat(some), 0.0)

    def turned() -> Tensor:
        return x.index_select(1, columns).t().contiguous()

    # At the least; the sectors of x that hold a used column are more.
    moved = {"x at used columns": 2 * some.numel(), "kept": 2 * some.numel()}
    work = Work({**moved, "columns": 4 * columns.numel()}, dtype=x.dtype)
    sides = [
        GpuSide(
            backend,
            partial(ops.keep_columns, x, plan, backend=backend),
            True,
            work,
            check=check,
        )
        for backend in bench.backends("keep_columns")
    ]
    peer = GpuSide(
        "index_select, transposed",
        turned,
        check=lambda output: close("turned", flat(output), flat(some.t()), 0.0),
    )
    return GpuCase("keep_columns", bench.title(spec), [*sides, peer])
