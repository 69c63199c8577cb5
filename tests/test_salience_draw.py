"""Masks that are drawn: uniformly, and with chances in proportion to the scores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from scoring import chain, chain_batches
from tiny_models import pair_loss
from torch import Tensor

from speft_kernels.errors import ConfigError, SalienceError
from speft_kernels.model import SpeftConfig, score_and_select
from speft_kernels.salience.draw import sampling_keys, uniform


@pytest.fixture(params=["meta", torch.float64, torch.bfloat16], ids=str)
def default(request: pytest.FixtureRequest) -> Iterator[None]:
    """Torch's default device or dtype is another."""
    if request.param == "meta":
        with torch.device("meta"):
            yield
        return
    usual = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(usual)


# Uniformly


@pytest.mark.usefixtures("default")
def test_random_masks_are_known_whatever_torchs_defaults_are() -> None:
    found = uniform({"b": 400, "a": 20}, 0.01, "global", 3)
    assert {name: t.tolist() for name, t in found.items()} == {"a": [], "b": [49, 84, 182, 272]}
    assert uniform({"b": 400}, 0.01, "layer", 3)["b"].tolist() == [35, 40, 217, 272]
    assert uniform({"b": 12}, 0.5, "layer", 3)["b"].tolist() == [5, 6, 7, 8, 9, 10]


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("density", [0.001, 0.03, 0.26, 0.9])
def test_random_counts_are_exact_and_the_order_of_layers_is_nothing(
    scope: str, density: float
) -> None:
    places = {"b": 1000, "a": 37, "c": 5000}
    chosen = uniform(places, density, scope, 3)
    again = uniform(dict(reversed(places.items())), density, scope, 3)
    assert set(chosen) == set(places)
    assert all(torch.equal(chosen[name], again[name]) for name in places)
    for name, indices in chosen.items():
        assert torch.equal(indices, indices.unique())
        assert not len(indices) or (indices.min() >= 0 and indices.max() < places[name])
        if scope == "layer":
            assert len(indices) == max(1, round(density * places[name]))
    if scope == "global":
        assert sum(map(len, chosen.values())) == round(density * 6037)
    other = uniform(places, density, scope, 4)
    assert any(not torch.equal(chosen[name], other[name]) for name in places)


def test_random_layers_of_one_size_draw_on_their_own() -> None:
    chosen = uniform({"a": 1000, "b": 1000}, 0.1, "layer", 0)
    assert not torch.equal(chosen["a"], chosen["b"])


@pytest.mark.parametrize("density", [0.1, 0.5])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_random_is_uniform(density: float, scope: str) -> None:
    # Both ways of drawing. 2000 draws of 60 places: a place's count has a standard deviation below
    # sqrt(2000 / 4) = 22.4; five of them are exceeded by one in 1.7 million, of 120 counts here.
    counts = torch.zeros(60)
    for seed in range(2000):
        chosen = uniform({"a": 40, "b": 20}, density, scope, seed)
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
    other = replace(config, seed=6)
    assert patterns != score_and_select(chain(), other)[0]


# By the scores


def test_draws_have_chances_in_proportion_to_what_is_left() -> None:
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0])
    chances = (scores / scores.sum()).tolist()
    draws, seen = 4000, dict.fromkeys(combinations(range(5), 2), 0)
    for seed in range(draws):
        first, second = sampling_keys(scores, seed, "a").topk(2).indices.sort().values.tolist()
        seen[first, second] += 1
    for (i, j), count in seen.items():
        p, q = chances[i], chances[j]
        expected = p * q / (1 - p) + q * p / (1 - q)
        # Five standard deviations: one failure in 170,000 for the ten counts.
        assert abs(count - draws * expected) <= 5 * (draws * expected * (1 - expected)) ** 0.5


def test_keys_depend_on_seed_and_name_and_keep_the_dtype() -> None:
    scores = torch.rand(8, 5, dtype=torch.float64)
    keys = sampling_keys(scores, 3, "a")
    assert (keys.dtype, keys.shape) == (scores.dtype, scores.shape)
    assert torch.equal(keys, sampling_keys(scores, 3, "a"))
    assert not torch.equal(keys, sampling_keys(scores, 4, "a"))
    assert not torch.equal(keys, sampling_keys(scores, 3, "b"))
    assert torch.isfinite(sampling_keys(torch.full((10**6,), 1e28), 0, "a")).all()


def absolute(w: Tensor, g: Tensor) -> Tensor:
    return (w * g).abs()


SCORES = torch.rand(30, 40, generator=torch.Generator().manual_seed(0)) ** 4
USUAL = {columns: sampling_keys(SCORES, 7, "a", columns) for columns in (1.0, 0.3)}


@pytest.mark.usefixtures("default")
@pytest.mark.parametrize("columns", USUAL)
def test_keys_do_not_depend_on_torchs_defaults(columns: float) -> None:
    assert torch.equal(sampling_keys(SCORES, 7, "a", columns), USUAL[columns])


