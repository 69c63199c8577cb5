"""The layers of a model are written together: how many calls that takes, the same bits as layer by
layer, and all or nothing on an error.
"""

import copy
from dataclasses import replace

import pytest
import torch
from kernels import backends, make_pattern
from tiny_models import Int8Linear, drawn
from torch import nn

from speft_kernels import SparsePattern, SpeftConfig, apply_patterns, ops
from speft_kernels.adapter import load_adapter, save_adapter
from speft_kernels.errors import BackendError, ConfigError
from speft_kernels.model import desparsify, merge, unmerge
from speft_kernels.ops import registry

X = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
FEW = 5


def dense(layers=FEW, dtypes=(torch.float32,)):
    """A chain of layers, in whose weights are zeros of both signs; a sum would lose the minus."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(12, 12) for _ in range(layers + 1)])
    with torch.no_grad():
        for i, layer in enumerate(model):
            layer.weight[::3] = 0.0
            layer.weight[1::3] = -0.0
            layer.to(dtypes[i % len(dtypes)])
    return model


def sparse(layers=FEW, mode="resident", dtypes=(torch.float32,), kind="uniform"):
    """`dense`, sparse but for the last layer, which has nothing to train; its values random."""
    model = dense(layers, dtypes)
    torch.manual_seed(1)
    patterns = {str(i): make_pattern(kind, 12, 12) for i in range(layers)}
    patterns[str(layers)] = SparsePattern((12, 12), torch.arange(0))
    apply_patterns(model, patterns, SpeftConfig(mode=mode))
    return drawn(model, seed=1)


def bits(model):
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    weights = [layer.weight.detach() for layer in model]
    return [weight.view(kinds[weight.element_size()]).clone() for weight in weights]


def same(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))


def modes(model):
    return {layer.mode for layer in model}


# Calls


def test_merge_and_unmerge_are_one_call(write_sizes):
    model = sparse()
    model(X)
    assert write_sizes == [FEW]
    for switch in (unmerge, merge, unmerge, merge):
        write_sizes.clear()
        switch(model)
        assert write_sizes == [FEW]
        model(X)
        assert write_sizes == [FEW]
    unmerge(model), write_sizes.clear()
    unmerge(model)
    assert write_sizes == []


def test_layers_of_two_dtypes_are_two_calls(write_sizes):
    model = sparse(dtypes=(torch.float32, torch.bfloat16))
    for switch in (merge, unmerge):
        write_sizes.clear()
        switch(model)
        assert write_sizes == [3, 2]


@pytest.mark.parametrize("before", ["resident", "additive"])
@pytest.mark.parametrize("mode", [None, "resident", "additive"])
def test_an_adapter_swap_is_one_call(write_sizes, tmp_path, before, mode):
    save_adapter(sparse(), tmp_path / "a")
    model = drawn(sparse(mode=before), seed=2)
    model(X), write_sizes.clear()
    load_adapter(model, tmp_path / "a", mode=mode)
    stays_additive = before == "additive" and mode != "resident"
    assert write_sizes == ([] if stays_additive else [FEW])
    model(X)
    assert len(write_sizes) <= 1
    assert modes(model) == {mode or before}
    expected = sparse(mode=mode or before)
    expected(X)
    assert same(bits(model), bits(expected))


def test_other_patterns_take_a_call_to_restore_and_a_call_to_write(write_sizes, tmp_path):
    save_adapter(sparse(kind="row"), tmp_path / "a")
    model = sparse()
    model(X), write_sizes.clear()
    load_adapter(model, tmp_path / "a")
    assert write_sizes == [FEW, FEW]


@pytest.mark.parametrize("keep_delta", [True, False])
def test_desparsify_is_one_call(write_sizes, keep_delta):
    model = sparse()
    model(X), write_sizes.clear()
    desparsify(model, keep_delta)
    assert write_sizes == [FEW]


def test_fingerprints_make_no_call(write_sizes, tmp_path):
    """Their copies are at new addresses each time."""
    model = sparse()
    model(X), write_sizes.clear()
    save_adapter(model, tmp_path / "a")
    assert write_sizes == []


@pytest.mark.skipif("triton" not in backends("write_delta"), reason="Triton is not here")
def test_the_table_of_a_training_step_outlives_swaps(monkeypatch, tmp_path):
    """Or a CUDA graph could not be captured after one: more layers here than tables are kept."""
    from speft_kernels.triton_kernels import write_delta

    monkeypatch.setenv("SPEFT_BACKEND", "triton")
    write_delta._tables.clear()
    model = sparse(write_delta.TABLES + 1)
    save_adapter(model, tmp_path / "a")
    with torch.no_grad():
        model(X)
    (step,) = write_delta._tables.values()
    merge(model), unmerge(model), load_adapter(model, tmp_path / "a", mode="resident")
    assert any(table is step for table in write_delta._tables.values())


# The same bits


@pytest.mark.parametrize(
    "dtypes", [(torch.float32,), (torch.bfloat16,), (torch.float64, torch.float16)]
)
def test_all_at_once_gives_the_bits_of_layer_by_layer(dtypes):
    base = bits(dense(dtypes=dtypes))
    model = sparse(dtypes=dtypes, mode="additive")
    alone = copy.deepcopy(model)
    assert same(bits(model), base)
    for _ in range(2):
        merge(model)
        for layer in alone:
            layer.merge()
        assert same(bits(model), bits(alone))
        assert not same(bits(model), base)
        unmerge(model)
        for layer in alone:
            layer.unmerge()
        assert same(bits(model), base)
        assert same(bits(alone), base)
    merge(model)
    desparsify(model, keep_delta=False)
    assert same(bits(model), base)


def test_versions_rise_as_before():
    """A graph over a weight that was written since must not be followed backward."""
    model = sparse()
    y = model(X.clone().requires_grad_())
    before = [layer.weight._version for layer in model[:FEW]]
    unmerge(model)
    assert all(x.weight._version > v for x, v in zip(model[:FEW], before, strict=True))
    with pytest.raises(RuntimeError):
        y.sum().backward()


# All or nothing


def widen_the_values(layer):
    layer.values.data = layer.values.data.double()


def turn_the_weight(layer):
    layer.weight.data = layer.weight.data.t().contiguous().t()


@pytest.mark.parametrize(
    ("switch", "spoil"),
    [(merge, widen_the_values), (merge, turn_the_weight), (unmerge, turn_the_weight)],
)
def test_a_refused_layer_leaves_all_as_they_were(switch, spoil):
    model = sparse(mode="additive" if switch is merge else "resident")
    model(X)
    spoil(model[FEW - 1])
    before, kept = bits(model), modes(model)
    versions = [layer.weight._version for layer in model]
    states = [layer._written_for for layer in model]
    with pytest.raises((TypeError, ValueError), match="must be"):
        switch(model)
    assert modes(model) == kept
    assert same(bits(model), before)
    assert [layer.weight._version for layer in model] == versions
    assert [layer._written_for for layer in model] == states


def test_a_backend_that_refuses_one_dtype_leaves_all_as_they_were(monkeypatch):
    model = sparse(mode="additive", dtypes=(torch.float32, torch.float64))
    found = registry.resolve("write_delta", torch.device("cpu"), torch.float32)
    name = found.backend.name
    narrow = replace(found, dtypes=(torch.float32,))
    monkeypatch.setitem(registry._implementations, ("write_delta", name), narrow)
    monkeypatch.setattr(registry, "_resolved", {})
    monkeypatch.setenv("SPEFT_BACKEND", name)
    with pytest.raises(BackendError):
        merge(model)
    assert modes(model) == {"additive"}
    assert same(bits(model), bits(dense(dtypes=(torch.float32, torch.float64))))


def test_an_opaque_base_leaves_the_others_as_they_were():
    model = dense()
    model[FEW] = Int8Linear(model[FEW])
    patterns = {str(i): make_pattern("uniform", 12, 12) for i in range(FEW)}
    patterns[str(FEW)] = SparsePattern((12, 12), torch.arange(0))
    apply_patterns(model, patterns, SpeftConfig(mode="additive"))
    drawn(model, 1)
    with pytest.raises(ConfigError, match="Int8Linear cannot hold the delta"):
        merge(model)
    assert modes(model) == {"additive"}
    assert same(bits(model[:FEW]), bits(dense()[:FEW]))


@pytest.mark.parametrize("switch", [merge, unmerge])
def test_a_write_that_is_cut_short_is_made_good_by_the_next_pass(monkeypatch, switch):
    """The first of two calls has run: what the layers compute stays the same all the while."""
    dtypes = (torch.float64, torch.float32)
    mode = "additive" if switch is merge else "resident"
    model = sparse(dtypes=dtypes, mode=mode)
    layers = [layer for layer in model if not layer.pattern.is_empty]
    xs = [X.to(layer.weight.dtype) for layer in layers]
    expected = [layer(x).detach() for layer, x in zip(layers, xs, strict=True)]
    found = registry.resolve("write_delta", X.device, X.dtype)
    key = "write_delta", found.backend.name
    calls = []

    def cut_short(weights, *rest):
        calls.append(weights)
        if len(calls) == 2:
            raise KeyboardInterrupt
        found.function(weights, *rest)

    broken = replace(found, function=cut_short)
    monkeypatch.setitem(registry._implementations, key, broken)
    monkeypatch.setattr(registry, "_resolved", {})
    with pytest.raises(KeyboardInterrupt):
        switch(model)
    for layer, x, y in zip(layers, xs, expected, strict=True):
        # In the other mode: each way rounds 25 sums, to 2^-20 at most as they stay below 32.
        assert float(y.abs().max()) < 16
        torch.testing.assert_close(layer(x).detach(), y, rtol=0, atol=2 * 25 * 2**-20)
    reached = sparse(dtypes=dtypes, mode="resident" if switch is merge else "additive")
    merge(reached) if switch is merge else unmerge(reached)
    assert same(bits(model), bits(reached))


@pytest.mark.parametrize("start", ["plain", "same patterns", "other patterns"])
def test_a_swap_that_fails_leaves_every_bit_and_the_family(
    monkeypatch, tmp_path, write_sizes, start
):
    save_adapter(drawn(sparse(), seed=2), tmp_path / "a")
    model = dense() if start == "plain" else sparse(kind="row" if "other" in start else "uniform")
    if start != "plain":
        model(X)
    before, layers = bits(model), list(model)
    write_deltas = ops.write_deltas

    def fails_after_a_swap(weights, patterns, base, values):
        write_deltas(weights, patterns, base, values)
        if any(value is not None for value in values):
            monkeypatch.setattr(ops, "write_deltas", write_deltas)
            raise MemoryError

    monkeypatch.setattr(ops, "write_deltas", fails_after_a_swap)
    with pytest.raises(MemoryError):
        load_adapter(model, tmp_path / "a")
    assert list(model) == layers
    assert same(bits(model), before)
    if start != "plain":
        drawn(model, seed=3)
        write_sizes.clear()
        model(X)
        assert write_sizes == [FEW]
