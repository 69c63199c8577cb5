"""Row panels: what the torch backend reads of a plan, and what it asks of a GPU."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import (
    LargestTensor,
    assert_as_exact_as_torch,
    exact_product,
    make_pattern,
    uniform_blocks,
)
from plans import drawn_keep, each_entry, mixed_pattern
from torch.utils._python_dispatch import TorchDispatchMode

from speft_kernels import SparsePattern, SparsityPlan, ops
from speft_kernels.compact import ROW_STEP
from speft_kernels.costs import DEFAULTS
from speft_kernels.ops import registry, wide
from speft_kernels.plan import plan_of
from speft_kernels.row_panels import PRODUCTS, RowPanels
from speft_kernels.testing import realistic_pattern

aten = torch.ops.aten

# Products cost nothing, or are all that costs: whatever rows are unused are computed, or left out.
ALL_ROWS = replace(DEFAULTS["cpu"], panel=1e-30)
FEW_ROWS = replace(DEFAULTS["cpu"], pack=1e-30)


def widened(left, right, dtype):
    """What a product with `out_dtype` computes: nothing is rounded but the sums."""
    return left.to(dtype) @ right.to(dtype)


@pytest.fixture
def as_on_cuda(monkeypatch):
    """The way that the operations go on CUDA, with products that this device has not."""
    monkeypatch.setattr(wide, "served", lambda operand: True)
    monkeypatch.setattr(wide, "mm", widened)
    monkeypatch.setattr(wide, "bmm", widened)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_each_entry_is_in_one_panel_of_bounded_size(data):
    n, k = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    mask = torch.rand(n, k, generator=generator) < data.draw(st.floats(0, 1))
    mask[:, torch.rand(k, generator=generator) < data.draw(st.floats(0, 1))] = False
    pattern = SparsePattern.from_mask(mask)
    keep = drawn_keep(data.draw, pattern, generator)
    costs = data.draw(st.sampled_from([DEFAULTS["cpu"], ALL_ROWS, FEW_ROWS]))
    plan = SparsityPlan.build(pattern, keep=keep, costs=costs)
    for packed in (False, True):
        panels = plan.compiled(RowPanels, packed)
        width = plan.kept_width if packed else k
        row, column, slot = each_entry(plan, packed, RowPanels)
        assert torch.equal(slot, torch.arange(plan.pattern.nnz))
        assert torch.equal(row * k + column, plan.pattern.entry_indices.long())
        first, last, begin, end = panels.panels.t().tolist()
        rows = panels.rows.numel() or n
        assert (first[0], last[-1], begin[0], end[-1]) == (0, rows, 0, plan.pattern.nnz)
        assert (first[1:], begin[1:]) == (last[:-1], end[:-1])
        tallest = max(b - a for a, b in zip(first, last, strict=True))
        width = panels.positions.numel() or width
        if plan.pattern.nnz:
            assert tallest <= ROW_STEP or tallest * width <= n * k // 2


def test_a_panel_of_a_large_weight_is_bounded_in_bytes():
    pattern = SparsePattern((16384, 4096), torch.arange(0, 16384 * 4096, 997))
    first, last, _, _ = plan_of(pattern).compiled(RowPanels, False).panels.t()
    assert (last - first).max() * 4096 == PRODUCTS


def test_index_memory_is_stated():
    """Four bytes an entry, and four a column and a row that are picked."""
    pattern = realistic_pattern((1024, 4096), 0.005)
    panels = SparsityPlan.build(pattern, costs=FEW_ROWS).compiled(RowPanels, False)
    found = sum(t.numel() * t.element_size() for t in panels)
    lines = pattern.used_cols.numel() + pattern.used_rows.numel()
    assert found == 4 * pattern.nnz + 4 * lines + panels.panels.nbytes
    assert panels.panels.nbytes <= 32 * 1024 // ROW_STEP


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["mixed", "column", "row", "single", "full", "empty"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("costs", [ALL_ROWS, FEW_ROWS], ids=["all rows", "few rows"])
def test_the_way_of_a_gpu_is_as_exact(as_on_cuda, costs, packed, kind, dtype):
    n, k, m = 96, 130, 613
    pattern = mixed_pattern(n, k) if kind == "mixed" else make_pattern(kind, n, k)
    plan = SparsityPlan.build(pattern, costs=costs)
    used = pattern.used_rows.numel()
    picks = plan.compiled(RowPanels, packed).rows.numel() > 0
    assert picks == (costs is FEW_ROWS and 0 < used < n)
    dy, x = torch.randn(m, n).to(dtype), torch.randn(m, k).to(dtype)
    exact, dense = exact_product(dy.t(), x), dy.float().t() @ x.float()
    kept = ops.keep_columns(x, plan) if packed else x
    ours = ops.sampled_grad(dy, kept, pattern, plan=plan, packed=packed, backend="torch")
    assert_as_exact_as_torch(ours, dense, exact, pattern.entry_indices)


@pytest.mark.parametrize("shape", [(8, 8), (1, 16), (16, 1)])
def test_blocks_go_the_way_of_a_gpu(as_on_cuda, shape):
    pattern = uniform_blocks((64, 96), shape, 0.1)
    dy, x = (torch.randn(300, size).bfloat16() for size in (64, 96))
    ours = ops.block_grad(dy, x, pattern, backend="torch")
    exact, dense = exact_product(dy.t(), x), dy.float().t() @ x.float()
    assert_as_exact_as_torch(ours.flatten(), dense, exact, pattern.entry_indices)


class Calls(TorchDispatchMode):
    """The operators that are called, with the dtypes of what they return."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.made.append((function, result.dtype))
        return result

    def count(self, function):
        return sum(called is function for called, _ in self.made)


