"""Scoring leaves no trace, warms the head up alone, and says what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import (
    Snapshot,
    bert_classifier,
    mlp,
    mlp_config,
    pair_batches,
    pair_loss,
    token_batches,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from speft_kernels.errors import ConfigError, SalienceError
from speft_kernels.model import SpeftConfig, score_and_select, sparsify

# What the pass leaves behind


def trained_mlp() -> nn.Module:
    """An MLP in a state that is easy to disturb: mixed modes and flags, gradients, batch norm."""
    model = mlp().train()
    model.second.eval()
    model.first.bias.requires_grad_(False)
    model.norm.weight.grad = torch.full((10,), 2.0)
    model.first.weight.grad = torch.ones(10, 6)
    return model


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("metric", ["magnitude", "gradient"])
def test_scoring_leaves_the_model_alone(count: int, metric: str) -> None:
    model = trained_mlp()
    before, random = Snapshot(model), torch.get_rng_state()
    score_and_select(model, mlp_config(salience=metric), pair_batches(count), pair_loss)
    before.assert_untouched()
    assert torch.equal(torch.get_rng_state(), random)


def test_selection_ignores_dropout_the_callers_seed_and_grad_mode() -> None:
    chosen = []
    for seed in (1, 2):
        model = mlp().train()
        torch.manual_seed(seed)
        with torch.set_grad_enabled(seed == 1):
            chosen.append(score_and_select(model, mlp_config(), pair_batches(3), pair_loss)[0])
    assert chosen[0] == chosen[1]


def failing_losses() -> dict[str, tuple[Callable[..., Tensor], type[Exception], str]]:
    def raising(model: nn.Module, batch: Any) -> Tensor:
        pair_loss(model, batch)
        raise RuntimeError("out of luck")

    def after_first(bad: Callable[[Tensor], Any]) -> Callable[..., Any]:
        seen: list[int] = []

        def loss_fn(model: nn.Module, batch: Any) -> Any:
            seen.append(1)
            loss = pair_loss(model, batch)
            return loss if len(seen) == 1 else bad(loss)

        return loss_fn

    def nan_gradient(model: nn.Module, batch: Any) -> Tensor:
        # The loss is finite, its gradient by way of `second` is 0 * inf.
        hidden = model.second(torch.tanh(model.first(batch[0])).detach())
        return pair_loss(model, batch) + (hidden * 0).sum().square().sqrt()

    def unused(model: nn.Module, batch: Any) -> Tensor:
        return model.first(batch[0]).sum()

    return {
        "raises": (raising, RuntimeError, "out of luck"),
        "nan": (after_first(lambda loss: loss * float("nan")), SalienceError, "batch 2 is nan"),
        "inf": (after_first(lambda loss: loss / 0), SalienceError, "batch 2 is inf"),
        "vector": (lambda m, b: m(b[0]), SalienceError, r"scalar tensor, got shape \(5, 3\)"),
        "number": (after_first(lambda loss: loss.item()), SalienceError, "got float"),
        "detached": (after_first(lambda loss: loss.detach()), SalienceError, "does not depend"),
        "nan gradient": (nan_gradient, SalienceError, "layer 'second'"),
        "unused": (unused, SalienceError, "layer 'second' received no gradient.*exclude_modules"),
    }


@pytest.mark.parametrize("fault", list(failing_losses()))
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("warmup", [0, 1])
def test_errors_leave_the_model_alone(fault: str, scope: str, warmup: int) -> None:
    loss_fn, error, message = failing_losses()[fault]
    model = trained_mlp()
    before, random = Snapshot(model), torch.get_rng_state()
    config = mlp_config(scope=scope, head_warmup_steps=warmup)
    with pytest.raises(error, match=message if not warmup else None):
        sparsify(model, config, pair_batches(2), loss_fn)
    before.assert_untouched()
    assert torch.equal(torch.get_rng_state(), random)


def test_a_gradient_that_is_not_finite_names_the_layer_in_a_single_batch() -> None:
    loss_fn, error, message = failing_losses()["nan gradient"]
    model = trained_mlp()
    before = Snapshot(model)
    with pytest.raises(error, match=message):
        sparsify(model, mlp_config(), pair_batches(1), loss_fn)
    before.assert_untouched()


@pytest.mark.parametrize(
    ("build", "batches", "message"),
    [
        (mlp, None, "needs batches"),
        (mlp, [], "batches is empty"),
        (mlp, pair_batches(1), r"batch 1 is a tuple.*pass loss_fn"),
        (mlp, [{"x": torch.zeros(5, 6)}], "Tensor without a loss: pass loss_fn"),
        (bert_classifier, [{"input_ids": torch.ones(1, 3).long()}], "add labels.*input_ids"),
    ],
)
def test_unusable_batches(build: Callable[[], nn.Module], batches: Any, message: str) -> None:
    model = build()
    before = Snapshot(model)
    with pytest.raises((ConfigError, SalienceError), match=message):
        sparsify(model, SpeftConfig(), batches)
    before.assert_untouched()


# Warming the head up


def test_head_warmup_trains_the_head_alone() -> None:
    model = bert_classifier().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batches = token_batches(2)
    config = SpeftConfig(head_warmup_steps=5, head_warmup_lr=1e-2)
    with torch.no_grad():
        start = sum(model.eval()(**batch).loss for batch in batches)
    model.train()
    _, report = score_and_select(model, config, iter(batches))
    after = model.state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    assert changed == {"classifier.weight", "classifier.bias"}
    assert report.head_warmup_seconds > 0
    assert report.batches == 2  # an iterator serves the warm-up and the scoring
    with torch.no_grad():
        assert sum(model.eval()(**batch).loss for batch in batches) < start


def test_head_warmup_changes_what_is_selected_as_training_by_hand_does() -> None:
    by_hand, warmed = mlp(), mlp()
    batches = pair_batches(2)
    by_hand.eval()
    optimizer = torch.optim.AdamW(by_hand.head.parameters(), lr=0.05, weight_decay=0.0)
    for step in range(5):
        by_hand.zero_grad()
        pair_loss(by_hand, batches[step % 2]).backward()
        optimizer.step()
    config = mlp_config(head_warmup_steps=5, head_warmup_lr=0.05)
    patterns, _ = score_and_select(warmed, config, batches, pair_loss)
    assert torch.equal(warmed.head.weight, by_hand.head.weight)
    assert patterns == score_and_select(by_hand, mlp_config(), batches, pair_loss)[0]
    assert patterns != score_and_select(mlp(), mlp_config(), batches, pair_loss)[0]


def test_head_warmup_does_not_decay_the_head() -> None:
    model = mlp()
    before = model.head.weight.detach().clone()
    config = mlp_config(head_warmup_steps=5, head_warmup_lr=0.05)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return pair_loss(model, batch) if warmed() else 0 * pair_loss(model, batch)

    steps: list[int] = []

    def warmed() -> bool:
        steps.append(1)
        return len(steps) > 5

    score_and_select(model, config, pair_batches(2), loss)
    assert len(steps) == 7
    assert torch.equal(model.head.weight, before)


def test_head_warmup_needs_a_head_and_batches() -> None:
    with pytest.raises(ConfigError, match="no head to warm up"):
        sparsify(mlp(), SpeftConfig(head_warmup_steps=1), pair_batches(1), pair_loss)
    with pytest.raises(ConfigError, match="needs batches"):
        sparsify(mlp(), mlp_config(head_warmup_steps=1, salience="magnitude"))
    with pytest.raises(SalienceError, match="batches is empty"):
        sparsify(mlp(), mlp_config(head_warmup_steps=1), [], pair_loss)


def test_a_nan_loss_names_the_layer_that_it_comes_from() -> None:
    model = trained_mlp()
    with torch.no_grad():
        model.second.weight[0, 0] = torch.nan
    with pytest.raises(SalienceError, match="loss of batch 1 is nan; layer 'second' is the first"):
        sparsify(model, mlp_config(), pair_batches(1), pair_loss)


class ReadsWeights(nn.Module):
    """An owner that multiplies by its layers' weights, as a state-space model may."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read, self.read_too = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.linear(self.called(x), self.read.weight, self.read.bias)
        return hidden @ self.read_too.weight


@pytest.mark.parametrize("metric", ["gradient", "grasp", "synflow"])
def test_a_layer_whose_weight_is_read_past_it_is_refused(metric: str) -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return model(torch.ones(3, 6)).square().sum()

    model = ReadsWeights()
    config = SpeftConfig(density=0.2, salience=metric)
    with pytest.raises(SalienceError, match="'read(_too)?' cannot train sparsely") as refused:
        score_and_select(model, config, [None], loss)
    assert "not called either: 'read" in str(refused.value)
    config = SpeftConfig(density=0.2, salience=metric, exclude_modules=["read", "read_too"])
    assert set(score_and_select(model, config, [None], loss)[0]) == {"called"}
    assert not model.called._forward_pre_hooks


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_loss_that_reentrant_checkpointing_cut_off_is_said_to_be() -> None:
    """Where no input requires a gradient, as a vision model's pixels do not."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return checkpoint(model, torch.ones(3, 6), use_reentrant=True).square().sum()

    with pytest.raises(
        SalienceError, match="reentrant gradient checkpointing.*use_reentrant=False"
    ):
        score_and_select(nn.Sequential(nn.Linear(6, 6)), SpeftConfig(), [None], loss)
