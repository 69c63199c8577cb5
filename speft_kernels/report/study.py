"""The page of a study: what its methods score, at which rates, where their masks lie, at what cost.

The statistics come from `runs.csv`. Masks and loss curves come from `runs/<id>`; where a folder is
missing or damaged they are left out, and the page says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import read_json
from ..study.folder import StudyFolder
from ..study.rows import Row
from . import figures
from .aggregate import Summary, density_groups, summarise
from .folder import Metrics, RunFiles, asked_for, diverged_rates, read_runs
from .page import Html, details, figure, notices, page, paragraph, section
from .parts import pretty, smoothed, thinned
from .study_masks import masks_section
from .study_tables import cost_section, machines, rate_table, result_table, run_table


def study_page(folder: Path) -> str:
    """The report of a study, finished or not.

    Raises:
        ConfigError: `study.json` is missing, or it, `runs.csv` or `failures.json` is damaged.
        ModuleNotFoundError: matplotlib is not installed.
    """
    places = StudyFolder(folder)
    study = read_json(places.study)
    rows = read_runs(places.rows)
    failures = read_json(places.failures) if places.failures.exists() else {}
    for row in rows:
        failures.pop(row.id, None)
    title = f"Study {study.get('name', folder.resolve().name)}"
    about = section("The study", details(places.study.name, pretty(study)))
    if not rows:
        lead = notices(["No run has finished: runs.csv is missing or has no rows."])
        return page(title, Html(lead + _unfinished(places, rows, failures)), about)
    current, others = asked_for(rows, study)
    summary = summarise(current, diverged_rates(current, study, failures))
    files = RunFiles(places.runs)
    curves = _curves(summary, files)
    masks = masks_section(summary, files)
    lead = Html(
        paragraph(_size(summary, current), "quiet")
        + notices([*_others(others), *summary.problems, *files.problems, *_mixed(current)])
        + _unfinished(places, rows, failures)
    )
    return page(
        title,
        lead,
        _results(summary),
        section("Learning rates", rate_table(summary)),
        masks,
        curves,
        cost_section(summary),
        section("All runs", run_table(rows), machines(rows)),
        about,
    )


def _size(summary: Summary, rows: Sequence[Row]) -> str:
    seeds = len({row.seed for row in rows})
    parts = ((len(rows), "run"), (len(summary.tasks), "task"), (len(summary.names), "method"))
    return ", ".join(f"{n} {word}{'s' * (n != 1)}" for n, word in (*parts, (seeds, "seed")))


def _others(ids: Sequence[str]) -> list[str]:
    if not ids:
        return []
    return [
        f"{len(ids)} runs are no longer of the grid in study.json; they are left out of everything "
        f"but the table of all runs: {', '.join(ids)}"
    ]


def _mixed(rows: Sequence[Row]) -> list[str]:
    """Times and memory of several machines or versions are not to be compared."""
    places = {(r.device, r.processor, r.threads, r.versions, r.commit) for r in rows}
    if len(places) < 2:
        return []
    return [
        f"The runs were made in {len(places)} different environments (device, processor, threads, "
        "versions or commit; see the table at the end): compare times and memory with care."
    ]


def _unfinished(places: StudyFolder, rows: Sequence[Row], failures: Mapping[str, Any]) -> Html:
    """The runs that failed and are not tried again, and those with a folder and no row yet."""
    lines = [f"run {id} failed: {why}" for id, why in failures.items()]
    try:
        found = {path.name for path in places.runs.iterdir() if path.is_dir()}
    except OSError:
        found = set()
    found -= {row.id for row in rows} | failures.keys()
    names = sorted(name for name in found if not name.startswith("."))
    if names:
        lines.append(f"{len(names)} with a folder and no row in runs.csv yet: {', '.join(names)}")
    return notices(lines)


def _results(summary: Summary) -> Html:
    return section(
        "Results",
        result_table(summary),
        paragraph(
            "Scores are on the reported data, at the learning rate whose mean validation is best. "
            "Validation is on data split off the training set, and rates are compared on the "
            "seeds that all of them have, without those at which the search diverged.",
            "quiet",
        ),
        _by_task(summary),
        _by_density(summary),
    )


def _by_task(summary: Summary) -> Html:
    if not summary.cells:
        return Html("")
    parts = []
    for metric in dict.fromkeys(summary.metrics.values()):
        tasks = [task for task in summary.tasks if summary.metrics[task] == metric]
        found = {
            name: [summary.cells.get((task, name)) for task in tasks] for name in summary.names
        }
        values = {
            name: [None if cell is None else (cell.mean, cell.deviation) for cell in cells]
            for name, cells in found.items()
        }
        parts.append(figures.Groups(metric, tasks, values))
    drawn = figures.grouped("scores", "Score of each method by task", parts, summary.names)
    return figure(drawn, "Mean score; the bars are one standard deviation over seeds each way.")


def _by_density(summary: Summary) -> Html:
    """Drawn where some kind of method was run at two densities."""
    parts = []
    kinds = _families(summary)
    # A family has the place, and so the look, of its first method.
    families = [kinds.get(name, name) for name in summary.names]
    families = [kind if kind not in families[:i] else "" for i, kind in enumerate(families)]
    several = False
    for task in summary.tasks:
        lines, levels = [], {}
        for family in filter(None, families):
            cells = [
                cell
                for (where, name), cell in summary.cells.items()
                if where == task and kinds[name] == family
            ]
            cells.sort(key=lambda cell: cell.density)
            points = [cell for cell in cells if cell.density > 0]
            several = several or len({cell.density for cell in points}) > 1
            if points:
                x, y = [cell.density for cell in points], [cell.mean for cell in points]
                spread = [cell.deviation for cell in points]
                lines.append(figures.Line(family, x, y, spread, points=True))
            elif cells:
                levels[family] = cells[-1].mean
        metric = summary.metrics[task]
        if lines:
            parts.append(figures.Panel(task, "trained share", metric, lines, True, levels))
    if not several:
        return Html("")
    drawn = figures.panels("density", "Score against the trained share", parts, families)
    return figure(drawn, "Score against the trained share of the adapted weights (dashed: none).")


def _families(summary: Summary) -> dict[str, str]:
    """What each method is apart from its density; two of one density are two families."""
    first = {name: cell.rows[0] for (_, name), cell in reversed(summary.cells.items())}
    kinds = {name: _kind(row) for name, row in first.items()}
    starts = density_groups(row.density for row in first.values())
    taken = Counter((kinds[name], starts[row.density]) for name, row in first.items())
    crowded = {kind for (kind, _), count in taken.items() if count > 1}
    alone = {kind for kind, count in Counter(kinds.values()).items() if count == 1}
    return {n: first[n].name if kind in crowded | alone else kind for n, kind in kinds.items()}


def _kind(row: Row) -> str:
    """What trains and how it was chosen; the rank of a low-rank method is its density."""
    return " ".join(filter(None, (row.method, row.salience, row.scope, row.dynamic)))


def _curves(summary: Summary, files: RunFiles) -> Html:
    parts = []
    for task in summary.tasks:
        lines = []
        for name in summary.names:
            cell = summary.cells.get((task, name))
            if cell is not None and (line := _mean_curve([files.metrics(r) for r in cell.rows])):
                lines.append(figures.Line(name, *line))
        if lines:
            parts.append(figures.Panel(task, "step", "loss", lines))
    if not parts:
        text = "No run's folder with a metrics.jsonl is here, so there are no loss curves."
        return section("Training loss", paragraph(text))
    drawn = figures.panels("loss", "Training loss by step and task", parts, summary.names)
    return section(
        "Training loss",
        figure(drawn, "Smoothed training loss at the chosen rate, mean over its seeds."),
        files.missing("The loss curves"),
    )


def _mean_curve(runs: Sequence[Metrics]) -> tuple[list[float], list[float]] | None:
    """The mean over runs where all of them have a value; of the first where they share no step."""
    curves = [curve for run in runs if (curve := run.curve("loss"))[0]]
    if not curves:
        return None
    curves = [thinned(x, smoothed(y, max(1, len(y) // 30)), 150) for x, y in curves]
    by_step = [dict(zip(x, y, strict=True)) for x, y in curves]
    common = sorted(set.intersection(*(set(values) for values in by_step)))
    if not common:
        return curves[0]
    return common, [sum(values[x] for values in by_step) / len(by_step) for x in common]
