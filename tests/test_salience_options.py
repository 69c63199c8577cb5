"""Random masks, callables as scores, folding of batches; every metric over scopes and blocks."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scoring import best, flow, grasp, squares
from tiny_models import Snapshot, mlp, mlp_config, pair_batches, pair_loss
from torch import Tensor, nn

from speft_kernels.adapter import load_adapter, save_adapter
from speft_kernels.errors import ConfigError, SalienceError
from speft_kernels.model import SpeftConfig, score_and_select, sparsify
from speft_kernels.salience import METRICS, metric_named
from speft_kernels.salience.uniform import draw

# Every metric, scope and block shape


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 10)).double()


def chain_batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(7, 10, dtype=torch.float64, generator=generator),
            torch.randint(0, 10, (7,), generator=generator),
        )
        for _ in range(count)
    ]


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
    scores = []
    found = entry_scores(metric, batches)
    for entries in (found["0"], found["2"]):
        (rows, cols), (bh, bw) = entries.shape, block_shape
        blocks = [
            entries[i : i + bh, j : j + bw].sum()
            for i in range(0, rows, bh)
            for j in range(0, cols, bw)
        ]
        scores.append(torch.stack(blocks))
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


# Random


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("density", [0.001, 0.03, 0.26, 0.9])
def test_random_counts_are_exact_and_the_order_of_layers_is_nothing(
    scope: str, density: float
) -> None:
    places = {"b": 1000, "a": 37, "c": 5000}
    chosen = draw(places, density, scope, 3)
    again = draw(dict(reversed(places.items())), density, scope, 3)
    assert set(chosen) == set(places)
    assert all(torch.equal(chosen[name], again[name]) for name in places)
    for name, indices in chosen.items():
        assert torch.equal(indices, indices.unique())
        assert not len(indices) or (indices.min() >= 0 and indices.max() < places[name])
        if scope == "layer":
            assert len(indices) == max(1, round(density * places[name]))
    if scope == "global":
        assert sum(map(len, chosen.values())) == round(density * 6037)
    other = draw(places, density, scope, 4)
    assert any(not torch.equal(chosen[name], other[name]) for name in places)


@pytest.mark.parametrize("density", [0.1, 0.5])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_random_is_uniform(density: float, scope: str) -> None:
    # Both ways of drawing. 2000 draws of 60 places: a place's count has a standard deviation below
    # sqrt(2000 / 4) = 22.4; five of them are exceeded by one in 1.7 million, of 120 counts here.
    counts = torch.zeros(60)
    for seed in range(2000):
        chosen = draw({"a": 40, "b": 20}, density, scope, seed)
        counts[:40] += torch.bincount(chosen["a"], minlength=40)
        counts[40:] += torch.bincount(chosen["b"], minlength=20)
    assert (counts - 2000 * density).abs().max() < 5 * (2000 * density * (1 - density)) ** 0.5


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("block_shape", [(1, 1), (2, 5)])
def test_random_masks(scope: str, block_shape: tuple[int, int]) -> None:
    config = SpeftConfig(
        density=0.2, salience="random", scope=scope, seed=5, block_shape=block_shape
    )
    patterns, report = score_and_select(chain(), config)
    blocks = 400 // (block_shape[0] * block_shape[1])
    assert sum(p.num_blocks for p in patterns.values()) == round(0.2 * blocks)
    assert (report.metric, report.batches, report.accumulator_bytes) == ("random", 0, 0)
    assert patterns == score_and_select(chain(), config, [object()])[0]
    other = SpeftConfig(**{**config.to_dict(), "seed": 6})
    assert patterns != score_and_select(chain(), other)[0]


# Callables


def product(w: Tensor, g: Tensor) -> Tensor:
    """SNIP's score."""
    return (w * g).abs()


class Scorer:
    def __call__(self, w: Tensor, g: Tensor) -> Tensor:
        return product(w, g)

    def method(self, w: Tensor, g: Tensor) -> Tensor:
        return product(w, g)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("block_shape", [(1, 1), (2, 2)])
