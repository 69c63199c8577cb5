"""SparsePattern: what it refuses, and that its views agree with the mask."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speft_kernels import SparsePattern
from speft_kernels.errors import PatternError


def indices(*values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize(
    ("shape", "ind", "block", "fact"),
    [
        ((4, 5), indices(0, 20), (1, 1), "index 20 is out of range: the pattern has 20 places"),
        ((4, 5), indices(-1, 3), (1, 1), "index -1 is out of range"),
        ((4, 5), indices(3, 3), (1, 1), "index 3 at position 0 is duplicated"),
        ((4, 5), indices(1, 7, 3), (1, 1), "index 7 at position 1 comes before 3"),
        ((4, 5), torch.tensor([0.0, 1.0]), (1, 1), "int32 or int64, got torch.float32"),
        ((4, 5), indices(1, dtype=torch.int16), (1, 1), "int32 or int64, got torch.int16"),
        ((4, 5), indices(0, 1).reshape(1, 2), (1, 1), "1-D, got shape (1, 2)"),
        ((4, 5), [0, 1], (1, 1), "must be a torch.Tensor, got list"),
        ((4, 5), indices(0), (2, 2), "do not tile a weight of shape (4, 5)"),
        ((4, 6), indices(6), (2, 2), "index 6 is out of range: the pattern has 6 places"),
        ((4, 6), indices(0), (0, 2), "block_shape must be two integers of at least 1"),
        ((4,), indices(0), (1, 1), "shape must be two integers"),
        ((4, -5), indices(0), (1, 1), "shape must be two integers"),
        ((4, 2.5), indices(0), (1, 1), "shape must be two integers"),
        ((float("inf"), 3), indices(0), (1, 1), "shape must be two integers"),
        ((4, 6), indices(0), (1, float("inf")), "block_shape must be two integers"),
    ],
)
def test_wrong_indices_are_refused_with_the_fact(shape, ind, block, fact):
    with pytest.raises(PatternError, match="(?s).*") as caught:
        SparsePattern(shape, ind, block)
    assert fact in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_doors_sort_but_refuse_duplicates():
    pattern = SparsePattern.from_indices((4, 5), indices(7, 0, 19))
    assert pattern.indices.tolist() == [0, 7, 19]
    with pytest.raises(PatternError, match="index 7 at position 1 is duplicated"):
        SparsePattern.from_indices((4, 5), indices(7, 0, 7))
    with pytest.raises(PatternError, match="duplicated"):
        SparsePattern.from_blocks((4, 4), (2, 2), indices(3, 3))


def test_from_mask_refuses_half_blocks_and_wrong_dtypes():
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[2:4, 3:6] = True
    assert SparsePattern.from_mask(mask, (2, 3)).indices.tolist() == [3]
    mask[0, 0] = True
    with pytest.raises(PatternError, match=r"block \(0, 0\) of shape \(2, 3\) is only partly set"):
        SparsePattern.from_mask(mask, (2, 3))
    with pytest.raises(PatternError, match="2-D bool tensor, got torch.float32"):
        SparsePattern.from_mask(mask.float())
    with pytest.raises(PatternError, match="do not tile"):
        SparsePattern.from_mask(mask, (3, 3))


def test_it_cannot_change():
    source = indices(0, 7)
    pattern = SparsePattern((4, 5), source)
    source[0] = 3
    assert pattern.indices.tolist() == [0, 7]
    with pytest.raises(AttributeError, match="immutable"):
        pattern.shape = (1, 1)


def test_copies_and_pickles_are_equal():
    pattern = SparsePattern.from_blocks((4, 6), (2, 3), indices(1, 3))
    assert copy.deepcopy(pattern) is pattern
    assert pickle.loads(pickle.dumps(pattern)) == pattern
    assert pattern != SparsePattern.from_blocks((4, 6), (2, 3), indices(1, 2))
    assert pattern != SparsePattern.from_indices((4, 6), indices(1, 3))


def test_index_dtype_follows_the_size_of_the_weight():
    assert SparsePattern((4, 5), indices(1)).indices.dtype == torch.int32
    wide = SparsePattern((1 << 16, 1 << 15), indices((1 << 31) - 1))
    assert wide.indices.dtype == torch.int64
    assert (wide.rows.item(), wide.cols.item()) == ((1 << 16) - 1, (1 << 15) - 1)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_views_agree_with_the_mask(data):
    bh, bw = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    gh, gw = data.draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    bits = data.draw(st.lists(st.booleans(), min_size=gh * gw, max_size=gh * gw))
    grid = torch.tensor(bits).reshape(gh, gw)
    mask = grid.repeat_interleave(bh, 0).repeat_interleave(bw, 1)
    pattern = SparsePattern.from_mask(mask, (bh, bw))
    assert torch.equal(pattern.mask(), mask)
    assert pattern.nnz == int(mask.sum())
    assert pattern.values_shape == (
        (pattern.nnz,) if (bh, bw) == (1, 1) else (int(grid.sum()), bh, bw)
    )
    rows, cols = pattern.rows.long(), pattern.cols.long()
    assert torch.equal(rows * mask.shape[1] + cols, pattern.entry_indices.long())
    assert pattern.used_rows.tolist() == mask.any(1).nonzero().flatten().tolist()
    assert pattern.used_cols.tolist() == mask.any(0).nonzero().flatten().tolist()
    # A block's entries follow each other row by row: values.reshape(-1) is indexed like this.
    if pattern.is_block and pattern.num_blocks:
        values = torch.arange(pattern.nnz).reshape(pattern.values_shape)
        weight = torch.full(mask.shape, -1)
        weight.view(-1)[pattern.entry_indices.long()] = values.reshape(-1)
        r, c = int(pattern.block_rows[0]) * bh, int(pattern.block_cols[0]) * bw
        assert torch.equal(weight[r : r + bh, c : c + bw], values[0])


def test_no_blocks_of_any_size_take_no_memory():
    """A file may say that they are as large as no memory is, and hold none."""
    side = 2**40
    pattern = SparsePattern((side, side), torch.empty(0, dtype=torch.int64), (side, side))
    for indices in (pattern.entry_indices, pattern.used_rows, pattern.used_cols, pattern.rows):
        assert indices.shape == (0,)
    assert pattern.entry_indices.dtype == torch.int64
    assert pattern.used_rows.dtype == pattern.rows.dtype == torch.int32
