"""Which runs of a study are due: the searches, and what their outcome asks for."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable, Mapping

from .config import Run, Study
from .rows import Row


def due(study: Study, finished: Mapping[str, Row], failed: Collection[str] = ()) -> list[Run]:
    """The runs that can begin now, in the order in which they should.

    Method by method as the study lists them: the search of each task, and the repeats as soon as
    the search has ended. So a study that is stopped early is complete for its first methods.
    A search that climbs asks for the middle rate and its neighbours, and then, as long as the best
    rate, or one within the study's slack of it, has a neighbour that was not tried, for that one.

    Args:
        finished: the rows there are, by id.
        failed: ids of runs that are not to be tried again now. A rate with one of them is out of
            the choice, as when it makes the loss diverge.
    """
    order = []
    for task, name in study.cells:
        rates = _climbed(study, task, name, finished, failed)
        search = study.search(task, name, rates)
        order += search
        if any(run.id not in finished and run.id not in failed for run in search):
            continue
        rows = _comparable(search, finished, failed)
        if rows:
            order += study.repeats(task, name, best_rate(rows))
    return [run for run in order if run.id not in finished and run.id not in failed]


def _climbed(
    study: Study, task: str, name: str, finished: Mapping[str, Row], failed: Collection[str]
) -> list[float]:
    """The rates that one cell's search asks for, given what has finished."""
    ordered = sorted(study.rates[name])
    if not study.climb:
        return list(study.rates[name])
    middle = (len(ordered) - 1) // 2
    asked = {middle - 1, middle, middle + 1} & set(range(len(ordered)))
    while True:
        search = study.search(task, name, [ordered[i] for i in sorted(asked)])
        if any(run.id not in finished and run.id not in failed for run in search):
            break
        rows = _comparable(search, finished, failed)
        # Where all diverged, only a lower rate may do.
        good = [ordered.index(lr) for lr in _good_rates(rows, study.slack)] or [min(asked)]
        further = {i + step for i in good for step in (-1, 1)} & set(range(len(ordered))) - asked
        if not further:
            break
        asked |= further
    return [ordered[i] for i in sorted(asked)]


def _comparable(
    search: Iterable[Run], finished: Mapping[str, Row], failed: Collection[str]
) -> list[Row]:
    """The rows of a search that has ended, without the rates at which a run diverged."""
    search = list(search)
    diverged = {run.lr for run in search if run.id in failed}
    return [finished[run.id] for run in search if run.lr not in diverged]


def best_rate(rows: Iterable[Row]) -> float:
    """The rate with the best mean validation; of equal ones the smallest.

    Args:
        rows: of one cell; every rate with the same seeds.
    """
    means = _means(rows)
    return max(means, key=means.__getitem__)


def _good_rates(rows: Iterable[Row], slack: float) -> list[float]:
    """The rates whose mean validation is at most `slack` worse than the best one's."""
    means = _means(rows)
    return [lr for lr, mean in means.items() if mean >= max(means.values()) - slack]


def _means(rows: Iterable[Row]) -> dict[float, float]:
    """Rate, rising -> its mean validation, so signed that higher is better."""
    by_rate: dict[float, list[float]] = {}
    for row in rows:
        value = row.validation if row.higher_is_better else -row.validation
        by_rate.setdefault(row.lr, []).append(value)
    return {lr: statistics.mean(by_rate[lr]) for lr in sorted(by_rate)}
