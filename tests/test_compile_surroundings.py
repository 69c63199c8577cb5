"""Compiled layers among torch's other means: hooks, writes in place, second derivatives, copies,
compiled optimizers.
"""

import copy
import gc
import weakref

import pytest
import torch
from graphs import whole
from kernels import make_pattern
from layers import MODES, make_layer
from torch import nn

from speft_kernels import FlatValues, compiled
from speft_kernels.errors import ConfigError, StaleWeightError

pytestmark = pytest.mark.usefixtures("nothing_compiled")


@pytest.mark.parametrize("flat", [False, True])
def test_a_compiled_step_of_a_fused_optimizer_is_seen(flat):
    """Which writes past the version of the values."""
    models = [make_layer(dtype=torch.float64)]
    models.append(copy.deepcopy(models[0]))
    trained = [[FlatValues(model).parameter if flat else model.values] for model in models]
    optimizers = [torch.optim.AdamW(own, lr=0.1, fused=True) for own in trained]
    steps = [optimizers[0].step, torch.compile(lambda: optimizers[1].step(), backend="aot_eager")]
    forwards = [models[0], whole(models[1])]
    for _ in range(3):
        x = torch.randn(3, 48, dtype=torch.float64)
        outputs = [forward(x) for forward in forwards]
        torch.testing.assert_close(*outputs)
        for model, y, step in zip(models, outputs, steps, strict=True):
            y.square().sum().backward()
            step()
            model.zero_grad()


def test_tensors_that_no_layer_holds_break_the_graph_or_are_refused():
    layer, x = make_layer(), torch.randn(3, 48)
    others = torch.randn_like(layer.values)

    def call(x):
        return torch.func.functional_call(layer, {"values": others}, x)

    y = torch.compile(call, backend="aot_eager")(x)
    layer.values = nn.Parameter(others)
    torch.testing.assert_close(y, layer(x))
    others = nn.Parameter(others.clone())
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="functional_call"):
        torch.compile(call, backend="aot_eager")(x)


def test_layers_whose_values_are_computed_are_passed_over():
    other = make_layer()
    del other.values  # as weight norm and pruning do
    layer, x = make_layer(), torch.randn(3, 48)
    assert torch.equal(whole(layer)(x), layer(x))


def test_a_weight_that_is_to_train_is_refused():
    layer = make_layer()
    layer.weight.requires_grad_(True)
    with pytest.raises(ConfigError, match="frozen"):
        torch.compile(layer, backend="aot_eager")(torch.randn(3, 48))


@pytest.mark.parametrize("mode", MODES)
def test_a_second_derivative_is_refused(mode):
    layer = make_layer(mode=mode, dtype=torch.float64)
    x = torch.randn(3, 48, dtype=torch.float64, requires_grad=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(whole(layer, "eager")(x).square().sum(), x, create_graph=True)
    torch._dynamo.reset()
    (dx,) = torch.autograd.grad(whole(layer)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):  # torch's own
        dx.sum().backward()


@pytest.mark.parametrize("mode", MODES)
def test_a_forward_mode_derivative_is_refused(mode):
    """It was zero. The layer raises in the place of the graph."""
    layer = make_layer(mode=mode)

    def jvp(x):
        return torch.func.jvp(layer, (x,), (torch.ones_like(x),))

    with pytest.raises(RuntimeError, match=r"functorch|forward-mode"):
        torch.compile(jvp, backend="aot_eager")(torch.randn(3, 48))


@pytest.mark.parametrize("mode", MODES)
def test_copies_and_moved_layers_are_themselves(mode):
    layer, x = make_layer(mode=mode), torch.randn(3, 48)
    forward = whole(layer)
    forward(x)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.values.add_(1.0)
    assert torch.equal(whole(other)(x), other(x))
    assert torch.equal(forward(x), layer(x))
    layer.double()
    torch.testing.assert_close(forward(x.double()), layer(x.double()))
    layer.values.data = layer.values.detach().clone()  # elsewhere, at the same version
    torch.testing.assert_close(forward(x.double()), layer(x.double()))


def test_a_layer_that_was_compiled_is_let_go():
    layer = make_layer()
    whole(layer)(torch.randn(3, 48)).sum().backward()
    alive = weakref.ref(layer)
    del layer
    torch._dynamo.reset()
    gc.collect()
    assert alive() is None
    other = make_layer()
    whole(other)(torch.randn(3, 48))
    assert [ref() for ref in compiled._known.values()] == [other]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(3, 48), (2, 3, 48), (48,)])
def test_what_it_returns_may_be_written_to(mode, shape, backend):
    layer = make_layer(mode=mode, dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def gradients(forward):
        y = forward(x).add_(1.0).relu_()
        return torch.autograd.grad(y.square().sum(), (x, layer.values))

    torch.testing.assert_close(gradients(whole(layer, backend)), gradients(layer))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("mode", MODES)
def test_hooks_on_saved_tensors_may_give_others_back(mode, backend):
    """As `save_on_cpu` does, which moves them."""
    layer = make_layer(mode=mode, dtype=torch.float64)
    x = torch.randn(3, 48, dtype=torch.float64, requires_grad=True)

    def gradients(forward):
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
            y = forward(x)
        return torch.autograd.grad(y.square().sum(), (x, layer.values))

    torch.testing.assert_close(gradients(whole(layer, backend)), gradients(layer))


@pytest.mark.parametrize("mode", MODES)
def test_a_backward_pass_refuses_other_values_of_the_same_version(mode):
    layer = make_layer(mode=mode, fill=False)
    y = whole(layer)(torch.randn(3, 48))
    others = make_layer(make_pattern("uniform", 32, 48), mode, fill=False).state_dict()
    others["indices"] = others["indices"][: layer.pattern.nnz]
    for name in ("values", "base_values"):
        others[name] = nn.Parameter(others[name][: layer.pattern.nnz])
    layer.load_state_dict(others, assign=True)
    assert layer.values._version == 0
    with pytest.raises(StaleWeightError):
        y.sum().backward()


def test_a_backward_pass_says_that_its_layer_is_gone():
    layer = make_layer()
    y = whole(layer)(torch.randn(3, 48))
    del layer
    torch._dynamo.reset()
    gc.collect()
    with pytest.raises(RuntimeError, match="no longer exists"):
        y.sum().backward()
