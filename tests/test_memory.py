"""What training costs in memory, by counting: what backward keeps, and what is never built."""

import copy

import pytest
import torch
from kernels import LargestTensor, make_pattern
from torch import nn

from speft_kernels import SparseDeltaLinear, SparsePattern, SpeftConfig, apply_patterns
from speft_kernels.bench import masks
from speft_kernels.bench.memory import saved_for_backward
from speft_kernels.plan import plan_of
from speft_kernels.testing import realistic_pattern, uniform_pattern

MODES = ("resident", "additive")


def layer_of(pattern, mode="resident"):
    linear = nn.Linear(pattern.shape[1], pattern.shape[0])
    return SparseDeltaLinear.from_linear(linear, pattern, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("blocks", [(1, 1), (16, 16), (1, 64), (64, 1)])
def test_a_layer_keeps_the_used_columns_alone(mode, blocks):
    if blocks == (1, 1):
        pattern = realistic_pattern((256, 512), 0.005)
    else:
        rows, width = 256 // blocks[0], 512 // blocks[1]
        cols = torch.randperm(width)[: width // 4]  # as real masks cluster
        chosen = torch.unique(torch.arange(rows) * width + cols[torch.arange(rows) % len(cols)])
        pattern = SparsePattern.from_blocks((256, 512), blocks, chosen)
    layer, x = layer_of(pattern, mode), torch.randn(640, 512, requires_grad=True)
    used = pattern.used_cols.numel()
    assert used < 512 // 2
    found = saved_for_backward([layer], lambda: layer(x))
    # 640 tokens are five whole blocks of 128: nothing is padding.
    assert found.bytes == 640 * used * 4
    assert found.inputs == 640 * 512 * 4


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_layer_keeps_nothing(mode):
    layer = layer_of(make_pattern("empty", 64, 48), mode)
    x = torch.randn(32, 48, requires_grad=True)
    assert saved_for_backward([layer], lambda: layer(x)).bytes == 0
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand_as(x))


def test_bytes_saved_with_a_real_mask():
    text = masks.text()
    patterns = masks.real_masks(0.005, "layer")
    model = copy.deepcopy(text.model)
    apply_patterns(model, patterns, SpeftConfig(density=0.005))
    layers = [model.get_submodule(name) for name in patterns]

    def step():
        return model(**text.steps[0]).loss

    first = saved_for_backward(layers, step)
    shared = saved_for_backward(layers, step)
    # From the second pass on queries, keys and values share one copy.
    assert shared.bytes < first.bytes
    assert shared.share <= 0.30, shared


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("kind", "density"),
    [("realistic", 0.001), ("realistic", 0.005), ("uniform", 0.05), ("uniform", 0.25)],
)
def test_no_tensor_of_the_weights_shape_in_forward_or_backward(kind, density, mode):
    n, k, tokens = 1024, 768, 64
    make = {"realistic": realistic_pattern, "uniform": uniform_pattern}[kind]
    pattern = make((n, k), density)
    layer = layer_of(pattern, mode)
    x = torch.randn(tokens, k, requires_grad=True)
    layer(x).sum().backward()  # plans are built by the first pass
    with LargestTensor() as seen:
        layer(x).sum().backward()
    assert 0 < seen.numel < n * k // 2
    dense = nn.Linear(k, n)
    with LargestTensor() as seen:
        dense(x).sum().backward()
    assert seen.numel == n * k  # the check sees what it is there for


def test_backward_of_a_dense_layer_needs_one_panel(memory_high_water):
    """25 % of a weight of 36 MB: beside the gradient of the values, 9 MB, nothing of its size.

    Stated in csrc/cpu/sampled_grad.cpp and parts.py: sums of at most 8 MiB, for each of two threads
    a chunk of dy (256 KiB) and the columns of one block of x (512 KiB), and a panel of at most
    4 MiB. A dense gradient would be 36 MB.
    """
    torch.set_num_threads(2)
    n = k = 3072
    pattern = uniform_pattern((n, k), 0.25)
    assert plan_of(pattern).whole.entry_row.numel() > 0
    layer = layer_of(pattern)
    x = torch.randn(64, k, requires_grad=True)
    frozen = nn.Linear(k, n)
    frozen.requires_grad_(False)
    dy = torch.randn(64, n)

    def backward(module):
        def run():
            x.grad = None
            for parameter in module.parameters():
                parameter.grad = None
            module(x).backward(dy)

        return run

    floor = memory_high_water(backward(frozen))
    ours = memory_high_water(backward(layer))
    gradient = 4 * pattern.nnz
    assert ours - floor <= gradient + (8 << 20) + 2 * (768 << 10) + (4 << 20)
