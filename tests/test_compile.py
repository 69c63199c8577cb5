"""torch.compile: a sparse layer is a part of the graph, and goes by what is so at each call."""

import subprocess
import sys

import pytest
import torch
from graphs import graphs, whole
from kernels import make_pattern
from layers import BLOCKS, MODES, at_entries, dense_twin, make_layer
from torch import nn
from torch.utils.checkpoint import checkpoint

from speft_kernels import (
    FlatValues,
    SparseDeltaLinear,
    SparsePattern,
    SpeftConfig,
    apply_patterns,
    compiled,
    merge,
    sparse_layers,
    unmerge,
)
from speft_kernels.errors import StaleWeightError
from speft_kernels.testing import uniform_pattern

pytestmark = pytest.mark.usefixtures("nothing_compiled")

LAYERS = 9  # more than the compiler's limit for versions of one function


class Block(nn.Module):
    def __init__(self, checkpointed):
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.checkpointed = checkpointed

    def forward(self, x):
        hidden = torch.tanh(x) * 0.5
        if self.checkpointed:
            return x + checkpoint(self.linear, hidden, use_reentrant=False)
        return x + self.linear(hidden)


def pattern_of_columns(count, entries=32):
    """For a weight `[16, 16]`, with so many columns that are used."""
    rows, cols = torch.randperm(16)[:, None], torch.randperm(16)[:count]
    every = (rows * 16 + cols).flatten()
    return SparsePattern.from_indices((16, 16), every[:entries])


def chain(mode, checkpointed=False):
    torch.manual_seed(1)
    model = nn.Sequential(*(Block(checkpointed) for _ in range(LAYERS))).double()
    some = {f"{i}.linear": pattern_of_columns(i + 2) for i in range(LAYERS)}
    apply_patterns(model, some, SpeftConfig(mode=mode, modules_to_train=[]))
    return model


