"""Sparse layers for tests, and the dense layer that each must equal."""

import torch
from kernels import make_pattern
from torch import nn

from speft_kernels import SparseDeltaLinear, SparsePattern

BLOCKS = SparsePattern.from_blocks((32, 48), (4, 8), torch.tensor([1, 7, 20, 33]))
MODES = ("resident", "additive")


def make_layer(pattern=None, mode="resident", dtype=torch.float32, bias=True, fill=True):
    pattern = make_pattern("realistic", 32, 48) if pattern is None else pattern
    n, k = pattern.shape
    layer = SparseDeltaLinear.from_linear(nn.Linear(k, n, bias=bias, dtype=dtype), pattern, mode)
    if fill:
        with torch.no_grad():
            layer.values.normal_()
    return layer


def dense_twin(layer):
    """A trainable dense layer with the weight W0 + D."""
    twin = nn.Linear(
        layer.in_features, layer.out_features, bias=layer.bias is not None, dtype=layer.weight.dtype
    )
    twin.weight.data.copy_(layer.effective_weight())
    if layer.bias is not None:
        twin.bias.data.copy_(layer.bias)
    return twin


def at_entries(dense, layer):
    return dense.reshape(-1)[layer.pattern.entry_indices.long()].reshape(layer.values.shape)
