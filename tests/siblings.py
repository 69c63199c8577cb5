"""Layers that read one tensor, what they save of it, and what their gradients must be."""

import torch
from layers import at_entries, dense_twin, make_layer

from speft_kernels import SparsePattern
from speft_kernels.testing import realistic_pattern

N, K, TOKENS = 48, 96, 50


def layer_of(pattern, dtype=torch.float64, mode="resident"):
    return make_layer(pattern, mode, dtype)


def columns_pattern(columns, k=K):
    """Every other row of some columns."""
    mask = torch.zeros(N, k, dtype=torch.bool)
    mask[::2, columns] = True
    return SparsePattern.from_mask(mask)


def siblings(dtype=torch.float64, mode="resident"):
    """Three layers whose columns overlap in part."""
    return [layer_of(realistic_pattern((N, K), 0.03, seed=i), dtype, mode) for i in range(3)]


def distinct(layers):
    """How many columns the layers use together."""
    return torch.unique(torch.cat([layer.pattern.used_cols for layer in layers])).numel()


class Saved:
    """The storages that autograd saves in the block beside parameters; each counts once."""

    def __init__(self, layers):
        self._own = {p.untyped_storage().data_ptr() for x in layers for p in x.parameters()}
        self._found = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._own:
            self._found[storage.data_ptr()] = storage  # held: its address stays its own
        return tensor

    def __enter__(self):
        self._hooks.__enter__()
        return self

    def __exit__(self, *error):
        self._hooks.__exit__(*error)

    def __len__(self):
        return len(self._found)

    @property
    def bytes(self):
        return sum(storage.nbytes() for storage in self._found.values())


def forward(layers, x):
    """All layers of x; what they save is counted."""
    with Saved(layers) as saved:
        outputs = [layer(x) for layer in layers]
    return outputs, saved


def tolerance(dtype, tokens=TOKENS):
    """Of sums of `tokens` products of unit normals (60 at most in all) in another order."""
    return tokens * torch.finfo(dtype).eps * 60 * 4


def check_gradients(layers, outputs, inputs):
    """Each layer's gradients equal those of its dense twin, for outputs of its input."""
    grads = [torch.randn_like(output) for output in outputs]
    for layer in layers:
        layer.values.grad = None
    torch.autograd.backward(outputs, grads)
    wanted = {id(layer): 0.0 for layer in layers}
    for layer, x, dy in zip(layers, inputs, grads, strict=True):
        twin = dense_twin(layer)
        twin(x.detach().to(twin.weight.dtype)).backward(dy.to(twin.weight.dtype))
        wanted[id(layer)] = wanted[id(layer)] + at_entries(twin.weight.grad, layer)
    for layer in layers:
        atol = tolerance(layer.values.dtype)
        torch.testing.assert_close(layer.values.grad, wanted[id(layer)], rtol=0, atol=atol)


def merged(layers, x=None):
    """The layers after a pass in which they were seen to read one tensor."""
    x = torch.randn(TOKENS, K, dtype=layers[0].weight.dtype) if x is None else x
    forward(layers, x)
    assert len({id(layer._input.group()) for layer in layers}) == 1
    return layers


def copy_bytes(layers, dtype=torch.float64):
    # 50 tokens are one block of 64.
    return distinct(layers) * 64 * torch.finfo(dtype).bits // 8
