"""Results as rows of a CSV file: one row for each side of each case on each machine and commit.

A row is named by all of `KEY`; measuring the same again replaces it where it stands, so that a
committed file changes in the rows that were measured and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..tables import read_table, write_table
from .harness import Result
from .machine import Machine


@dataclass(frozen=True)
class Record(Machine):
    """One side of one case. Times in milliseconds; `light_ms` is the speed of light's.

    `ratios` lists `peer=ratio`, the median of the rounds' ratios of the times, `lower_quartiles`
    and `upper_quartiles` those of the same ratios, `goals` lists `peer<=ratio`, all split by "; ";
    None, an empty field, is what was not counted. Rows from before there were quartiles have none.
    """

    operation: str
    case: str
    side: str
    role: str
    rounds: int
    calls: int
    median_ms: float
    first_ms: float
    light_ms: float | None
    bytes: int | None
    operations: int | None
    trained: int | None
    saved_bytes: int | None
    input_bytes: int | None
    saved_goal: float | None
    ratios: str
    goals: str
    lower_quartiles: str = ""
    upper_quartiles: str = ""

    def __post_init__(self) -> None:
        try:
            _ = self.limits, self.measured, self.quartiles
        except (ValueError, KeyError):
            raise ValueError(
                f"goals = {self.goals!r} must be 'peer<=ratio', and ratios = {self.ratios!r} and "
                "the quartiles 'peer=ratio', split by '; '"
            ) from None

    @property
    def key(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in KEY)

    @property
    def limits(self) -> dict[str, float]:
        """Peer's name -> the largest wanted ratio."""
        return _pairs(self.goals, "<=")

    @property
    def measured(self) -> dict[str, float]:
        """Peer's name -> the ratio found."""
        return _pairs(self.ratios, "=")

    @property
    def quartiles(self) -> dict[str, tuple[float, float]]:
        """Peer's name -> the lower and the upper quartile of the rounds' ratios."""
        upper = _pairs(self.upper_quartiles, "=")
        return {p: (low, upper[p]) for p, low in _pairs(self.lower_quartiles, "=").items()}


def _pairs(text: str, sign: str) -> dict[str, float]:
    pairs = [entry.rpartition(sign) for entry in text.split("; ") if entry]
    found = {peer: float(ratio) for peer, _, ratio in pairs}
    if not all(map(math.isfinite, found.values())):  # no axis could hold it
        raise ValueError
    return found


KEY = (
    *("processor", "cores", "threads", "python", "torch", "speft_kernels", "transformers", "peft"),
    *("commit", "operation", "case", "side"),
)


def records_of(result: Result, machine: Machine) -> list[Record]:
    """The rows of a result, one for each side."""
    rows = []
    for side in result.case.sides:
        timing = result.timings[side.name]
        verdicts = [v for v in result.verdicts() if v.ours == side.name]
        quartiles = [(v.peer, v.quartiles) for v in verdicts if v.quartiles is not None]
        rows.append(
            Record(
                **asdict(machine),
                operation=result.case.operation,
                case=result.name,
                side=side.name,
                role="ours" if side.ours else "peer",
                rounds=result.rounds,
                calls=result.case.calls,
                median_ms=_short(timing.median * 1e3),
                first_ms=_short(timing.first * 1e3),
                light_ms=None if timing.light is None else _short(timing.light * 1e3),
                bytes=None if side.work is None else side.work.total_bytes,
                operations=None if side.work is None else side.work.operations,
                trained=side.trained,
                saved_bytes=None if side.saved is None else side.saved.bytes,
                input_bytes=None if side.saved is None else side.saved.inputs,
                saved_goal=None if side.saved is None else side.saved.at_most,
                ratios=_listed((v.peer, v.ratio) for v in verdicts),
                goals="; ".join(f"{peer}<={ratio:g}" for peer, ratio in side.goals.items()),
                lower_quartiles=_listed((peer, lower) for peer, (lower, _) in quartiles),
                upper_quartiles=_listed((peer, upper) for peer, (_, upper) in quartiles),
            )
        )
    return rows


def _listed(ratios: Iterable[tuple[str, float]]) -> str:
    return "; ".join(f"{peer}={ratio:.6g}" for peer, ratio in ratios)


def _short(number: float) -> float:
    """Six digits: more than any timing holds, few enough to read."""
    return float(f"{number:.6g}")


def read_records(path: Path) -> list[Record]:
    """The rows of a file.

    Raises:
        DataError: the file is not such a table; the message names the line.
    """
    try:
        return read_table(path, Record)
    except DataError as error:
        raise DataError(
            f"{error}: no table of benchmark results; name another file, or move this one away"
        ) from error


def write_records(path: Path, rows: Iterable[Record]) -> list[Record]:
    """Add rows to a file, in the place of those with the same key; return all it then holds.

    The file is replaced in one step, and only after all of it could be read.

    Raises:
        DataError: the file holds something else.
        OutputError: its folder is missing, or nothing may be written there.
    """
    merged = {row.key: row for row in (read_records(path) if path.exists() else [])}
    merged.update((row.key, row) for row in rows)
    write_table(path, Record, merged.values())
    return list(merged.values())
