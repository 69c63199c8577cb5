"""Fisher: squared per-example gradients against one backward pass an example, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from scoring import (
    Loss,
    alone,
    assert_close,
    linear_layers,
    model_loss,
    next_token_loss,
    one_backward_an_example,
    squares,
)
from tiny_models import (
    MLP_LAYERS,
    bert_classifier,
    llama,
    mlp,
    opt,
    padded_batches,
    pair_batches,
    pair_loss,
    token_batches,
)
from torch import Tensor, nn

from speft_kernels.errors import SalienceError
from speft_kernels.model import SpeftConfig, score_and_select
from speft_kernels.salience import squared
from speft_kernels.salience.borrow import borrowed
from speft_kernels.salience.squared import square_sums, stream_squared_gradients


def test_fisher_of_an_mlp_is_one_backward_an_example() -> None:
    model = mlp(dtype=torch.float64)
    layers = {name: model.get_submodule(name) for name in (*MLP_LAYERS, "head")}
    batches = [*pair_batches(2, dtype=torch.float64), *pair_batches(1, dtype=torch.float64, seed=1)]
    batches[0] = tuple(part[:2] for part in batches[0])  # batches of different sizes
    expected = one_backward_an_example(model, layers, batches, pair_loss)
    assert_close(squares(model, layers, batches, pair_loss), expected)


@pytest.mark.parametrize("build", [bert_classifier, llama])
@pytest.mark.parametrize("buffer", [7, 2**10, 2**20])
def test_fisher_of_transformers(
    build: Callable[[], nn.Module], buffer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(squared, "_CPU_BUFFER", buffer)  # tiles of rows, chunks of examples
    model = build().double()
    assert model.config._attn_implementation == "sdpa"
    batches = token_batches(2, causal=build is llama)
    layers = linear_layers(model)
    expected = one_backward_an_example(model, layers, batches, model_loss)
    assert_close(squares(model, layers, batches, model_loss), expected)


@pytest.mark.parametrize(("build", "loss"), [(bert_classifier, model_loss), (opt, next_token_loss)])
def test_fisher_weights_each_example_as_a_batch_of_it_alone(
    build: Callable[[], nn.Module], loss: Loss
) -> None:
    model = build().double()
    layers = linear_layers(model)
    batches = padded_batches(2, causal=build is opt)
    expected = one_backward_an_example(model, layers, batches, loss)
    assert_close(squares(model, layers, batches, loss), expected)
    labelled = [alone(batch, i) for batch in batches for i in range(3)]  # the last has no label
    assert_close(squares(model, layers, labelled, loss), expected)


def test_fisher_of_labels_at_their_own_places() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.BertForTokenClassification(bert_classifier().config).double()
    batches = padded_batches(2, causal=True)
    for batch in batches:
        batch["labels"] = torch.where(batch["labels"] > 1, batch["labels"] % 2, batch["labels"])
    layers = linear_layers(model)
    expected = one_backward_an_example(model, layers, batches, model_loss)
    assert_close(squares(model, layers, batches, model_loss), expected)


def test_fisher_of_the_losses_of_causal_models_and_of_runs() -> None:
    from accelerate import Accelerator

    from speft_kernels.finetune.methods import mean_loss
    from speft_kernels.finetune.tasks import CausalLM

    of_a_run = mean_loss(CausalLM(None, 8), Accelerator(cpu=True))  # it encodes nothing here
    model = opt().double()
    layers = linear_layers(model)
    batches = padded_batches(2, causal=True)
    expected = one_backward_an_example(model, layers, batches, next_token_loss)
    for loss in (None, of_a_run):
        for name, found in squares(model, layers, batches, loss).items():
            difference = (found - expected[name]).norm() / expected[name].norm()
            assert difference < 1e-6, name  # both compute in float32: 2^-24 an operation


def test_fisher_refuses_ragged_labels_under_a_loss_that_it_cannot_read() -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        logits = model(batch["input_ids"], batch["attention_mask"]).logits[:, :-1]
        targets = batch["labels"][:, 1:]
        each = nn.functional.cross_entropy(logits.mT, targets, reduction="none")
        return (each.sum(1) / (targets != -100).sum(1).clamp(min=1)).mean()

    model = llama()
    config = SpeftConfig(density=0.05, salience="fisher")
    with pytest.raises(SalienceError, match="batch 1 have different numbers of labels.*one exam"):
        score_and_select(model, config, padded_batches(1, causal=True), loss)
    alone_each = [alone(batch, i) for batch in padded_batches(1, causal=True) for i in range(3)]
    score_and_select(model, config, alone_each, loss)


def test_fisher_holds_a_bounded_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    largest: list[int] = []
    bmm = torch.bmm
    monkeypatch.setattr(
        torch, "bmm", lambda *args: largest.append((out := bmm(*args)).numel()) or out
    )
    monkeypatch.setattr(squared, "_CPU_BUFFER", 100)
    x, dy = torch.randn(6, 3, 40), torch.randn(6, 3, 9)
    scales = torch.tensor([6.0, 3, 0, 6, 2, 6])
    found = square_sums([(x, dy)], scales.tolist(), "a layer")
    products = torch.einsum("btn,btk->bnk", dy.double(), x.double())
    expected = products.mul(scales[:, None, None]).square().sum(0)
    # Sums of 3 products, squared, of 6 examples: some 12 roundings of 6e-8 of what is added, of
    # which single terms are some 100.
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
    assert max(largest) <= 100
    assert len(largest) > 6


class Flat(nn.Module):
    """Token states flattened to [B * T, K] on the way, one layer called twice, written into."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared = nn.Linear(6, 5), nn.Linear(5, 5)
        self.write = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.write(self.first(x.reshape(-1, 6)))
        once = torch.tanh(self.shared(hidden)).reshape(*x.shape[:-1], 5)
        twice = self.shared(once).mean(dim=1)
        self.shared(once)  # a call that the loss does not depend on
        return twice


