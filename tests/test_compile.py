"""torch.compile: a compiled model trains as the model does, step after step."""

import subprocess
import sys

import pytest
import torch
from layers import MODES, make_layer
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from speft_kernels import FlatValues, SpeftConfig, apply_patterns, sparse_layers
from speft_kernels.errors import StaleWeightError
from speft_kernels.testing import uniform_pattern

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


def chain(mode, checkpointed=False):
    torch.manual_seed(1)
    model = nn.Sequential(*(Block(checkpointed) for _ in range(LAYERS))).double()
    some = {f"{i}.linear": uniform_pattern((16, 16), 0.2, seed=i) for i in range(LAYERS)}
    apply_patterns(model, some, SpeftConfig(mode=mode, modules_to_train=[]))
    return model


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("flat", "checkpointed"), [(False, False), (True, False), (True, True)])
def test_a_compiled_model_trains_as_the_model_does(mode, flat, checkpointed):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    models = [chain(mode, checkpointed), chain(mode, checkpointed)]
    forwards = [models[0], torch.compile(models[1], backend=backend)]
    optimizers = []
    for model in models:
        own = [x.values for x in sparse_layers(model).values()]
        trained = [FlatValues(model).parameter] if flat else own
        optimizers.append(torch.optim.AdamW(trained, lr=0.05, weight_decay=0))
    for step in range(4):
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
    # What lies between the layers is compiled, and nothing of them.
    assert graphs
    assert not any("speft" in str(node.target) for graph in graphs for node in graph.graph.nodes)
    assert sum("recompile_limit" in reason for reason in counters["graph_break"]) == 0


@pytest.mark.parametrize("mode", MODES)
def test_a_compiled_layer_sees_that_its_values_changed(mode):
    layer = make_layer(mode=mode)
    compiled = torch.compile(layer, backend="aot_eager")
    x = torch.randn(3, 48)
    for _ in range(3):
        y = compiled(x)
        with torch.no_grad():
            layer.values.add_(1.0)
        with pytest.raises(StaleWeightError):
            y.sum().backward()
        assert torch.equal(compiled(x), layer(x))


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
