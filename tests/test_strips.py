"""Strips: every entry is in exactly one part, and the groups are what the kernels take them for."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import KINDS, make_pattern
from plans import STRIP_PARTS, check_each_entry_once, drawn_keep, mixed_pattern, plan_with

from speft_kernels import SparsePattern, SparsityPlan
from speft_kernels.costs import DEFAULTS
from speft_kernels.parts import Parts
from speft_kernels.row_panels import RowPanels
from speft_kernels.strips import GROUP_STRIPS, STRIP_ROWS, TILE_WIDTHS, Strips
from speft_kernels.testing import realistic_pattern, uniform_pattern
from speft_kernels.thin_strips import ThinStrips


def assert_each_entry_once(plan):
    for packed in (False, True):
        check_each_entry_once(plan, packed, Strips)
        assert_groups_hold_together(plan.compiled(Strips, packed), plan.pattern.shape)


def assert_groups_hold_together(strips, shape):
    groups = strips.group_cols.shape[0]
    starts = strips.block_groups.long()
    assert starts.numel() == -(-shape[0] // STRIP_ROWS) + 1
    assert (starts[0], starts[-1]) == (0, groups)
    assert (starts.diff() >= 0).all()
    assert int(strips.most_groups) == (int(starts.diff().max()) if starts.numel() > 1 else 0)
    for wide in TILE_WIDTHS:
        assert strips.tiles_of(wide) == sum(-(-count // wide) for count in starts.diff().tolist())
    ends = strips.group_entries.long()
    assert (ends[0], ends[-1]) == (0, strips.entry_at.numel())
    assert (ends.diff() > 0).all()  # no group of nothing is computed
    assert ((strips.entry_at >= 0) & (strips.entry_at < STRIP_ROWS * GROUP_STRIPS)).all()
    # The strips of a block are its used columns, each once: only the last group is filled up.
    for first, last in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        some = strips.entry_at[ends[first] : ends[last]].long() % GROUP_STRIPS
        group = torch.repeat_interleave(torch.arange(last - first), ends[first : last + 1].diff())
        used = (group * GROUP_STRIPS + some).unique()
        assert torch.equal(used, torch.arange(used.numel()))
        columns = strips.group_cols[first:last].flatten()
        assert columns[: used.numel()].unique().numel() == used.numel()


@pytest.mark.parametrize("part", STRIP_PARTS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_entry_is_in_one_part(kind, part):
    for shape in ((5, 7), (96, 130), (300, 200)):
        assert_each_entry_once(plan_with(part, make_pattern(kind, *shape)))
    assert_each_entry_once(plan_with(part, mixed_pattern(96, 130)))


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_pattern(data):
    n, k = data.draw(st.integers(1, 400)), data.draw(st.integers(1, 150))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    mask = torch.rand(n, k, generator=generator) < data.draw(st.floats(0, 0.2))
    if data.draw(st.booleans()):
        mask[:, data.draw(st.integers(0, k - 1))] = True
    if data.draw(st.booleans()):
        mask[data.draw(st.integers(0, n - 1))] = True
    pattern = SparsePattern.from_mask(mask)
    keep = drawn_keep(data.draw, pattern, generator)
    assert_each_entry_once(plan_with(data.draw(st.sampled_from(STRIP_PARTS)), pattern, keep))


def test_costs_decide_what_is_gathered():
    # Under the costs "mixed" a strip is computed from 128 / 3 entries on.
    mask = torch.zeros(256, 90, dtype=torch.bool)
    mask[:43, 3] = mask[:42, 4] = mask[100:171, 5] = True  # 28 of the last, and 43 below row 128
    strips = plan_with("mixed", SparsePattern.from_mask(mask)).compiled(Strips, False)
    assert strips.entry_at.numel() == 43 + 43
    assert strips.entry_row.numel() == 42 + 28
    assert strips.rows.tolist() == [*range(42), *range(100, 128)]


def test_gathering_must_pay_for_packing_its_rows():
    """With a GPU's costs, where a strip costs less than an entry, and with dearer strips."""
    pattern = realistic_pattern((1024, 1024), 0.005)
    costs = DEFAULTS["cuda"]
    assert SparsityPlan.build(pattern, costs=costs).compiled(Strips, False).entry_row.numel() == 0
    single = SparsePattern.from_indices((1024, 1024), torch.tensor([5]))
    dear = replace(costs, panel=costs.gather, call=1e-12)
    assert SparsityPlan.build(single, costs=dear).compiled(Strips, False).entry_row.numel() == 1
    packing = replace(dear, pack=1.0)
    assert SparsityPlan.build(single, costs=packing).compiled(Strips, False).entry_row.numel() == 0


@pytest.mark.parametrize("density", [0.001, 0.005, 0.05])
def test_index_memory_is_stated(density):
    """In docs/gpu.md: 6 bytes an entry, and 4 a strip, of which an entry has one at most, filled
    up to groups of 64.
    """
    for make in (realistic_pattern, uniform_pattern):
        pattern = make((1024, 4096), density)
        strips = SparsityPlan.build(pattern, costs=DEFAULTS["cuda"]).compiled(Strips, False)
        found = sum(t.numel() * t.element_size() for t in strips)
        blocks = 1024 // STRIP_ROWS
        filled = 4 * GROUP_STRIPS * blocks
        assert (
            found <= (6 + 4) * pattern.nnz + filled + 4 * 4096 + 8 * strips.group_cols.shape[0] + 99
        )


@pytest.mark.parametrize("form", [Parts, RowPanels, Strips, ThinStrips])
@pytest.mark.parametrize("packed", [True, False])
def test_a_plan_compiles_each_form_once(form, packed):
    plan = plan_with("mixed", mixed_pattern(96, 130))
    compiled = plan.compiled(form, packed)
    assert isinstance(compiled, form)
    assert plan.compiled(form, packed) is compiled
