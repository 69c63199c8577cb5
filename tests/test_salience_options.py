"""Every metric over scopes, blocks and accumulators; folding of batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scoring import best, block_sums, chain, chain_batches, flow, grasp, squares
from tiny_models import mlp, mlp_config, pair_loss
from torch import Tensor, nn

from speft_kernels.errors import ConfigError, SalienceError
from speft_kernels.model import SpeftConfig, score_and_select
from speft_kernels.salience import METRICS

# Every metric, scope and block shape


def entry_scores(metric: str, batches: list[Any]) -> dict[str, Tensor]:
    """Scores by the formulas, of statistics that other tests hold against their definitions."""
    model = chain()
    layers = {"0": model[0], "2": model[2]}
    weights = {name: layer.weight.detach() for name, layer in layers.items()}
    if metric == "fisher":
        return squares(model, layers, batches, pair_loss)
    if metric == "synflow":
        return {name: (weights[name] * r).abs() for name, r in flow(model, layers).items()}
    products = grasp(model, layers, SpeftConfig(salience="grasp"), batches, pair_loss)[1]
    return {name: -weights[name] * h for name, h in products.items()}


@pytest.mark.parametrize("metric", ["fisher", "synflow", "grasp"])
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("block_shape", [(1, 1), (2, 2), (10, 1)])
@pytest.mark.parametrize("device", ["model", "cpu"])
def test_selection_equals_scores_summed_over_blocks(
    metric: str, scope: str, count: int, block_shape: tuple[int, int], device: str
) -> None:
    batches = chain_batches(count)
    found = entry_scores(metric, batches)
    scores = [block_sums(found[name], block_shape) for name in ("0", "2")]
    config = SpeftConfig(
        density=0.2,
        salience=metric,
        scope=scope,
        block_shape=block_shape,
        accumulator_device=device,
        target_modules=("0", "2"),
    )
    patterns, report = score_and_select(chain(), config, iter(batches), pair_loss)
    assert [p.indices.tolist() for p in patterns.values()] == best(scores, 0.2, scope)
    assert all(p.block_shape == block_shape for p in patterns.values())
    one_set = 2 * 200 * 8
    at_once = scope == "layer" and (count == 1 or metric == "synflow")
    sets = 2 if metric == "grasp" else 0 if at_once else 1
    assert report.accumulator_bytes == sets * one_set


@pytest.mark.parametrize("dtype", ["float32", "weight"])
@pytest.mark.parametrize("metric", ["fisher", "synflow", "grasp"])
def test_accumulators_of_a_bf16_model(metric: str, dtype: str) -> None:
    model = chain().bfloat16()
    batches = [(x.bfloat16(), y) for x, y in chain_batches(3)]
    config = SpeftConfig(
        density=0.2,
        salience=metric,
        scope="global",
        accumulator_dtype=dtype,
        target_modules=("0", "2"),
    )
    patterns, report = score_and_select(model, config, batches, pair_loss)
    sets, size = 2 if metric == "grasp" else 1, 2 if dtype == "weight" else 4
    assert report.accumulator_bytes == sets * 400 * size
    exact, _ = score_and_select(
        chain(),
        SpeftConfig(density=0.2, salience=metric, scope="global", target_modules=("0", "2")),
        chain_batches(3),
        pair_loss,
    )
    # bf16 has 8 bits: the entries near the threshold change places, most do not.
    for name, pattern in exact.items():
        common = set(pattern.indices.tolist()) & set(patterns[name].indices.tolist())
        assert len(common) > 0.75 * pattern.nnz


@pytest.mark.parametrize("metric", [m.key for m in METRICS.values() if not m.needs_data])
def test_metrics_without_data_read_no_batch(metric: str) -> None:
    def never() -> Any:
        raise AssertionError("read")
        yield

    config = SpeftConfig(salience=metric)
    assert score_and_select(chain(), config)[0] == score_and_select(chain(), config, never())[0]


@pytest.mark.parametrize("metric", [m.key for m in METRICS.values() if m.needs_data])
def test_metrics_of_data_need_some(metric: str) -> None:
    config = mlp_config(salience=metric)
    for batches, message in (
        (None, "needs batches.*none: magnitude, synflow, random"),
        ([], "is empty"),
    ):
        with pytest.raises((ConfigError, SalienceError), match=message):
            score_and_select(mlp(), config, batches, pair_loss)


# Folding of batches


def summed_roots(w: Tensor, g: Tensor) -> Tensor:
    return w.abs().sqrt() + g.abs().sqrt()


@pytest.mark.parametrize("metric", ["gradient", "snip", "force", "taylor_fo", summed_roots])
@pytest.mark.parametrize("accumulate", ["sum", "absolute", "square"])
@pytest.mark.parametrize("count", [1, 3])
def test_accumulate(metric: Any, accumulate: str, count: int) -> None:
    batches, model = chain_batches(count), chain()
    weights = [model[0].weight, model[2].weight]
    fold = {"sum": lambda g: g, "absolute": Tensor.abs, "square": Tensor.square}[accumulate]
    total = [0.0, 0.0]
    for batch in batches:
        gradients = torch.autograd.grad(pair_loss(model, batch), weights)
        total = [t + fold(g) for t, g in zip(total, gradients, strict=True)]
    score = metric if callable(metric) else METRICS[metric].score
    scores = [score(w.detach(), t) for w, t in zip(weights, total, strict=True)]
    settings = {"density": 0.2, "salience": metric, "target_modules": ("0", "2")}
    for scope in ("layer", "global"):
        config = SpeftConfig(**settings, accumulate=accumulate, scope=scope)
        patterns, _ = score_and_select(model, config, batches, pair_loss)
        assert [p.indices.tolist() for p in patterns.values()] == best(scores, 0.2, scope)


def test_the_square_of_a_half_keeps_its_range() -> None:
    model = nn.Sequential(nn.Linear(4, 4)).half()
    batches = [torch.full((2, 4), 600.0, dtype=torch.float16)] * 2
    config = SpeftConfig(accumulate="square", target_modules=("0",))
    patterns, _ = score_and_select(model, config, batches, lambda m, x: m(x).sum())
    assert patterns["0"].nnz == 1  # 1200 ** 2 is no half, and would be refused as infinite


@pytest.mark.parametrize("salience", [m.key for m in METRICS.values() if m.statistic != "gradient"])
@pytest.mark.parametrize("accumulate", ["absolute", "square"])
def test_accumulate_is_for_plain_gradients(salience: str, accumulate: str) -> None:
    with pytest.raises(ConfigError, match=f"accumulate='{accumulate}' is for metrics of the plain"):
        SpeftConfig(salience=salience, accumulate=accumulate)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("accumulate", "mean", "accumulate must be one of"),
        ("selection", "best", "selection must be one of"),
        ("grasp_sign", "minus", "grasp_sign must be one of"),
        ("grasp_temperature", 0, "grasp_temperature must be above 0"),
        ("grasp_temperature", "hot", "grasp_temperature must be a finite number"),
    ],
)
def test_settings_out_of_range(setting: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SpeftConfig(**{setting: value})


def test_absolute_sums_refuse_gradients_in_parts() -> None:
    from torch.utils.checkpoint import checkpoint

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        x = x.requires_grad_()
        for _ in range(2):
            x = checkpoint(model, x, use_reentrant=True)
        return x.square().mean()

    model, batches = nn.Sequential(nn.Linear(6, 6)), [torch.randn(3, 6) for _ in range(2)]
    settings = {"target_modules": ("0",)}
    score_and_select(model, SpeftConfig(**settings), batches, loss)
    with pytest.raises(SalienceError, match="layer '0' arrives in parts"):
        score_and_select(model, SpeftConfig(**settings, accumulate="absolute"), batches, loss)
