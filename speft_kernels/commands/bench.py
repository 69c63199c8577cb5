"""`speft bench`: the operations against their peers on this machine."""

from __future__ import annotations

import argparse
import importlib.util

from ..bench.cases import KERNELS, OPERATIONS, cases_of
from .numbers import count, threads
from .outputs import output_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "operations",
        nargs="*",
        metavar="OPERATION",
        help=f"what to measure: {', '.join(OPERATIONS)} [the quick cases of {', '.join(KERNELS)}]",
    )
    parser.add_argument("--quick", action="store_true", help="only the quick cases")
    parser.add_argument("--rounds", type=count, metavar="N", help="rounds of each case [its own]")
    parser.add_argument(
        "--threads", type=threads, metavar="N", help="threads of torch and the kernels"
    )
    parser.add_argument("--cold", action="store_true", help="empty the caches before each call")
    parser.add_argument("--output", metavar="CSV", help="file to add the results to")
    parser.add_argument(
        "--plot",
        metavar="FILE",
        help="figure of --output, or of this run: a .png, .svg, .pdf or .jpg",
    )


def run(args: argparse.Namespace) -> int:
    operations = args.operations or KERNELS
    quick = args.quick or not args.operations
    builds = [build for name in operations for build in cases_of(name, quick=quick)]
    # All that can be said before the time is spent.
    output, figure = output_file("output", args.output), output_file("plot", args.plot)
    if figure is not None and importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError("no matplotlib", name="matplotlib")

    import torch

    from ..bench.harness import measure
    from ..bench.machine import this_machine
    from ..bench.plot import check_format, plot
    from ..bench.records import Record, read_records, records_of, write_records
    from ..bench.report import describe, goals, heading

    if figure is not None:
        check_format(figure)
    if output is not None and output.exists():
        read_records(output)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    machine = this_machine()
    print(heading(machine))
    rows: list[Record] = []
    results = []
    for build in builds:
        result = measure(build(), rounds=args.rounds, cold=args.cold)
        print(f"\n{describe(result)}", flush=True)
        results.append(result)
        fresh = records_of(result, machine)
        # After each case: an interrupted run keeps what it has measured.
        rows = rows + fresh if output is None else write_records(output, fresh)
    if closing := goals(results):
        print(f"\n{closing}")
    if figure is not None:
        plot(rows, figure)
    return 0
