"""SparsityPlan: each entry exactly once in each form, and what it keeps of the activations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import KINDS, make_pattern

from speft_kernels import SparsePattern, SparsityPlan
from speft_kernels.plan import plan_of


def entries(compact):
    return list(zip(compact.entry_rows.tolist(), compact.entry_cols.tolist(), strict=True))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_each_entry_once_in_every_form(data):
    n, k = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    bits = data.draw(st.lists(st.booleans(), min_size=n * k, max_size=n * k))
    mask = torch.tensor(bits).reshape(n, k)
    plan = SparsityPlan.build(SparsePattern.from_mask(mask))
    expected = [tuple(e) for e in mask.nonzero().tolist()]
    assert entries(plan.csr) == expected
    by_column, order = plan.csc
    assert sorted((r, c) for c, r in entries(by_column)) == expected
    assert entries(by_column) == sorted(entries(by_column))
    assert [expected[i] for i in order.tolist()] == [(r, c) for c, r in entries(by_column)]
    # The kept activations hold the same numbers as the whole ones at every entry.
    x = torch.randn(3, k)
    kept = plan.keep(x)
    assert kept.shape[1] == plan.kept_width
    assert torch.equal(kept[:, plan.kept_csr.entry_cols], x[:, plan.csr.entry_cols])


def test_blocks_are_sorted_by_row():
    pattern = SparsePattern.from_blocks((4, 6), (2, 3), torch.tensor([1, 2, 3]))
    plan = plan_of(pattern)
    assert entries(plan.csr) == [tuple(e) for e in pattern.mask().nonzero().tolist()]
    flat = pattern.entry_indices[plan.row_order]
    assert flat.tolist() == sorted(flat.tolist())


@pytest.mark.parametrize("kind", KINDS)
def test_it_keeps_used_columns_only_where_that_is_smaller(kind):
    pattern = make_pattern(kind, 64, 48)
    plan = plan_of(pattern)
    used = pattern.used_cols.numel()
    x = torch.randn(5, 48)
    if used > 24:
        assert plan.keep(x) is x
    else:
        assert plan.keep(x).shape == (5, used)
    assert plan_of(pattern) is plan
