"""Tensors whose memory does not hold their numbers as they are: lazy negations, zeros without
memory, and what hooks make of the activations that a layer saves.
"""

import pytest
import torch
from kernels import make_pattern
from layers import BLOCKS, MODES, at_entries, dense_twin, make_layer

from speft_kernels import SparsePattern, ops


def negated(tensor):
    lazy = torch._neg_view(-tensor)
    assert lazy.is_neg()
    return lazy


@pytest.mark.parametrize("pattern", [make_pattern("realistic", 32, 48), BLOCKS])
def test_operations_write_out_a_lazy_negation(pattern):
    x, dy = torch.randn(6, 48), torch.randn(6, 32)
    values, weight = torch.randn(pattern.values_shape), torch.randn(32, 48)
    gradient = ops.block_grad if pattern.is_block else ops.sampled_grad
    for call, *operands in [
        (lambda dy, x: gradient(dy, x, pattern), dy, x),
        (lambda x, v: ops.delta_matmul(x, v, pattern), x, values),
        (lambda dy, v: ops.delta_matmul_grad_input(dy, v, pattern), dy, values),
        (lambda x, w, v: ops.sparse_delta_matmul(x, w, v, pattern), x, weight, values),
    ]:
        expected = call(*operands)
        for place in range(len(operands)):
            lazy = [negated(t) if i == place else t for i, t in enumerate(operands)]
            torch.testing.assert_close(call(*lazy), expected, rtol=0, atol=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pattern", [make_pattern("realistic", 32, 48), BLOCKS])
def test_a_layer_writes_out_a_lazy_negation(mode, pattern):
    """As torch gives for the imaginary part of a conjugate."""
    layer, x = make_layer(pattern, mode), torch.randn(7, 48)
    twin = dense_twin(layer)
    for module, given in ((layer, negated(x)), (twin, x)):
        module(given).square().sum().backward()
    expected = at_entries(twin.weight.grad, layer)
    torch.testing.assert_close(layer.values.grad, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pattern", [make_pattern("realistic", 32, 48), BLOCKS])
def test_a_layer_takes_a_gradient_of_zeros_without_memory(mode, pattern):
    layer = make_layer(pattern, mode)
    layer(torch.randn(5, 48)).backward(torch._efficientzerotensor((5, 32)))
    assert torch.equal(layer.values.grad, torch.zeros(pattern.values_shape))


def through_hooks(layer, x, dy, pack, unpack=lambda tensor: tensor):
    layer.values.grad = None
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        y = layer(x)
    y.backward(dy)
    return layer.values.grad


# Entries in three columns, which are packed in lines; and in all, so that x is kept whole.
PACKED = SparsePattern.from_indices((32, 48), torch.arange(0, 32 * 48, 16))
WHOLE = SparsePattern.from_indices((32, 48), torch.arange(0, 32 * 48, 7))


@pytest.mark.parametrize("pattern", [PACKED, WHOLE, BLOCKS])
def test_saved_activations_may_come_back_with_other_strides(pattern):
    layer, x, dy = make_layer(pattern), torch.randn(300, 48), torch.randn(300, 32)
    layer(x).backward(dy)
    expected = layer.values.grad
    restrided = []

    def restride(tensor):
        other = tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
        restrided.append(other.stride() != tensor.stride())
        return other

    found = through_hooks(layer, x, dy, lambda t: restride(t) if t.dim() > 1 else t)
    assert any(restrided)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("pattern", [PACKED, WHOLE, BLOCKS])
def test_saved_activations_of_another_dtype_or_shape_are_refused(pattern):
    """As in a plain layer: a kernel would read beyond them."""
    layer, x, dy = make_layer(pattern), torch.randn(300, 48), torch.randn(300, 32)
    with pytest.raises(TypeError, match=r"one dtype, got torch\.float32 and torch\.float16"):
        through_hooks(layer, x, dy, lambda t: t.half())
    with pytest.raises(ValueError, match=r"shape|tokens"):
        through_hooks(layer, x, dy, lambda t: t[..., :2, :])


@pytest.mark.parametrize("pattern", [PACKED])
def test_the_operation_takes_packed_activations_of_any_strides(pattern):
    plan = make_layer(pattern).plan
    x, dy = torch.randn(300, 48), torch.randn(300, 32)
    kept = ops.keep_columns(x, plan)
    other = kept.transpose(1, 2).contiguous().transpose(1, 2)
    expected = ops.sampled_grad(dy, kept, pattern, plan=plan, packed=True)
    found = ops.sampled_grad(dy, other, pattern, plan=plan, packed=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
