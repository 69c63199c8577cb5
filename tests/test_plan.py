"""SparsityPlan: each entry in exactly one part, and what it keeps of the activations."""

import copy
import itertools
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import KINDS, make_pattern
from plans import COSTS, PARTS, check_each_entry_once, drawn_keep, mixed_pattern, plan_with

from speft_kernels import SparsePattern, SparsityPlan, ops
from speft_kernels.costs import DEFAULTS, Costs
from speft_kernels.errors import PatternError
from speft_kernels.parts import ALIGNED_LINES, PANEL_ELEMENTS, Parts
from speft_kernels.plan import (
    BLOCK_BYTES,
    BLOCK_TOKENS,
    DEFAULT_TOKENS,
    KEEP_COLUMNS_SHARE,
    TOKEN_STEP,
    plan_of,
)
from speft_kernels.testing import realistic_pattern


def entries(compact):
    return list(zip(compact.entry_rows.tolist(), compact.entry_cols.tolist(), strict=True))


@st.composite
def patterns(draw):
    """Shapes around the side of a tile; entries by chance, in clusters, in lines, in blocks."""
    n, k = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    kind = draw(st.sampled_from([*KINDS, "chance", "dense square", "blocks"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    if kind == "chance":
        mask = torch.rand(n, k, generator=generator) < draw(st.floats(0, 1))
        return SparsePattern.from_mask(mask)
    if kind == "dense square":
        mask = torch.zeros(n, k, dtype=torch.bool)
        mask[n // 3 :, k // 3 :] = True
        mask[0] |= torch.rand(k, generator=generator) < 0.3
        return SparsePattern.from_mask(mask)
    if kind == "blocks":
        bh, bw = draw(st.sampled_from([(2, 3), (1, 4), (5, 1)]))
        chosen = torch.rand(n * k, generator=generator) < draw(st.floats(0, 1))
        return SparsePattern((n * bh, k * bw), chosen.nonzero().flatten(), (bh, bw))
    return make_pattern(kind, n, k)


@st.composite
def plans(draw):
    """Plans of any part, some of which keep more columns than they use, in any order."""
    pattern = draw(patterns())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    keep = None if pattern.is_block else drawn_keep(draw, pattern, generator)
    part = draw(st.sampled_from([*PARTS, "default"]))
    if part == "default":
        return SparsityPlan.build(pattern, keep=keep, costs=DEFAULTS["cpu"]), keep
    return plan_with(part, pattern, keep), keep


def check_each_entry_is_in_one_part(plan):
    for packed in (True, False):
        check_each_entry_once(plan, packed)


@settings(max_examples=300, deadline=None)
@given(made=plans())
def test_each_entry_is_in_exactly_one_part(made):
    check_each_entry_is_in_one_part(made[0])


@pytest.mark.parametrize("keeps_more", [False, True])
@pytest.mark.parametrize("part", PARTS)
def test_each_entry_is_in_exactly_one_part_of_all(part, keeps_more):
    pattern = mixed_pattern(96, 130)
    keep = None
    if keeps_more:
        unused = torch.tensor([c for c in range(130) if c not in pattern.used_cols])[:3].int()
        keep = torch.cat([pattern.used_cols, unused])
        keep = keep[torch.randperm(keep.numel())]
    plan = plan_with(part, pattern, keep)
    assert plan.kept_columns is not None
    check_each_entry_is_in_one_part(plan)


@settings(max_examples=200, deadline=None)
@given(made=plans())
def test_kept_columns_hold_the_used_ones_hot_ones_first(made):
    plan, keep = made
    used, (_, k) = plan.pattern.used_cols, plan.pattern.shape
    asked = used if keep is None else keep
    if asked.numel() > KEEP_COLUMNS_SHARE * k:
        assert plan.kept_columns is None
        assert plan.kept_width == k
        return
    kept = plan.kept_columns
    assert kept.dtype == torch.int32
    assert plan.kept_width == kept.numel() == asked.numel()
    if keep is not None:
        assert torch.equal(kept, keep)
        return
    assert torch.equal(kept.sort().values, used)
    # A panel of hot columns then reads rows that lie together in the packed x. Where the test has
    # put all into rows there are no hot columns.
    if not plan.pattern.is_block:
        hot = plan.hot_lines.cols.int()
        assert torch.equal(kept[: hot.numel()], hot)
        rest = kept[hot.numel() :]
        assert torch.equal(rest, rest.sort().values)


@settings(max_examples=200, deadline=None)
@given(made=plans())
def test_what_the_kernels_binary_search_is_sorted(made):
    plan, _ = made
    for parts in (plan.compiled(Parts, True), plan.compiled(Parts, False)):
        for lines in (parts.rows, parts.entry_row, parts.tile_row, parts.hot_rows):
            assert torch.equal(lines, lines.sort().values)
        for at in (parts.hot_col_at, parts.hot_row_at):
            assert torch.equal(at, at.sort().values)


def check_pieces(pieces, lines, count, length, other):
    """Pieces cover all lines and entries in order, and none is larger than it may be."""
    first, entry = pieces.tolist()
    assert first == sorted(first)
    assert entry == sorted(entry)
    assert (first[0], entry[0]) == (0, 0)
    assert (first[-1], entry[-1]) == (lines, count)
    for a, b in itertools.pairwise(first):
        most = max(ALIGNED_LINES * length, min(PANEL_ELEMENTS, length * other / 4))
        assert (b - a) * length <= most


@settings(max_examples=200, deadline=None)
@given(made=plans())
def test_pieces_of_panels_are_bounded(made):
    plan, _ = made
    n, k = plan.pattern.shape
    for parts, width in (
        (plan.compiled(Parts, True), plan.kept_width),
        (plan.compiled(Parts, False), k),
    ):
        columns, rows = parts.hot_cols.numel(), parts.hot_rows.numel()
        check_pieces(parts.hot_col_panels, columns, parts.hot_col_at.numel(), n, k)
        check_pieces(parts.hot_row_panels, rows, parts.hot_row_at.numel(), width, n)


@pytest.mark.parametrize("part", ["columns", "rows"])
def test_a_panel_of_a_large_weight_has_four_megabytes_at_most(part):
    # One entry a line, so that only the number of lines makes pieces necessary.
    n, k = (4096, 2048) if part == "columns" else (2048, 4096)
    long, short = max(n, k), min(n, k)
    line, along = torch.arange(short), torch.arange(short) * (long // short)
    flat = along * k + line if part == "columns" else line * k + along
    plan = plan_with(part, SparsePattern.from_indices((n, k), flat))
    parts = plan.compiled(Parts, False)
    pieces = parts.hot_col_panels if part == "columns" else parts.hot_row_panels
    check_pieces(pieces, short, short, long, short)
    # A quarter of the weight would be 512 lines; the bound in bytes allows 256.
    assert pieces[0].diff().max() * long == PANEL_ELEMENTS


@pytest.mark.parametrize("part", PARTS)
def test_costs_decide_the_part(part):
    plan = plan_with(part, mixed_pattern(96, 130))
    shares = plan.shares()
    assert sum(shares.values()) == pytest.approx(1)
    if part == "mixed":
        assert all(share > 0.01 for share in shares.values()), shares
    else:
        assert shares[part] == 1


def test_scattered_entries_are_gathered_and_full_columns_are_hot():
    # In the proportions of a measured processor.
    costs = Costs(panel=1e-11, read=4e-10, tile=2e-11, gather=3e-11, pack=2e-10, call=7e-4)
    mask = torch.zeros(512, 512, dtype=torch.bool)
    mask[torch.arange(512), torch.arange(512) // 2] = True
    scattered = SparsityPlan.build(SparsePattern.from_mask(mask), costs=costs)
    assert scattered.shares()["gather"] == 1
    # 2048 tokens and 512 rows: a full column saves 21 us; reading dy costs 420 us, the call 700 us.
    mask[:, 300:350] = True
    few = SparsityPlan.build(SparsePattern.from_mask(mask), costs=costs)
    assert few.shares()["columns"] == 0
    mask[:, 300:360] = True
    many = SparsityPlan.build(SparsePattern.from_mask(mask), costs=costs)
    assert many.hot_lines.cols.tolist() == list(range(300, 360))
    assert many.shares()["gather"] == pytest.approx(512 / many.pattern.nnz)


def test_the_hint_of_tokens_is_honoured():
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[:, 7] = True
    pattern = SparsePattern.from_mask(mask)
    # A token in the panel saves 64 * (2 - 1) ns, and the panel costs 6.4 us.
    costs = Costs(panel=1e-9, read=1e-15, tile=1, gather=2e-9, pack=1, call=6.4e-6)
    few, many = (SparsityPlan.build(pattern, tokens_hint=t, costs=costs) for t in (99, 101))
    assert (few.tokens, many.tokens) == (99, 101)
    assert few.shares()["gather"] == 1
    assert many.shares()["columns"] == 1
    assert SparsityPlan.build(pattern).tokens == DEFAULT_TOKENS
    for tokens in (0, -5):
        with pytest.raises(ValueError, match=f"tokens_hint must be at least 1, got {tokens}"):
            SparsityPlan.build(pattern, tokens_hint=tokens)


def test_keep_is_checked():
    mask = torch.zeros(4, 9, dtype=torch.bool)
    mask[1, 2] = mask[3, 6] = True
    pattern = SparsePattern.from_mask(mask)

    def build(*columns, dtype=torch.int32):
        return SparsityPlan.build(pattern, keep=torch.tensor(columns, dtype=dtype))

    assert build(6, 0, 2).kept_columns.tolist() == [6, 0, 2]
    with pytest.raises(PatternError, match="leaves out column 6, which the pattern uses"):
        build(2, 5)
    with pytest.raises(PatternError, match="keep leaves out column 2"):
        build()
    with pytest.raises(PatternError, match="names a column twice"):
        build(2, 6, 2)
    for outside in (9, -1):
        with pytest.raises(PatternError, match="a column that is not among the 9"):
            build(2, 6, outside)
    with pytest.raises(PatternError, match="1-D int32 on cpu, got torch.int64"):
        build(2, 6, dtype=torch.int64)
    with pytest.raises(PatternError, match=r"got torch.int32 of shape \(1, 2\)"):
        SparsityPlan.build(pattern, keep=torch.tensor([[2, 6]], dtype=torch.int32))


def test_a_block_pattern_keeps_whole_groups_of_columns():
    pattern = SparsePattern.from_blocks((4, 12), (2, 2), torch.tensor([1, 9]))
    keep = torch.tensor([6, 7, 2, 3, 8, 9], dtype=torch.int32)
    assert torch.equal(SparsityPlan.build(pattern, keep=keep).kept_columns, keep)
    apart = torch.stack((keep, keep), dim=1)[:, 0]  # kernels read them one after the other
    kept = SparsityPlan.build(pattern, keep=apart).kept_columns
    assert kept.is_contiguous()
    assert torch.equal(kept, keep)
    for wrong in ([2, 6, 3, 7], [2, 3, 6, 7, 8], [3, 2, 6, 7]):
        with pytest.raises(PatternError, match="keep must name whole groups of 2 columns"):
            SparsityPlan.build(pattern, keep=torch.tensor(wrong, dtype=torch.int32))


@settings(max_examples=200, deadline=None)
@given(made=plans(), tokens=st.integers(1, 5000), more=st.integers(1, 5000))
def test_shares_and_predicted_times(made, tokens, more):
    plan, _ = made
    shares, seconds = plan.shares(), plan.predicted_seconds(tokens)
    later = plan.predicted_seconds(tokens + more)
    assert plan.predicted_seconds() == plan.predicted_seconds(plan.tokens)
    if plan.pattern.is_empty:
        assert set(shares.values()) == {0}
        return
    assert sum(shares.values()) == pytest.approx(1)
    assert all(value >= 0 for value in seconds.values())
    # What serves any entry takes time, and more of it for more tokens.
    for name, share in shares.items():
        assert (seconds[name] > 0) == (share > 0)
        assert (later[name] > seconds[name]) == (share > 0)


def test_the_summary_says_what_serves_what():
    plan = plan_with("mixed", mixed_pattern(96, 130))
    lines = plan.summary(1000).splitlines()
    shares, seconds = plan.shares(), plan.predicted_seconds(1000)
    assert lines[0] == (
        f"{plan.pattern!r} on cpu, 1000 tokens; kept: {plan.kept_width} of 130 columns of x"
    )
    assert [line.split()[0] for line in lines[1:]] == [*seconds, "all"]
    for line, (name, value) in zip(lines[1:], seconds.items(), strict=False):
        if name in shares:
            assert f"{shares[name]:.1%} of the entries" in line
        assert f"{value * 1e6:.1f} us predicted" in line
    assert f"{sum(seconds.values()) * 1e6:.1f} us" in lines[-1]
    whole = plan_with("gather", make_pattern("full", 8, 8))
    assert "2048 tokens; kept: x whole" in whole.summary()
    blocks = SparsityPlan.build(SparsePattern.from_blocks((4, 6), (2, 3), torch.tensor([1])))
    assert "100.0% of the entries" in blocks.summary()


def test_what_serves_on_other_devices(monkeypatch):
    monkeypatch.setattr(SparsityPlan, "_in_panels", True)
    mask = mixed_pattern(96, 130).mask()
    mask[64:] = False  # the second panel has no entry, and is not computed
    mask[40:60] = False
    pattern = SparsePattern.from_mask(mask)
    used = pattern.used_rows.numel()
    # Under the first picking a row costs a second, and none is picked.
    for costs, rows, picked in ((COSTS["columns"], 64, 0), (COSTS["mixed"], used, (96 + used) / 2)):
        plan = SparsityPlan.build(pattern, costs=costs)
        assert plan.shares() == {"panels": 1}
        token = rows * plan.kept_width * costs.panel + picked * costs.pack
        assert plan.predicted_seconds(1000) == {
            "panels": pytest.approx(1000 * token + costs.call),
            "keep": pytest.approx(plan.kept_width * 1000 * costs.pack),
        }
    assert "100.0% of the entries" in plan.summary()
    none = plan_with("mixed", make_pattern("empty", 96, 130))
    assert none.shares() == {"panels": 0}
    assert none.predicted_seconds(1000)["panels"] == 0


@settings(max_examples=300, deadline=None)
@given(tokens=st.integers(0, 5000), columns=st.integers(0, 20000))
def test_blocks_of_tokens_cover_them_with_little_padding(tokens, columns):
    pattern = SparsePattern((1, 40000), torch.arange(columns))
    width = plan_of(pattern).block_tokens(tokens)
    assert width % TOKEN_STEP == 0
    assert TOKEN_STEP <= width <= BLOCK_TOKENS == 128
    # The packed columns of one block stay in the cache, but for the least block there is.
    assert width == TOKEN_STEP or width * columns * 4 <= BLOCK_BYTES
    blocks = -(-tokens // width)
    assert 0 <= blocks * width - tokens < TOKEN_STEP * max(blocks, 1)


def test_elsewhere_than_on_a_cpu_one_block_holds_all_tokens():
    pattern = make_pattern("uniform", 33, 17).to("meta")
    plan = SparsityPlan(pattern, None, DEFAULTS["cuda"], 1)
    assert [plan.block_tokens(m) for m in (0, 1, 16, 17, 5000)] == [16, 16, 16, 32, 5008]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_each_entry_once_by_row_and_by_column(data):
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


def test_blocks_are_sorted_by_row():
    pattern = SparsePattern.from_blocks((4, 6), (2, 3), torch.tensor([1, 2, 3]))
    plan = plan_of(pattern)
    assert entries(plan.csr) == [tuple(e) for e in pattern.mask().nonzero().tolist()]
    flat = pattern.entry_indices[plan.row_order]
    assert flat.tolist() == sorted(flat.tolist())


def test_a_pattern_has_one_plan():
    pattern = realistic_pattern((64, 48), 0.05)
    assert plan_of(pattern) is plan_of(pattern)
    assert SparsityPlan.build(pattern, costs=COSTS["gather"]) is not plan_of(pattern)


def test_autograd_may_save_the_parts_of_a_plan_made_in_inference_mode():
    pattern = mixed_pattern(96, 130)
    with torch.inference_mode():
        plan = plan_with("mixed", pattern)
        assert plan.compiled(Parts, True).rows.numel() > 0
    tensors = [*plan.compiled(Parts, True), *plan.compiled(Parts, False)]
    assert not any(tensor.is_inference() for tensor in tensors)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda plan: pickle.loads(pickle.dumps(plan))])
def test_a_plan_in_use_can_be_copied(copied):
    pattern = make_pattern("realistic", 48, 64)
    plan = plan_of(pattern)
    dy, x = torch.randn(20, 48), torch.randn(20, 64)
    wanted = ops.sampled_grad(dy, x, pattern, plan=plan)
    again = copied(plan)
    del plan
    assert torch.equal(ops.sampled_grad(dy, x, again.pattern, plan=again), wanted)
