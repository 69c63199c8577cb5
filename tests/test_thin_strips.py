"""Thin strips: every entry is in exactly one tile, and no tile is more than the kernel takes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import KINDS, make_pattern
from plans import check_each_entry_once, drawn_keep, mixed_pattern

from speft_kernels import SparsePattern, SparsityPlan
from speft_kernels.testing import realistic_pattern, uniform_pattern
from speft_kernels.thin_strips import (
    BLOCK_ROWS,
    BLOCK_STRIPS,
    GROUP,
    STRIP_ROWS,
    TILE_GROUPS,
    TILE_LINES,
    TILE_STRIPS,
    ThinStrips,
)


def assert_each_entry_once(plan):
    for packed in (False, True):
        check_each_entry_once(plan, packed, ThinStrips)
        assert_tiles_hold_together(plan.compiled(ThinStrips, packed))


def assert_tiles_hold_together(strips):
    tiles = strips.tile_block.numel()
    for starts, total in (
        (strips.tile_lines, strips.line.numel()),
        (strips.tile_groups, strips.group_rows.numel()),
        (strips.tile_entries, strips.slot.numel()),
    ):
        assert starts.numel() == tiles + 1
        assert (starts[0], starts[-1]) == (0, total)
        assert (starts.diff() > 0).all()
    if not tiles:
        return
    assert int(strips.tile_lines.diff().max()) <= TILE_LINES
    assert int(strips.tile_groups.diff().max()) <= TILE_GROUPS
    assert min(int(strips.at.min()), int(strips.strip_line.min())) >= 0
    assert int(strips.group_rows.max()) < BLOCK_STRIPS
    for tile in range(tiles):
        groups = slice(*strips.tile_groups[tile : tile + 2].tolist())
        lines = int(strips.tile_lines[tile + 1] - strips.tile_lines[tile])
        assert int(strips.strip_line[groups].max()) < lines
        # Groups of the same rows are neighbours: what a warp has of dy serves the next one.
        assert (strips.group_rows[groups].int().diff() >= 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_each_entry_is_in_one_tile(kind):
    for shape in ((5, 7), (96, 130), (300, 200), (BLOCK_ROWS, 1)):
        assert_each_entry_once(SparsityPlan.build(make_pattern(kind, *shape)))
    assert_each_entry_once(SparsityPlan.build(mixed_pattern(96, 130)))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_pattern(data):
    n, k = data.draw(st.integers(1, 600)), data.draw(st.integers(1, 900))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    mask = torch.rand(n, k, generator=generator) < data.draw(st.floats(0, 0.3))
    if data.draw(st.booleans()):
        mask[:, data.draw(st.integers(0, k - 1))] = True
    pattern = SparsePattern.from_mask(mask)
    keep = drawn_keep(data.draw, pattern, generator)
    assert_each_entry_once(SparsityPlan.build(pattern, keep=keep))


def test_a_tile_ends_where_its_lines_or_its_strips_do():
    mask = torch.zeros(BLOCK_ROWS, 2 * TILE_LINES, dtype=torch.bool)
    mask[0] = True  # a strip a line: the lines end first
    strips = SparsityPlan.build(SparsePattern.from_mask(mask)).compiled(ThinStrips, False)
    assert strips.tile_lines.tolist() == [0, TILE_LINES, 2 * TILE_LINES]
    mask[::STRIP_ROWS] = True  # all strips of each
    strips = SparsityPlan.build(SparsePattern.from_mask(mask)).compiled(ThinStrips, False)
    assert strips.tile_lines.diff().max() * BLOCK_STRIPS <= TILE_GROUPS * GROUP
    assert strips.tile_lines.diff().min() > 100  # of the 121 that surely fit


@pytest.mark.parametrize("density", [0.001, 0.005, 0.02])
@pytest.mark.parametrize("make", [realistic_pattern, uniform_pattern])
def test_tiles_are_as_few_as_they_can_be_and_of_like_size(make, density):
    pattern = make((512, 4096), density)
    strips = SparsityPlan.build(pattern).compiled(ThinStrips, False)
    block, strip = pattern.rows // BLOCK_ROWS, pattern.rows // STRIP_ROWS % BLOCK_STRIPS
    fewest = 0
    for own in (block == 0, block == 1):
        of_block = torch.unique(pattern.cols[own] * BLOCK_STRIPS + strip[own])
        held = [TILE_LINES, 0]
        for more in torch.unique(of_block // BLOCK_STRIPS, return_counts=True)[1].tolist():
            if held[0] == TILE_LINES or held[1] + more > TILE_STRIPS:
                held, fewest = [0, 0], fewest + 1
            held = [held[0] + 1, held[1] + more]
    assert strips.tile_block.numel() == fewest
    if make is uniform_pattern:
        lines = strips.tile_lines.diff()
        assert lines.min() > 0.8 * lines.max()


@pytest.mark.parametrize("make", [realistic_pattern, uniform_pattern])
def test_strips_that_are_read_at_once_lie_in_different_banks(make):
    """Of an even and an odd line; which leaves what one kind has more than the other."""
    strips = SparsityPlan.build(make((1024, 4096), 0.005)).compiled(ThinStrips, False)
    pairs = strips.strip_line.reshape(-1, 2) % 2
    assert (pairs[:, 0] == pairs[:, 1]).float().mean() < 0.2


@pytest.mark.parametrize("density", [0.001, 0.005, 0.05])
def test_index_memory_is_stated(density):
    """In docs/gpu.md: 6 bytes an entry, 4 a line of a tile, 2.1 a strip, of which groups are
    filled up.
    """
    for make in (realistic_pattern, uniform_pattern):
        strips = SparsityPlan.build(make((1024, 4096), density)).compiled(ThinStrips, True)
        found = sum(t.numel() * t.element_size() for t in strips)
        tiles, groups = strips.tile_block.numel(), strips.group_rows.numel()
        packed = 4 * strips.columns.numel()
        wanted = 6 * strips.slot.numel() + 4 * strips.line.numel() + 17 * groups
        assert found == wanted + packed + 4 * (tiles + 3 * (tiles + 1))
