"""What a run's or a study's folder holds, read as data of unknown origin.

Every error is a ConfigError that names the file, and its line where it has lines.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ..errors import ConfigError, DataError
from ..files import read_text
from ..finetune.folder import RunFolder
from ..study.config import Run
from ..study.rows import Row, read_rows
from .masks import Masks, read_masks
from .page import Html, notices
from .units import number

_T = TypeVar("_T")

# A run of a million steps needs a hundred megabytes.
_LARGEST_METRICS = 2**30


@dataclass(frozen=True)
class Metrics:
    """Entries of `metrics.jsonl`: steps with "loss" and "lr", evaluations with "eval"."""

    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]

    def curve(self, key: str) -> tuple[list[float], list[float]]:
        """The steps and the values of `key` there, where both are finite numbers."""
        pairs = [(number(entry.get("step")), number(entry.get(key))) for entry in self.steps]
        known = [(x, y) for x, y in pairs if x is not None and y is not None]
        return [x for x, _ in known], [y for _, y in known]


def read_metrics(path: Path) -> Metrics:
    """A run's `metrics.jsonl`; half a line at the end is one that is being written."""
    metrics = Metrics([], [])
    lines = read_text(path, _LARGEST_METRICS).split("\n")
    for at, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict):
                raise ValueError("not an object")
        except (ValueError, RecursionError) as error:
            if isinstance(error, json.JSONDecodeError) and at == len(lines):
                break
            raise ConfigError(f"{path}, line {at}: damaged: {error}") from error
        if number(entry.get("step")) is None:
            raise ConfigError(f"{path}, line {at}: damaged: it has no step that is a number")
        if "eval" not in entry:
            metrics.steps.append(entry)
        elif isinstance(entry["eval"], dict):
            metrics.evaluations.append(entry)
        else:
            raise ConfigError(f"{path}, line {at}: damaged: eval is no object")
    return metrics


def read_runs(path: Path) -> list[Row]:
    """The rows of a study's `runs.csv`, none where no run has finished."""
    try:
        return read_rows(path)
    except DataError as error:
        raise ConfigError(str(error)) from error


def asked_for(rows: Sequence[Row], study: Mapping[str, Any]) -> tuple[list[Row], list[str]]:
    """The rows of the grid that `study.json` describes, in its order, and the ids of the others.

    A study whose settings were changed keeps the rows of before: they have other ids, and would
    count twice or be averaged with what they cannot be compared with. A `study.json` that describes
    no grid, or another one than all of the rows are of, leaves every row in.
    """
    found = {row.id for row in rows if _is_asked_for(row, study)}
    kept = [row for row in rows if row.id in found or not found]
    tasks, methods = (_places(study.get(key)) for key in ("tasks", "methods"))
    last = len(tasks) + len(methods)
    kept.sort(key=lambda row: (tasks.get(row.task, last), methods.get(row.name, last)))
    return kept, [row.id for row in rows if found and row.id not in found]


def _is_asked_for(row: Row, study: Mapping[str, Any]) -> bool:
    try:
        if row.lr not in study["lr"][row.name] or row.seed not in study["seeds"][row.name]:
            return False
        return _id(study, row.task, row.name, row.lr, row.seed) == row.id
    except (KeyError, TypeError, ValueError):
        return False


def _id(study: Mapping[str, Any], task: str, name: str, lr: float, seed: int) -> str:
    settings = {**study["tasks"][task], **study["methods"][name], "lr": lr, "seed": seed}
    return Run(task, name, lr, seed, settings).id


def diverged_rates(
    rows: Iterable[Row], study: Mapping[str, Any], failed: Collection[str]
) -> set[tuple[str, str, float]]:
    """Task, method and rate of the rows at whose rate a run of the search failed: out of the choice
    when the study made it, whatever its other seeds gave. A failed repeat says nothing of its rate.

    Args:
        study: as in `study.json`.
        failed: ids of the runs that failed and have no row.
    """
    rates = {(row.task, row.name, row.lr) for row in rows} if failed else set()
    return {rate for rate in rates if any(id in failed for id in _search(study, *rate))}


def _search(study: Mapping[str, Any], task: str, name: str, lr: float) -> list[str]:
    try:
        seeds = study["seeds"][name][: study["search_seeds"]]
        return [_id(study, task, name, lr, seed) for seed in seeds]
    except (KeyError, TypeError, ValueError):
        return []


def _places(names: object) -> dict[str, int]:
    return {name: i for i, name in enumerate(names)} if isinstance(names, dict) else {}


@dataclass
class RunFiles:
    """Reads from the folders of a study's runs; what cannot be read is told once in `problems`."""

    folder: Path
    problems: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)

    def metrics(self, row: Row) -> Metrics:
        return self._read(row, lambda run: read_metrics(RunFolder(run).metrics), Metrics([], []))

    def masks(self, row: Row) -> Masks:
        return self._read(row, lambda run: read_masks(RunFolder(run).adapter), {})

    def _read(self, row: Row, read: Any, nothing: _T) -> _T:
        try:
            run = _inside(self.folder, row.id)
            if not run.exists():
                if row.id not in self.absent:
                    self.absent.append(row.id)
                return nothing
            found: _T = read(run)
            return found
        except (ConfigError, OSError) as error:  # OSError: of a name too long for any folder
            reason = getattr(error, "strerror", None) or error
            problem = f"run {row.id} could not be read: {reason}"
            if problem not in self.problems:
                self.problems.append(problem)
            return nothing

    def missing(self, what: str) -> Html:
        if not self.absent:
            return Html("")
        names = ", ".join(self.absent)
        return notices([f"{what} of these runs are left out, for they have no folder: {names}"])


def _inside(folder: Path, name: str) -> Path:
    """`folder / name` for a name that is no path: a row's id must not lead out of the study."""
    if name in ("", ".", "..") or any(letter in name for letter in "/\\\0"):
        raise ConfigError(f"{folder}: {name!r} is no name of a run's folder")
    return folder / name
