"""Statistics of a study's rows: the learning rate each method gets, and what it then scores.

A method's rate on a task is the one with the best mean validation over seeds; among equals the
smallest. A rate at which the search diverged is out of the choice, here as in the study. The others
are compared on the same seeds: those that all of them, of that method and task, were run with.
Where no seed is common to all, the one that most rates have decides (among equals the smallest),
and the rates without it are out of the choice. What a method scores is then taken over all seeds at
its rate, so a study may run several rates with one seed and the best with more.

Everything here is a function of the rows; what cannot be used is told in `Summary.problems`.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..study.rows import Row

_SHARES = frozenset({"accuracy", "f1", "matthews"})
# Densities of one method are the same budget within this factor: rounding and seeds move them less.
_SAME_DENSITY = 1.25


class Rate(NamedTuple):
    """Learning rate of what is adapted, and of the head."""

    lr: float
    head_lr: float


@dataclass(frozen=True)
class RateResult:
    """`validation` is the mean over `seeds`, the compared ones; None: out of the choice."""

    rate: Rate
    validation: float | None
    seeds: tuple[int, ...]
    chosen: bool


@dataclass(frozen=True)
class Cell:
    """A method on a task, at its chosen rate: `rows` are sorted by seed, one a seed.

    `mean` and `deviation` (n - 1 in the denominator, None for one seed) are of the score.
    """

    task: str
    name: str
    rate: Rate
    rows: tuple[Row, ...]
    mean: float
    deviation: float | None
    best: bool = False

    @property
    def n(self) -> int:
        return len(self.rows)

    @property
    def density(self) -> float:
        return statistics.fmean(row.density for row in self.rows)


@dataclass(frozen=True)
class Summary:
    """`tasks` and `names` are in the order in which the rows name them.

    `averages` has a name for each method with a score on every task, where all tasks report in the
    same direction; `best_averages` are the names with the best of them.
    """

    tasks: tuple[str, ...]
    names: tuple[str, ...]
    metrics: dict[str, str]
    cells: dict[tuple[str, str], Cell]
    rates: dict[tuple[str, str], tuple[RateResult, ...]]
    averages: dict[str, float]
    best_averages: frozenset[str]
    problems: tuple[str, ...]


def summarise(rows: Sequence[Row], diverged: Collection[tuple[str, str, float]] = ()) -> Summary:
    """Choose each method's rate and average its scores; see the module's docstring.

    Args:
        diverged: task, name and learning rate of what is out of the choice, see `diverged_rates`.
    """
    problems: list[str] = []
    tasks = tuple(dict.fromkeys(row.task for row in rows))
    first = {row.task: row for row in reversed(rows)}
    metrics = {task: first[task].metric for task in tasks}
    higher = {task: first[task].higher_is_better for task in tasks}
    named = labels(rows)
    names = tuple(dict.fromkeys(named))
    groups: dict[tuple[str, str], dict[Rate, dict[int, Row]]] = {}
    for row, label in zip(rows, named, strict=True):
        fault = _fault(row, metrics[row.task])
        if fault:
            problems.append(f"run {row.id} is left out of the statistics: {fault}")
            continue
        seeds = groups.setdefault((row.task, label), {}).setdefault(_rate(row), {})
        if row.seed in seeds:
            problems.append(
                f"run {row.id} repeats run {seeds[row.seed].id} (task, method, rates and seed are "
                "the same); the later row counts"
            )
        seeds[row.seed] = row
    cells: dict[tuple[str, str], Cell] = {}
    rates: dict[tuple[str, str], tuple[RateResult, ...]] = {}
    for (task, name), found in groups.items():
        out = {
            rate
            for rate, seeds in found.items()
            if any((task, row.name, row.lr) in diverged for row in seeds.values())
        }
        rates[task, name] = compare_rates(found, out, higher=higher[task])
        chosen = next((result.rate for result in rates[task, name] if result.chosen), None)
        if chosen is None:
            problems.append(
                f"{name} on {task} has no rate: of each the search diverged, or no validation is a "
                "number"
            )
            continue
        cells[task, name] = _cell(task, name, chosen, found[chosen])
    cells = _marked(cells, higher)
    averages = _averages(cells, names, metrics, higher)
    top = _best(averages.values(), all(higher.values()))
    best = frozenset(name for name, value in averages.items() if value == top)
    return Summary(tasks, names, metrics, cells, rates, averages, best, tuple(problems))


def labels(rows: Sequence[Row]) -> list[str]:
    """The method's name of each row, with the density where the study has several of that name."""
    seen: dict[str, list[float]] = {}
    for row in rows:
        seen.setdefault(row.name, []).append(row.density)
    clusters = {name: density_groups(found) for name, found in seen.items()}
    return [
        row.name
        if len(set(clusters[row.name].values())) < 2
        else f"{row.name}, {clusters[row.name].get(row.density, math.nan):.2%}"
        for row in rows
    ]


