"""GraSP against torch's own Hessian-vector products in float64; checkpointing for all metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from scoring import (
    assert_close,
    best,
    grasp,
    hessian_product,
    linear_layers,
    model_loss,
)
from tiny_models import (
    MLP_LAYERS,
    bert_classifier,
    llama,
    mlp,
    mlp_config,
    pair_batches,
    pair_loss,
    token_batches,
)
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from speft_kernels.errors import SalienceError
from speft_kernels.model import SpeftConfig, score_and_select


@pytest.mark.parametrize("temperature", [1.0, 200.0])
@pytest.mark.parametrize("sign", ["paper", "code"])
def test_grasp_of_an_mlp(temperature: float, sign: str) -> None:
    def tempered(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]) / temperature, batch[1])

    model = mlp(dtype=torch.float64)
    layers = {name: model.get_submodule(name) for name in MLP_LAYERS}
    batches = pair_batches(3, dtype=torch.float64)
    config = mlp_config(salience="grasp", grasp_sign=sign, grasp_temperature=temperature)
    expected = hessian_product(model, layers, batches, tempered)
    statistics, found, nbytes = grasp(model, layers, config, iter(batches), pair_loss)
    factor = 1 if sign == "paper" else -1
    assert_close({name: factor * product for name, product in found.items()}, expected)
    assert (statistics.batches, statistics.examples, statistics.notes) == (3, 15, [])
    assert nbytes == 2 * (60 + 80) * 8

    scores = [-factor * expected[n] * layers[n].weight.detach() for n in MLP_LAYERS]
    patterns, report = score_and_select(model, config, batches, pair_loss)
    assert [p.indices.tolist() for p in patterns.values()] == best(scores, 0.1, "layer")
    assert report.accumulator_bytes == nbytes


def test_grasp_of_an_mlp_by_the_dense_hessian() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randint(0, 2, (5,))

    def loss(w0: Tensor, w2: Tensor) -> Tensor:
        hidden = torch.tanh(x @ w0.T + model[0].bias)
        return nn.functional.cross_entropy(hidden @ w2.T + model[2].bias, y)

    weights = (model[0].weight.detach(), model[2].weight.detach())
    g = torch.autograd.functional.jacobian(loss, weights)
    blocks = torch.autograd.functional.hessian(loss, weights)
    expected = {
        name: sum(torch.tensordot(blocks[i][j], g[j], 2) for j in range(2))
        for i, name in enumerate(("0", "2"))
    }
    config = SpeftConfig(salience="grasp", grasp_temperature=1)
    layers = linear_layers(model)
    found = grasp(model, layers, config, [(x, y)], pair_loss)[1]
    assert_close(found, expected)


@pytest.mark.parametrize("build", [bert_classifier, llama])
def test_grasp_of_transformers_with_fused_attention(build: Callable[[], nn.Module]) -> None:
    model, plain = build().double(), build().double()
    assert model.config._attn_implementation == "sdpa"
    batches = token_batches(2, causal=build is llama)
    config = SpeftConfig(salience="grasp", grasp_temperature=1)
    with sdpa_kernel(SDPBackend.MATH):
        expected = hessian_product(plain, linear_layers(plain), batches, model_loss)
    statistics, found, _ = grasp(model, linear_layers(model), config, batches, None)
    if build is llama:
        # Its norms compute in float32, 6e-8 an operation; a missing term would be of order 1.
        for name, tensor in expected.items():
            limit = 1e-5 * tensor.abs().max().item()
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=limit)
    else:
        assert_close(found, expected)
    assert ["SDPBackend.MATH" in note for note in statistics.notes] == [True]
    report = score_and_select(model, SpeftConfig(salience="grasp"), batches)[1]
    assert "mathematical kernel" in report.to_dict()["notes"][0]


@pytest.mark.parametrize("need_weights", [False, True])
def test_grasp_says_so_of_torchs_own_attention_too(need_weights: bool) -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(6, 2), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.attention(x, x, x, need_weights=need_weights)[0]))

    config = SpeftConfig(salience="grasp", target_modules=("head",), grasp_temperature=1)
    loss = lambda model, x: model(x).square().sum()  # noqa: E731
    notes = score_and_select(Attending(), config, [torch.randn(3, 6)], loss)[1].notes
    # With its weights asked for, it computes them itself, and these have second derivatives.
    assert ["SDPBackend.MATH" in note for note in notes] == [True] * (not need_weights)


def test_grasp_notes_a_temperature_without_effect() -> None:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return torch.tanh(model(x)).square().mean()

    model, batches = nn.Sequential(nn.Linear(6, 6)), [torch.randn(3, 6)]
    noted = score_and_select(model, SpeftConfig(salience="grasp"), batches, loss)[1].notes
    assert ["grasp_temperature=200 had no effect" in note for note in noted] == [True]
    config = SpeftConfig(salience="grasp", grasp_temperature=1)
    assert score_and_select(model, config, batches, loss)[1].notes == ()


def test_grasp_refuses_batches_that_change_between_the_passes() -> None:
    class Shrinking:
        left = 3

        def __iter__(self) -> Any:
            self.left -= 1
            return iter(pair_batches(self.left))

    with pytest.raises(SalienceError, match="goes over the batches twice.*Pass a list"):
        score_and_select(mlp(), mlp_config(salience="grasp"), Shrinking(), pair_loss)


def test_grasp_says_that_an_operation_has_no_second_derivative() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            return dy * 2

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(Once.apply(model(batch[0])), batch[1])

    with pytest.raises(SalienceError, match="'grasp' needs second derivatives"):
        score_and_select(mlp(), mlp_config(salience="grasp"), pair_batches(1), loss)


def test_grasp_of_weights_that_the_gradient_does_not_depend_on() -> None:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model[0](x).sum() + torch.tanh(model[1](x)).sum()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    config = SpeftConfig(salience="grasp", target_modules=("0", "1"))
    found = grasp(model, linear_layers(model), config, [x], loss)[1]
    assert not found["0"].any()
    assert found["1"].any()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("salience", ["fisher", "grasp", "synflow"])
def test_gradient_checkpointing_selects_the_same(salience: str) -> None:
    config = SpeftConfig(density=0.05, salience=salience, scope="global")
    batches = token_batches(2, causal=True)
    plain, _ = score_and_select(llama().double(), config, batches)
    model = llama().double()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert score_and_select(model, config, batches)[0] == plain


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_reentrant_checkpointing_serves_fisher_and_is_refused_for_grasp() -> None:
    config = SpeftConfig(density=0.05, salience="fisher", scope="global")
    batches = token_batches(2, causal=True)
    plain, _ = score_and_select(llama().double(), config, batches)
    model = llama().double()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    assert score_and_select(model, config, batches)[0] == plain
    with pytest.raises(SalienceError, match="cannot differentiate.*use_reentrant=False"):
        score_and_select(model, SpeftConfig(salience="grasp"), batches)
