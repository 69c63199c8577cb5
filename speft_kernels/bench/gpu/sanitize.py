"""The GPU kernels on small tensors (small.py), each operation in a process of its own:
`python -m speft_kernels.bench.gpu.sanitize OUT STAGE`.

The stage `small` comes before all others and tells in a minute which kernels run at all. The stage
`sanitize` has each of compute-sanitizer's tools watch. First memcheck has to find a write beyond a
weight that small.py plants: a tool that watches none of our kernels would pass them all. One that
is not there, or that refuses this machine, is put down as unavailable: that is no fault of ours.
Nothing here imports torch.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from .install import CUDA, cuda_tool
from .journal import NAME, ROOT, Journal, fingerprint, stage_parser
from .processes import Job, outcomes
from .stages import MISSING, OUT_OF_TIME

TOOLS = ("memcheck", "racecheck", "synccheck")
NO_TOOL = "alone"
OPERATIONS = (
    *("sparse_delta_matmul", "sampled_grad", "keep_columns"),
    *("block_grad", "topk_salience", "write_delta"),
)
PLANTED = "planted"  # the operation that small.py spoils on purpose
BACKENDS = ("cuda", "triton")
Case = tuple[str, str, str]  # tool, backend, operation
# What finds most comes first. Where threads meet in Triton's kernels is up to its compiler, so
# synccheck watches CUDA's alone.
CASES: tuple[Case, ...] = (
    *(("memcheck", backend, PLANTED) for backend in BACKENDS),
    *(
        (tool, backend, name)
        for tool in TOOLS
        for backend in BACKENDS
        for name in OPERATIONS
        if (tool, backend) != ("synccheck", "triton")
    ),
)
STAGES: dict[str, tuple[Case, ...]] = {
    "small": tuple((NO_TOOL, backend, name) for name in OPERATIONS for backend in BACKENDS),
    "sanitize": CASES,
}
# Seconds after which a process hangs, and with less than which none is begun.
LONGEST = {"small": 100.0, "sanitize": 120.0}
LEAST = 10.0
AT_A_TIME = min(6, os.cpu_count() or 1)
NO_SANITIZER = f"compute-sanitizer is not in CUDA_HOME, on PATH or in {CUDA}"
_FOUND = 86  # what the tool is told to end with where it finds something
_REFUSED = ("Device not supported", "Failed to initialize")
_KEPT = 800  # characters of a report


@dataclass
class Watch:
    """The cases of a stage that are due.

    Attributes:
        refused: (tool, backend) that cannot be had here: what is left of them is left out.
        ended: case -> outcome, of those that this run has put down.
    """

    journal: Journal
    device: str
    deadline: float
    due: Sequence[Case]
    refused: set[tuple[str, str]] = field(default_factory=set)
    ended: dict[Case, str] = field(default_factory=dict)

    def jobs(self) -> Iterator[Job]:
        for case in self.due:
            left = self.deadline - time.monotonic()
            if left < LEAST:
                return
            if case[:2] in self.refused:
                continue
            found = command(*case, self.device)
            if found is None:
                self.note(case, "unavailable", NO_SANITIZER)
            else:
                yield Job(case, found, min(left, LONGEST[self.journal.stage]))

    def run(self) -> None:
        # An allocation of its own size for each tensor: in torch's pool, what lies behind one is
        # valid. Several processes share the cores.
        more = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "2"}
        for job, status, output in outcomes(self.jobs(), AT_A_TIME, more):
            if status is None and job.seconds < LONGEST[self.journal.stage]:
                continue  # the stage's time is up
            outcome, message = judged(job.name, status, output)
            if outcome not in ("passed", "unavailable"):
                print(output, flush=True)
            self.note(job.name, outcome, message)

    def note(self, case: Case, outcome: str, message: str) -> None:
        tool, backend, _ = case
        self.ended[case] = outcome
        if outcome == "unavailable":
            if case[:2] in self.refused:
                return
            self.refused.add((tool, backend))
        name = named(case)
        facts = {"tool": tool, "operation": name, "outcome": outcome, "message": message}
        self.journal.add("sanitizer", **facts)
        first = "".join(message.splitlines()[:1])
        print(f"{tool:10} {name:28} {outcome} {first}".rstrip(), flush=True)

    def is_over(self) -> bool:
        return all(case in self.ended or case[:2] in self.refused for case in self.due)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = stage_parser("sanitize")
    parser.add_argument("stage", choices=STAGES)
    options = parser.parse_args(arguments)
    stage = options.stage
    journal = Journal(options.out / NAME, stage, fingerprint(stage), options.key)
    before = {(e["tool"], e["operation"]): e["outcome"] for e in journal.entries("sanitizer")}
    known = {key: outcome for key, outcome in before.items() if outcome != "unavailable"}
    due = [
        case
        for case in STAGES[stage]
        if (case[0], named(case)) not in known
        and not (case[2] == PLANTED and options.device == "cpu")
    ]
    watch = Watch(journal, options.device, time.monotonic() + options.seconds, due)
    watch.run()
    if not watch.is_over():
        return OUT_OF_TIME
    # That kernels cannot run here is what the stage `small` is to find.
    good = {"passed"} if stage == "small" else {"passed", "unavailable"}
    return 0 if {*known.values(), *watch.ended.values()} <= good else 1


def named(case: Case) -> str:
    _, backend, operation = case
    return operation if backend == "cuda" else f"{operation}, {backend}"


def command(tool: str, backend: str, operation: str, device: str) -> list[str] | None:
    """What runs an operation under a tool; on a CPU without one; None where there is no tool."""
    small = [sys.executable, "-m", "speft_kernels.bench.gpu.small", operation]
    if device == "cpu":
        here = "cuda-host" if backend == "cuda" else backend
        return [*small, "--device", "cpu", "--backend", here]
    if tool == NO_TOOL:
        return [*small, "--backend", backend]
    sanitizer = cuda_tool("compute-sanitizer")
    if sanitizer is None:
        return None
    # Of the kernels in the process only ours, and no refused call: torch's are not ours to judge.
    # A kernel that any of several filters takes is watched.
    filters = ["kns=speft"] if backend == "cuda" else [f"kne={name}" for name in _of_triton()]
    ours = [word for one in filters for word in ("--kernel-name", one)]
    told = ["--error-exitcode", str(_FOUND), *ours, "--report-api-errors", "no"]
    told += ["--show-backtrace", "device", "--print-limit", "20"]
    return [sanitizer, "--tool", tool, *told, *small, "--backend", backend]


def _of_triton() -> list[str]:
    """The names of Triton's functions: a kernel has that of the function it is made of."""
    sources = sorted((ROOT / "triton_kernels").glob("*.py"))
    found = (re.findall(r"^@triton\.jit\ndef (\w+)", path.read_text(), re.M) for path in sources)
    return sorted({name for names in found for name in names})


def judged(case: Case, status: int | None, output: str) -> tuple[str, str]:
    """Return "passed", "failed", "unavailable" or "timed out", and what says why."""
    tool, _, operation = case
    if status is None:
        return "timed out", "it hung, and was ended"
    if operation == PLANTED and status in (0, _FOUND):
        seen = status == _FOUND
        return ("passed", "") if seen else ("failed", f"{tool} did not see what was planted")
    if status == 0:
        return "passed", ""
    if status == _FOUND:
        return "failed", _report(output)
    tail = output.strip()[-_KEPT:]
    refused = tool != NO_TOOL and any(words in output for words in _REFUSED)
    return "unavailable" if status == MISSING or refused else "failed", tail


def _report(output: str) -> str:
    """The first error of a report, with its kernel: the end of it only counts them."""
    lines = output.strip().splitlines()
    told = [n for n, line in enumerate(lines) if re.match(r"=+ (?!COMPUTE-SANITIZER)", line)]
    return "\n".join(lines[told[0] :])[:_KEPT] if told else output.strip()[-_KEPT:]


if __name__ == "__main__":
    sys.exit(main())