def density_groups(densities: Iterable[float]) -> dict[float, float]:
    """For each density the smallest of those that count as the same budget."""
    groups: dict[float, float] = {}
    start: float | None = None
    for density in sorted({density for density in densities if _is_usable(density)}):
        if start is None or density > start * _SAME_DENSITY:
            start = density
        groups[density] = start
    return groups


def compare_rates(
    found: dict[Rate, dict[int, Row]], out: Collection[Rate], *, higher: bool
) -> tuple[RateResult, ...]:
    """The rates of one method and task, in ascending order, at most one of them chosen.

    Args:
        found: the rows of each rate by seed.
        out: the rates that are out of the choice.
        higher: whether the higher validation is the better one.
    """
    rivals = [set(seeds) for rate, seeds in found.items() if rate not in out]
    shared = set.intersection(*rivals) if rivals else set()
    if rivals and not shared:
        counts = Counter(seed for seeds in rivals for seed in seeds)
        shared = {min(counts, key=lambda seed: (-counts[seed], seed))}
    compared = tuple(sorted(shared))
    means: dict[Rate, float | None] = {}
    for rate in sorted(found):
        validations = [found[rate][seed].validation for seed in compared if seed in found[rate]]
        known = len(validations) == len(compared) and all(map(_is_usable, validations))
        means[rate] = statistics.mean(validations) if known and rate not in out else None
    best = _best([mean for mean in means.values() if mean is not None], higher)
    chosen = next((rate for rate, mean in means.items() if mean is not None and mean == best), None)
    if chosen is None and len(means) == len(rivals) == 1:
        chosen = next(iter(means))  # nothing to choose between, so no validation is needed
    return tuple(RateResult(rate, mean, compared, rate == chosen) for rate, mean in means.items())


def score(cell: Cell, summary: Summary) -> str:
    """Mean and deviation, "79.20 ± 0.41" for a share in percent; one seed has no deviation."""
    metric = summary.metrics[cell.task]
    text = formatted(cell.mean, metric)
    return text if cell.deviation is None else f"{text} ± {formatted(cell.deviation, metric)}"


def formatted(value: float, metric: str) -> str:
    return f"{100 * value:.2f}" if metric in _SHARES else f"{value:.4f}"


def unit(metric: str) -> str:
    return f"{metric}, %" if metric in _SHARES else metric


def seeds_of(cells: Sequence[Cell]) -> str:
    """How many seeds the cells have: "3", or "1-3"."""
    counts = sorted({cell.n for cell in cells})
    return "-".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))


def _fault(row: Row, metric: str) -> str:
    if row.metric != metric:
        return f"its metric is {row.metric}, that of its task {metric}"
    for what, value in (
        ("score", row.score),
        ("learning rate", row.lr),
        ("density", row.density),
    ):
        if not _is_usable(value):
            return f"its {what} is {value}"
    return ""


def _is_usable(value: float) -> bool:
    """Whether sums and axes can take it; nothing that was measured is near the bound."""
    return math.isfinite(value) and abs(value) < 1e12


def _rate(row: Row) -> Rate:
    return Rate(row.lr, row.head_lr if _is_usable(row.head_lr) else row.lr)


def _cell(task: str, name: str, rate: Rate, found: dict[int, Row]) -> Cell:
    rows = tuple(found[seed] for seed in sorted(found))
    scores = [row.score for row in rows]
    deviation = statistics.stdev(scores) if len(scores) > 1 else None
    return Cell(task, name, rate, rows, statistics.fmean(scores), deviation)


def _best(values: Iterable[float], higher: bool) -> float | None:
    return (max if higher else min)(values, default=None)


def _marked(
    cells: dict[tuple[str, str], Cell], higher: dict[str, bool]
) -> dict[tuple[str, str], Cell]:
    best = {
        task: _best([c.mean for c in cells.values() if c.task == task], higher[task])
        for task in higher
    }
    return {key: replace(c, best=c.mean == best[c.task]) for key, c in cells.items()}


def _averages(
    cells: dict[tuple[str, str], Cell],
    names: Sequence[str],
    metrics: dict[str, str],
    higher: dict[str, bool],
) -> dict[str, float]:
    kinds = {(higher[task], metric in _SHARES) for task, metric in metrics.items()}
    if len(kinds) != 1:
        return {}  # a mean of losses and shares says nothing
    return {
        name: statistics.fmean(cells[task, name].mean for task in metrics)
        for name in names
        if all((task, name) in cells for task in metrics)
    }
