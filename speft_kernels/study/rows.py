"""One row of `runs.csv`: what a finished run was, what came out, and all it takes to repeat it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..tables import cells_of, read_table, row_of, write_table


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
                mask_seconds=result.get("dynamic", {}).get("seconds"),
            )
        except (AttributeError, KeyError, TypeError) as error:
            raise DataError(f"run {id}: its result.json lacks what a row needs: {error}") from error
        # What the table could not give back would end the study where the table is next read.
        return row_of(cls, cells_of(row), f"run {id}, result.json")


COLUMNS = tuple(field.name for field in dataclasses.fields(Row))


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Replace `path` by these rows, sorted by id, as a whole."""
    write_table(path, Row, sorted(rows, key=lambda row: row.id))


def read_rows(path: Path) -> list[Row]:
    """The rows of a `runs.csv`; none where there is no such file.

    Raises:
        DataError: a column is missing, or a value is not of its column's kind; names the line.
    """
    return read_table(path, Row) if path.exists() else []