def of_8192_tokens(op, pattern, entries, result):
    """The calls of torch's own way on CUDA, whose tensors have no memory here."""
    n, k = pattern.shape
    dy, x = (torch.empty(8192, size, dtype=torch.bfloat16, device="meta") for size in (n, k))
    out = torch.empty(result, device="meta")
    serve = registry.resolve(op, torch.device("cpu"), torch.bfloat16, "torch").function
    with Calls() as calls, LargestTensor() as largest:
        serve(dy, x, *entries, out, False)
    return calls, largest


def test_a_gpu_is_asked_for_unrounded_products_in_few_launches(monkeypatch):
    monkeypatch.setattr(wide, "served", lambda operand: True)
    pattern = realistic_pattern((4096, 4096), 0.005)
    plan = SparsityPlan.build(pattern, costs=DEFAULTS["cuda"])
    panels = plan.compiled(RowPanels, False)
    assert not panels.rows.numel()  # though a third is not used
    on_meta = panels._replace(
        rows=panels.rows.to("meta"), positions=panels.positions.to("meta"), at=panels.at.to("meta")
    )
    calls, largest = of_8192_tokens("sampled_grad", pattern, (on_meta, 0), (pattern.nnz,))
    number = panels.panels.shape[0]
    assert calls.count(aten.mm.dtype) == number == 1
    # The used columns, and of each panel the entries.
    assert calls.count(aten.index_select.default) == 1 + number
    # Nothing of all tokens is widened.
    used = pattern.used_cols.numel() * 8192
    assert {dtype for made, dtype in calls.made if made is aten._to_copy.default} <= {torch.int64}
    assert largest.numel <= used


def test_an_h200_picks_rows_where_few_are_used():
    """As where all layers are ranked together: a fifth of the rows, and many columns."""
    mask = realistic_pattern((4096, 4096), 0.005).mask()
    mask[820:] = False
    plan = SparsityPlan.build(SparsePattern.from_mask(mask), costs=DEFAULTS["cuda"])
    assert plan.compiled(RowPanels, True).rows.numel() > 0


def test_of_a_shared_copy_a_layers_own_columns_are_multiplied():
    pattern = realistic_pattern((1024, 1024), 0.005)
    own = pattern.used_cols
    others = torch.arange(1024, dtype=torch.int32)[::2]
    plan = SparsityPlan.build(pattern, keep=torch.unique(torch.cat([own, others])))
    assert plan.kept_width > 1.5 * own.numel()
    positions = plan.compiled(RowPanels, True).positions
    assert torch.equal(plan.kept_columns[positions.long()], own)


def test_a_gpu_multiplies_blocks_unrounded(monkeypatch):
    monkeypatch.setattr(wide, "served", lambda operand: True)
    pattern = uniform_blocks((4096, 4096), (16, 16), 0.005)
    where = pattern.block_rows.to("meta"), pattern.block_cols.to("meta")
    calls, _ = of_8192_tokens("block_grad", pattern, where, pattern.values_shape)
    assert calls.count(aten.bmm.dtype) == 6
    assert calls.count(aten._to_copy.default) == 0
