"""Plans for tests: those that put all entries into one kind of part, and one that has each kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from speft_kernels import SparsePattern, SparsityPlan
from speft_kernels.costs import Costs
from speft_kernels.parts import HotLines, Parts
from speft_kernels.testing import uniform_pattern

# One kind of work costs nothing, and the others cost a second a unit.
COSTS = {
    "columns": Costs(panel=1e-15, read=1e-15, tile=1, gather=1, pack=1, call=1e-15),
    "tiles": Costs(panel=1, read=1, tile=1e-15, gather=1, pack=1, call=1),
    "gather": Costs(panel=1, read=1, tile=1, gather=1e-12, pack=1, call=1),
    # A line is hot from a third of its entries on, and a tile is dense from 86 of its 256 on.
    "mixed": Costs(panel=1e-12, read=1e-15, tile=1e-12, gather=3e-12, pack=1e-15, call=1e-15),
}
PARTS = ("columns", "rows", "tiles", "gather", "mixed")
# GPU kernels know strips, which costs of "columns" make of all entries, and gathering.
STRIP_PARTS = ("columns", "gather", "mixed")


def parts_of(backend: str | None) -> tuple[str, ...]:
    """The kinds of plans that are different for a backend."""
    if backend in ("cuda", "cuda-host"):
        return ()  # thin strips, whatever the costs
    return STRIP_PARTS if backend == "triton" else PARTS


def plan_with(part: str, pattern: SparsePattern, keep: Tensor | None = None) -> SparsityPlan:
    """A plan that serves all entries by one part; "mixed" has those that the pattern makes it."""
    if part != "rows":
        return SparsityPlan.build(pattern, costs=COSTS[part], keep=keep)
    # Columns are weighed first, so no costs make every row hot: the choice is replaced.
    plan = SparsityPlan.build(pattern, costs=COSTS["gather"], keep=keep)
    rows = pattern.used_rows.long()
    plan.__dict__["hot_lines"] = HotLines(rows[:0], rows)
    return plan


def mixed_pattern(n: int, k: int) -> SparsePattern:
    """Under the costs "mixed" each part serves some: two full columns and rows, a dense square, and
    a few entries elsewhere. From about 64 x 64 on.
    """
    mask = uniform_pattern((n, k), 0.02).mask()
    mask[:, [3, k - 1]] = True
    mask[[0, n // 2], : k // 2] = True
    mask[n // 2 + 1 : n // 2 + 20, 5:23] = True
    mask[:, 2 * k // 3 : 2 * k // 3 + k // 4] = False  # so that packing x is worth it
    return SparsePattern.from_mask(mask)


def drawn_keep(
    draw: Callable[..., Any], pattern: SparsePattern, generator: torch.Generator
) -> Tensor | None:
    """Columns as layers keep them that share a copy, in any order: those of the pattern, and
    others. Or None, as of a layer by itself.
    """
    from hypothesis import strategies as st  # not there for the GPU suite, which reads this file

    if not draw(st.booleans()):
        return None
    kept = torch.rand(pattern.shape[1], generator=generator) < draw(st.floats(0, 1))
    kept[pattern.used_cols.long()] = True
    keep = kept.nonzero().flatten().int()
    return keep[torch.randperm(keep.numel(), generator=generator)]


def each_entry(
    plan: SparsityPlan, packed: bool, form: Any = Parts
) -> tuple[Tensor, Tensor, Tensor]:
    """Row and column of the weight and slot of all entries, whichever part they are in."""
    parts = plan.compiled(form, packed)
    n, k = plan.pattern.shape
    width = plan.kept_width if packed else k
    row, position, slot = (
        torch.cat(some) for some in zip(*parts.each_entry(n, width), strict=True)
    )
    if packed and plan.kept_columns is not None:
        position = plan.kept_columns.long()[position]
    return row, position, slot


def check_each_entry_once(plan: SparsityPlan, packed: bool, form: Any = Parts) -> None:
    """The parts of the form hold every entry of the pattern once, at its place."""
    row, column, slot = each_entry(plan, packed, form)
    order = torch.argsort(slot)
    assert torch.equal(slot[order], torch.arange(plan.pattern.nnz))
    flat = (row * plan.pattern.shape[1] + column)[order]
    assert torch.equal(flat, plan.pattern.entry_indices.long())
