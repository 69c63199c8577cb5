"""The masks of a study: how much they share, and where each lies."""

from __future__ import annotations

from ..errors import ConfigError
from ..study.rows import Row
from . import cells
from .aggregate import Summary, density_groups
from .folder import RunFiles
from .masks import Masks, Overlap, grid_of, overlap
from .page import Cell, Column, Html, details, figure, join, notices, paragraph, section, table
from .units import cell, share


def masks_section(summary: Summary, files: RunFiles) -> Html:
    """For each task the masks of one seed, at each method's chosen rate, compared in pairs."""
    parts = [
        part for i, task in enumerate(summary.tasks) for part in _task(summary, task, files, i)
    ]
    title = "Where the masks lie"
    if not parts:
        text = "No run's folder with a sparse adapter is here, so nothing is said of the masks."
        return section(title, paragraph(text), files.missing("The masks"))
    note = paragraph(
        "Overlap (Jaccard) is the entries that both masks have, as a share of those that either "
        "has. Masks are compared within a task, a seed and a density. One that dynamic merge moved "
        "is not compared: what is drawn is its adapter, which holds a delta wherever any of its "
        "masks trained.",
        "quiet",
    )
    return section(title, note, *parts, files.missing("The masks"))


def _task(summary: Summary, task: str, files: RunFiles, number: int) -> list[Html]:
    seed, rows = _one_seed(summary, task)
    masks = {name: found for name, row in rows.items() if (found := files.masks(row))}
    if not masks:
        return []
    where = f"{task}, seed {seed}"
    parts = [Html("")]
    groups = density_groups(rows[name].density for name in masks)
    for place, start in enumerate(sorted(set(groups.values()))):
        names = [name for name in masks if groups[rows[name].density] == start]
        names = [name for name in names if rows[name].dynamic != "merge"]
        if len(names) > 1:
            key = f"overlap-{number}-{place}"
            parts.append(_compared(key, f"{where}, density {start:.3%}", names, masks))
    grids = {n: grid for n, found in masks.items() if (grid := grid_of(found)).is_drawable}
    if not grids:
        return [*parts, paragraph(f"The masks have too many layers to be drawn: {where}.")]
    drawn = cells.heat_maps(
        f"masks-{number}", f"Density of each mask by layer and projection: {where}", grids
    )
    return [*parts, figure(drawn, f"Trained share by layer (down) and projection: {where}.")]


def _one_seed(summary: Summary, task: str) -> tuple[int, dict[str, Row]]:
    """The seed that most methods have at their chosen rates, and their rows of it."""
    cells = {n: c for (where, n), c in summary.cells.items() if where == task}
    counts: dict[int, int] = {}
    for found in cells.values():
        for row in found.rows:
            sparse = row.method == "speft"  # only those have masks to compare
            counts[row.seed] = counts.get(row.seed, 0) + sparse
    seed = min(counts, key=lambda number: (-counts[number], number), default=0)
    rows = {n: row for n, c in cells.items() for row in c.rows if row.seed == seed}
    return seed, rows


def _compared(key: str, where: str, names: list[str], masks: dict[str, Masks]) -> Html:
    pairs: dict[tuple[str, str], Overlap] = {}
    problems = []
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            try:
                pairs[one, other] = overlap(masks[one], masks[other])
            except ConfigError as error:
                problems.append(f"{one} and {other} ({where}) cannot be compared: {error}")
    values: list[list[float | None]] = [
        [
            1.0
            if one == other
            else pair.jaccard
            if (pair := pairs.get((one, other)) or pairs.get((other, one)))
            else None
            for other in names
        ]
        for one in names
    ]
    drawn = cells.matrix(key, f"Overlap of the masks: {where}", names, values)
    titles = ("entries of first", "entries of second", "shared", "Jaccard", "share of first")
    columns = [
        Column("first"),
        Column("second"),
        *(Column(title, True) for title in (*titles, "share of second", "share by chance")),
    ]
    rows = [
        (
            Cell(one),
            Cell(other),
            *(cell(value) for value in (pair.first, pair.second, pair.shared)),
            *(share(value) for value in (pair.jaccard, pair.share)),
            share(pair.shared / pair.second if pair.second else 1.0),
            share(pair.expected_share),
        )
        for (one, other), pair in pairs.items()
    ]
    return join(
        notices(problems),
        figure(drawn, f"Overlap of the masks in percent (Jaccard): {where}."),
        details(f"Pairs of masks: {where}", table(columns, rows, f"Pairs of masks: {where}")),
    )
