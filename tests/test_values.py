"""Values that are written through `.data`, as libraries that average weights do."""

import copy
import pickle

import pytest
import torch
from kernels import make_pattern
from layers import MODES, make_layer
from torch import nn

import speft_kernels as sk
from speft_kernels.values import Values


def computes(model, values, x):
    """Whether a model computes what its sparse layers do with these values."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for layer, new in zip(sk.sparse_layers(twin).values(), values, strict=True):
            layer.values.copy_(new)
        return torch.equal(model(x), twin(x))


def make_model(mode):
    model = nn.Sequential(nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 48))
    patterns = {name: make_pattern("realistic", 48, 48) for name in ("0", "2")}
    sk.apply_patterns(model, patterns, sk.SpeftConfig(mode=mode))
    for layer in sk.sparse_layers(model).values():
        nn.init.normal_(layer.values)
    return model


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_averages_may_be_swapped_in_and_out_through_data(mode, flat):
    """With and without a pass before each swap, and with gradients and without."""
    model, x = make_model(mode), torch.randn(5, 48)
    held = [sk.FlatValues(model).parameter] if flat else model.parameters()
    held = [p for p in held if p.requires_grad]
    own = [p.detach().clone() for p in held]

    def values_of(tensors):
        sizes = [layer.values.numel() for layer in sk.sparse_layers(model).values()]
        return torch.cat([t.flatten() for t in tensors]).split(sizes)

    for round in range(4):
        if round % 2:
            assert computes(model, values_of(own), x)
        averages = [torch.randn_like(p) for p in own]
        for parameter, new in zip(held, averages, strict=True):
            parameter.data.copy_(new)
        if round < 2:
            with torch.no_grad():
                assert computes(model, values_of(averages), x)
        for parameter, former in zip(held, own, strict=True):
            parameter.data.copy_(former)
        assert computes(model, values_of(own), x)


def test_what_is_saved_after_a_write_through_data_is_what_the_layer_computes(tmp_path):
    model, x = make_model("resident"), torch.randn(5, 48)
    base = copy.deepcopy(model)
    sk.desparsify(base, keep_delta=False)
    model(x)
    for layer in sk.sparse_layers(model).values():
        layer.values.data.mul_(0.5)
    y = model(x)
    state = copy.deepcopy(model.state_dict())
    sk.save_adapter(model, tmp_path / "adapter")
    sk.load_adapter(base, tmp_path / "adapter")
    assert torch.equal(base(x), y)
    sk.desparsify(model)
    assert torch.equal(model(x), y)
    assert torch.equal(state["0.weight"], model[0].weight)


def test_reading_data_between_the_passes_is_no_change():
    layer, x = make_layer(), torch.randn(5, 48)
    y = layer(x)
    layer.values.data.norm()
    y.sum().backward()
    assert layer.values.grad is not None


@pytest.mark.parametrize(
    "renew",
    [
        copy.deepcopy,
        lambda layer: pickle.loads(pickle.dumps(layer)),
        lambda layer: (
            layer.load_state_dict(copy.deepcopy(layer.state_dict()), assign=True) and layer
        ),
        lambda layer: layer.double().float(),
    ],
    ids=["copied", "pickled", "assigned", "cast"],
)
def test_other_parameters_that_a_layer_comes_to_have_are_watched_too(renew):
    layer, x = make_layer(), torch.randn(5, 48)
    layer(x)
    layer = renew(layer)
    layer(x)
    layer.values.data.zero_()
    with torch.no_grad():
        assert torch.equal(layer(x), nn.functional.linear(x, layer.base_weight(), layer.bias))


def test_a_compiled_layer_sees_a_write_through_data():
    layer, x = make_layer(), torch.randn(5, 48)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        compiled(x)
        layer.values.data.zero_()
        assert torch.equal(compiled(x), nn.functional.linear(x, layer.base_weight(), layer.bias))


def test_values_are_a_parameter_as_any_other():
    values = make_layer().values
    assert isinstance(values, Values)
    assert isinstance(values, nn.Parameter)
    assert type(values.detach()) is type(values * 2) is torch.Tensor
    before = values.data_ptr()
    values.data = torch.ones_like(values)
    assert values.data_ptr() != before
    assert bool((values == 1).all())


def test_values_that_no_weight_ever_held_are_plain():
    layer, x = make_layer(mode="additive"), torch.randn(5, 48)
    assert type(layer.values) is nn.Parameter
    y = layer(x)
    layer.merge()
    assert type(layer.values) is Values
    torch.testing.assert_close(layer(x), y)
    layer.unmerge()
    layer.values.data.zero_()
    assert torch.equal(layer(x), nn.functional.linear(x, layer.base_weight(), layer.bias))
