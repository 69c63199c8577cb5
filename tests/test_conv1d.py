"""GPT-2's `Conv1D`, which holds the transposed weight: trained as a linear layer, and back."""

import copy
import weakref
from dataclasses import replace

import pytest
import torch
from conv1ds import BATCHES, CONFIG, SQUARE, WIDE, loss, with_linears
from tiny_models import Snapshot, drawn, gpt2
from torch import nn
from torch.nn.utils import prune

from speft_kernels import (
    SparseDeltaLinear,
    SparsePattern,
    SpeftConfig,
    apply_patterns,
    conv1d,
    desparsify,
    load_adapter,
    save_adapter,
    sparse_layers,
    sparsify,
    summary,
)
from speft_kernels.conv1d import Conv1DLinear, is_conv1d
from speft_kernels.errors import ConfigError
from speft_kernels.model import score_and_select

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("settings", [{}, {"mode": "additive"}, {"block_shape": (4, 4)}])
def test_it_trains_as_the_same_model_of_linear_layers(settings):
    config = replace(CONFIG, **settings)
    model, linears = gpt2(), with_linears(gpt2())
    assert sparsify(model, config, BATCHES).notes == ()
    sparsify(linears, config, BATCHES)
    assert list(sparse_layers(model)) == list(sparse_layers(linears))
    assert len(sparse_layers(model)) == 8
    for one, other in zip(
        sparse_layers(model).values(), sparse_layers(linears).values(), strict=True
    ):
        assert one.pattern == other.pattern
        assert torch.equal(one.base_weight(), other.base_weight())
    losses = []
    for each in (model, linears):
        optimizer = torch.optim.Adam([p for p in each.parameters() if p.requires_grad], lr=0.05)
        losses.append([])
        for _ in range(5):
            losses[-1].append(loss(each))
            losses[-1][-1].backward()
            optimizer.step()
            optimizer.zero_grad()
    assert losses[0] == losses[1]
    assert losses[0] == sorted(losses[0], reverse=True)
    assert "48 x 16" in str(summary(model))  # as [N, K]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_a_conv1d_again_afterwards(dtype):
    model = gpt2().to(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    of_conv1d = [weakref.ref(m.weight) for m in model.modules() if is_conv1d(m)]
    sparsify(model, CONFIG, BATCHES)
    assert all(ref() is None for ref in of_conv1d)  # no weight is there twice
    drawn(model)
    trained = loss(model)
    kept = copy.deepcopy(model)
    desparsify(kept)
    assert is_conv1d(kept.get_submodule(SQUARE))
    # Another product of the same numbers: the sums of 64 have other orders.
    torch.testing.assert_close(loss(kept), trained, rtol=64 * torch.finfo(dtype).eps, atol=0)
    desparsify(model, keep_delta=False)
    assert list(model.state_dict()) == list(before)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
        assert tensor.is_contiguous()
    found = model.get_submodule(WIDE)
    assert (found.nf, found.nx, tuple(found.weight.shape)) == (64, 16, (16, 64))


def test_layers_that_do_not_train_are_left_as_they_were():
    """Those that are excluded, and those that train densely."""
    model = gpt2()
    excluded, dense = model.get_submodule(SQUARE), model.get_submodule(WIDE)
    values = excluded.weight.detach().clone()
    hook = excluded.register_forward_hook(lambda *_: called.append(1))
    called = []
    config = replace(CONFIG, exclude_modules=[SQUARE], modules_to_train=[WIDE])
    sparsify(model, config, BATCHES)
    assert model.get_submodule(SQUARE) is excluded
    assert model.get_submodule(WIDE) is dense
    assert torch.equal(excluded.weight, values)
    assert dense.weight.requires_grad
    assert not excluded.weight.requires_grad
    called.clear()
    loss(model)
    assert called == [1]
    hook.remove()
    loss(model)
    assert called == [1]


def test_scoring_alone_and_errors_leave_the_model_as_it_was():
    model = gpt2()
    loss(model).backward()  # gradients are put back, too
    before = Snapshot(model)
    patterns, _ = score_and_select(model, CONFIG, BATCHES)
    assert len(patterns) == 8
    before.assert_untouched()

    def failing(model, batch):
        raise RuntimeError("the loss of the caller")

    with pytest.raises(RuntimeError, match="the loss of the caller"):
        sparsify(model, CONFIG, BATCHES, failing)
    before.assert_untouched()
    wrong = {**patterns, SQUARE: SparsePattern((16, 17), torch.tensor([], dtype=torch.int32))}
    with pytest.raises(ConfigError, match=r"pattern is for a weight of shape \(16, 17\)"):
        apply_patterns(model, wrong, CONFIG)
    before.assert_untouched()
    # Of a weight that nobody else has, an equal one comes back.
    model, same = gpt2(), gpt2()
    for each in (model, same):
        each.get_submodule(WIDE).weight.requires_grad_(False)
        each.get_submodule(SQUARE).weight.tag = "mine"
        loss(each).backward()
    score_and_select(model, CONFIG, BATCHES)
    with pytest.raises(RuntimeError, match="the loss of the caller"):
        sparsify(model, CONFIG, BATCHES, failing)
    for (name, found), wanted in zip(model.named_parameters(), same.parameters(), strict=True):
        assert torch.equal(found, wanted), name
        assert found.requires_grad == wanted.requires_grad, name
        assert (found.grad is None) == (wanted.grad is None), name
        assert found.grad is None or torch.equal(found.grad, wanted.grad), name
        assert found.is_contiguous()
    assert model.get_submodule(SQUARE).weight.tag == "mine"


def test_what_others_have_of_the_model_stays_as_it_was():
    """An optimizer that was made before, and a model that shares the parameters."""
    model = gpt2()
    sharing = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    before = Snapshot(sharing)
    wanted = loss(sharing)
    score_and_select(model, CONFIG, BATCHES)
    assert all(a is b for a, b in zip(model.parameters(), sharing.parameters(), strict=True))
    config = replace(CONFIG, mode="additive", exclude_modules=[SQUARE])
    sparsify(model, config, BATCHES)
    drawn(model)
    assert not torch.equal(loss(model), wanted)
    assert torch.equal(loss(sharing), wanted)
    shared = model.get_submodule(SQUARE).weight
    assert shared is sharing.get_submodule(SQUARE).weight
    assert not shared.requires_grad  # frozen like the rest
    desparsify(model, keep_delta=False)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    before.assert_untouched()
    # A parameter that its transpose is a mere view of is not written to, either.
    model = gpt2()
    weight = model.get_submodule(SQUARE).weight
    weight.data = weight.data.t().contiguous().t()
    values = weight.detach().clone()
    module = model.get_submodule(SQUARE)
    x = torch.randn(3, 16)
    sparsify(model, CONFIG, BATCHES)
    drawn(model)
    loss(model)
    assert torch.equal(weight, values)
    # Who has the module itself computes what the sparse layer does.
    torch.testing.assert_close(module(x), model.get_submodule(SQUARE)(x))


def test_hooks_on_a_weight_outlive_scoring():
    model, called = gpt2(), []
    model.get_submodule(SQUARE).weight.register_hook(lambda _: called.append(1))
    model.get_submodule(WIDE).weight.register_post_accumulate_grad_hook(lambda _: called.append(2))
    score_and_select(model, CONFIG, BATCHES)
    assert called == []
    loss(model).backward()
    assert sorted(called) == [1, 2]


@pytest.mark.parametrize("excluded", [True, False])
def test_a_layer_that_computes_in_a_way_of_its_own_is_passed_over(excluded):
    """As with the hooks of accelerate, which replace `forward`."""
    model = gpt2()
    module = model.get_submodule(SQUARE)
    module.forward = lambda x, forward=module.forward: 2 * forward(x)
    wanted = loss(model)
    config = replace(CONFIG, exclude_modules=[SQUARE] if excluded else [])
    patterns, _ = score_and_select(model, config, BATCHES)
    other, _ = score_and_select(gpt2(), replace(CONFIG, exclude_modules=[SQUARE]), BATCHES)
    assert patterns.keys() == other.keys()
    assert patterns != other  # scored with what the layer computes
    sparsify(model, config, BATCHES)
    torch.testing.assert_close(loss(model), wanted)
    assert model.get_submodule(SQUARE) is module
    named = replace(CONFIG, target_modules=["attn.c_proj"])
    with pytest.raises(ConfigError, match="sparse layers already"):
        sparsify(model, named, BATCHES)
    desparsify(model)
    with pytest.raises(ConfigError, match="computes in a way of its own"):
        sparsify(model, named, BATCHES)


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_layer_with_a_computed_parameter(part):
    model = gpt2()
    prune.l1_unstructured(model.get_submodule(SQUARE), part, 0.5)
    wanted = loss(model)
    named = replace(CONFIG, target_modules=["c_proj"])
    with pytest.raises(ConfigError, match=f"{SQUARE}' .*{part} is computed"):
        sparsify(model, named, BATCHES)
    excluded = replace(CONFIG, exclude_modules=[SQUARE])
    for config in (excluded, CONFIG):  # of all linear layers it is left out
        sparsify(model, config, BATCHES)
        assert len(sparse_layers(model)) == 7
        torch.testing.assert_close(loss(model), wanted)
        desparsify(model)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_callers_without_gradients(mode, tmp_path):
    model = gpt2()
    with mode():
        score_and_select(model, CONFIG, BATCHES)
        sparsify(model, CONFIG, BATCHES)
    drawn(model)
    save_adapter(model, tmp_path / "adapter")
    other = gpt2()
    with mode():
        load_adapter(other, tmp_path / "adapter")
    for each in (model, other):
        loss(each).backward()
        with mode():
            desparsify(each)
        each.requires_grad_(True)
        loss(each).backward()
    assert torch.equal(loss(model), loss(other))


def test_where_memory_runs_out_the_model_is_as_it_was(monkeypatch):
    model = gpt2()
    before = Snapshot(model)
    made = []

    def transposed(weight, transpose=conv1d._transposed):
        if len(made) == 3:
            made.append(None)
            raise MemoryError
        made.append(weight.shape)
        return transpose(weight)

    monkeypatch.setattr(conv1d, "_transposed", transposed)
    with pytest.raises(MemoryError):
        sparsify(model, CONFIG, BATCHES)
    assert len(made) == 4  # those before are given back as they were
    before.assert_untouched()
    del before
    made = [None] * 4
    sparsify(model, CONFIG, BATCHES)
    drawn(model)
    wanted = loss(model)
    made = [None]
    with pytest.raises(MemoryError):
        desparsify(model)
    assert {type(m) for m in model.modules() if is_conv1d(m) or isinstance(m, nn.Linear)} == {
        *(type(gpt2().get_submodule(SQUARE)), Conv1DLinear, nn.Linear)
    }
    torch.testing.assert_close(loss(model), wanted)
    desparsify(model)  # goes on
    assert sum(map(is_conv1d, model.modules())) == 8
    torch.testing.assert_close(loss(model), wanted)
    with pytest.raises(ConfigError, match="no sparse layers"):
        desparsify(model)


def test_hooks_and_shared_weights_are_refused():
    model = gpt2()
    model.get_submodule(SQUARE).register_forward_hook(lambda *_: None)
    before = Snapshot(model)
    with pytest.raises(ConfigError, match=f"{SQUARE}' .*has hooks"):
        sparsify(model, CONFIG, BATCHES)
    before.assert_untouched()
    for shared in (lambda w: w, lambda w: nn.Parameter(w.data), lambda w: nn.Parameter(w.data.t())):
        model = gpt2()
        other = model.get_submodule("transformer.h.1.attn.c_proj")
        other.weight = shared(model.get_submodule(SQUARE).weight)
        before = Snapshot(model)
        for mode in ("resident", "additive"):
            config = replace(CONFIG, target_modules=["attn.c_proj"], mode=mode)
            with pytest.raises(ConfigError, match="a Conv1D, whose weight .* shares it with"):
                sparsify(model, config, BATCHES)
            before.assert_untouched()
        # The others train.
        config = replace(CONFIG, exclude_modules=["attn.c_proj"])
        sparsify(model, config, BATCHES)
        assert len(sparse_layers(model)) == 6
        assert model.get_submodule("transformer.h.1.attn.c_proj") is other


def test_one_alone_is_no_linear_layer():
    alone = gpt2().get_submodule(SQUARE)
    pattern = SparsePattern((16, 16), torch.tensor([], dtype=torch.int32))
    for mode in ("resident", "additive"):
        with pytest.raises(ConfigError, match="becomes one by sparsify"):
            SparseDeltaLinear.from_linear(alone, pattern, mode)
    with pytest.raises(ConfigError):
        sparsify(alone, SpeftConfig(density=0.1, salience="magnitude"))
