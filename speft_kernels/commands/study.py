"""`speft study`: a grid of runs, resumable run by run."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from ..errors import plain
from ..finetune.signals import Interrupted
from ..study.folder import StudyFolder
from .numbers import count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file of the study")
    parser.add_argument("--output", metavar="FOLDER", help="in the place of the file's output")
    parser.add_argument("--data", metavar="FOLDER", help="folder that data paths start from")
    parser.add_argument(
        "--jobs",
        type=count,
        metavar="N",
        help="runs at a time [one a GPU; without GPUs one]",
    )
    parser.add_argument(
        "--max-runs", type=count, metavar="N", help="begin no more than so many runs now"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="list the runs that are due, and run none"
    )


def run(args: argparse.Namespace) -> int:
    from ..study.config import read_study
    from ..study.runner import FailedRunsError, collect, run_study, settled
    from ..study.schedule import due

    study = read_study(Path(args.config), output=args.output, data=args.data)
    if args.dry_run:
        finished = collect(study)
        failed = settled(study, finished)
        left = due(study, finished, failed)
        print("\n".join(run.id for run in left))
        print(f"{len(left)} runs are due now, {len(finished)} are finished", file=sys.stderr)
        print(_failed(study.output, failed), end="", file=sys.stderr)
        return 0
    lost: FailedRunsError | None = None
    try:
        run_study(
            study,
            jobs=args.jobs or _jobs(),
            say=lambda line: print(plain(line), flush=True),
            max_runs=args.max_runs,
        )
    except Interrupted as interruption:
        again = f"speft study --config {shlex.quote(args.config)}"
        for flag in ("output", "data", "jobs"):
            if getattr(args, flag):
                again += f" --{flag} {shlex.quote(str(getattr(args, flag)))}"
        print(f"speft: stopped by {interruption}; to go on:\n  {again}", file=sys.stderr)
        return 128 + interruption.signum
    except FailedRunsError as error:
        lost = error  # told after what the others gave
    from ..report import write_report
    from ..report.aggregate import summarise
    from ..report.folder import diverged_rates
    from ..report.study_tables import markdown

    finished = collect(study)
    print(f"\n{len(finished)} runs are in {StudyFolder(study.output).rows}")
    failed = settled(study, finished)
    print(_failed(study.output, failed), end="")
    if finished:
        rows = list(finished.values())
        summary = summarise(rows, diverged_rates(rows, study.to_dict(), failed))
        print(f"\n{plain(markdown(summary))}", flush=True)
        print(f"report: {write_report(study.output)}")
    if lost is not None:
        raise lost
    return 0


def _failed(folder: Path, failures: Mapping[str, str]) -> str:
    """The runs that are not tried again; empty where there is none.

    As the rows are, it is fit for a terminal, which obeys what is in it: the folder may come from
    anybody.
    """
    from ..study.runner import listed

    if not failures:
        return ""
    return plain(
        f"{len(failures)} failed and would fail again; to try one again all the same, take it out "
        f"of {StudyFolder(folder).failures}, or delete that file:\n{listed(failures)}\n"
    )


def _jobs() -> int:
    import torch

    return max(1, torch.cuda.device_count())