def test_a_callable_scores_as_the_metric_of_its_formula(
    scope: str, count: int, block_shape: tuple[int, int]
) -> None:
    settings = {"density": 0.2, "scope": scope, "block_shape": block_shape}
    batches = chain_batches(count)
    snip = SpeftConfig(**settings, salience="snip", target_modules=("0", "2"))
    expected, _ = score_and_select(chain(), snip, batches, pair_loss)
    for salience in (product, Scorer(), f"{__name__}:product", lambda w, g: product(w, g)):
        config = SpeftConfig(**settings, salience=salience, target_modules=("0", "2"))
        found, report = score_and_select(chain(), config, batches, pair_loss)
        assert found == expected
        assert report.metric == config.to_dict()["salience"]


def test_a_callable_may_write_into_what_it_is_given() -> None:
    def careless(w: Tensor, g: Tensor) -> Tensor:
        return w.mul_(g).abs_()

    model = mlp()
    before = Snapshot(model)
    config = mlp_config(salience=careless)
    found, _ = score_and_select(model, config, pair_batches(2), pair_loss)
    before.assert_untouched()
    assert (
        found == score_and_select(model, mlp_config(salience="snip"), pair_batches(2), pair_loss)[0]
    )


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda w, g: None, "returned a NoneType"),
        (lambda w, g: g.sum(), r"layer 'second'.*returned shape \(\) for a weight of shape"),
        (lambda w, g: g.abs() > 0, r"returned torch.bool; it must return floating"),
        (lambda w, g: w / 0, "score of layer 'second' has NaN or infinite"),
    ],
)
@pytest.mark.parametrize("block_shape", [(1, 1), (2, 2)])
def test_results_of_a_callable_are_checked(
    score: Any, message: str, block_shape: tuple[int, int]
) -> None:
    model = mlp()
    before = Snapshot(model)
    with pytest.raises(SalienceError, match=message):
        sparsify(model, mlp_config(salience=score, block_shape=block_shape), pair_batches(1),
                 pair_loss)  # fmt: skip
    before.assert_untouched()


def test_configs_keep_a_callables_name(tmp_path: Path) -> None:
    config = mlp_config(salience=product)
    stored = config.to_dict()
    assert stored["salience"] == f"{__name__}:product"
    restored = SpeftConfig.from_dict(stored)
    assert metric_named(restored.salience).score is product
    assert restored.to_dict() == stored


@pytest.mark.parametrize(
    ("score", "part"),
    [
        (lambda w, g: g, "<lambda>"),
        (Scorer(), "<Scorer>"),
        (Scorer().method, "<Scorer.method>"),
        (functools.partial(product), "<partial>"),
    ],
)
def test_an_adapter_of_a_callable_without_a_name_is_saved_and_loaded(
    score: Callable[..., Tensor], part: str, tmp_path: Path
) -> None:
    config = mlp_config(salience=score)
    model = mlp()
    sparsify(model, config, pair_batches(1), pair_loss)
    save_adapter(model, tmp_path / "adapter", config=config)
    info = load_adapter(mlp(), tmp_path / "adapter")
    assert info.config is not None
    assert part in str(info.config.salience)
    with pytest.raises(ConfigError, match="cannot be imported: a lambda, a local function"):
        sparsify(mlp(), info.config, pair_batches(1), pair_loss)


def test_reading_a_config_imports_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "hostile_score.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    config = SpeftConfig.from_dict({"salience": "hostile_score:score"})
    assert config.to_dict()["salience"] == "hostile_score:score"
    assert "hostile_score" not in sys.modules


@pytest.mark.parametrize(
    ("salience", "message"),
    [
        ("no_such_module:f", "'no_such_module:f' cannot be imported: No module"),
        ("math:nothing", "math has no nothing"),
        ("math:pi", "is a float; it must be a callable"),
        (f"{__name__}:outer.<locals>.f", "local function"),
    ],
)
def test_names_that_cannot_be_imported(salience: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        score_and_select(mlp(), mlp_config(salience=salience), pair_batches(1), pair_loss)


@pytest.mark.parametrize("salience", ["math:", ":pi", "a b:c", "math:pi()", "m:f:g", "../x:f"])
def test_names_of_the_wrong_form(salience: str) -> None:
    with pytest.raises(ConfigError, match="not the name of a callable"):
        SpeftConfig(salience=salience)


@pytest.mark.parametrize("salience", [3, None, "gradeint"])
def test_other_things_are_no_metric(salience: Any) -> None:
    with pytest.raises(ConfigError, match="unknown salience metric"):
        SpeftConfig(salience=salience)


# Folding of batches


@pytest.mark.parametrize("metric", ["gradient", "snip", "force", "taylor_fo", product])
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
