"""`sampled_grad` in bf16 against the dense gradient of the weight and a gather, and against torch's
own sampled product, which takes float32 alone.
"""

from __future__ import annotations

import functools
from functools import partial

import torch
from torch import Tensor

from .... import ops
from ....pattern import SparsePattern
from ....plan import plan_of
from ...checks import close, flat
from ...harness import Work
from ..bounds import summation_bound
from ..problems import MOST_TOKENS, Spec, Workbench
from ..timing import GpuCase, GpuSide, why_left_out

DENSE = "dense dW, gather"
# Of the dense way's time, for realistic masks on the most tokens, called as the layer calls it.
GOALS = {0.005: 0.15, 0.001: 0.06}
# Of Triton's time, for uniform masks of these densities: the CUDA kernel is to be 1.3 times as
# fast.
BESIDE_TRITON = 1 / 1.3


def setup(spec: Spec, bench: Workbench) -> GpuCase:
    pattern = bench.pattern_of(spec)
    dy, x = bench.operands(spec)
    exact = exact_entries(dy, x, pattern)
    bound = summation_bound(dy.shape[0], float(exact.abs().max()), dy.dtype)
    check = partial(check_entries, exact=exact, bound=bound)
    work = _work(dy, pattern)
    goal = GOALS.get(spec.density) if is_goal(spec) else None
    sides = []
    left_out = {}
    for backend in bench.backends("sampled_grad", "keep_columns"):
        bench.trying(backend)
        try:
            kept = ops.keep_columns(x, plan_of(pattern), backend=backend)
            bench.device.synchronize()  # else the first side that is tried would be blamed
        except Exception as error:
            left_out[backend] = why_left_out(backend, error, bench.device)
            continue
        forms = {"x kept": kept}
        if kept.dim() == 2:  # the plan keeps x as it is
            forms = {"x whole": x}
        elif spec.tokens == MOST_TOKENS:
            forms["x whole"] = x
        for form, operand in forms.items():
            goals = {DENSE: goal} if goal and form == "x kept" and backend != "torch" else {}
            run = partial(ops.sampled_grad, dy, operand, pattern, packed=operand is kept)
            run = partial(run, backend=backend)
            name = f"{backend}, {form}"
            asked = backend == "cuda" and form == next(iter(forms)) and is_beside(spec)
            beside = {f"triton, {form}": BESIDE_TRITON} if asked else {}
            sides.append(GpuSide(name, run, True, work, goals, check=check, beside=beside))
    sides += dense_sides(dy, x, pattern, exact, bound)
    return GpuCase("sampled_grad", bench.title(spec), sides, left_out)


def is_goal(spec: Spec) -> bool:
    return spec.mask == "realistic" and spec.tokens == MOST_TOKENS


def is_beside(spec: Spec) -> bool:
    """Whether the CUDA kernel has a goal beside Triton's: both are given x as the layer gives it,
    which for a uniform mask is whole.
    """
    return spec.mask == "uniform" and spec.tokens == MOST_TOKENS and spec.density in GOALS


def exact_entries(dy: Tensor, x: Tensor, pattern: SparsePattern) -> Tensor:
    """`dy^T @ x` in float64 at the entries of the pattern."""
    return (dy.double().t() @ x.double()).view(-1)[pattern.entry_indices.long()]


def check_entries(output: Tensor, exact: Tensor, bound: float | Tensor) -> None:
    close("result", flat(output), exact, bound)


def dense_sides(
    dy: Tensor, x: Tensor, pattern: SparsePattern, exact: Tensor, bound: float
) -> list[GpuSide]:
    """The peers: all of the gradient, and torch's sampled product where entries stand alone."""
    places = pattern.entry_indices.long()
    tokens, (n, k) = dy.shape[0], pattern.shape

    def dense() -> Tensor:
        return (dy.t() @ x).view(-1)[places]

    # It writes dW in bf16 and reads it again at the entries.
    moved = {"dy": 2 * dy.numel(), "x": 2 * x.numel(), "dW": 2 * n * k, "entries": 12 * pattern.nnz}
    rounded = bound + torch.finfo(dy.dtype).eps * exact.abs()
    sides = [
        GpuSide(
            DENSE,
            dense,
            work=Work(moved, 2 * tokens * n * k, dy.dtype),
            check=partial(check_entries, exact=exact, bound=rounded),
        )
    ]

    @functools.cache
    def operands() -> tuple[Tensor, Tensor, Tensor]:
        starts = torch.searchsorted(pattern.rows.long(), torch.arange(n + 1, device=dy.device))
        zeros = torch.zeros(pattern.nnz, device=dy.device)
        sampled = torch.sparse_csr_tensor(starts, pattern.cols.long(), zeros, (n, k))
        return sampled, dy.float().t().contiguous(), x.float()

    def by_torch() -> Tensor:
        return torch.sparse.sampled_addmm(*operands(), beta=0.0).values()

    if not pattern.is_block:
        wide = partial(check_entries, exact=exact, bound=bound)
        sides.append(GpuSide("torch.sparse.sampled_addmm, float32", by_torch, check=wide))
    return sides


def _work(dy: Tensor, pattern: SparsePattern) -> Work:
    """The columns of dy and x that hold an entry, read once; an int32 index in, a float32 gradient
    out for each entry.
    """
    tokens = dy.shape[0]
    return Work(
        {
            "dy at used rows": 2 * tokens * pattern.used_rows.numel(),
            "x at used columns": 2 * tokens * pattern.used_cols.numel(),
            "indices": 4 * pattern.nnz,
            "dv": 4 * pattern.nnz,
        },
        2 * tokens * pattern.nnz,
        dy.dtype,
    )
