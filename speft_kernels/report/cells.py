"""Figures of coloured cells: the overlap of masks, and where in a model they lie."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .figures import WIDTH
from .masks import Grid
from .page import Html
from .svg import TEXT, draw, label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def matrix(
    key: str, title: str, names: Sequence[str], values: Sequence[Sequence[float | None]]
) -> Html:
    """Shares between 0 and 1 as a square of coloured cells with their percentages."""
    side = 1.0 + 0.5 * len(names)
    longest = max(len(label(name)) for name in names)

    def fill(figure: Figure) -> None:
        axes = figure.add_subplot()
        _cells(axes, values, 1.0)
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                if value is not None:
                    ink = "white" if value < 0.6 else "black"
                    text = f"{100 * value:.0f}" if value >= 0.0995 else f"{100 * value:.1f}"
                    axes.text(
                        column + 0.5,
                        row + 0.5,
                        text,
                        color=ink,
                        ha="center",
                        va="center",
                        fontsize=9,
                    )
        axes.set_aspect("equal")
        _ticks(axes, names, names)

    size = (min(WIDTH, side + 0.16 * longest), side + 0.06 * longest)
    return draw(key, title, size, fill)


def heat_maps(key: str, title: str, grids: Mapping[str, Grid]) -> Html:
    """Where masks lie: a panel a mask, layer numbers down, projections across, one scale."""
    first = next(iter(grids.values()))
    top = max((value for grid in grids.values() for value in grid.density.values()), default=0.0)
    wide = max(len(grid.columns) for grid in grids.values())
    tall = max(len(grid.rows) for grid in grids.values())
    columns = min(len(grids), 3 if wide <= 8 else 1)
    rows = math.ceil(len(grids) / columns)
    width = WIDTH if columns > 1 or wide > 8 else min(WIDTH, 3.6 + 0.45 * len(first.columns))

    def fill(figure: Figure) -> None:
        shared = all(grid.columns == first.columns for grid in grids.values())
        axes_of = list(figure.subplots(rows, columns, squeeze=False, sharex=shared).flat)
        image: Any = None
        for axes, (name, grid) in zip(axes_of, grids.items(), strict=False):
            image = _cells(axes, _values(grid), 100 * top)
            _ticks(axes, [_row(row) for row in grid.rows], grid.columns)
            axes.set_title(label(name))
        for number in range(len(grids), rows * columns):
            axes_of[number].set_axis_off()
            if shared:  # the panel above is the last of its column
                axes_of[number - columns].tick_params(labelbottom=True)
        bar = figure.colorbar(image, ax=axes_of, shrink=0.9, fraction=0.04, pad=0.02)
        bar.outline.set_visible(False)
        bar.set_label("trained share, %")

    # The names of the projections are below the last panel of each column.
    named = 1 if len(grids) % columns == 0 else 2
    height = 0.4 + 1.2 * named + rows * (0.5 + 0.22 * max(tall, 4))
    return draw(key, title, (width, height), fill)


def _values(grid: Grid) -> list[list[float | None]]:
    return [
        [
            None if (d := grid.density.get((row, column))) is None else 100 * d
            for column in grid.columns
        ]
        for row in grid.rows
    ]


def _row(row: int | None) -> str:
    return "other" if row is None else str(row)


def _cells(axes: Axes, values: Sequence[Sequence[float | None]], top: float) -> Any:
    import numpy as np
    from matplotlib import colormaps

    data = np.ma.masked_invalid([[math.nan if v is None else v for v in line] for line in values])
    # Fewer colours than matplotlib's limit of 50: it would draw the scale as pixels.
    image = axes.pcolormesh(
        data,
        cmap=colormaps["viridis"].resampled(40),
        vmin=0.0,
        vmax=top or 1.0,
        edgecolors=TEXT,
        linewidth=0.3,
    )
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return image


def _ticks(axes: Axes, down: Sequence[str], across: Sequence[str]) -> None:
    axes.set_xticks(
        [i + 0.5 for i in range(len(across))],
        [label(name) for name in across],
        rotation=40,
        ha="right",
        rotation_mode="anchor",
    )
    axes.set_yticks([i + 0.5 for i in range(len(down))], [label(name) for name in down])