def train_alike(models, forwards, flat=False, steps=4):
    """Train the first as it is and the second by its compiled forward pass, and compare."""
    optimizers = []
    for model in models:
        own = [x.values for x in sparse_layers(model).values()]
        trained = [FlatValues(model).parameter] if flat else own
        optimizers.append(torch.optim.AdamW(trained, lr=0.05, weight_decay=0))
    for step in range(steps):
        x = torch.randn(8, 16, dtype=torch.float64)
        outputs = [forward(x) for forward in forwards]
        torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
        for y, optimizer in zip(outputs, optimizers, strict=True):
            y.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        if step == 2:
            with torch.no_grad():
                torch.testing.assert_close(*(f(x) for f in forwards), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("flat", "checkpointed"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_trains_as_the_model_does(mode, flat, checkpointed, backend):
    models = [chain(mode, checkpointed), chain(mode, checkpointed)]
    train_alike(models, [models[0], whole(models[1], backend)], flat)
    assert graphs() == 2  # with gradients, and without


def test_inductor_compiles_it():
    models = [chain("resident"), chain("resident")]
    train_alike(models, [models[0], whole(models[1], "inductor")], flat=True)
    assert graphs() == 2


@pytest.mark.parametrize("mode", MODES)
def test_blocks_that_are_compiled_one_by_one_share_their_graphs(mode):
    models = [chain(mode), chain(mode)]
    for block in models[1]:
        block.compile(backend="aot_eager", fullgraph=True)
    train_alike(models, models)
    # One for a number of columns, one for any, each with and without a gradient of the input; and
    # one without gradients.
    assert graphs() <= 5


@pytest.mark.parametrize("mode", MODES)
def test_a_compiled_layer_sees_that_its_values_changed(mode):
    layer = make_layer(mode=mode)
    forward, x = whole(layer), torch.randn(3, 48)
    for _ in range(3):
        y = forward(x)
        with torch.no_grad():
            layer.values.add_(1.0)
        with pytest.raises(RuntimeError, match=r"modified by an inplace operation|values of a"):
            y.sum().backward()
        assert torch.equal(forward(x), layer(x))


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_is_not_computed_again_with_other_values(mode, flat):
    model = chain(mode, checkpointed=True)
    own = [layer.values for layer in sparse_layers(model).values()]
    optimizer = torch.optim.SGD([FlatValues(model).parameter] if flat else own, lr=1.0)
    forward, x = whole(model), torch.randn(3, 16, dtype=torch.float64)
    forward(x).sum().backward()
    y = forward(x)
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation|values of a"):
        y.sum().backward()


@pytest.mark.parametrize("mode", MODES)
def test_it_sees_that_flat_values_changed(mode):
    """Which have another version than the layer's values."""
    layer = make_layer(mode=mode)
    flat, forward, x = FlatValues(layer), whole(layer), torch.randn(3, 48)
    y = forward(x)
    with torch.no_grad():
        flat.parameter.add_(1.0)
    with pytest.raises(StaleWeightError):
        y.sum().backward()
    assert torch.equal(forward(x), layer(x))


@pytest.mark.parametrize(
    "pattern",
    [
        make_pattern("realistic", 32, 48),
        make_pattern("uniform", 32, 48),
        BLOCKS,
        SparsePattern.from_mask(torch.ones(32, 48, dtype=torch.bool)),
        SparsePattern.from_indices((32, 48), torch.tensor([100])),
        SparsePattern.from_indices((32, 48), torch.tensor([], dtype=torch.int64)),
    ],
    ids=["realistic", "uniform", "blocks", "full", "one", "none"],
)
@pytest.mark.parametrize("shape", [(5, 48), (2, 3, 48), (48,), (0, 48)])
@pytest.mark.parametrize("mode", MODES)
def test_its_gradients_are_the_dense_ones(mode, pattern, shape):
    layer = make_layer(pattern, mode, dtype=torch.float64)
    twin = dense_twin(layer)
    layer.bias.requires_grad_(True)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y, wanted = whole(layer)(x), twin(x)
    torch.testing.assert_close(y, wanted)
    dy = torch.randn_like(wanted)
    dx, d_bias = torch.autograd.grad(y, (x, layer.bias), dy, retain_graph=True)
    expected = torch.autograd.grad(wanted, (x, twin.bias, twin.weight), dy)
    torch.testing.assert_close((dx, d_bias), expected[:2])
    if not pattern.is_empty:
        (d_values,) = torch.autograd.grad(y, layer.values, dy)
        torch.testing.assert_close(d_values, at_entries(expected[2], layer))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("dtype", "cast"),
    [
        (torch.bfloat16, None),
        (torch.float16, None),
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.bfloat16),  # which autocast leaves alone
    ],
)
def test_in_16_bits_and_under_autocast_it_computes_what_the_layer_does(mode, dtype, cast):
    layer = make_layer(mode=mode, dtype=dtype)
    x = torch.randn(7, 48, dtype=dtype, requires_grad=True)

    def run(forward):
        with torch.autocast("cpu", cast or torch.bfloat16, enabled=cast is not None):
            y = forward(x)
        dy = torch.ones_like(y)
        return [y, *torch.autograd.grad(y, (x, layer.values), dy)]

    for found, wanted in zip(run(whole(layer)), run(layer), strict=True):
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted)


def test_a_change_of_mode_compiles_nothing():
    layer = make_layer(fill=True)
    forward, x = whole(layer), torch.randn(3, 48)
    wanted = layer(x)
    base = layer.base_weight()
    for change in (lambda _: None, unmerge, merge, unmerge):
        change(layer)
        y = forward(x)
        torch.testing.assert_close(y, wanted)
        y.sum().backward()
        assert torch.equal(layer.weight, base) == (layer.mode == "additive")
    assert graphs() == 1


@pytest.mark.parametrize("mode", MODES)
def test_other_entries_are_followed(mode):
    """Of fewer columns, of more, and of so many that the input is kept whole."""
    torch.manual_seed(0)

    def layer_of(columns):
        return make_layer(pattern_of_columns(columns), mode, dtype=torch.float64)

    layer, x = layer_of(4), torch.randn(5, 16, dtype=torch.float64)
    forward = whole(layer)
    for columns in (4, 2, 8, 16, 3):
        other = layer_of(columns)
        layer.load_state_dict(other.state_dict())
        found, wanted = (
            (y, *torch.autograd.grad(y.square().sum(), own.values))
            for y, own in ((forward(x), layer), (other(x), other))
        )
        torch.testing.assert_close(found, wanted)