def flat_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def flat_batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(4, 3, 6, dtype=torch.float64, generator=generator),
            torch.randint(0, 5, (4,), generator=generator),
        )
        for _ in range(2)
    ]


def test_fisher_of_flattened_inputs_and_of_a_layer_called_again() -> None:
    torch.manual_seed(0)
    model = Flat().double()
    layers = linear_layers(model)
    expected = one_backward_an_example(model, layers, flat_batches(), flat_loss)
    assert_close(squares(model, layers, flat_batches(), flat_loss), expected)


def test_fisher_computes_no_dense_gradient() -> None:
    model = mlp()
    with borrowed(model, 0):

        def loss(model: nn.Module, batch: Any) -> Tensor:
            assert not any(p.requires_grad for p in model.parameters())
            return pair_loss(model, batch)

        layers = {name: model.get_submodule(name) for name in MLP_LAYERS}
        stream_squared_gradients(model, layers, pair_batches(1), loss, lambda name, part: None)
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_fisher_lets_go_of_a_layer_as_soon_as_it_arrives(checkpointing: bool) -> None:
    model = llama()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    within: list[bool] = []

    def consume(name: str, part: Tensor) -> None:
        within.append(torch._C._current_graph_task_id() != -1)  # a backward pass is running

    with borrowed(model, 0):
        layers = linear_layers(model)
        batches = token_batches(2, causal=True)
        stream_squared_gradients(model, layers, batches, None, consume)
    assert within == [True] * (2 * len(layers))


def test_fisher_of_a_layer_shared_by_reentrant_checkpoints_is_refused() -> None:
    from torch.utils.checkpoint import checkpoint

    cell = nn.Linear(6, 6)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        x = x.requires_grad_()
        for _ in range(2):
            x = checkpoint(model, x, use_reentrant=True)
        return x.square().mean()

    model = nn.Sequential(cell)
    with pytest.raises(SalienceError, match="layer '0' arrives in parts.*use_reentrant=False"):
        score_and_select(model, SpeftConfig(salience="fisher"), [torch.randn(3, 6)], loss)


@pytest.mark.parametrize(
    ("batch", "shape", "message"),
    [
        ({"scale": 2.0}, (3, 6), "batch 1 does not tell how many examples"),
        ((torch.zeros(4),), (6, 6), r"rows of layer '0'.*4 examples.*shape \(6, 6\)"),
        ((torch.zeros(4),), (1, 3, 6), r"layer '0'.*shape \(1, 3, 6\).*\(4, ..., 6\)"),
        ((torch.zeros(2),), (6,), r"layer '0'.*2 examples"),
    ],
)
def test_fisher_needs_to_tell_examples_apart(batch: Any, shape: Any, message: str) -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return model(torch.ones(shape)).square().mean()

    model = nn.Sequential(nn.Linear(6, 6))
    with pytest.raises(SalienceError, match=message):
        score_and_select(model, SpeftConfig(salience="fisher"), [batch], loss)


def test_fisher_of_a_layer_that_is_not_called_as_a_module() -> None:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return nn.functional.linear(model[0](x), model[1].weight).square().mean()

    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    config = SpeftConfig(salience="fisher", target_modules=("0", "1"))
    with pytest.raises(SalienceError, match="layer '1'.*never called as a module"):
        score_and_select(model, config, [torch.randn(3, 6)], loss)
