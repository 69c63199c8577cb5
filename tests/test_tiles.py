"""`Tiles`: each entry of a pattern once, in its tile."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import KINDS, make_pattern

from speft_kernels.plan import plan_of
from speft_kernels.tiles import QUARTERS, SIDE, Tiles


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_each_entry_is_once_in_the_tile_it_lies_in(data):
    rows, quarter = data.draw(st.integers(1, 80)), data.draw(st.integers(1, 70))
    parts = data.draw(st.sampled_from((1, QUARTERS)))
    pattern = make_pattern(data.draw(st.sampled_from(KINDS)), rows, quarter * parts)
    tiles = Tiles.build(plan_of(pattern).csr, pattern.shape[1], parts)
    starts, places = tiles.starts.tolist(), tiles.places.tolist()
    across = -(-quarter // SIDE)
    assert len(starts) == -(-rows // SIDE) * parts * across + 1
    assert (starts[0], starts[-1]) == (0, pattern.nnz)
    found = []
    for tile in range(len(starts) - 1):
        down, part = divmod(tile // across, parts)
        for place in places[starts[tile] : starts[tile + 1]]:
            within = tile % across * SIDE + place % SIDE
            assert within < quarter
            found.append((down * SIDE + place // SIDE, part * quarter + within))
    entries = torch.stack([pattern.rows, pattern.cols], 1)[tiles.order]
    assert [tuple(entry) for entry in entries.tolist()] == found
    assert torch.equal(tiles.order.sort().values, torch.arange(pattern.nnz, dtype=torch.int32))


def test_of_block_patterns_the_order_is_that_of_values_sorted_by_row():
    from speft_kernels import SparsePattern

    pattern = SparsePattern.from_blocks((64, 64), (16, 16), torch.tensor([5, 2, 15]))
    plan = plan_of(pattern)
    mask = pattern.mask()
    tiled = mask.nonzero()[plan.tiles.order]
    assert tiled[:, 0].tolist() == sorted(tiled[:, 0].tolist(), key=lambda row: row // SIDE)
    assert plan.tiles.starts.diff().tolist() == [
        int(mask[r : r + SIDE, c : c + SIDE].sum()) for r in (0, 32) for c in (0, 32)
    ]
