"""`speft report`: a run or a study as one HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="folder of a run or of a study")
    parser.add_argument("--output", metavar="FILE", help="page to write [FOLDER/report.html]")


def run(args: argparse.Namespace) -> int:
    from ..report import write_report

    output = Path(args.output).expanduser() if args.output else None
    print(write_report(Path(args.folder).expanduser(), output))
    return 0
