"""What is saved of a sparse GPT-2: state dicts, copies, adapters, of a mask that moves too."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from conv1ds import BATCHES, CONFIG, SQUARE, WIDE, loss, with_linears
from safetensors.torch import save_file
from tiny_models import Snapshot, drawn, gpt2

from speft_kernels import desparsify, load_adapter, save_adapter, sparsify
from speft_kernels.adapter import fingerprint
from speft_kernels.conv1d import Conv1DLinear, is_conv1d
from speft_kernels.dynamic import MovingMask
from speft_kernels.errors import AdapterError
from speft_kernels.install import linear_for_conv1d
from speft_kernels.model import score_and_select

transformers = pytest.importorskip("transformers")


def test_state_dicts_have_the_weight_as_transformers_does(tmp_path):
    model = gpt2()
    plain = copy.deepcopy(model)
    sparsify(model, CONFIG, BATCHES)
    drawn(model)
    trained = loss(model).detach()
    names = set(plain.state_dict())
    state = model.state_dict()
    assert {n: t.shape for n, t in state.items() if n in names} == {
        n: t.shape for n, t in plain.state_dict().items()
    }
    # safetensors writes what is contiguous alone, as does the Trainer of any nn.Module.
    untied = {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}
    save_file(untied, tmp_path / "state.safetensors")
    # transformers reads what it wrote; the rest it says it does not know.
    model.save_pretrained(tmp_path / "whole")
    whole = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(loss(whole), trained)
    # Into another sparse model, which has another delta.
    other = gpt2(seed=1)
    sparsify(other, CONFIG, BATCHES)
    drawn(other)
    for assign in (False, True):
        saved = copy.deepcopy(state)
        other.load_state_dict(saved, assign=assign)
        assert torch.equal(loss(other), trained)
        assert all(torch.equal(tensor, state[name]) for name, tensor in saved.items())
    desparsify(other, keep_delta=False)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
    # Of the plain model: what it lacks is said, and its weights are taken.
    result = model.load_state_dict(gpt2(seed=2).state_dict(), strict=False)
    assert not result.unexpected_keys
    desparsify(model, keep_delta=False)
    for name, tensor in gpt2(seed=2).state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_state_dicts_of_the_linear_layers_while_they_are_lent(assign, held):
    model, other = gpt2(), gpt2(seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weight = model.get_submodule(WIDE).weight if held else None
    with linear_for_conv1d(model, [SQUARE, WIDE]):
        assert isinstance(model.get_submodule(SQUARE), Conv1DLinear)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]), name
        torch.testing.assert_close(loss(model), loss(gpt2()))
        assert all(t.is_contiguous() for t in model.state_dict().values())
        model.load_state_dict(other.state_dict(), assign=assign)
        linear = model.get_submodule(WIDE)
    found = model.get_submodule(WIDE).weight
    assert weight is None or weight is found
    assert linear.weight.data_ptr() == found.data_ptr()  # who kept it keeps no copy
    assert is_conv1d(model.get_submodule("transformer.h.0.mlp.c_fc"))
    for name, tensor in other.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_copies_and_pickles():
    model = gpt2()
    sparsify(model, CONFIG, BATCHES)
    drawn(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(loss(other), loss(model))
        desparsify(other)
        assert is_conv1d(other.get_submodule(WIDE))
        torch.testing.assert_close(loss(other), loss(model))


def test_an_adapter_is_for_either_kind_of_model(tmp_path):
    model = gpt2()
    sparsify(model, CONFIG, BATCHES)
    drawn(model)
    save_adapter(model, tmp_path / "adapter", config=CONFIG)
    for other in (gpt2(), with_linears(gpt2())):
        load_adapter(other, tmp_path / "adapter")
        assert torch.equal(loss(other), loss(model))
    other = gpt2(seed=1)
    before = Snapshot(other)
    with pytest.raises(AdapterError, match="another base"):
        load_adapter(other, tmp_path / "adapter")
    before.assert_untouched()
    wanted = fingerprint(other.get_submodule(SQUARE))
    with linear_for_conv1d(other, [SQUARE]):
        assert fingerprint(other.get_submodule(SQUARE)) == wanted
    sparsify(other, CONFIG, BATCHES)
    drawn(other)
    assert fingerprint(other.get_submodule(SQUARE)) == wanted


def test_an_adapter_of_fewer_layers_gives_the_others_back(tmp_path):
    few = replace(CONFIG, target_modules=["mlp.c_fc"])
    model = gpt2()
    sparsify(model, few, BATCHES)
    drawn(model)
    save_adapter(model, tmp_path / "few")
    other = gpt2()
    sparsify(other, CONFIG, BATCHES)
    drawn(other)
    load_adapter(other, tmp_path / "few")
    assert is_conv1d(other.get_submodule(SQUARE))
    torch.testing.assert_close(loss(other), loss(model))


def test_a_weight_that_trains_densely_is_the_same_in_either_kind(tmp_path):
    """It is square: read the wrong way round, its shape would not tell."""
    few = replace(CONFIG, target_modules=["mlp.c_fc"], modules_to_train=[SQUARE])
    trained = []
    for number, make in enumerate((gpt2, lambda: with_linears(gpt2()))):
        model = make()
        sparsify(model, few, BATCHES)
        drawn(model)
        optimizer = torch.optim.SGD([model.get_submodule(SQUARE).weight], lr=1.0)
        loss(model).backward()
        optimizer.step()
        save_adapter(model, tmp_path / str(number), config=few)
        trained.append(loss(model))
    torch.testing.assert_close(*trained)
    whole, sparse = with_linears(gpt2()), gpt2()
    sparsify(sparse, CONFIG, BATCHES)
    for number in "01":
        for other in (gpt2(), whole, sparse):
            load_adapter(other, tmp_path / number)
            torch.testing.assert_close(loss(other), trained[0])
    assert is_conv1d(sparse.get_submodule(SQUARE))


def test_a_bias_that_trains_beside_the_entries(tmp_path):
    model = gpt2()
    sparsify(model, CONFIG, BATCHES)
    drawn(model)
    bias = model.get_submodule(WIDE).bias.requires_grad_(True)
    with torch.no_grad():
        bias.add_(1.0)
    save_adapter(model, tmp_path / "adapter")
    for other in (gpt2(), with_linears(gpt2())):
        load_adapter(other, tmp_path / "adapter")
        assert torch.equal(loss(other), loss(model))


@pytest.mark.parametrize("strategy", ["merge", "rigl"])
def test_a_mask_moves(strategy, tmp_path):
    model, linears = gpt2(), with_linears(gpt2())
    for name, each in (("conv1d", model), ("linears", linears)):
        sparsify(each, CONFIG, BATCHES)
        moving = MovingMask(each, CONFIG, strategy)
        drawn(each)
        move = moving.update(each, BATCHES, None, progress=0.5)
        assert move.moved
        moving.save(each, tmp_path / name)
    assert torch.equal(loss(model), loss(linears))
    for name in ("conv1d", "linears"):
        other = gpt2()
        load_adapter(other, tmp_path / name)
        torch.testing.assert_close(loss(other), loss(model))
    desparsify(model)
    assert is_conv1d(model.get_submodule(SQUARE))


@pytest.mark.parametrize("salience", ["synflow", "fisher", "grasp", "snip"])
def test_every_score_is_that_of_the_linear_layers(salience):
    config = replace(CONFIG, salience=salience)
    found, _ = score_and_select(gpt2(), config, BATCHES)
    wanted, _ = score_and_select(with_linears(gpt2()), config, BATCHES)
    assert found == wanted
