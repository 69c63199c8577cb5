"""Results as a table of text."""

from __future__ import annotations

from collections.abc import Iterable

from .harness import Result, Side, Timing
from .machine import Machine, light

_HEADER = f"{'side':26} {'ms':>9} {'first':>9} {'GB/s':>7} {'GFLOP/s':>8} {'light':>6}"


def heading(machine: Machine) -> str:
    """The machine, its speed of light, and how to read the figures."""
    speed = light()
    return (
        f"{machine}\n"
        f"speed of light, measured: {speed.bandwidth / 1e9:.1f} GB/s read from memory, "
        f"{speed.rate / 1e9:.0f} GFLOP/s float32\n"
        "medians of interleaved rounds; only ratios of sides in the same rounds mean anything\n"
        "behind a ratio: [lower, upper quartile] of those of the rounds"
    )


def describe(result: Result) -> str:
    """One case: a line for each side, then each ratio with its goal."""
    case = result.case
    memory = any(side.saved is not None for side in case.sides)
    trained = any(side.trained is not None for side in case.sides)
    header = _HEADER + (f" {'saved':>6}" if memory else "") + (f" {'trained':>11}" * trained)
    lines = [f"{case.operation}: {result.name}", f"  {header}"]
    for side in case.sides:
        cells = _timed(side, result.timings[side.name])
        if memory:
            cells += f" {_percent(None if side.saved is None else side.saved.share):>6}"
        if trained:
            cells += f" {'' if side.trained is None else format(side.trained, ','):>11}"
        lines.append(f"  {cells}".rstrip())
    return "\n".join([*lines, *(f"  {verdict}" for verdict in result.verdicts())])


def goals(results: Iterable[Result]) -> str:
    """All ratios that have a goal, as a table; empty where none has one."""
    lines = []
    for result in results:
        for verdict in result.verdicts():
            if verdict.at_most is None:
                continue
            spread = "" if verdict.quartiles is None else "{:.3f}-{:.3f}".format(*verdict.quartiles)
            figures = f"{verdict.ratio:8.3f} {spread:>13} {verdict.at_most:7g}"
            what = f"{result.case.operation}, {result.name}: {verdict.ours} / {verdict.peer}"
            lines.append(f"  {figures} {'met' if verdict.met else 'MISSED':6}  {what}")
    if not lines:
        return ""
    missed = sum(" MISSED " in line for line in lines)
    header = f"  {'measured':>8} {'quartiles':>13} {'at most':>7} {'goal':6}  what"
    return "\n".join([f"goals: {len(lines) - missed} met, {missed} missed", header, *lines])


def _timed(side: Side, timing: Timing) -> str:
    """Rates count what a side cannot do without, not what it does besides."""
    cells = f"{side.name:26} {timing.median * 1e3:9.3f} {timing.first * 1e3:9.3f}"
    if side.work is None or timing.light is None:
        return f"{cells} {'':7} {'':8} {'':6}"
    bytes_rate = side.work.total_bytes / timing.median / 1e9
    rate = side.work.operations / timing.median / 1e9
    share = _percent(timing.light / timing.median)
    return f"{cells} {bytes_rate:7.1f} {rate:8.1f} {share:>6}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"
