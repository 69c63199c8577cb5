"""`speft finetune`: a run on the user's data, or the demo."""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import Any

from ..errors import ConfigError, plain
from ..files import path_of
from ..finetune.config import RunConfig, check_alone, load_json
from ..finetune.folder import RunFolder
from ..finetune.signals import Interrupted
from .settings import add_settings, given_settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser)
    group = parser.add_argument_group("the output folder")
    group.add_argument("--resume", action="store_true", help="continue the stopped run in --output")
    group.add_argument("--overwrite", action="store_true", help="delete the run in --output first")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="read and check what is here, say what would be trained, and write nothing",
    )


def run(args: argparse.Namespace) -> int:
    settings = given_settings(args)
    if settings.get("mask") is not None:
        check_alone(settings)
    if args.resume and args.overwrite:
        raise ConfigError("--resume and --overwrite exclude each other")
    if args.dry_run:
        from ..finetune.dry_run import dry_run

        if args.resume:
            raise ConfigError("--resume goes on as the run began: there is nothing to try")
        # A file of settings may come from anybody, and a terminal obeys what is in it.
        print(plain(dry_run(RunConfig.from_dict(settings), overwrite=args.overwrite)))
        return 0
    try:
        if args.resume:
            train(_stored_settings(settings), resume=True)
        elif "train" in settings:
            train(settings, overwrite=args.overwrite)
        else:
            from .demo import run_demo

            run_demo(settings, overwrite=args.overwrite)
    except Interrupted as interruption:
        return report_interruption(interruption)
    return 0


def train(settings: dict[str, Any], *, resume: bool = False, overwrite: bool = False) -> None:
    """One run; prints its result."""
    config = RunConfig.from_dict(settings)
    from ..finetune.result import describe
    from ..finetune.run import finetune

    result = finetune(config, resume=resume, overwrite=overwrite)
    print(describe(result, config.output))


def report_interruption(interruption: Interrupted) -> int:
    """Says how to go on; returns the exit code, 128 plus the signal's number as in a shell."""
    if interruption.folder is None:
        print(
            f"speft: stopped by {interruption} before training began; nothing was written",
            file=sys.stderr,
        )
    else:
        folder = shlex.quote(str(interruption.folder))
        print(
            f"speft: stopped by {interruption}; to go on from this step:\n"
            f"  speft finetune --resume --output {folder}",
            file=sys.stderr,
        )
    return 128 + interruption.signum


def _stored_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The stopped run's settings with those given now on top; `finetune` refuses differences."""
    if "output" not in settings:
        raise ConfigError("--resume needs --output, the folder of the run to continue")
    folder = path_of("output", settings["output"])
    return {**load_json(RunFolder(folder).config), **settings}
