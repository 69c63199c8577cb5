"""Running a study: the runs that are due, side by side, each finished one a row at once."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from multiprocessing.connection import wait
from pathlib import Path
from typing import BinaryIO

import torch

from ..errors import ConfigError, DataError, SpeftError
from ..files import lock, lock_file, read_json, write_json
from ..finetune.folder import RunFolder
from ..finetune.signals import Interrupted, StopSignals
from .config import PATHS, Run, Study
from .folder import StudyFolder
from .inputs import changed_inputs, changed_settings
from .rows import Row, read_rows, write_rows
from .schedule import due
from .worker import Failure, Worker, run_lock

_PATIENCE = 1.0  # seconds until a signal is looked for again


class StudyError(SpeftError, RuntimeError):
    """A study cannot run as it is; what finished is kept."""


class FailedRunsError(StudyError):
    """Runs of a study failed that may do better next time; all others were run."""


def run_study(
    study: Study, *, jobs: int, say: Callable[[str], object], max_runs: int | None = None
) -> list[Row]:
    """Runs everything of `study` that is not finished; returns all its rows.

    Interrupted anywhere, it goes on when called again: a finished run has its row in `runs.csv` or
    its `result.json`, an unfinished one its checkpoint, and neither is repeated. A `runs.csv` alone
    is enough to go on from. A run that failed and would again, as its loss diverged, is noted in
    `failures.json` and not tried again while it is there.

    Args:
        jobs: runs at a time, in processes of their own, which share the cores and the GPUs.
        say: receives a line for each run that ends, and one where it has to wait at the start.
        max_runs: begin no more than so many.

    Raises:
        ConfigError: the folder cannot be made.
        FailedRunsError: some runs failed for another reason; all others were run.
        StudyError: another process runs this study, or the data, the weights or the settings are no
            longer those of the rows; nothing was run.
        Interrupted: on Ctrl-C or SIGTERM, after the runs in progress have left checkpoints.
    """
    places = StudyFolder(study.output)
    try:
        places.runs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output {places.root} cannot be made: {error.strerror}") from error
    with _alone(places, say), StopSignals() as stop:
        write_json(places.study, study.to_dict())
        finished = collect(study)
        grid = study.grid()
        changed = changed_inputs(study, grid, finished)
        if changed:
            raise StudyError(
                f"{places.rows} has rows of other data or weights than there are now, and they "
                "cannot be compared with new ones; put back what they were made from, or give the "
                "study another output folder:\n" + "\n".join(f"  {line}" for line in changed)
            )
        changed = changed_settings(study, grid, finished)
        if changed:
            raise StudyError(
                f"{places.rows} has rows made with other settings than new ones would be, as the "
                "defaults have changed, and they cannot be compared; go on with the version that "
                "made them, or give the study another output folder:\n"
                + "\n".join(f"  {line}" for line in changed)
            )
        _add_rows(places, finished.values())
        failures = {id: Failure(reason, True) for id, reason in settled(study, finished).items()}
        _run_due(study, places, finished, failures, jobs, say, max_runs, stop)
    again = {id: failure.reason for id, failure in failures.items() if not failure.settled}
    if again:
        raise FailedRunsError(
            f"{len(again)} runs failed; all others are in {places.rows}. Run the same command "
            f"again to try these again:\n{listed(again)}"
        )
    return sorted(finished.values(), key=lambda row: row.id)


def listed(failures: Mapping[str, str]) -> str:
    return "\n".join(f"  {id}: {reason}" for id, reason in failures.items())


def settled(study: Study, finished: Mapping[str, Row]) -> dict[str, str]:
    """Run id -> why it failed, for the runs in `failures.json`: those that would fail again.

    Runs that the study no longer asks for are kept in the file and left out here.
    """
    grid = study.grid()
    noted = _noted(StudyFolder(study.output).failures)
    return {id: reason for id, reason in noted.items() if id in grid and id not in finished}


def _noted(path: Path) -> dict[str, str]:
    noted = read_json(path, DataError) if path.exists() else {}
    return {id: str(reason) for id, reason in noted.items()}


def collect(study: Study) -> dict[str, Row]:
    """The rows of `runs.csv`, and of the runs that finished without getting one.

    Rows of runs that the study no longer asks for are left out.
    """
    places = StudyFolder(study.output)
    stored = {row.id: row for row in read_rows(places.rows)}
    known = study.grid()
    for id, run in known.items():
        folder = places.runs / id
        if id not in stored and RunFolder(folder).result.exists():
            stored[id] = _row(run, folder)
    return {id: row for id, row in stored.items() if id in known}


def _run_due(
    study: Study,
    places: StudyFolder,
    finished: dict[str, Row],
    failures: dict[str, Failure],
    jobs: int,
    say: Callable[[str], object],
    max_runs: int | None,
    stop: StopSignals,
) -> None:
    """Adds to `finished` and `failures`, and to their files."""
    started: set[str] = set()
    workers: dict[str, Worker] = {}
    running: dict[str, Run] = {}
    threads = max(1, torch.get_num_threads() // jobs)
    try:
        while True:
            for run in due(study, finished, failures):
                if len(workers) == jobs or len(started) == max_runs:
                    break
                if run.id not in started:
                    started.add(run.id)
                    taken = {worker.slot for worker in workers.values()}
                    slot = next(slot for slot in itertools.count() if slot not in taken)
                    config = run.config(places.runs / run.id, study.data)
                    workers[run.id] = Worker(config, threads=threads, slot=slot)
                    running[run.id] = run
            if not workers:
                return
            ended = wait([worker.sentinel for worker in workers.values()], _PATIENCE)
            stop.check()
            for id in [id for id, worker in workers.items() if worker.sentinel in ended]:
                failure = workers.pop(id).failure()
                if failure is None:
                    finished[id] = _row(running[id], places.runs / id)
                    _add_rows(places, [finished[id]])
                    say(_line(finished[id], len(due(study, finished, failures)) - len(workers)))
                else:
                    failures[id] = failure
                    if failure.settled:
                        noted = _noted(places.failures)
                        write_json(places.failures, {**noted, id: failure.reason})
                    say(f"{id}: failed: {failure.reason}")
    except Interrupted as interruption:
        interruption.folder = places.root
        raise
    finally:
        for worker in workers.values():
            worker.stop()
        for worker in workers.values():
            worker.failure()


@contextlib.contextmanager
def _alone(places: StudyFolder, say: Callable[[str], object]) -> Iterator[None]:
    """Waits for the runs that a killed study left, which end as soon as they notice.

    Raises StudyError if another process runs the study in this folder.
    """
    with _lock_file(places.lock) as file:
        if not lock(file):
            raise StudyError(f"another process runs the study in {places.root}")
        with _lock_file(run_lock(places.runs)) as runs:
            if not lock(runs):
                say(f"waits for runs of a study that was killed to leave {places.runs}")
                lock(runs, wait=True)
        yield


def _lock_file(path: Path) -> BinaryIO:
    try:
        return lock_file(path)
    except OSError as error:
        raise StudyError(
            f"{path}, the study's lock, cannot be opened: {error.strerror}; remove it, or give the "
            "study another output folder"
        ) from error


def _row(run: Run, folder: Path) -> Row:
    try:
        result = read_json(RunFolder(folder).result)
        settings = read_json(RunFolder(folder).config)["settings"]
        # Where the run and its data lay says nothing of it; the rest is needed to repeat it.
        del settings["output"]
        settings.update({key: run.settings.get(key) for key in (*PATHS, "mask")})
    except (ConfigError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{folder}: not the folder of a finished run ({error}); delete it to run it again"
        ) from error
    return Row.of(run.id, run.task, run.name, result, settings)


def _add_rows(places: StudyFolder, new: Iterable[Row]) -> None:
    rows = {row.id: row for row in [*read_rows(places.rows), *new]}
    write_rows(places.rows, rows.values())


def _line(row: Row, left: int) -> str:
    return (
        f"{row.id}: validation {row.validation:.4f}, {row.metric} {row.score:.4f}, "
        f"{row.train_seconds:.0f} s; {max(0, left)} more are known to be due"
    )
