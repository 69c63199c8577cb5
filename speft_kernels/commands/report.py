"""`speft report`: a run or a study as one HTML page."""

from __future__ import annotations

import argparse

from ..files import path_of
from .outputs import output_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="folder of a run or of a study")
    parser.add_argument("--output", metavar="FILE", help="page to write [FOLDER/report.html]")


def run(args: argparse.Namespace) -> int:
    from ..report import write_report

    output = output_file("output", args.output)
    print(write_report(path_of("folder", args.folder), output))
    return 0
