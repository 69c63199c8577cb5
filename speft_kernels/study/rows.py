"""One row of `runs.csv`: what a finished run was, what came out, and all it takes to repeat it."""

from __future__ import annotations

import csv
import dataclasses
import json
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError, shown
from ..files import replaced


@dataclass(frozen=True)
class Row:
    """A finished run of a study.

    Attributes:
        id: names the run within the study and its folder `runs/<id>`.
        task, name: of the study's grid: the task, and the method as the study labels it.
        method, salience, scope, dynamic: how it trained; the last three are empty where they say
            nothing (no sparse method, or a static mask; the first two for a ready mask, too).
        density: trained scalars outside the head as a share of the adapted matrices.
        lr, head_lr: the rates that were used.
        metric: what `validation` and `score` measure.
        validation: of the best checkpoint, on data split off the training set; what rates and
            checkpoints are chosen by.
        score: of the same checkpoint on the reported data, which chose nothing.
        versions, settings: JSON objects; `settings` are all those of the run.
        mask_seconds: what a dynamic run spent choosing its mask again, a part of neither of the
            other times; None for others, and from before there was this column.
        inputs: digests of the data, the base weights and, where the score is of the user's own,
            of its file, and a ready mask: "train=DIGITS test=DIGITS model=DIGITS salience=DIGITS
            mask=DIGITS"; empty in rows from before there was this column.
    """

    id: str
    task: str
    name: str
    method: str
    salience: str
    scope: str
    dynamic: str
    density: float
    trainable_parameters_without_head: int
    head_parameters: int
    lr: float
    head_lr: float
    seed: int
    epochs: int
    steps: int
    metric: str
    validation: float
    score: float
    best_step: int
    salience_seconds: float
    salience_peak_memory_bytes: int | None
    train_seconds: float
    step_ms_median: float
    peak_memory_bytes: int | None
    device: str
    threads: int
    processor: str
    versions: str
    commit: str
    settings: str
    inputs: str = ""
    mask_seconds: float | None = None

    @property
    def higher_is_better(self) -> bool:
        return self.metric != "loss"

    @classmethod
    def of(
        cls, id: str, task: str, name: str, result: Mapping[str, Any], settings: Mapping[str, Any]
    ) -> Row:
        """The row of a run from its `result.json` and the settings of its `config.json`.

        Raises:
            DataError: the result is not that of a run measured on reported data.
        """
        try:
            sparse = settings["method"] == "speft"
            scored = sparse and settings.get("mask") is None
            row = cls(
                id=id,
                task=task,
                name=name,
                method=settings["method"],
                salience=settings["salience"] if scored else "",
                scope=settings["scope"] if scored else "",
                dynamic=(settings.get("dynamic") or "") if sparse else "",
                density=result["density"],
                trainable_parameters_without_head=result["trainable_parameters_without_head"],
                head_parameters=result["head_parameters"],
                lr=result["lr"],
                head_lr=result["head_lr"],
                seed=settings["seed"],
                epochs=settings["epochs"],
                steps=result["steps"],
                metric=result["metric"],
                validation=result["after"],
                score=result["test"][result["metric"]],
                best_step=result["best_step"],
                salience_seconds=result["salience_seconds"],
                salience_peak_memory_bytes=result["salience"].get("peak_memory_bytes"),
                train_seconds=result["train_seconds"],
                step_ms_median=result["step_ms_median"],
                peak_memory_bytes=result["peak_memory_bytes"],
                device=result["device"],
                threads=result["threads"],
                processor=result["processor"],
                versions=json.dumps(result["versions"], sort_keys=True),
                commit=result["commit"],
                settings=json.dumps(settings, sort_keys=True),
                inputs=result.get("inputs", ""),
                mask_seconds=result.get("mask", {}).get("seconds"),
            )
        except (AttributeError, KeyError, TypeError) as error:
            raise DataError(f"run {id}: its result.json lacks what a row needs: {error}") from error
        # What the table could not give back would end the study where the table is next read.
        return _row(f"run {id}, result.json", dict(zip(COLUMNS, _texts(row), strict=True)))


COLUMNS = tuple(field.name for field in dataclasses.fields(Row))
_TYPES = typing.get_type_hints(Row)
# A file may lack what has a default.
_NEEDED = [f.name for f in dataclasses.fields(Row) if f.default is dataclasses.MISSING]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Replace `path` by these rows, sorted by id, as a whole."""
    with (
        replaced(path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in sorted(rows, key=lambda row: row.id):
            writer.writerow(_texts(row))


def read_rows(path: Path) -> list[Row]:
    """The rows of a `runs.csv`; none where there is no such file.

    Raises:
        DataError: a column is missing, or a value is not of its column's kind; names the line.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            missing = [name for name in _NEEDED if name not in (reader.fieldnames or ())]
            if missing:
                raise DataError(f"{path}: no column {', '.join(map(repr, missing))}")
            return [_row(f"{path}, line {reader.line_num}", record) for record in reader]
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as CSV: {error}") from error


def _texts(row: Row) -> list[str]:
    return ["" if value is None else str(value) for value in dataclasses.astuple(row)]


def _row(where: str, record: Mapping[str, str | None]) -> Row:
    """The row of these texts. Raises DataError, which names `where`."""
    values: dict[str, Any] = {}
    for name in [name for name in COLUMNS if name in record]:
        text = record[name]
        kind, *others = typing.get_args(_TYPES[name]) or (_TYPES[name],)
        if text is None:
            raise DataError(f"{where}: the line ends before column {name!r}")
        try:
            text.encode()  # halves of surrogate pairs cannot be written
            values[name] = None if others and not text else kind(text)
        except ValueError as error:
            what = "text" if kind is str else "number"
            raise DataError(f"{where}: {name} = {shown(text)} is no {what}") from error
    return Row(**values)