@pytest.mark.parametrize("salience", ["magnitude", "snip", "fisher", "synflow", absolute])
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("block_shape", [(1, 1), (2, 5)])
def test_sampled_masks(salience: Any, scope: str, block_shape: tuple[int, int]) -> None:
    settings = {"density": 0.2, "salience": salience, "scope": scope, "block_shape": block_shape}
    target = {"target_modules": ("0", "2")}

    def select(**other: Any) -> dict[str, list[int]]:
        config = SpeftConfig(**settings, **target, **other)
        patterns, _ = score_and_select(chain(), config, chain_batches(2), pair_loss)
        return {name: pattern.indices.tolist() for name, pattern in patterns.items()}

    drawn = select(selection="sample")
    assert drawn == select(selection="sample")
    assert drawn != select(selection="sample", seed=1)
    top = select()
    assert drawn != top
    blocks = 400 // (block_shape[0] * block_shape[1])
    assert sum(map(len, drawn.values())) == sum(map(len, top.values())) == round(0.2 * blocks)
    if scope == "layer":
        assert {name: len(drawn[name]) for name in drawn} == {n: len(top[n]) for n in top}


def test_sampling_lies_between_the_top_and_a_uniform_draw() -> None:
    """Of scores with a long tail it takes most of the highest, and not all."""
    scores = torch.linspace(1, 40, 1000).exp2()
    top = set(scores.topk(100).indices.tolist())
    drawn = set(sampling_keys(scores, 0, "a").topk(100).indices.tolist())
    assert 50 < len(top & drawn) < 100


@pytest.mark.parametrize("salience", ["force", "grasp"])
def test_signed_scores_are_no_chances(salience: str) -> None:
    with pytest.raises(ConfigError, match=f"salience '{salience}' are signed"):
        SpeftConfig(salience=salience, selection="sample")


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda w, g: w * g, "layer '0' has scores below zero"),
        (lambda w, g: (w * g).abs() / 0.0, "layer '[02]'.*not finite"),
    ],
)
def test_scores_that_cannot_be_drawn_by(score: Any, message: str) -> None:
    model = chain()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = SpeftConfig(0.2, score, selection="sample", target_modules=("0", "2"))
    with pytest.raises(SalienceError, match=message):
        score_and_select(model, config, chain_batches(2), pair_loss)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# From the columns that score highest


def test_draws_come_from_the_columns_whose_scores_sum_highest() -> None:
    scores = torch.rand(50, 40) + 0.01
    scores[:, ::4] += 1  # the ten columns to draw from
    scores[7, 1] = 40  # the highest score of all, in a column that is one of the others
    drawn = sampling_keys(scores, 0, "a", 0.25).view(-1).topk(100).indices
    assert set((drawn % 40).tolist()) <= set(range(0, 40, 4))
    keys = sampling_keys(scores, 0, "a")
    assert torch.equal(sampling_keys(scores, 0, "a", 0.25)[:, ::4], keys[:, ::4])
    assert torch.equal(sampling_keys(scores, 0, "a", 1.0), keys)


def test_the_first_of_equal_columns_count_and_one_at_least() -> None:
    drawn = sampling_keys(torch.ones(3, 8), 0, "a", 0.25)
    assert (drawn > 0).any(0).tolist() == [True] * 2 + [False] * 6
    assert (sampling_keys(torch.ones(3, 8), 0, "a", 0.01) > 0).any(0).sum() == 1


@pytest.mark.parametrize("place", [(0, 0), (2, 3)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_score_does_not_hide_in_a_column_that_is_left_out(
    place: tuple[int, int], bad: float
) -> None:
    scores = torch.ones(3, 4)
    scores[:, 0] = 0
    scores[place] = bad
    assert not torch.isfinite(sampling_keys(scores, 0, "a", 0.5)).all()


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize(("density", "columns"), [(0.1, 6), (0.7, 21)])
def test_sampled_masks_use_as_many_columns_as_they_may(
    scope: str, density: float, columns: int
) -> None:
    """2 of 10 columns and 4 of 20, and more where the density asks for more."""
    config = SpeftConfig(
        density, "magnitude", scope, "sample", sample_columns=0.2, target_modules=("0", "2")
    )
    patterns, _ = score_and_select(chain(), config)
    used = sum(len((p.entry_indices % p.shape[1]).unique()) for p in patterns.values())
    assert sum(p.nnz for p in patterns.values()) == round(density * 400)
    assert used == columns


def test_columns_suffice_where_their_share_of_the_entries_is_no_whole_number() -> None:
    """0.72 of 10 and 20 columns are 7.2 and 14.4: with fewer, entries of no chance would train."""
    config = SpeftConfig(
        0.72, "magnitude", "layer", "sample", sample_columns=0.2, target_modules=("0", "2")
    )
    patterns, _ = score_and_select(chain(), config)
    used = [len((p.entry_indices % p.shape[1]).unique()) for p in patterns.values()]
    assert used == [8, 15]


def test_defaults_draw_by_snip_and_a_named_salience_takes_the_top() -> None:
    drawn, named = SpeftConfig(), SpeftConfig(salience="grasp")
    assert (drawn.salience, drawn.selection) == ("snip", "sample")
    assert SpeftConfig(selection="top") == SpeftConfig(salience="snip")
    assert (named.salience, named.selection) == ("grasp", "top")
    assert SpeftConfig.from_dict(drawn.to_dict()) == drawn


@pytest.mark.parametrize("columns", [0, -0.5, 1.01, float("nan"), "half", True])
def test_a_share_of_columns_that_is_none(columns: Any) -> None:
    with pytest.raises(ConfigError, match="sample_columns must"):
        SpeftConfig(sample_columns=columns)
