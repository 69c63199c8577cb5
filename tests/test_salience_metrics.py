"""Fisher, GraSP and SynFlow against their definitions, written out in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from test_salience import best
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
from speft_kernels.salience import squared
from speft_kernels.salience.borrow import borrowed
from speft_kernels.salience.hessian import hessian_gradients
from speft_kernels.salience.squared import square_sums, stream_squared_gradients
from speft_kernels.salience.synflow import stream_synaptic_flow

# Sums in float64 in another order: thousands of terms of relative error 1e-16.
CLOSE = {"rtol": 1e-9, "atol": 1e-14}
Loss = Callable[[nn.Module, Any], Tensor]


def model_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return model(**batch).loss


def linear_layers(model: nn.Module, *heads: str) -> dict[str, nn.Linear]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in heads
    }


def squares(model: nn.Module, layers: Mapping[str, nn.Linear], batches: Any, loss: Loss) -> Any:
    found: dict[str, Tensor] = {}

    def add(name: str, part: Tensor) -> None:
        found[name] = found[name] + part if name in found else part

    with borrowed(model, 0):
        stream_squared_gradients(model, layers, batches, loss, add)
    return found


def one_backward_an_example(
    model: nn.Module, layers: Mapping[str, nn.Linear], batches: Any, loss: Loss
) -> dict[str, Tensor]:
    model.eval()
    weights = [layer.weight for layer in layers.values()]
    total = [torch.zeros_like(weight) for weight in weights]
    for batch in batches:
        values = batch.values() if isinstance(batch, dict) else batch
        for i in range(len(next(iter(values)))):
            if isinstance(batch, dict):
                single = {key: value[i : i + 1] for key, value in batch.items()}
            else:
                single = tuple(value[i : i + 1] for value in batch)
            for out, g in zip(
                total, torch.autograd.grad(loss(model, single), weights), strict=True
            ):
                out += g.square()
    return dict(zip(layers, total, strict=True))


def assert_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert tensor.abs().max() > 0
        torch.testing.assert_close(found[name], tensor, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


# Fisher


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


def test_fisher_holds_a_bounded_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    largest: list[int] = []
    bmm = torch.bmm
    monkeypatch.setattr(
        torch, "bmm", lambda *args: largest.append((out := bmm(*args)).numel()) or out
    )
    monkeypatch.setattr(squared, "_CPU_BUFFER", 100)
    x, dy = torch.randn(6, 3, 40), torch.randn(6, 3, 9)
    found = square_sums([(x, dy)], 6, "a layer")
    expected = torch.einsum("btn,btk->bnk", dy.double(), x.double()).mul(6).square().sum(0)
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


# GraSP


def hessian_product(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    batches: Any,
    loss: Callable[[nn.Module, Any], Tensor],
) -> dict[str, Tensor]:
    """H g of the summed loss over the layers' weights, by torch's own hvp."""
    model.eval()
    names = [f"{name}.weight" for name in layers]

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> Tensor:
            return sum(loss(self.model, batch) for batch in batches)

    wrapped = Wrapped()

    def total(*weights: Tensor) -> Tensor:
        given = {f"model.{name}": w for name, w in zip(names, weights, strict=True)}
        return torch.func.functional_call(wrapped, given)

    at = tuple(layer.weight.detach() for layer in layers.values())
    g = torch.autograd.functional.jacobian(total, at)
    return dict(zip(layers, torch.autograd.functional.hvp(total, at, g)[1], strict=True))


def grasp(model: nn.Module, layers: Any, config: SpeftConfig, batches: Any, loss: Any) -> Any:
    with borrowed(model, 0):
        return hessian_gradients(model, layers, config, batches, loss)


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


# SynFlow


def flow(model: nn.Module, layers: Mapping[str, nn.Linear], forward: Any = None) -> Any:
    found: dict[str, Tensor] = {}
    with borrowed(model, 0):
        stream_synaptic_flow(model, layers, None, forward, found.__setitem__)
    return found


def test_synflow_of_a_chain_is_the_product_of_absolute_matrices() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 6), nn.Sigmoid(), nn.Linear(6, 3), nn.Softmax(-1)
    ).double()
    a, b, c = (model[i].weight.detach().abs() for i in (0, 2, 4))
    bias_a, bias_b = (model[i].bias.detach().abs() for i in (0, 2))
    ones_in, ones_out = torch.ones(4).double(), torch.ones(3).double()
    first = a @ ones_in + bias_a
    second = b @ first + bias_b
    expected = {
        "0": torch.outer(b.T @ (c.T @ ones_out), ones_in),
        "2": torch.outer(c.T @ ones_out, first),
        "4": torch.outer(ones_out, second),
    }
    assert_close(flow(model, linear_layers(model)), expected)
    scores = [model[int(name)].weight.detach().abs() * t for name, t in expected.items()]
    for scope in ("layer", "global"):
        config = SpeftConfig(density=0.2, salience="synflow", scope=scope)
        patterns, report = score_and_select(model, config)
        assert [p.indices.tolist() for p in patterns.values()] == best(scores, 0.2, scope)
        assert (report.batches, report.examples) == (0, 0)
        assert report.accumulator_bytes == (0 if scope == "layer" else 8 * (20 + 30 + 18))


def test_synflow_through_functions_and_a_forward_of_the_users() -> None:
    class Functions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = nn.functional.leaky_relu(self.first(x), 0.1).tanh()
            x = nn.functional.glu(torch.sigmoid(x))
            x = nn.functional.relu(x, inplace=True).softmax(-1)
            return nn.functional.log_softmax(self.second(nn.functional.gelu(x)), dim=-1)

    torch.manual_seed(0)
    model = Functions().double()
    layers = linear_layers(model)
    forward = lambda model, batch: model(torch.ones(1, 4, dtype=torch.float64))  # noqa: E731
    a, b = (layer.weight.detach().abs().requires_grad_() for layer in layers.values())
    left, right = (a.sum(1) + model.first.bias.detach().abs()).chunk(2)
    r = (b @ (left * right) + model.second.bias.detach().abs()).sum()
    expected = dict(zip(layers, torch.autograd.grad(r, (a, b)), strict=True))
    assert_close(flow(model, layers, forward), expected)
    patterns, _ = score_and_select(model, SpeftConfig(salience="synflow"), None, forward)
    assert patterns["first"].nnz


@pytest.mark.parametrize("build", [bert_classifier, llama])
def test_synflow_is_the_same_with_fused_and_with_plain_attention(
    build: Callable[..., nn.Module],
) -> None:
    fused, plain = build().double(), build().double()
    plain.set_attn_implementation("eager")
    expected = flow(plain, linear_layers(plain))
    # Llama's plain attention rounds its weights to float32, a relative error of 6e-8 a layer.
    found = flow(fused, linear_layers(fused))
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert tensor.abs().max() > 0
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-12)


def test_synflow_of_a_wrapper_that_takes_tokens_alone() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = bert_classifier().double()
            self.config = self.inner.config

        def get_input_embeddings(self) -> nn.Module:
            return self.inner.get_input_embeddings()

        def forward(self, input_ids: Tensor) -> Any:
            return self.inner(input_ids)

    wrapped = Wrapper()
    expected = flow(wrapped.inner, linear_layers(wrapped.inner))
    found = flow(wrapped, linear_layers(wrapped))
    assert_close({name.removeprefix("inner."): t for name, t in found.items()}, expected)
