"""Several processes at a time, each for a limited time. Nothing here imports torch."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any


@dataclass(frozen=True)
class Job:
    """A command, and the seconds that it may take."""

    name: Any
    command: Sequence[str]
    seconds: float


@dataclass
class _Running:
    job: Job
    more: Mapping[str, str]
    output: IO[bytes] = field(default_factory=tempfile.TemporaryFile)

    def __post_init__(self) -> None:
        self.deadline = time.monotonic() + self.job.seconds
        self.process = subprocess.Popen(
            self.job.command,
            env={**os.environ, **self.more},
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            preexec_fn=os.setpgrp,  # compute-sanitizer has a child, which does not end with it
        )

    def has_ended(self) -> bool:
        return self.process.poll() is not None or time.monotonic() > self.deadline

    def end(self) -> tuple[int | None, str]:
        """Exit status, None where it was still running, and output."""
        status = self.process.poll()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(2)
        with self.output as output:
            output.seek(0)
            return status, output.read().decode(errors="replace")


def outcomes(
    jobs: Iterable[Job], at_a_time: int, more: Mapping[str, str]
) -> Iterator[tuple[Job, int | None, str]]:
    """Run jobs; tell of each, as it ends, its exit status, None where it took too long, and its
    output.

    Args:
        jobs: the next one is asked for when there is room for it, so that it may depend on what
            came of those before.
        more: what the processes have in their environment besides.
    """
    left, running = iter(jobs), list[_Running]()
    # The processes are in groups of their own: whoever ends this one would leave them behind.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        while True:
            while len(running) < at_a_time and (job := next(left, None)) is not None:
                running.append(_Running(job, more))
            if not running:
                return
            for one in [one for one in running if one.has_ended()]:
                running.remove(one)
                yield one.job, *one.end()
            time.sleep(0.05)
    finally:
        for one in running:
            one.end()
        signal.signal(signal.SIGTERM, before)
