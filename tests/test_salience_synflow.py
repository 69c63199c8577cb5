"""SynFlow against linear networks written out in float64, and parameters given back bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from scoring import (
    CLOSE,
    assert_close,
    best,
    flow,
    linear_layers,
)
from tiny_models import (
    bert_classifier,
    llama,
)
from torch import Tensor, nn

from speft_kernels.errors import ConfigError
from speft_kernels.model import SpeftConfig, score_and_select
from speft_kernels.salience.linearise import linear_activations


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


def test_synflow_of_a_model_of_images_needs_a_forward() -> None:
    class Images(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.head, self.config = nn.Conv2d(3, 4, 2), nn.Linear(4, 2), object()

        def get_input_embeddings(self) -> nn.Module:
            return self.patches

        def forward(self, pixel_values: Tensor) -> Tensor:
            return self.head(self.patches(pixel_values).mean((2, 3)))

    config = SpeftConfig(salience="synflow", target_modules=("head",))
    with pytest.raises(ConfigError, match="Images is neither"):
        score_and_select(Images(), config)
    forward = lambda model, batch: model(torch.ones(1, 3, 4, 4))  # noqa: E731
    assert score_and_select(Images(), config, None, forward)[0]["head"].nnz


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("mask", ["none", "causal", "bool", "float"])
def test_linear_attention_weighs_by_the_scores(scale: float | None, mask: str) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, 5, 4, dtype=torch.float64, generator=generator) for heads in (4, 2, 2)
    )
    allowed = torch.ones(5, 5, dtype=torch.bool).tril()
    bias = torch.zeros(5, 5, dtype=torch.float64)
    given: dict[str, Any] = {
        "none": {},
        "causal": {"is_causal": True},
        "bool": {"attn_mask": allowed},
        "float": {"attn_mask": (bias + 0.5).masked_fill(~allowed, -torch.inf)},
    }[mask]
    with linear_activations(nn.Identity()):
        found = nn.functional.scaled_dot_product_attention(
            q, k, v, scale=scale, enable_gqa=True, **given
        )
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k.repeat_interleave(2, 1))
    scores = scores * (0.5 if scale is None else scale) + (0.5 if mask == "float" else 0)
    if mask != "none":
        scores = scores * allowed
    expected = torch.einsum("bhqk,bhkd->bhqd", scores, v.repeat_interleave(2, 1))
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_torchs_own_attention_weighs_by_the_scores_too(need_weights: bool, masked: bool) -> None:
    """`nn.MultiheadAttention` calls softmax or attention inside one function."""
    torch.manual_seed(0)
    module = nn.MultiheadAttention(6, 2, batch_first=True, dtype=torch.float64).eval()
    x = torch.randn(1, 3, 6, dtype=torch.float64)
    forbidden = torch.ones(3, 3, dtype=torch.bool).triu(1) if masked else None
    with linear_activations(module):
        found = module(x, x, x, attn_mask=forbidden, need_weights=need_weights)[0]
    q, k, v = (x @ module.in_proj_weight.T + module.in_proj_bias).view(3, 3, 2, 3).unbind(1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / 3**0.5
    if forbidden is not None:
        scores = scores.masked_fill(forbidden, 0)
    mixed = torch.einsum("hqk,khd->qhd", scores, v).reshape(1, 3, 6)
    torch.testing.assert_close(found, module.out_proj(mixed), **CLOSE)
    assert torch.softmax(torch.zeros(2), 0).tolist() == [0.5, 0.5]
    assert nn.functional.softmax(torch.zeros(2), 0).tolist() == [0.5, 0.5]
