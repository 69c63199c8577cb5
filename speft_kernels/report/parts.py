"""Parts that the page of a run and that of a study share."""

from __future__ import annotations

import json
from collections.abc import Mapping

from .masks import Masks
from .page import Cell, Column, Html, preformatted, table
from .units import cell, share

_POINTS = 400


def pretty(content: object) -> Html:
    """Plain data as indented JSON."""
    return preformatted(json.dumps(content, indent=2, ensure_ascii=False))


def thinned(
    x: list[float], y: list[float], points: int = _POINTS
) -> tuple[list[float], list[float]]:
    """At most `points` means of neighbours: a curve of a million steps is drawn as it looks."""
    size = -(-len(x) // points)
    if size <= 1:
        return x, y
    starts = range(0, len(x), size)
    chunks = [(x[i : i + size], y[i : i + size]) for i in starts]
    return [sum(a) / len(a) for a, _ in chunks], [sum(b) / len(b) for _, b in chunks]


def smoothed(values: list[float], span: int) -> list[float]:
    """The mean of up to `span` values on either side of each."""
    total = [0.0]
    for value in values:
        total.append(total[-1] + value)
    ends = [(max(0, i - span), min(len(values), i + span + 1)) for i in range(len(values))]
    return [(total[end] - total[start]) / (end - start) for start, end in ends]


def facts(rows: Mapping[str, Cell], caption: str) -> Html:
    """A table of a name and a value a row."""
    columns = [Column("what"), Column("value")]
    return table(columns, [(Cell(k), v) for k, v in rows.items()], caption, sortable=False)


def mask_table(masks: Masks) -> Html:
    """Each layer's share of the mask."""
    columns = [
        Column("layer"),
        Column("shape"),
        Column("block"),
        *(
            Column(title, numeric=True)
            for title in (
                "trained",
                "density",
                "used rows",
                "of rows",
                "used columns",
                "of columns",
            )
        ),
    ]
    rows = []
    for name, pattern in masks.items():
        used = pattern.used_rows.numel(), pattern.used_cols.numel()
        of_rows, of_columns = (
            u / s if s else 0.0 for u, s in zip(used, pattern.shape, strict=True)
        )
        rows.append(
            (
                Cell(name),
                Cell(" x ".join(map(str, pattern.shape))),
                Cell("x".join(map(str, pattern.block_shape))),
                cell(pattern.nnz),
                share(pattern.density),
                *(cell(used[0]), cell(of_rows, ".1%"), cell(used[1]), cell(of_columns, ".1%")),
            )
        )
    return table(columns, rows, "Trained entries by layer")
