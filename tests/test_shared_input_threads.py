"""SharedInput where several threads run models, or one model."""

import threading

import torch
from siblings import (
    TOKENS,
    K,
    check_gradients,
    columns_pattern,
    forward,
    layer_of,
    merged,
    siblings,
)

from speft_kernels import ops


def test_two_threads_that_run_two_models():
    models = [siblings(), siblings()]
    failures, start = [], threading.Barrier(2)

    def train(layers, seed):
        generator = torch.Generator().manual_seed(seed)
        try:
            start.wait(timeout=60)
            for step in range(30):
                x = torch.randn(TOKENS, K, dtype=torch.float64, generator=generator)
                outputs, saved = forward(layers, x)
                assert len(saved) == (3 if step == 0 else 1)
                check_gradients(layers, outputs, [x] * 3)
        except BaseException as error:
            failures.append(error)

    threads = [
        threading.Thread(target=train, args=(layers, seed)) for seed, layers in enumerate(models)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=100)
        assert not thread.is_alive()
    assert not failures, failures
    assert len({id(layer._input.group()) for layers in models for layer in layers}) == 2


def test_two_threads_that_read_one_tensor():
    """Models that are given the same batch do not merge: each thread sees its own layers."""
    models = [siblings(), siblings()]
    x = torch.randn(TOKENS, K, dtype=torch.float64)
    for layers in models:
        thread = threading.Thread(target=merged, args=(layers, x))
        thread.start()
        thread.join(timeout=60)
    assert len({id(layer._input.group()) for layers in models for layer in layers}) == 2


def test_a_group_that_another_thread_merges_while_a_copy_is_made(monkeypatch):
    """The copy is of the columns of before: no sibling may read it with a plan of those of now."""
    first, second = layer_of(columns_pattern([1, 2, 3])), layer_of(columns_pattern([50, 60, 70]))
    x = torch.randn(TOKENS, K, dtype=torch.float64)
    original, others = ops.keep_columns, []

    def meanwhile(*args):
        if not others:
            other = torch.randn(8, K, dtype=torch.float64)
            others.append(threading.Thread(target=lambda: [first(other), second(other)]))
            others[0].start()
            others[0].join()
        return original(*args)

    monkeypatch.setattr(ops, "keep_columns", meanwhile)
    y = first(x), second(x)
    dy = [torch.randn_like(part) for part in y]
    torch.autograd.backward(y, dy)
    for layer, gradient in zip((first, second), dy, strict=True):
        wanted = (gradient.t() @ x).flatten()[layer.pattern.indices.long()]
        torch.testing.assert_close(layer.values.grad, wanted)