def test_any_number_of_tokens_is_served_by_one_graph():
    layer = make_layer(dtype=torch.float64)
    forward = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (3, 5, 200):
        x = torch.randn(tokens, 48, dtype=torch.float64)
        y = forward(x)
        torch.testing.assert_close(y, layer(x))
        (found,) = torch.autograd.grad(y.sum(), layer.values)
        torch.testing.assert_close(found, *torch.autograd.grad(layer(x).sum(), layer.values))
    assert graphs() == 1


class OwnLinear(nn.Module):
    """A base that is no plain matrix."""

    in_features, out_features = 48, 32

    def __init__(self):
        super().__init__()
        self.own = nn.Parameter(torch.randn(32, 48, dtype=torch.float64) / 2)

    def forward(self, x):
        return x @ (2 * self.own).t()


def test_an_opaque_base_is_compiled_with_its_layer():
    pattern = make_pattern("realistic", 32, 48)
    layer = SparseDeltaLinear.from_linear(OwnLinear(), pattern, "additive").double()
    with torch.no_grad():
        layer.values.normal_()
    x = torch.randn(5, 48, dtype=torch.float64, requires_grad=True)
    found, wanted = (
        torch.autograd.grad(forward(x).square().sum(), (x, layer.values))
        for forward in (whole(layer), layer)
    )
    torch.testing.assert_close(found, wanted)


def test_it_keeps_used_columns_or_what_the_graph_has_anyway():
    """A layer alone: its columns. Of three that share an input none of which uses few: the input.
    In float64, 16 tokens.
    """
    torch.manual_seed(0)

    class Three(nn.Module):
        def __init__(self, density):
            super().__init__()
            self.layers = nn.ModuleList(
                make_layer(uniform_pattern((32, 256), density, seed=i), dtype=torch.float64)
                for i in range(3)
            )

        def forward(self, x):
            return sum(layer(x) for layer in self.layers)

    def saved(model):
        x = torch.randn(16, 256, dtype=torch.float64)
        forward, sizes = whole(model, "inductor"), {}
        own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
        own |= {layer.kept_columns.untyped_storage().data_ptr() for layer in model.layers}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            forward(x)
        return sum(sizes.values())

    versions = 3 * 3 * 8
    few, many = Three(0.002), Three(0.03)
    used = [[layer.pattern.used_cols.numel() for layer in model.layers] for model in (few, many)]
    assert sum(used[0]) < 128
    assert all(64 < columns < 0.9 * 256 for columns in used[1])
    assert sum(used[1]) > 256
    assert saved(few) <= 16 * 8 * sum(used[0]) + versions
    assert saved(many) <= 16 * 8 * 256 + versions


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pattern", [make_pattern("uniform", 32, 48), BLOCKS])
def test_the_operations_are_what_they_are_registered_as(mode, pattern, monkeypatch):
    layer = make_layer(pattern, mode, dtype=torch.float64)
    layer.bias.requires_grad_(True)
    x = torch.randn(5, 48, dtype=torch.float64, requires_grad=True)
    layer(x)  # writes the weight
    # The checks make copies of the layer's tensors.
    monkeypatch.setattr(compiled, "_layer_of", lambda values, weight: layer)
    own = (layer.values, layer.weight)
    for columns in (None, layer.kept_columns):
        arguments = (x, *own, layer.bias, columns, 32)
        torch.library.opcheck(torch.ops.speft.sparse_linear.default, arguments)
    dy, values = torch.randn(5, 32, dtype=torch.float64), layer.values.detach()
    used = torch.tensor([layer.number, id(layer.values), layer.values._version])
    arguments = (dy, values, layer.weight.detach(), used, 48)
    operation = torch.ops.speft.sparse_linear_grad_input.default
    torch.library.opcheck(operation, arguments)
    for kept in (x.detach(), x.detach()[:, pattern.used_cols]):
        operation = torch.ops.speft.sparse_linear_grad_values.default
        torch.library.opcheck(operation, (dy, kept, values, used))


def test_the_compiler_is_not_imported_for_a_layer():
    code = (
        "import sys, torch\n"
        "from speft_kernels import SparseDeltaLinear, SparsePattern, FlatValues, sparsify\n"
        "pattern = SparsePattern.from_mask(torch.eye(4, dtype=torch.bool))\n"
        "layer = SparseDeltaLinear.from_linear(torch.nn.Linear(4, 4), pattern)\n"
        "layer(torch.ones(2, 4)).sum().backward()\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
