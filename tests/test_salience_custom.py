"""Callables as scores: what they come to, their names in configs, and what is refused."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scoring import chain, chain_batches
from tiny_models import Snapshot, mlp, mlp_config, pair_batches, pair_loss
from torch import Tensor

from speft_kernels.adapter import load_adapter, save_adapter
from speft_kernels.errors import ConfigError, SalienceError
from speft_kernels.model import SpeftConfig, score_and_select, sparsify
from speft_kernels.salience import custom, metric_named
from speft_kernels.salience.draw import sampling_keys


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


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """The named score of `examples/own_salience.py`, found as a command finds it."""
    monkeypatch.chdir(Path(__file__).resolve().parents[1])
    return lambda name: custom.import_score(f"examples.own_salience:{name}")


def test_the_examples_levelled_score_gives_shares_between_the_scopes(
    example: Callable[[str], Any],
) -> None:
    score = example("levelled_snip")
    generator = torch.Generator().manual_seed(0)
    layers = {"a": (100, 300, 1.0), "b": (200, 400, 100.0)}  # rows, columns, size of its scores
    keys, expected = [], []
    for name, (rows, columns, size) in layers.items():
        w, g = torch.randn(2, rows, columns, generator=generator)
        keys.append(sampling_keys(score(w, size * g), 0, name).flatten())
        mean = (size * w * g).abs().mean().item()
        expected.append(rows * columns * mean**0.5)
    drawn = torch.cat(keys).topk(1000).indices
    share = expected[1] / sum(expected)
    # Five standard deviations: one failure in 1.7 million for a seed.
    assert (
        abs((drawn >= 100 * 300).sum().item() - 1000 * share)
        <= 5 * (1000 * share * (1 - share)) ** 0.5
    )
    assert torch.equal(score(torch.zeros(2, 2), torch.ones(2, 2)), torch.zeros(2, 2))


def test_the_examples_one_sided_score_is_forces_where_positive(
    example: Callable[[str], Any],
) -> None:
    score = example("lowering")
    w, g = torch.randn(2, 20, 30, generator=torch.Generator().manual_seed(0))
    force = metric_named("force").score
    assert force is not None
    assert torch.equal(score(w, g), torch.where(force(w, g) > 0, force(w, g), 0.0))


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


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def score(w, g):\n    return g.abs()\n", None),
        ("def score(w, g)", "broken_score:score' cannot be imported: SyntaxError"),
        ("1 / 0", "broken_score:score' cannot be imported: ZeroDivisionError: division by zero"),
    ],
)
def test_a_module_in_the_working_folder(
    source: str, message: str | None, tmp_path: Path, monkeypatch: Any
) -> None:
    name = "working_score" if message is None else "broken_score"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    # As for an installed command: not even "", which stands for the working folder.
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    searched = list(sys.path)
    if message is None:
        score = custom.import_score("working_score:score")
        assert score(torch.ones(2), -torch.ones(2)).tolist() == [1, 1]
    else:
        with pytest.raises(ConfigError, match=message):
            custom.import_score("broken_score:score")
    assert sys.path == searched


@pytest.mark.parametrize("salience", ["math:", ":pi", "a b:c", "math:pi()", "m:f:g", "../x:f"])
def test_names_of_the_wrong_form(salience: str) -> None:
    with pytest.raises(ConfigError, match="not the name of a callable"):
        SpeftConfig(salience=salience)


@pytest.mark.parametrize("salience", [3, b"snip", "gradeint"])
def test_other_things_are_no_metric(salience: Any) -> None:
    with pytest.raises(ConfigError, match="unknown salience metric"):
        SpeftConfig(salience=salience)
