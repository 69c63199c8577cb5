"""The command `speft`. Each subcommand lives in `commands`; torch is loaded when one runs."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from ._version import __version__
from .errors import SpeftError, nearest, plain

COMMANDS = {
    "finetune": "fine-tune a model; without arguments: a demo that needs nothing but this computer",
    "evaluate": "measure a trained model on data of your own",
    "merge": "fold an adapter into its base model and write a plain model",
    "study": "run a grid of methods, tasks, learning rates and seeds, and keep a row of each run",
    "report": "one HTML page of a run or a study, to read offline",
    "info": "versions and backends of this machine, or what a run's or adapter's folder holds",
    "tune": "measure what the plan's cost model needs to know of this machine",
    "salience": "score a model's weights and write the mask that would train",
    "bench": "time the operations against their peers on this machine",
}
# Modules of the optional extras, by the extra that brings them.
_EXTRAS = {
    "transformers": "finetune",
    "accelerate": "finetune",
    "datasets": "finetune",
    "rich": "finetune",
    "yaml": "finetune",
    "peft": "peft",
    "matplotlib": "report",
}


class Parser(argparse.ArgumentParser):
    """Takes no abbreviated flags, and answers an unknown flag with the nearest one."""

    def __init__(self, **settings: object) -> None:
        super().__init__(**{"allow_abbrev": False, **settings})  # type: ignore[arg-type]

    def parse_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = parsed.parser._option_string_actions
            flag = next((item for item in unknown if item.startswith("-")), unknown[0])
            parsed.parser.error(f"unknown argument {flag!r}.{nearest(flag.split('=')[0], known)}")
        return parsed

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n(see {self.prog} --help)\n")


def build_parser(wanted: str | None) -> argparse.ArgumentParser:
    """The parser of all subcommands, with the flags of the `wanted` one; no other is loaded."""
    parser = Parser(
        prog="speft",
        description="Sparse parameter-efficient fine-tuning at the price of the frozen model.",
    )
    parser.add_argument("--version", action="version", version=f"speft {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary)
        subparser.set_defaults(parser=subparser)
        if name == wanted:
            command = importlib.import_module(f".commands.{name}", __package__)
            command.add_arguments(subparser)
            subparser.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code.

    0: done. 2: the user can put it right; one line on standard error says how. 130 or 143: stopped
    by Ctrl-C or SIGTERM. Whatever else goes wrong is a fault of this package: it is not caught.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    command = next((word for word in argv if word in COMMANDS), None)
    parser = build_parser(command)
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 2
    try:
        code = int(args.run(args))
        sys.stdout.flush()
        return code
    except SpeftError as error:
        # A name in a message may come from anybody's file, and a terminal obeys what is in it.
        lines = [plain(line) for line in str(error).split("\n")]
        print("speft: error: " + "\n".join(lines), file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        print(
            f"speft: error: this needs the library {error.name!r}: "
            f"pip install 'speft-kernels[{extra}]'",
            file=sys.stderr,
        )
        return 2
    except PermissionError as error:  # what is named may lie in a folder of another user's
        if error.filename is None:
            raise
        print(f"speft: error: {plain(error.filename)}: {error.strerror}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, such as `head`, has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("speft: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
