"""Compile every Triton kernel, in every configuration in which it is launched, for GPUs that are
not here, and say what came out: registers, spills, shared memory, matrix and memory instructions.

Exits with 1 where a kernel spills, multiplies without the tensor cores that its operands allow, or
takes more shared memory than the GPU has; and where no call of `gpu_calls.py` launches a kernel, or
reaches settings that are chosen for some problem (`gpu_settings.py`).
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

# The interpreter is chosen when Triton is imported, and compiles nothing.
if os.environ.pop("TRITON_INTERPRET", None):
    print("TRITON_INTERPRET is set and ignored: kernels are compiled here", file=sys.stderr)
# What Triton 3.9 does by default; left unset it warns that 3.10 will not.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
from gpu_calls import CALLS, Call
from gpu_settings import missing
from gpu_variant import GRID_LIMITS, Report, Variant, compile_variant, specialise
from offline_report import Compiled, write_report
from speft_kernels.triton_kernels.launch import MACHINES, Launch, Recorded, recording

from speft_kernels import triton_kernels

KERNELS = Path(triton_kernels.__path__[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--archs", type=int, nargs="+", choices=MACHINES, default=list(MACHINES), metavar="ARCH"
    )
    parser.add_argument("--only", nargs="+", choices=CALLS, default=list(CALLS), metavar="OP")
    parser.add_argument(
        "--candidates",
        action="store_true",
        help="the tuning candidates in place of the defaults; spills among them are shown and fail "
        "nothing: tuning is there to find them",
    )
    parser.add_argument("--json", type=Path, help="record every variant in this file")
    parser.add_argument("--report", type=Path, help="write a summary by kernel to this file")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    began = time.monotonic()
    chosen: set[tuple[int, Launch]] = set()
    variants, problems = collect(options.only, options.archs, options.candidates, chosen)
    if not options.candidates:
        problems += unreached(options.only, variants)
        if set(options.only) == set(CALLS):
            problems += missing(chosen)
    reports = compile_all(variants, options.jobs)
    print("\n".join(table(reports)))
    if options.json:
        options.json.write_text(json.dumps([record(report) for report in reports], indent=1) + "\n")
    if options.report:
        compiler = f"Triton {triton.__version__}"
        write_report(options.report, "The Triton kernels' machine code", compiler, short(reports))
    for report in reports:
        for problem in report.problems():
            if not (options.candidates and problem.startswith("spills")):
                problems.append(f"{title(report.variant)}: {problem}")
    seconds = time.monotonic() - began
    print(f"\n{len(reports)} variants in {seconds:.0f} s, {len(problems)} problems")
    for problem in problems:
        print(f"FAILED {problem}", file=sys.stderr)
    return 1 if problems else 0


def collect(
    operations: Iterable[str],
    archs: Iterable[int],
    candidates: bool = False,
    chosen: set[tuple[int, Launch]] | None = None,
) -> tuple[list[Variant], list[str]]:
    """Return what the calls launch, each variant once, and what is wrong with the launches.

    Args:
        chosen: where to put the arch and the settings of each launch.
    """
    found: dict[str, Variant] = {}
    problems = []
    for arch in archs:
        for operation in operations:
            for call in CALLS[operation]():
                if arch not in call.archs:
                    continue
                name = f"{operation} {call.name}"
                for launched in launches(call, arch, candidates):
                    variant = specialise(launched, arch)
                    if chosen is not None:
                        chosen.add((arch, launched.settings))
                    found.setdefault(variant.key, variant).calls.append(name)
                    if any(n > limit for n, limit in zip(launched.grid, GRID_LIMITS, strict=False)):
                        problems.append(f"{title(variant)}: its grid {launched.grid} is too large")
    return list(found.values()), problems


def launches(call: Call, arch: int, candidates: bool) -> Iterator[Recorded]:
    if not candidates:
        yield from record_launches(call.run, arch)
        return
    for settings in call.candidates(MACHINES[arch]):
        kind = type(settings)
        with mock.patch.object(kind, "default", lambda *a, settings=settings, **k: settings):
            launched = record_launches(call.run, arch)
        yield from (one for one in launched if one.settings == settings)


def record_launches(run: Callable[[], object], arch: int) -> list[Recorded]:
    with recording(MACHINES[arch]) as launched:
        run()
    return launched


def unreached(operations: Iterable[str], variants: Iterable[Variant]) -> list[str]:
    """Name the files without calls, and the kernels that are launched in the files of `operations`,
    or in those that serve several, and that no call reached.
    """
    seen = {(variant.module, variant.kernel) for variant in variants}
    names = sorted(path.stem for path in KERNELS.glob("*.py") if path.stem != "__init__")
    helpers = [name for name in names if name.startswith("_")]
    problems = [
        f"{name}: gpu_calls.py has no calls of it"
        for name in names
        if name not in (*CALLS, *helpers, "launch")
    ]
    for name in (*operations, *(helpers if set(operations) == set(CALLS) else ())):
        module = importlib.import_module(f"{triton_kernels.__name__}.{name}")
        for launched in launched_in(KERNELS / f"{name}.py"):
            kernel = getattr(module, launched, None)
            if kernel is None or (kernel.fn.__module__, kernel.fn.__qualname__) not in seen:
                problems.append(f"{name}: no call in gpu_calls.py launches {launched}")
    return problems


def launched_in(path: Path) -> list[str]:
    """The names of what a file hands to `launch`."""
    return [
        ast.unparse(node.args[0])
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "launch"
    ]


def compile_all(variants: list[Variant], jobs: int) -> list[Report]:
    # Spawned, not forked: torch and Triton have started threads here.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        return list(pool.map(compile_variant, variants))


def short(reports: Iterable[Report]) -> Iterator[Compiled]:
    for report in reports:
        widest = max((bits for by in report.loads.values() for bits in by), default=0)
        yield Compiled(
            *(report.variant.kernel, str(report.variant.arch), report.registers, report.stack),
            *(report.shared, frozenset(report.matrix), widest),
        )


def title(variant: Variant) -> str:
    return f"{variant.kernel} ({variant.calls[0]}; {variant.settings}) on sm_{variant.arch}"


def table(reports: Iterable[Report]) -> Iterator[str]:
    columns = ("kernel", "calls", "settings", "sm", "registers", "stack", "shared", "matrix")
    columns += ("loads", "stores")
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)
    for report in reports:
        variant = report.variant
        more = f" and {len(variant.calls) - 1} more" if len(variant.calls) > 1 else ""
        matrix = " ".join(f"{name} x{count}" for name, count in sorted(report.matrix.items()))
        cells = (
            *(variant.kernel, variant.calls[0] + more, variant.settings, variant.arch),
            *(report.registers, report.stack, report.shared, matrix),
            *(_widths(report.loads), _widths(report.stores)),
        )
        yield "| " + " | ".join(str(cell) for cell in cells) + " |"


def _widths(of: dict[str, dict[int, int]]) -> str:
    return "; ".join(
        f"{name} " + " ".join(f"{bits}b x{count}" for bits, count in sorted(by.items()))
        for name, by in sorted(of.items())
    )


def record(report: Report) -> dict[str, object]:
    """A report as plain data, its signature and constants by name."""
    variant = report.variant
    names = list(variant.signature)
    plain = dataclasses.asdict(report)
    plain["variant"] = {
        "kernel": variant.kernel,
        "module": variant.module,
        "arch": variant.arch,
        "num_warps": variant.num_warps,
        "num_stages": variant.num_stages,
        "calls": variant.calls,
        "signature": {name: str(kind) for name, kind in variant.signature.items()},
        "constants": {names[path[0]]: str(value) for path, value in variant.constexprs.items()},
        "multiples_of_16": [names[path[0]] for path, value in variant.attrs.items() if value],
    }
    plain["problems"] = report.problems()
    return plain


if __name__ == "__main__":
    sys.exit(main())
