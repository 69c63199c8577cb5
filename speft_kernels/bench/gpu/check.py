"""`scripts/gpu_check.sh`: build for this machine's GPU, test on it, measure on it, keep a record.

    scripts/gpu_check.sh [--list] [--dry-run] [--force] [--within SECONDS] [OUT] [STAGE ...]

Each stage runs in processes of its own, for a limited time, and writes what it finds into a journal
in OUT as it finds it. A stage that is complete for the present sources is not run again; one that
was cut off goes on where it was. Nothing of the GPU's settings is changed. Nothing here imports
torch: it is the stages that may crash.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ...errors import nearest
from . import install, record
from .journal import NAME, ROOT, Journal, fingerprint
from .stages import OUT_OF_TIME, RESTART, STAGES

# Ignored by git, as all builds are: whoever takes ignored outputs along to the next machine takes
# the journal, too. The record itself is copied to KEPT, to be committed.
OUT = ROOT / "build" / "gpu_check"
KEPT = ROOT / "benchmarks" / "results"

# pytest's own exit statuses.
TESTS_FAILED, NO_TESTS_LEFT = 1, 5
MOST_RESTARTS = 40
_GRACE = 10.0  # seconds to end in, before a stage is killed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/gpu_check.sh",
        description=__doc__.splitlines()[0].partition(": ")[2],
        epilog="stages: " + "; ".join(f"{name}: {stage.what}" for name, stage in STAGES.items()),
    )
    parser.add_argument("--list", action="store_true", help="list the stages")
    parser.add_argument("--dry-run", action="store_true", help="all of it at tiny sizes on the CPU")
    parser.add_argument("--force", action="store_true", help="run complete stages again")
    parser.add_argument("--within", type=float, metavar="SECONDS", help="end after this time")
    parser.add_argument(
        "rest",
        nargs="*",
        metavar="[OUT] [STAGE ...]",
        help=f"by default {OUT.relative_to(ROOT)}; from the repository's root",
    )
    options = parser.parse_args(arguments)
    if options.list:
        for name, stage in STAGES.items():
            print(f"{name:8} {stage.seconds:4.0f} s at most  {stage.what}")
        return 0
    out, wanted = _split(options.rest, parser)
    machine = install.probe(sys.executable)
    if isinstance(machine, str):
        print(f"{machine}. Name the Python that has it: PYTHON=/path/to/python", file=sys.stderr)
        return 2
    if machine.gpu is None and not options.dry_run:
        print(
            f"there is no CUDA GPU that torch {machine.torch} sees: nothing was built, tested or "
            "measured, and no record was written. --dry-run goes through all of it on the CPU.",
            file=sys.stderr,
        )
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + (options.within or float("inf"))
    check = Check(out, machine, options.dry_run, deadline)
    for name in wanted:
        check.run(name, force=options.force)
    found = check.write()
    print(f"\n{record.summary(found)}")
    print(f"the record is in {out}; to keep it, copy it beside the figures of the CPU:")
    print(f"cp {out / record.JSON} {out / record.TABLE} {KEPT.relative_to(ROOT)}/")
    failed = [name for name in wanted if found["stages"].get(name, {}).get("status") != "complete"]
    return 1 if failed else 0


def _split(rest: Sequence[str], parser: argparse.ArgumentParser) -> tuple[Path, list[str]]:
    """OUT, where the first word is no stage, and the stages in their order."""
    words = list(rest)
    out = OUT
    if words and words[0] not in STAGES:
        meant, is_path = nearest(words[0], STAGES), os.sep in words[0]
        if meant and not is_path and not Path(words[0]).exists():
            parser.error(f"unknown stage {words[0]!r}.{meant} A new folder is ./{words[0]}")
        out = Path(words.pop(0)).absolute()
    for word in words:
        if word not in STAGES:
            parser.error(f"unknown stage {word!r}. Known: {', '.join(STAGES)}")
    return out, [stage for stage in STAGES if stage in words or not words]


@dataclass
class Check:
    """One run of the command.

    Attributes:
        deadline: of `time.monotonic()`, for all stages together.
        found_by: what the environment of a stage needs to find the package.
    """

    out: Path
    machine: install.Machine
    dry: bool
    deadline: float
    built: bool = False
    python: str | None = None
    with_cuda: bool = True
    found_by: Mapping[str, str] = field(default_factory=dict)

    @property
    def device(self) -> str:
        return "cpu" if self.dry else str(self.machine.gpu)

    @property
    def workers(self) -> int:
        """Processes that share the tests, of which each compiles kernels for itself."""
        number = min(8, self.machine.cores // 2, int(self.machine.memory_gib // 8))
        return number if self.machine.xdist and number > 1 else 0

    def journal(self, stage: str) -> Journal:
        return Journal(self.out / NAME, stage, fingerprint(stage), self.device)

    def run(self, stage: str, *, force: bool) -> None:
        """Run a stage, unless it is complete; and the build before it, where it needs one."""
        journal = self.journal(stage)
        if force:
            journal.forget()
        if journal.status() == "complete" and stage != "build":
            print(f"== {stage}: complete for these sources", flush=True)
            return
        if not self.built:
            self._build()
        if stage == "build":
            return
        if self.python is None:
            print(f"== {stage}: not run, since nothing was built", flush=True)
        elif stage == "sanitize" and not self.with_cuda:
            print(f"== {stage}: not run, since the CUDA kernels were not built", flush=True)
        else:
            self._run(stage, journal, self.python)

    def _build(self) -> None:
        """Not taken from the journal: the machine may be another one, with nothing built on it."""
        print("== build", flush=True)
        self.built = True
        start, journal = time.monotonic(), self.journal("build")
        if self.dry:
            refused = install.import_error(sys.executable)
            found = install.Built(None if refused else sys.executable, refused)
        else:
            found = install.install(self.machine.archs, self._install_run)
        lacking = {}
        if found.python and not self.dry:
            lacking = install.lacking(found.python, found.more)
        self.python, self.with_cuda = found.python, not found.error and "CUDA" not in lacking
        self.found_by = found.more
        told = [f"{kind} kernels CANNOT RUN: {why}" for kind, why in lacking.items()]
        if found.error:
            goes_on = "without the CUDA kernels, everything else goes on: " if found.python else ""
            told.append(f"{goes_on}{found.error}")
        status = "failed" if told or not found.python else "complete"
        if found.pip:  # which keeps no figure from counting
            told.append(f"built in place and found by PYTHONPATH, for pip failed: {found.pip}")
        detail = "\n".join(told)
        seconds = round(time.monotonic() - start, 1)
        journal.add("stage", status=status, seconds=seconds, detail=detail)
        print(f"== build: {status} {detail}", flush=True)

    def _install_run(
        self, command: Sequence[str], more: Mapping[str, str]
    ) -> tuple[int | None, str]:
        path = self.out / "build.log"
        before = path.stat().st_size if path.exists() else 0
        deadline = min(time.monotonic() + STAGES["build"].seconds, self.deadline - _GRACE)
        ended = self._child(command, "build", more, deadline)
        with open(path, "rb") as log:
            log.seek(before)
            return ended, log.read().decode(errors="replace")

    def _run(self, stage: str, journal: Journal, python: str) -> None:
        start = time.monotonic()
        limit = min(start + STAGES[stage].seconds, self.deadline - _GRACE)
        print(f"== {stage}: {max(0.0, limit - start):.0f} s at most", flush=True)
        status, detail, failed = "out of time", "", False
        for restart in range(MOST_RESTARTS):
            left = limit - time.monotonic()
            if left < _GRACE:
                break
            command, more = self._command(stage, python, left, again=restart > 0)
            ended = self._child(command, stage, more, limit + _GRACE)
            failed |= stage == "test" and ended == TESTS_FAILED
            # A test that hangs ends pytest with the status of one that fails: what is left runs on.
            hung = failed and ended == TESTS_FAILED and not self.workers
            if ended == RESTART or (ended is not None and ended < 0) or hung:
                print(f"== {stage}: goes on in a new process ({ended})", flush=True)
                continue
            if ended in (0, NO_TESTS_LEFT) or failed:
                status = "failed" if failed else "complete"
            elif ended is not None and (ended != OUT_OF_TIME or stage == "test"):
                # For pytest the status of OUT_OF_TIME is an error of its own.
                status, detail = "failed", f"exit status {ended}"
            break
        seconds = round(time.monotonic() - start, 1)
        journal.add("stage", status=status, seconds=seconds, detail=detail)
        print(f"== {stage}: {status}, {seconds} s", flush=True)
        self.write()

    def _command(
        self, stage: str, python: str, seconds: float, *, again: bool
    ) -> tuple[list[str], dict[str, str]]:
        dry = {"SPEFT_GPU_DRY_RUN": "1", "TRITON_INTERPRET": "1"} if self.dry else {}
        if stage != "test":
            device = ["--device", "cpu" if self.dry else "cuda", "--key", self.device]
            run = ["sanitize" if stage in ("small", "sanitize") else "run", stage]
            run = ["tuning"] if stage == "tune" else run
            module = [python, "-W", "ignore", "-m", f"speft_kernels.bench.gpu.{run[0]}"]
            return [*module, str(self.out), *run[1:], *device, "--seconds", f"{seconds:.0f}"], dry
        # A worker that loses the device is replaced. By default 4 x as many are, and no more.
        spread = ["-n", str(self.workers), "--max-worker-restart", "1000"] if self.workers else []
        pytest = [python, "-m", "pytest", "tests/gpu", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
        more = {"SPEFT_GPU_JOURNAL": str(self.out / NAME), "SPEFT_GPU_KEY": self.device, **dry}
        # Each of the tests' processes would start as many compilers and threads as there are cores.
        more["TORCHINDUCTOR_COMPILE_THREADS"] = "2"
        if self.workers:
            more["OMP_NUM_THREADS"] = str(max(1, self.machine.cores // self.workers))
        if again:
            more["SPEFT_GPU_AGAIN"] = "1"
        if self.machine.timeout:
            limits = ["--timeout", "150", "--timeout-method", "thread"]
        else:
            # pyproject.toml sets the plugin's limit, which --strict-config refuses without it. A
            # test that hangs then takes the rest of the stage's time.
            limits = ["--override-ini", "addopts=--strict-markers -ra"]
        return [*pytest, *limits, *spread], more

    def _child(
        self, command: Sequence[str], stage: str, more: Mapping[str, str], deadline: float
    ) -> int | None:
        """Run a command, its output shown and kept in a log; None where it was out of time."""
        more = {**self.found_by, **more}
        with open(self.out / f"{stage}.log", "ab") as log, _group(command, more) as child:
            assert child.stdout is not None
            copying = threading.Thread(target=_copy, args=(child.stdout, log), daemon=True)
            copying.start()
            written = time.monotonic()
            while child.poll() is None and time.monotonic() < deadline:
                time.sleep(0.2)
                if time.monotonic() - written > 10:
                    self.write()  # what is known if nothing more comes
                    written = time.monotonic()
            ended = child.poll()
            if ended is not None:
                copying.join(5)
        return ended

    def write(self) -> dict[str, Any]:
        found = record.build(self.out, self.device)
        record.write(self.out, found)
        return found


@contextlib.contextmanager
def _group(command: Sequence[str], more: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own, which does not outlive the block. No session of its own:
    whoever ends ours is to end it, too.
    """
    child = subprocess.Popen(
        command,
        cwd=ROOT,
        env=install.environment(more),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=os.setpgrp,
    )
    try:
        yield child
    finally:
        for how in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, how)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_GRACE / 2)
                break


def _copy(source: IO[bytes], log: IO[bytes]) -> None:
    for line in source:
        with contextlib.suppress(ValueError):  # closed: the stage was cut off
            log.write(line)
            log.flush()
        sys.stdout.write(line.decode(errors="replace"))
        sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
