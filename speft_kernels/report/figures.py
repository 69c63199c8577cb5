"""The figures of the reports as inline SVG; matplotlib is loaded when the first is drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .page import Html
from .svg import TEXT, draw, label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 11.0  # inches; 990 pixels in the page
# Middle tones, to be told apart by most eyes, on white and on black.
_COLOURS = (
    *("#2f7ebc", "#d9730d", "#2a9d62", "#c2568f", "#8a6fc9"),
    *("#b08900", "#3aa6b9", "#cf4b4b", "#7f8894", "#6b8e23"),
)
_MARKERS = "osD^vP*Xph"


@dataclass(frozen=True)
class Line:
    """Points joined by a line; `deviation` has an error bar for each or is empty."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    deviation: Sequence[float | None] = field(default=())
    points: bool = False
    faint: bool = False


@dataclass(frozen=True)
class Panel:
    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    log_x: bool = False
    levels: Mapping[str, float] = field(default_factory=dict)  # horizontal lines, by name


def look(index: int) -> dict[str, Any]:
    """Colour and marker of the method number `index`, the same in every figure of a page."""
    return {"color": _COLOURS[index % len(_COLOURS)], "marker": _MARKERS[index % len(_MARKERS)]}


def panels(key: str, title: str, parts: Sequence[Panel], names: Sequence[str]) -> Html:
    """Panels side by side, at most two in a row, with one legend.

    Args:
        names: all that may be drawn; a name's place decides its look.
    """
    columns = min(2, len(parts))
    rows = math.ceil(len(parts) / columns)
    used = [
        name
        for name in names
        if any(name in (*(line.name for line in part.lines), *part.levels) for part in parts)
    ]

    def fill(figure: Figure) -> None:
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes, part in zip(grid.flat, parts, strict=False):
            _panel(axes, part, names)
        for axes in grid.flat[len(parts) :]:
            axes.set_axis_off()
        if len(used) > 1:
            _legend(figure, used, names, any(line.points for p in parts for line in p.lines))

    height = 3.2 * rows + 0.3 * math.ceil(len(used) / 3) * (len(used) > 1)
    return draw(key, title, (WIDTH, height), fill)


def _panel(axes: Axes, part: Panel, names: Sequence[str]) -> None:
    for line in part.lines:
        style = look(names.index(line.name))
        if not line.points:
            axes.plot(line.x, line.y, color=style["color"], lw=1.4, alpha=0.5 if line.faint else 1)
        else:
            _points(axes, line.x, line.y, line.deviation, style, joined=len(line.x) > 1)
    for name, level in part.levels.items():
        axes.axhline(level, color=look(names.index(name))["color"], ls="--", lw=1.2)
    if part.log_x:
        _log_shares(axes, [x for line in part.lines for x in line.x])
    axes.set_title(label(part.title))
    axes.set_xlabel(label(part.x_label))
    axes.set_ylabel(label(part.y_label))


def _log_shares(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic x axis in percent, with as many labels as there is room for."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.set_xlim(min(values) / 1.6, max(values) * 1.6)
    wide = max(values) > 100 * min(values)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _points(
    axes: Axes,
    x: Sequence[float],
    y: Sequence[float],
    deviation: Sequence[float | None],
    style: dict[str, Any],
    *,
    joined: bool,
) -> None:
    bars = [value or 0.0 for value in deviation] if any(deviation) else None
    line = "-" if joined else "none"
    axes.errorbar(x, y, yerr=bars, ls=line, lw=1.2, ms=6, elinewidth=1.2, capsize=3, **style)


def _legend(figure: Figure, used: Sequence[str], names: Sequence[str], markers: bool) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for name in used:
        style = look(names.index(name))
        marker = style["marker"] if markers else "none"
        handles.append(Line2D([], [], color=style["color"], marker=marker, label=label(name)))
    figure.legend(handles=handles, loc="outside lower center", ncols=3)


@dataclass(frozen=True)
class Groups:
    """One panel of grouped points: `values[name]` has (mean, deviation) or None for each group."""

    y_label: str
    groups: Sequence[str]
    values: Mapping[str, Sequence[tuple[float, float | None] | None]]


def grouped(key: str, title: str, parts: Sequence[Groups], names: Sequence[str]) -> Html:
    """Points with error bars, grouped along the x axis; a panel below the other.

    Args:
        names: all that may be drawn; a name's place decides its look.
    """
    used = [name for name in names if any(any(part.values.get(name, ())) for part in parts)]

    def fill(figure: Figure) -> None:
        for axes, part in zip(
            figure.subplots(len(parts), 1, squeeze=False).flat, parts, strict=True
        ):
            drawn = [name for name in names if any(part.values.get(name, ()))]
            step = 0.8 / max(len(drawn), 1)
            for place, name in enumerate(drawn):
                points = [(i, v) for i, v in enumerate(part.values[name]) if v is not None]
                offset = (place - (len(drawn) - 1) / 2) * step
                _points(
                    axes,
                    [i + offset for i, _ in points],
                    [mean for _, (mean, _) in points],
                    [deviation for _, (_, deviation) in points],
                    look(names.index(name)),
                    joined=False,
                )
            for i in range(1, len(part.groups)):
                axes.axvline(i - 0.5, color=TEXT, alpha=0.25, lw=0.8)
            named = [label(group) for group in part.groups]
            axes.set_xticks(range(len(named)), named)
            if sum(map(len, named)) > 110:  # letters that fit side by side
                axes.tick_params(axis="x", labelrotation=20)
            axes.set_xlim(-0.5, len(part.groups) - 0.5)
            axes.grid(visible=False, axis="x")
            axes.set_ylabel(label(part.y_label))
        _legend(figure, used, names, markers=True)

    height = 3.4 * len(parts) + 0.3 * math.ceil(len(used) / 3)
    return draw(key, title, (WIDTH, height), fill)


def bars(
    key: str, title: str, parts: Sequence[tuple[str, Mapping[str, float]]], names: Sequence[str]
) -> Html:
    """Horizontal bars, one a name; `parts` are (label of the x axis, value by name).

    Args:
        names: all that may be drawn; a name's place decides its look.
    """
    used = [name for name in names if any(name in values for _, values in parts)]

    def fill(figure: Figure) -> None:
        axes_of = figure.subplots(1, len(parts), sharey=True, squeeze=False)[0]
        for axes, (x_label, values) in zip(axes_of, parts, strict=True):
            for place, name in enumerate(used):
                if name in values:
                    axes.barh(
                        place, values[name], color=look(names.index(name))["color"], height=0.7
                    )
                    axes.annotate(
                        f"{values[name]:.3g}",
                        (values[name], place),
                        xytext=(4, 0),
                        textcoords="offset points",
                        va="center",
                        fontsize=9,
                    )
            axes.set_yticks(range(len(used)), [label(name) for name in used])
            axes.set_ylim(len(used) - 0.4, -0.6)
            axes.set_xlim(0, 1.2 * max(values.values(), default=0.0) or 1.0)
            axes.set_xlabel(x_label)
            axes.grid(visible=False, axis="y")

    return draw(key, title, (WIDTH, 1.0 + 0.32 * len(used)), fill)
