"""Scoring and selection: exact against dense autograd, and frugal."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kernels import peak_of_tensors
from scoring import best, block_sums, chain, linear_layers, model_loss
from tiny_models import (
    MLP_LAYERS,
    Snapshot,
    bert_classifier,
    llama,
    mlp,
    mlp_config,
    opt,
    pair_batches,
    pair_loss,
    token_batches,
)
from torch import Tensor, nn

from speft_kernels import ops
from speft_kernels.errors import ConfigError
from speft_kernels.model import SpeftConfig, score_and_select
from speft_kernels.peak_memory import PeakMemory
from speft_kernels.salience import METRICS, metric_named
from speft_kernels.salience.accumulate import GradientSums, stream_gradients
from speft_kernels.salience.borrow import borrowed

# The formulas of the paper's table, on their own.
FORMULAS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "magnitude": lambda w, g: w.abs(),
    "gradient": lambda w, g: g.abs(),
    "snip": lambda w, g: (w * g).abs(),
    "force": lambda w, g: -w * g,
    "taylor_fo": lambda w, g: (w * g) ** 2,
}


def summed_gradients(
    model: nn.Module, names: list[str], batches: list[Any], loss_fn: Any
) -> dict[str, Tensor]:
    """The gradients of a dense backward pass over all batches, in evaluation mode."""
    model.eval()
    weights = [model.get_submodule(name).weight for name in names]
    total = sum(loss_fn(model, batch) for batch in batches)
    return dict(zip(names, torch.autograd.grad(total, weights), strict=True))


@pytest.mark.parametrize("metric", list(FORMULAS))
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("device", ["model", "cpu"])
def test_selection_equals_dense_scores(metric: str, scope: str, count: int, device: str) -> None:
    model = mlp(dtype=torch.float64)
    batches = pair_batches(count, dtype=torch.float64)
    config = mlp_config(salience=metric, scope=scope, accumulator_device=device)
    gradients = summed_gradients(model, list(MLP_LAYERS), batches, pair_loss)
    weights = [model.get_submodule(name).weight.detach() for name in MLP_LAYERS]
    scores = [
        FORMULAS[metric](weight, gradients[name])
        for name, weight in zip(MLP_LAYERS, weights, strict=True)
    ]
    expected = best(scores, config.density, scope)

    patterns, report = score_and_select(model, config, batches, pair_loss)

    assert [patterns[name].indices.tolist() for name in MLP_LAYERS] == expected
    assert [layer.nnz for layer in report.layers] == [len(indices) for indices in expected]
    assert report.nnz == sum(map(len, expected))


@pytest.mark.parametrize("metric", list(FORMULAS))
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("block_shape", [(2, 2), (1, 5), (10, 1)])
def test_block_selection_sums_entry_scores(
    metric: str, scope: str, count: int, block_shape: tuple[int, int]
) -> None:
    model = chain()
    inputs = [torch.randn(7, 10, dtype=torch.float64) for _ in range(count)]

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().sum()

    gradients = summed_gradients(model, ["0", "2"], inputs, loss_fn)
    scores = [
        block_sums(
            FORMULAS[metric](model.get_submodule(name).weight.detach(), gradient), block_shape
        )
        for name, gradient in gradients.items()
    ]
    config = SpeftConfig(density=0.2, salience=metric, scope=scope, block_shape=block_shape)
    patterns, _ = score_and_select(model, config, inputs, loss_fn)

    assert [p.indices.tolist() for p in patterns.values()] == best(scores, 0.2, scope)
    assert all(p.block_shape == block_shape for p in patterns.values())


@pytest.mark.parametrize("build", [bert_classifier, llama])
def test_transformers_selection_equals_dense_scores(build: Callable[[], nn.Module]) -> None:
    model = build().double()
    batches = token_batches(2, causal=build is llama)
    config = SpeftConfig(density=0.05, salience="snip", scope="global")
    names = list(linear_layers(model, "classifier", "lm_head"))
    gradients = summed_gradients(model, names, batches, model_loss)
    scores = [(model.get_submodule(n).weight.detach() * gradients[n]).abs() for n in names]

    patterns, report = score_and_select(model, config, batches)

    assert list(patterns) == names
    assert [p.indices.tolist() for p in patterns.values()] == best(scores, 0.05, "global")
    assert (report.batches, report.examples) == (2, 8)


@pytest.mark.parametrize("accumulator_dtype", ["float32", "weight"])
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("metric", ["magnitude", "gradient", "snip"])
def test_bf16_model(accumulator_dtype: str, scope: str, metric: str) -> None:
    model = mlp(dtype=torch.bfloat16)
    batches = pair_batches(3, dtype=torch.bfloat16)
    config = mlp_config(salience=metric, scope=scope, accumulator_dtype=accumulator_dtype)
    wide = torch.float32 if accumulator_dtype == "float32" else torch.bfloat16
    sums: dict[str, Tensor] = {}
    for batch in batches:
        for name, g in summed_gradients(model, list(MLP_LAYERS), [batch], pair_loss).items():
            sums[name] = sums[name] + g.to(wide) if name in sums else g.to(wide)
    scores = [
        FORMULAS[metric](model.get_submodule(n).weight.detach().float(), sums[n].float())
        for n in MLP_LAYERS
    ]

    patterns, report = score_and_select(model, config, batches, pair_loss)

    expected = best(scores, config.density, scope)
    assert [patterns[name].indices.tolist() for name in MLP_LAYERS] == expected
    if metric == "magnitude":
        assert report.accumulator_bytes == 0
    else:
        assert report.accumulator_bytes == (6 * 10 + 10 * 8) * wide.itemsize


def test_layers_of_different_dtypes_rank_together() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6).bfloat16())
    config = SpeftConfig(density=0.2, salience="magnitude", scope="global")
    patterns, _ = score_and_select(model, config)
    scores = [model[i].weight.detach().float().abs() for i in (0, 1)]
    assert [p.indices.tolist() for p in patterns.values()] == best(scores, 0.2, "global")


def test_at_least_one_entry_of_each_layer() -> None:
    patterns, _ = score_and_select(mlp(), mlp_config(density=1e-4), pair_batches(1), pair_loss)
    assert [pattern.nnz for pattern in patterns.values()] == [1, 1]


def test_metrics_table_agrees_with_the_fused_ranking() -> None:
    generator = torch.Generator().manual_seed(0)
    w, g = (torch.randn(9, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    assert set(ops.METRICS) <= {*METRICS, "raw"}
    for key, metric in METRICS.items():
        statistic = g.square() if key == "fisher" else g
        if metric.score is None or metric.ranked_as is None:
            assert key == "random"
            continue
        fused = ops.topk_salience([w], [statistic], 6, metric=metric.ranked_as)[0]
        plain = ops.topk_salience([None], [metric.score(w, statistic)], 6, metric="raw")[0]
        assert torch.equal(fused, plain), key
        assert metric.needs_statistic or key == "magnitude"


def test_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown salience metric 'gradeint'.*'gradient'"):
        metric_named("gradeint")
    with pytest.raises(ConfigError, match="snip"):
        SpeftConfig(salience="snipp")


# What the pass costs


def test_one_gradient_at_a_time() -> None:
    model = mlp()
    layers = {name: model.get_submodule(name) for name in (*MLP_LAYERS, "head")}
    given: list[weakref.ref[Tensor]] = []

    def consume(name: str, gradient: Tensor) -> None:
        assert all(layer.weight.grad is None for layer in layers.values())
        assert all(earlier() is None for earlier in given)
        assert gradient.shape == layers[name].weight.shape
        given.append(weakref.ref(gradient))

    with borrowed(model, 0):
        statistics = stream_gradients(model, layers, pair_batches(2), pair_loss, consume)
    assert len(given) == 6
    assert statistics.arrived == set(layers)
    assert statistics.largest_gradient_bytes == 80 * 4


def test_single_batch_per_layer_selection_keeps_no_accumulators(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batches = pair_batches(1)
    accumulated, report = score_and_select(
        mlp(), mlp_config(), [*batches, *batches], pair_loss
    )  # twice the same batch: twice the gradient, the same ranks
    assert report.accumulator_bytes == (60 + 80) * 4

    def refuse(self: GradientSums, name: str, gradient: Tensor) -> None:
        raise AssertionError("accumulated")

    monkeypatch.setattr(GradientSums, "add", refuse)
    patterns, report = score_and_select(mlp(), mlp_config(), iter(batches), pair_loss)
    assert patterns == accumulated
    assert report.accumulator_bytes == 0
    assert report.largest_gradient_bytes == 80 * 4


def _square(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def _wide_layers(count: int, side: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(side, side, bias=False) for _ in range(count)))


@pytest.mark.parametrize(
    ("config", "most"),
    [
        # The gradient and the mask; what the compiled selection takes is not of torch's tensors.
        (SpeftConfig(density=0.001, salience="gradient"), 1.2),
        # The gradient, its scores, those of the highest columns, what each waits, and the keys.
        (SpeftConfig(density=0.001), 5.2),
    ],
)
def test_one_gradient_is_alive_at_a_time(config: SpeftConfig, most: float) -> None:
    side = 512
    x, peaks = torch.randn(2, side), []
    for layers in (4, 24):
        model = _wide_layers(layers, side)

        def score(model: nn.Module = model) -> None:
            score_and_select(model, config, [x], _square)

        score()  # what the first use allocates and keeps is not the pass's
        peaks.append(peak_of_tensors(score))
    one = side * side * 4
    # The activations and the masks of twenty more layers take less than a tenth of one.
    assert peaks[1] - peaks[0] < 0.1 * one
    assert peaks[1] < most * one


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_peak_memory_of_the_pass_is_reported() -> None:
    layers, side = 24, 1024
    model = _wide_layers(layers, side)
    x = torch.randn(2, side)
    _, report = score_and_select(model, SpeftConfig(density=0.001), [x], _square)
    if report.peak_memory_source != "process high-water mark":
        pytest.skip("the kernel does not let the high-water mark be reset")
    assert report.peak_memory_bytes is not None
    assert report.peak_memory_bytes > layers * side * side * 4  # the weights alone


def test_peak_memory_says_when_it_counts_from_the_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from speft_kernels import peak_memory as memory

    monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path / "none" / "clear_refs")
    peak = PeakMemory([torch.device("cpu")])
    assert peak.source == "process high-water mark since its start"
    assert (peak.bytes() or 0) > 2**20
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "status")
    assert (peak.bytes() or 0) > 2**20  # out of getrusage


# Models that need care


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_gradient_checkpointing_stays_on_and_selects_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batches = token_batches(2, causal=True)
    plain, _ = score_and_select(llama(), SpeftConfig(density=0.05), batches)
    model = llama()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    calls: list[int] = []
    for module in model.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            original = module._gradient_checkpointing_func
            monkeypatch.setattr(
                module,
                "_gradient_checkpointing_func",
                lambda *a, original=original, **k: calls.append(1) or original(*a, **k),
            )
    model.eval()
    checkpointed, _ = score_and_select(model, SpeftConfig(density=0.05), batches)
    assert len(calls) == 4  # 2 layers, 2 batches
    assert checkpointed == plain
    assert not any(module.training for module in model.modules())


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_a_checkpointed_layer_is_scored_without_its_dropout() -> None:
    """OPT drops units and whole layers by the training flag of the layers that checkpoint."""
    batches = token_batches(2, causal=True)
    plain, _ = score_and_select(opt(), SpeftConfig(salience="gradient"), batches)
    model = opt(dropout=0.5, layerdrop=0.5)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    layer = model.model.decoder.layers[0]
    calls: list[tuple[bool, float]] = []
    layer.register_forward_hook(lambda *_: calls.append((layer.training, layer.dropout)))
    kept = [(name, dict(vars(module))) for name, module in model.named_modules()]
    for seed in (0, 1):
        config = SpeftConfig(salience="gradient", seed=seed)
        assert score_and_select(model, config, batches)[0] == plain
    assert calls == [(True, 0.0)] * 4  # it checkpointed, as it does in training mode alone
    assert [(name, dict(vars(module))) for name, module in model.named_modules()] == kept
    assert (layer.dropout, model.model.decoder.layerdrop) == (0.5, 0.5)


def test_chances_of_dropout_come_back_after_an_error() -> None:
    class Config:
        layerdrop = 0.0

        def __init__(self) -> None:
            self.layerdrop, self.hidden_dropout, self.width = 0.25, 0.5, 2.0

    class Layer(nn.Linear):
        gradient_checkpointing = True

    shared = Config()
    model = nn.Sequential(Layer(4, 4), Layer(4, 4), nn.LSTM(4, 4, 2, dropout=0.5))
    for module in (model[0], model[1]):
        module.config, module.dropout = shared, 0.75

    def fail() -> None:
        with borrowed(model, 0):
            assert (shared.layerdrop, shared.hidden_dropout, shared.width) == (0, 0, 2)
            assert [model[0].dropout, model[1].dropout, model[2].dropout] == [0, 0, 0]
            assert all(module.training for module in model)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (shared.layerdrop, shared.hidden_dropout, shared.width) == (0.25, 0.5, 2)
    assert [model[0].dropout, model[1].dropout, model[2].dropout] == [0.75, 0.75, 0.5]


# What the report says


@pytest.mark.parametrize(("sizes", "said"), [((6, 6, 1), True), ((4, 3, 3), False)])
@pytest.mark.parametrize("salience", ["gradient", "grasp", "fisher"])
def test_batches_of_different_sizes_are_noted(
    sizes: tuple[int, ...], said: bool, salience: str
) -> None:
    x, labels = (torch.cat(parts)[: sum(sizes)] for parts in zip(*pair_batches(3), strict=True))
    batches = list(zip(x.split(sizes), labels.split(sizes), strict=True))
    _, report = score_and_select(mlp(), mlp_config(salience=salience), batches, pair_loss)
    noted = [note for note in report.notes if "the batches hold 1 to 6 examples" in note]
    # Fisher weighs each example by itself.
    assert len(noted) == (said and salience != "fisher")


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("selection", ["top", "sample"])
@pytest.mark.parametrize("block_shape", [(1, 1), (2, 2)])
@pytest.mark.parametrize("count", [1, 2])
def test_places_that_scored_zero_are_noted(
    scope: str, selection: str, block_shape: tuple[int, int], count: int
) -> None:
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4))
    with torch.no_grad():
        model[0].bias[4:] = -100  # four of 64 units are alive
    batches = [torch.randn(16, 8) for _ in range(count)]
    config = SpeftConfig(
        density=0.25,
        salience="snip",
        scope=scope,
        selection=selection,
        sample_columns=1.0,
        block_shape=block_shape,
        target_modules=("0",),
        modules_to_train=(),
    )

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().mean()

    patterns, report = score_and_select(model, config, batches, loss)
    size = block_shape[0] * block_shape[1]
    total, alive = 512 // 4 // size, 32 // size
    what = "entries" if size == 1 else "blocks"
    (note,) = report.notes
    assert note.startswith(f"fewer {what} score above zero than are to train")
    assert f"'0' ({total - alive} of {total})" in note
    assert len(patterns["0"].indices) == total


@pytest.mark.parametrize("salience", ["magnitude", "force", "random"])
def test_zeros_that_others_score_below_are_not_noted(salience: str) -> None:
    config = mlp_config(salience=salience, density=0.5)
    _, report = score_and_select(mlp(), config, pair_batches(1), pair_loss)
    assert report.notes == ()


def test_tied_head_is_scored_by_its_own_gradient() -> None:
    tied = llama(tie_word_embeddings=True).double()
    untied = llama().double()
    untied.load_state_dict(tied.state_dict())
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    config = SpeftConfig(density=0.05, target_modules=("lm_head",), mode="additive")
    batches = token_batches(2, causal=True)
    before = Snapshot(tied)
    patterns, _ = score_and_select(tied, config, batches)
    assert patterns == score_and_select(untied, config, batches)[0]
    before.assert_untouched()


def test_a_layer_used_twice_is_scored_by_the_sum() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.cell(torch.tanh(self.cell(x)))

    torch.manual_seed(0)
    model, x = Loop().double(), torch.randn(3, 6, dtype=torch.float64)

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().sum()

    gradient = summed_gradients(model, ["cell"], [x], loss_fn)["cell"]
    patterns, _ = score_and_select(model, SpeftConfig(0.2, "gradient"), [x], loss_fn)
    assert patterns["cell"].indices.tolist() == best([gradient.abs()], 0.2, "layer")[0]
