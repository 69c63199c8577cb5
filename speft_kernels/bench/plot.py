"""A figure of a table of results: how much of each peer's time our sides take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError
from ..files import replaced
from .harness import meets
from .records import Record

FORMATS = (".png", ".svg", ".pdf", ".jpg")
_COLOURS = {True: "#2a7f4f", False: "#c0392b", None: "#7f8c9b"}
_LABELS = {True: "goal met", False: "goal missed", None: "no goal"}


@dataclass(frozen=True)
class Bar:
    label: str
    ratio: float
    at_most: float | None

    @property
    def met(self) -> bool | None:
        return meets(self.ratio, self.at_most)


def bars_of(records: Sequence[Record]) -> list[Bar]:
    """A bar for each of our sides against each peer of the same case and run.

    Sides of different machines, versions or commits are never divided by each other. Where a case
    was measured in several, the rows that come last in the file count.
    """
    runs: dict[tuple[str, str], dict[str, Record]] = {}
    for record in records:
        sides = runs.setdefault((record.operation, record.case), {})
        if sides and next(iter(sides.values())).key[:-1] != record.key[:-1]:
            sides.clear()
        sides[record.side] = record
    bars = []
    for (operation, case), sides in runs.items():
        for ours in (side for side in sides.values() if side.role == "ours"):
            for peer in (side for side in sides.values() if side.role == "peer"):
                label = f"{operation}: {case}\n{ours.side} / {peer.side}"
                if peer.side in ours.measured:
                    ratio = ours.measured[peer.side]
                    bars.append(Bar(label, ratio, ours.limits.get(peer.side)))
    return bars


def check_format(path: Path) -> None:
    """Raises ConfigError for an ending that names no format of `plot`."""
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"--plot {path}: the file must end in one of {', '.join(FORMATS)}")


def plot(records: Sequence[Record], path: Path) -> None:
    """Write the figure; the ending of `path` names the format, one of `FORMATS`.

    Raises:
        ConfigError: there is nothing to plot.
        OutputError: the file cannot be written; it is as it was.
        ModuleNotFoundError: matplotlib is not installed.
    """
    check_format(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    bars = bars_of(records)
    if not bars:
        raise ConfigError("nothing to plot: no case has a side of ours and a peer")
    figure = Figure(figsize=(10, 1.5 + 0.42 * len(bars)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = range(len(bars))
    axes.barh(places, [bar.ratio for bar in bars], color=[_COLOURS[bar.met] for bar in bars])
    for place, bar in zip(places, bars, strict=True):
        end = max(bar.ratio, bar.at_most or 0.0)
        axes.text(end, place, f" {bar.ratio:.3f}", va="center", fontsize=8)
        if bar.at_most is not None:
            axes.plot([bar.at_most] * 2, [place - 0.45, place + 0.45], color="black", lw=2)
    axes.axvline(1, color="black", lw=0.8, ls=":")
    # A case may be named by anybody, and a dollar begins a formula.
    axes.set_yticks(places, [bar.label for bar in bars], fontsize=7, parse_math=False)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(0, 1.1 * max(1.0, *(max(bar.ratio, bar.at_most or 0.0) for bar in bars)))
    axes.set_xlabel("time of ours / time of the peer (shorter is better; black: the goal, at most)")
    shown = [state for state in _COLOURS if any(bar.met is state for bar in bars)]
    handles = [Patch(color=_COLOURS[state], label=_LABELS[state]) for state in shown]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(shown), fontsize=8)
    with replaced(path) as temporary:
        figure.savefig(temporary, dpi=150, format=path.suffix[1:].lower())
