"""The tables of a study's page."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Sequence

from ..study.rows import COLUMNS, Row
from . import figures
from .aggregate import Rate, Summary, formatted, score, seeds_of, unit
from .page import Cell, Column, Html, code, details, figure, section, table
from .units import NOTHING, cell, memory, number, seconds, share


def result_table(summary: Summary) -> Html:
    columns, rows = _results(summary)
    caption = "Mean ± standard deviation of the score over seeds; the best of each column is marked"
    return table(columns, rows, caption)


def markdown(summary: Summary) -> str:
    """The table of results for a document, the best of each column in bold."""
    columns, rows = _results(summary)
    lines = [
        [column.title for column in columns],
        ["---:" if column.numeric else "---" for column in columns],
        *(
            [f"**{found.text}**" if found.marked else str(found.text) for found in row]
            for row in rows
        ),
    ]
    return "".join(f"| {' | '.join(map(_markdown_cell, line))} |\n" for line in lines)


def _markdown_cell(text: str) -> str:
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").split())


def _results(summary: Summary) -> tuple[list[Column], list[list[Cell]]]:
    """A row a method: its mean score on each task, the best of each marked."""
    average = bool(summary.averages) and len(summary.tasks) > 1
    columns = [Column("method"), Column("trained", True)]
    columns += [Column(f"{t} ({unit(summary.metrics[t])})", True) for t in summary.tasks]
    columns += [*([Column("average", True)] if average else []), Column("seeds", True)]
    rows = []
    for name in summary.names:
        cells = [summary.cells.get((task, name)) for task in summary.tasks]
        present = [found for found in cells if found is not None]
        if not present:
            continue
        line = [Cell(name), share(statistics.fmean(found.density for found in present))]
        line += [
            Cell(NOTHING) if found is None else Cell(score(found, summary), found.mean, found.best)
            for found in cells
        ]
        if average:
            value = summary.averages.get(name)
            metric = summary.metrics[summary.tasks[0]]
            text = NOTHING if value is None else formatted(value, metric)
            line.append(Cell(text, value, name in summary.best_averages))
        line.append(Cell(seeds_of(present), min(found.n for found in present)))
        rows.append(line)
    return columns, rows


def rate_table(summary: Summary) -> Html:
    """A row a task and method: the mean validation of each rate, the chosen one marked."""
    rates = sorted({found.rate for group in summary.rates.values() for found in group})
    repeated = Counter(rate.lr for rate in rates)
    columns = [Column("task"), Column("method")]
    columns += [Column(_rate(rate, repeated[rate.lr] > 1), True) for rate in rates]
    columns.append(Column("compared on seeds"))
    rows = []
    for (task, name), group in summary.rates.items():
        by_rate = {found.rate: found for found in group}
        line = [Cell(task), Cell(name)]
        for rate in rates:
            found = by_rate.get(rate)
            if found is None:
                line.append(Cell(NOTHING))
            elif found.validation is None:
                line.append(Cell("not compared", marked=found.chosen))
            else:
                text = formatted(found.validation, summary.metrics[task])
                line.append(Cell(text, found.validation, found.chosen))
        rows.append([*line, Cell(" ".join(map(str, group[0].seeds)))])
    return table(columns, rows, "Mean validation by learning rate; the chosen rate is marked")


def _rate(rate: Rate, with_head: bool) -> str:
    return f"{rate.lr:g} (head {rate.head_lr:g})" if with_head else f"{rate.lr:g}"


def cost_section(summary: Summary) -> Html:
    """Time and memory of each method at its chosen rates, over all tasks."""
    shares: dict[str, float] = {}
    peaks: dict[str, float] = {}
    rows = []
    for name in summary.names:
        runs = [r for (_, n), found in summary.cells.items() if n == name for r in found.rows]
        if not runs:
            continue
        scored = _known(runs, "salience_seconds", "mask_seconds")
        trained = _known(runs, "train_seconds")
        used, scoring = (
            _known(runs, "peak_memory_bytes"),
            _known(runs, "salience_peak_memory_bytes"),
        )
        if scored and trained and statistics.median(trained) > 0:
            ratio = number(100 * statistics.median(scored) / statistics.median(trained))
            shares |= {} if ratio is None else {name: ratio}
        if used:
            peaks[name] = max(used) / 2**30
        steps = _known(runs, "step_ms_median")
        rows.append(
            (
                Cell(name),
                cell(_median(steps), ",.1f"),
                seconds(_median(trained)),
                seconds(_median(scored)),
                cell(shares.get(name), ".2f"),
                memory(max(used, default=None)),
                memory(max(scoring, default=None)),
                cell(len(runs)),
            )
        )
    titles = ("step, ms", "training", "scoring", "scoring / training, %", "peak memory")
    columns = [
        Column("method"),
        *(Column(title, True) for title in (*titles, "peak memory of scoring", "runs")),
    ]
    axes = [("scoring, % of the training time", shares), ("peak memory of training, GiB", peaks)]
    if not rows:
        return Html("")
    drawn = figures.bars("cost", "Scoring time and peak memory of each method", axes, summary.names)
    return section(
        "Cost",
        figure(
            drawn,
            "Scoring time, with that of moving the mask while training, as a share of the steps' "
            "(median), and peak memory (maximum).",
        ),
        table(columns, rows, "Medians over the runs at the chosen rates; memory is the maximum"),
    )


def _known(runs: Sequence[Row], *columns: str) -> list[float]:
    """The sums of the columns, where the first of them is a number.

    Nothing that was measured is near the bound.
    """
    found = ([number(getattr(run, column)) for column in columns] for run in runs)
    sums = (sum(value or 0 for value in values) for values in found if values[0] is not None)
    return [value for value in sums if 0 <= value < 1e18]


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


_TEXTS = frozenset({"id", "task", "name", "method", "salience", "scope", "dynamic", "metric"})
_TEXTS |= {"device", "processor", "commit", "inputs"}
_SHOWN = {
    "density": share,
    "salience_seconds": seconds,
    "train_seconds": seconds,
    "mask_seconds": seconds,
    "salience_peak_memory_bytes": memory,
    "peak_memory_bytes": memory,
    "validation": lambda value: cell(value, ".4f"),
    "score": lambda value: cell(value, ".4f"),
    "step_ms_median": lambda value: cell(value, ",.1f"),
    "lr": lambda value: cell(value, "g"),
    "head_lr": lambda value: cell(value, "g"),
    "seed": lambda value: cell(value, ".0f"),
}


def run_table(rows: Sequence[Row]) -> Html:
    """Every run with every column, but for `versions`, which `machines` shows."""
    names = [name for name in COLUMNS if name not in ("versions", "settings")]
    columns = [Column(name.replace("_", " "), name not in _TEXTS) for name in names]
    columns.append(Column("settings"))
    body = []
    for row in rows:
        line = [
            Cell(getattr(row, name))
            if name in _TEXTS
            else _SHOWN.get(name, cell)(getattr(row, name))
            for name in names
        ]
        body.append([*line, Cell(details("all", code(row.settings)))])
    return table(columns, body, "Every row of runs.csv")


def machines(rows: Sequence[Row]) -> Html:
    """The environments of the runs, one a row."""
    found = Counter((r.device, r.processor, r.threads, r.commit, r.versions) for r in rows)
    columns = [
        *(Column("device"), Column("processor"), Column("threads", True), Column("commit")),
        *(Column("versions"), Column("runs", True)),
    ]
    body = [
        (Cell(device), Cell(processor), cell(threads), Cell(commit), Cell(_versions(v)), cell(n))
        for (device, processor, threads, commit, v), n in found.items()
    ]
    return table(columns, body, "Environments of the runs")


def _versions(text: str) -> str:
    """Names and versions from the JSON object; text that is none as it is."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return ", ".join(f"{k} {v}" for k, v in found.items()) if isinstance(found, dict) else text
