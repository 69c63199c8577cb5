"""SparseDeltaLinear among torch's other means: writes in place, second derivatives, computed
parameters, memory maps, hooks.
"""

import warnings

import pytest
import torch
from kernels import make_pattern
from layers import MODES, at_entries, dense_twin, make_layer
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

from speft_kernels import SparseDeltaLinear
from speft_kernels.errors import ConfigError


@pytest.mark.parametrize("shape", [(5, 48), (2, 3, 48), (48,), (0, 48)])
@pytest.mark.parametrize("mode", MODES)
def test_what_it_returns_may_be_written_into(mode, shape):
    """As `nn.ReLU(inplace=True)` and `hidden += residual` do."""
    layer, x = make_layer(mode=mode, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    twin = dense_twin(layer)
    for module in (layer, twin):
        y = module(x)
        y += 1
        y.unflatten(-1, (2, -1)).mul_(2)  # as DeBERTa scales its queries
        nn.functional.relu_(y).square().sum().backward()
    torch.testing.assert_close(layer.values.grad, at_entries(twin.weight.grad, layer))


@pytest.mark.parametrize("mode", MODES)
def test_what_a_checkpoint_of_it_returns_may_be_written_into(mode):
    x = torch.randn(3, 48, requires_grad=True)
    y = checkpoint(make_layer(mode=mode), x, use_reentrant=True)
    y += 1
    y.sum().backward()


@pytest.mark.parametrize("values_train", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_a_second_derivative_is_right_or_refused(mode, values_train):
    """Where `autograd.grad` meets a node without a path to its inputs it says zero."""
    layer = make_layer(mode=mode, dtype=torch.float64)
    layer.values.requires_grad_(values_train)
    twin, x = dense_twin(layer), torch.randn(3, 48, dtype=torch.float64, requires_grad=True)

    def product(module):
        return torch.autograd.functional.hvp(lambda x: module(x).pow(3).sum(), x, x)[1]

    if mode == "resident" and not values_train:  # nothing but torch's own product
        torch.testing.assert_close(product(layer), product(twin))
        return
    with pytest.raises(NotImplementedError, match="no second derivative.*desparsify"):
        product(layer)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)


class Twice(nn.Module):
    def forward(self, tensor):
        return tensor * 2


@pytest.mark.parametrize("mode", MODES)
def test_what_is_computed_in_the_place_of_a_parameter_is_read_or_refused(mode):
    layer, x = make_layer(mode=mode, dtype=torch.float64), torch.randn(3, 48, dtype=torch.float64)
    twin = dense_twin(layer)
    for module in (layer, twin):
        prune.l1_unstructured(module, "bias", 0.5)
    torch.testing.assert_close(layer(x), twin(x))
    for module in (layer, twin):
        prune.remove(module, "bias")
        parametrize.register_parametrization(module, "bias", Twice())
    torch.testing.assert_close(layer(x), twin(x))
    pruned = make_layer(mode=mode)
    prune.l1_unstructured(pruned, "weight", 0.5)
    with pytest.raises(ConfigError, match="'weight' of a SparseDeltaLinear is computed"):
        pruned(torch.randn(3, 48))


def test_a_weight_in_a_read_only_map_is_not_written(tmp_path):
    """A write there ends the process by a signal."""
    numpy = pytest.importorskip("numpy")
    stored = numpy.random.default_rng(0).standard_normal((32, 48)).astype("float32")
    stored.tofile(tmp_path / "weight")
    linear, pattern = nn.Linear(48, 32), make_pattern("realistic", 32, 48)

    def mapped(mode):
        found = numpy.memmap(tmp_path / "weight", "float32", mode, shape=(32, 48))
        return nn.Parameter(torch.from_numpy(found), requires_grad=False)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that it cannot mark a tensor as read-only
        linear.weight = mapped("r")
    with pytest.raises(ConfigError, match='cannot be written to.*use mode="additive"'):
        SparseDeltaLinear.from_linear(linear, pattern)
    layer = SparseDeltaLinear.from_linear(linear, pattern, "additive")
    layer(torch.randn(3, 48)).sum().backward()
    for write in (layer.merge, layer.to_linear):
        with pytest.raises(ConfigError, match="cannot be written to"):
            write()
    assert layer.mode == "additive"
    assert layer.to_linear(keep_delta=False).weight is linear.weight
    linear.weight = mapped("c")  # a copy of what is written
    layer = SparseDeltaLinear.from_linear(linear, pattern)
    layer(torch.randn(3, 48))
    assert torch.equal(layer.base_weight(), torch.from_numpy(stored))


def test_hooks_go_along_to_the_plain_layer():
    layer, calls = make_layer(), []
    handle = layer.register_forward_hook(lambda *_: calls.append(1))
    linear = layer.to_linear()
    linear(torch.randn(3, 48))
    assert len(calls) == 1
    handle.remove()
    linear(torch.randn(3, 48))
    assert len(calls) == 1
