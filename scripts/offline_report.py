"""The machine code of the kernels in short: what `--report` of the two offline scripts writes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from speft_kernels.machine import commit


@dataclass(frozen=True)
class Compiled:
    """One kernel as compiled once. `shared` is bytes of a block, None where a launch decides."""

    kernel: str
    arch: str
    registers: int
    stack: int
    shared: int | None
    matrix: frozenset[str]
    widest_load: int  # bits


def write_report(file: Path, title: str, compiler: str, rows: Iterable[Compiled]) -> None:
    """Write a line for each kernel and target: the most that any of its variants takes."""
    groups = defaultdict(list)
    for row in rows:
        groups[row.kernel, row.arch].append(row)
    count = sum(map(len, groups.values()))
    about = (
        f"{count} variants of commit {commit()}, compiled without a GPU by {compiler}. Of each "
        "kernel and target the most that any of its variants takes: registers and bytes of stack "
        "of a thread, bytes of shared memory of a block (where the compiler knows), bits of a load."
    )
    lines = [f"# {title}", "", about, ""]
    columns = ("kernel", "sm", "variants", "registers", "stack", "shared", "matrix", "load")
    lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    by_name_and_target = sorted(groups.items(), key=lambda one: (one[0][0], len(one[0][1]), one[0]))
    for (kernel, arch), some in by_name_and_target:
        shared = [row.shared for row in some if row.shared is not None]
        cells = (
            *(f"`{kernel}`", arch, len(some)),
            *(max(row.registers for row in some), max(row.stack for row in some)),
            f"{max(shared):,}" if shared else "",
            " ".join(sorted(frozenset().union(*(row.matrix for row in some)))),
            max(row.widest_load for row in some) or "",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    file.write_text("\n".join(lines) + "\n")
