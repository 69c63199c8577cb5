"""What a run's or a study's folder holds, read as data of unknown origin.

Every error is a ConfigError that names the file, and its line where it has lines.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError
from ..study.config import Run
from ..study.rows import Row, read_rows
from .units import number

# A study of a thousand runs needs a megabyte, a run of a million steps a hundred.
_LARGEST = 2**30


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


def is_study(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("study.json", "runs.csv"))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    text = _read(path)
    try:
        content = json.loads(text)
    except RecursionError:
        raise ConfigError(f"{path}: damaged: it is nested too deeply") from None
    except ValueError as error:
        raise ConfigError(f"{path}: damaged: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: damaged: it must hold an object")
    return content


def read_metrics(path: Path) -> Metrics:
    """A run's `metrics.jsonl`; half a line at the end is one that is being written."""
    metrics = Metrics([], [])
    for at, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict):
                raise ValueError("not an object")
        except (ValueError, RecursionError) as error:
            if isinstance(error, json.JSONDecodeError) and _is_last(path, at):
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
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path}: not a file")
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
        own = {**study["tasks"][row.task], **study["methods"][row.name]}
        settings = {**own, "lr": row.lr, "seed": row.seed}
        return Run(row.task, row.name, row.lr, row.seed, settings).id == row.id
    except (KeyError, TypeError, ValueError):
        return False


def _places(names: object) -> dict[str, int]:
    return {name: i for i, name in enumerate(names)} if isinstance(names, dict) else {}


def inside(folder: Path, name: str) -> Path:
    """`folder / name` for a name that is no path: a row's id must not lead out of the study."""
    if name in ("", ".", "..") or any(letter in name for letter in "/\\\0"):
        raise ConfigError(f"{folder}: {name!r} is no name of a run's folder")
    return folder / name


def _read(path: Path) -> str:
    try:
        if not path.is_file():  # opening a pipe would wait for its writer
            raise ConfigError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
        if path.stat().st_size > _LARGEST:
            raise ConfigError(f"{path}: larger than {_LARGEST} bytes")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: damaged: not UTF-8: {error}") from error


def _is_last(path: Path, at: int) -> bool:
    return _read(path).count("\n") < at
