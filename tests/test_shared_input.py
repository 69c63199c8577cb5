"""SharedInput: layers that read one tensor keep one copy of it, and nothing else changes."""

import copy
import gc
import io
import weakref

import numpy as np
import pytest
import torch
from layers import at_entries
from siblings import (
    TOKENS,
    K,
    N,
    Saved,
    check_gradients,
    columns_pattern,
    copy_bytes,
    forward,
    layer_of,
    merged,
    siblings,
    tolerance,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from speft_kernels import SparsePattern
from speft_kernels.shared_input import SharedInput
from speft_kernels.testing import realistic_pattern


@pytest.mark.parametrize("mode", ["resident", "additive"])
def test_one_copy_is_kept_from_the_second_step_on(mode):
    layers = siblings(mode=mode)
    optimizer = torch.optim.SGD([layer.values for layer in layers], lr=0.1)
    for step in range(4):
        x = torch.randn(TOKENS, K, dtype=torch.float64)
        outputs, saved = forward(layers, x)
        assert len(saved) == (3 if step == 0 else 1)
        if step:
            assert saved.bytes == copy_bytes(layers)
        check_gradients(layers, outputs, [x] * 3)
        optimizer.step()


def test_one_copy_serves_the_input_gradient_too():
    layers = merged(siblings())
    x = torch.randn(TOKENS, K, dtype=torch.float64, requires_grad=True)
    outputs, saved = forward(layers, x)
    assert len(saved) == 1
    dy = [torch.randn_like(y) for y in outputs]
    torch.autograd.backward(outputs, dy)
    wanted = sum(g @ layer.effective_weight() for g, layer in zip(dy, layers, strict=True))
    # Three sums of 48 products.
    torch.testing.assert_close(x.grad, wanted, rtol=0, atol=tolerance(torch.float64, 3 * N))


def test_an_input_that_is_the_same_tensor_in_every_step_is_shared_in_every_step():
    layers = siblings()
    x = torch.randn(TOKENS, K, dtype=torch.float64)
    for step in range(5):
        outputs, saved = forward(layers, x)
        assert len(saved) == (3 if step == 0 else 1)
        check_gradients(layers, outputs, [x] * 3)


def test_several_graphs_of_one_input_share_the_copy():
    layers = merged(siblings())
    x = torch.randn(TOKENS, K, dtype=torch.float64)
    with Saved(layers) as saved:
        outputs = [layer(x) for _ in range(2) for layer in layers]
    assert len(saved) == 1
    check_gradients([*layers, *layers], outputs, [x] * 6)


def test_a_layer_used_twice_on_two_inputs_in_one_graph():
    layers = merged(siblings())
    first, second = (torch.randn(TOKENS, K, dtype=torch.float64) for _ in range(2))
    inputs = [first, second, first, second, first]
    used = [layers[0], layers[0], layers[1], layers[2], layers[0]]
    with Saved(layers):
        outputs = [layer(x) for layer, x in zip(used, inputs, strict=True)]
    check_gradients(used, outputs, inputs)


def test_a_change_in_place_between_siblings_makes_a_new_copy():
    layers = merged(siblings())
    x = torch.randn(TOKENS, K, dtype=torch.float64)
    with Saved(layers) as saved:
        outputs, inputs = [], []
        for layer in layers:
            outputs.append(layer(x))
            inputs.append(x.clone())
            if layer is layers[0]:
                x.mul_(-3).add_(1)
    assert len(saved) == 2
    check_gradients(layers, outputs, inputs)
    # And once more: the copy of the changed tensor is not taken for one of this content either.
    x.zero_()
    outputs, saved = forward(layers, x)
    assert len(saved) == 1
    check_gradients(layers, outputs, [x] * 3)


def test_another_tensor_at_the_same_address_makes_a_new_copy():
    layers = merged(siblings())
    memory = np.zeros((TOKENS, K))
    outputs, inputs = [], []
    for layer in layers:
        memory[:] = np.random.default_rng(len(inputs)).normal(size=memory.shape)
        x = torch.from_numpy(memory)
        assert x._version == 0
        outputs.append(layer(x))
        inputs.append(torch.tensor(memory))
        del x
    check_gradients(layers, outputs, inputs)


def test_a_view_is_another_tensor():
    layers = siblings()
    x = torch.randn(TOKENS, K, dtype=torch.float64)
    views = [x, x.detach(), x.view(TOKENS, K)]
    for _ in range(2):
        with Saved(layers) as saved:
            outputs = [layer(view) for layer, view in zip(layers, views, strict=True)]
        assert len(saved) == 3
        check_gradients(layers, outputs, [x] * 3)
    assert len({id(layer._input.group()) for layer in layers}) == 3


def test_a_wrong_guess_costs_columns_alone():
    """Siblings of one pass that go separate ways later."""
    layers = merged(siblings())
    inputs = [torch.randn(TOKENS, K, dtype=torch.float64) for _ in layers]
    for _ in range(2):
        with Saved(layers) as saved:
            outputs = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
        assert len(saved) == 3
        assert saved.bytes == 3 * copy_bytes(layers)
        check_gradients(layers, outputs, inputs)


def test_groups_that_meet_later_become_one():
    layers = [*siblings(), layer_of(realistic_pattern((N, K), 0.03, seed=9))]
    merged(layers[:2]), merged(layers[2:])
    x = torch.randn(TOKENS, K, dtype=torch.float64)
    for _ in range(2):
        outputs, saved = forward(layers, x)
        check_gradients(layers, outputs, [x] * 4)
    assert len({id(layer._input.group()) for layer in layers}) == 1
    outputs, saved = forward(layers, torch.randn(TOKENS, K, dtype=torch.float64))
    assert len(saved) == 1
    assert saved.bytes == copy_bytes(layers)


def test_blocks_merge_with_their_like_alone():
    blocks = [
        SparsePattern.from_blocks((N, K), (4, 8), torch.tensor([1, 5, 30])),
        SparsePattern.from_blocks((N, K), (4, 8), torch.tensor([1, 6, 29])),
        SparsePattern.from_blocks((N, K), (4, 4), torch.tensor([3])),
        realistic_pattern((N, K), 0.03),
    ]
    layers = [layer_of(pattern) for pattern in blocks]
    for step in range(3):
        x = torch.randn(TOKENS, K, dtype=torch.float64)
        outputs, saved = forward(layers, x)
        assert len(saved) == (4 if step == 0 else 3)
        check_gradients(layers, outputs, [x] * 4)
    groups = [layer._input.group() for layer in layers]
    assert groups[0] is groups[1]
    assert len({id(group) for group in groups}) == 3


def test_layers_of_other_widths_do_not_merge():
    patterns = columns_pattern([1, 2]), columns_pattern([1, 2], k=K // 2)
    first, second = (SharedInput(pattern) for pattern in patterns)
    source = torch.randn(TOKENS, K)
    for _ in range(2):
        first.keep(source, source, patterns[0])
        kept, plan = second.keep(source, source[:, : K // 2], patterns[1])
        assert plan.pattern is patterns[1]
        assert torch.equal(kept[0, :, :TOKENS], source[:, 1:3].t())
    assert first.group() is not second.group()


def test_columns_that_are_all_used_together_keep_the_input_itself():
    layers = [layer_of(columns_pattern(range(i, K, 3))) for i in range(3)]
    for step in range(3):
        x = torch.randn(TOKENS, K, dtype=torch.float64)
        outputs, saved = forward(layers, x)
        assert len(saved) == (3 if step == 0 else 1)
        if step:
            assert saved.bytes == x.untyped_storage().nbytes()
            assert all(layer.plan.kept_columns is None for layer in layers)
        check_gradients(layers, outputs, [x] * 3)


def test_empty_and_frozen_siblings_do_not_disturb():
    layers = siblings()
    frozen, empty = layers[1], layer_of(SparsePattern((N, K), torch.arange(0)))
    frozen.values.requires_grad_(False)
    trained = [layers[0], layers[2]]
    for step in range(3):
        x = torch.randn(TOKENS, K, dtype=torch.float64)
        outputs, saved = forward([layers[0], frozen, empty, layers[2]], x)
        assert len(saved) == (2 if step == 0 else 1)
        check_gradients(trained, [outputs[0], outputs[3]], [x] * 2)
    assert saved.bytes == copy_bytes(trained)


def test_autocast():
    layers = siblings(torch.float32)
    for step in range(3):
        x = torch.randn(TOKENS, K)
        with torch.autocast("cpu", dtype=torch.bfloat16), Saved(layers) as saved:
            outputs = [layer(x) for layer in layers]
        # torch itself saves x and W in bfloat16 where a product is cast; here x alone is kept.
        assert len(saved) == (3 if step == 0 else 1)
        if step:
            assert saved.bytes == copy_bytes(layers, torch.bfloat16)
        grads = [torch.randn_like(y) for y in outputs]
        for layer in layers:
            layer.values.grad = None
        torch.autograd.backward(outputs, grads)
        for layer, dy in zip(layers, grads, strict=True):
            wanted = dy.double().t() @ x.bfloat16().double()
            # The very products of bfloat16 numbers, summed in float32.
            atol = tolerance(torch.float32)
            got = layer.values.grad.double()
            torch.testing.assert_close(got, at_entries(wanted, layer), rtol=0, atol=atol)


def test_one_tensor_inside_and_outside_of_autocast():
    layers = merged(siblings(torch.float32))
    x = torch.randn(TOKENS, K)
    outputs = []
    for i, layer in enumerate(layers):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=i == 1):
            outputs.append(layer(x))
    check_gradients([layers[0], layers[2]], [outputs[0], outputs[2]], [x] * 2)
    outputs[1].backward(torch.ones_like(outputs[1]))
    wanted = torch.ones(N, TOKENS, dtype=torch.float64) @ x.bfloat16().double()
    got = layers[1].values.grad.double()
    atol = tolerance(torch.float32)
    torch.testing.assert_close(got, at_entries(wanted, layers[1]), rtol=0, atol=atol)


def pickled(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("make", [copy.deepcopy, pickled])
def test_copies_of_merged_layers_start_alone(make):
    originals = nn.ModuleList(merged(siblings()))
    copies = make(originals)
    groups = [{id(layer._input.group()) for layer in some} for some in (originals, copies)]
    assert len(groups[1]) == 3
    assert not groups[0] & groups[1]
    for step in range(2):
        x = torch.randn(TOKENS, K, dtype=torch.float64)
        both = [*copies, *originals] if step else [*originals, *copies]
        outputs, _ = forward(both, x)
        check_gradients(both, outputs, [x] * 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_are_cast_after_merging(dtype):
    layers = merged(siblings())
    for layer in layers:
        layer.to(dtype)
    for step in range(3):
        x = torch.randn(TOKENS, K, dtype=dtype)
        outputs, saved = forward(layers, x)
        assert len(saved) == (3 if step == 0 else 1)
        grads = [torch.randn_like(y) for y in outputs]
        for layer in layers:
            layer.values.grad = None
        torch.autograd.backward(outputs, grads)
        for layer, dy in zip(layers, grads, strict=True):
            # Products of the very numbers, summed in float32.
            wanted = at_entries(dy.double().t() @ x.double(), layer)
            got, atol = layer.values.grad.double(), tolerance(torch.float32)
            torch.testing.assert_close(got, wanted, rtol=0, atol=atol)


@pytest.mark.parametrize("source", ["argument", "within"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant, source):
    """What a layer keeps is the same when a checkpoint computes it again, in every step."""
    layers = siblings()

    def branch(x):
        inner = torch.tanh(x) if source == "within" else x
        return sum(layer(inner).square() for layer in layers).sum()

    def gradients(x, call):
        x.grad = None
        for layer in layers:
            layer.values.grad = None
        call(x).backward()
        return [x.grad, *(layer.values.grad for layer in layers)]

    x = torch.randn(TOKENS, K, dtype=torch.float64, requires_grad=True)
    for step in range(4):
        if step == 2:
            merged(layers)  # a pass without a checkpoint, as of an evaluation with gradients
        if step:  # first of all with layers that have not met
            plain = gradients(x, branch)
        found = gradients(x, lambda x: checkpoint(branch, x, use_reentrant=use_reentrant))
        if step:
            assert all(map(torch.equal, found, plain))
        x = torch.randn(TOKENS, K, dtype=torch.float64, requires_grad=True)


def test_nested_checkpoints():
    layers = siblings()

    def inner(x):
        return sum(layer(x).square() for layer in layers).sum()

    def outer(x):
        return checkpoint(inner, torch.tanh(x), use_reentrant=False) + inner(x)

    for _ in range(3):
        x = torch.randn(TOKENS, K, dtype=torch.float64, requires_grad=True)
        wanted = torch.autograd.grad(outer(x), [x, *(layer.values for layer in layers)])
        loss = checkpoint(outer, x, use_reentrant=False)
        got = torch.autograd.grad(loss, [x, *(layer.values for layer in layers)])
        for one, other in zip(got, wanted, strict=True):
            assert torch.equal(one, other)


def test_copies_that_are_moved_away():
    """As `save_on_cpu` does: each layer then keeps its own columns alone."""
    layers = merged(siblings())
    x = torch.randn(TOKENS, K, dtype=torch.float64)
    for _ in range(2):
        with torch.autograd.graph.save_on_cpu():
            outputs = [layer(x) for layer in layers]
        check_gradients(layers, outputs, [x] * 3)


def test_inputs_made_in_inference_mode():
    """They have no version by which a change in place could be seen: nothing is shared."""
    layers = siblings()
    for _ in range(3):
        with torch.inference_mode():
            x = torch.randn(TOKENS, K, dtype=torch.float64)
        outputs, _ = forward(layers, x)
        check_gradients(layers, outputs, [x.clone()] * 3)
    merged(layers)
    outputs, saved = forward(layers, x)
    assert len(saved) == 3
    check_gradients(layers, outputs, [x.clone()] * 3)


def test_nothing_is_kept_alive():
    layers = merged(siblings())
    x = torch.randn(TOKENS, K, dtype=torch.float64)
    outputs, _ = forward(layers, x)
    storage = weakref.ref(outputs[0].grad_fn.saved_tensors[0])
    source = weakref.ref(x)
    del outputs, x
    gc.collect()
    assert storage() is None
    assert source() is None
