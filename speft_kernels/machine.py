"""What this machine is called, and what runs on it: the commit of the sources, the libraries."""

from __future__ import annotations

import functools
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]


@functools.lru_cache(maxsize=1)
def processor() -> str:
    """The processor's name, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def installed(library: str) -> str:
    """The version of a library, empty where it is not installed."""
    try:
        return version(library)
    except PackageNotFoundError:
        return ""


@functools.cache
def commit(root: Path = _ROOT) -> str:
    """The commit of the sources, with "-dirty" where they differ from it; "unknown" outside git.

    Results are left out of the comparison: recording one must not make the next one dirty.
    """
    top = _git(root, "rev-parse", "--show-toplevel")
    # An installed copy may lie inside some other repository, whose commit would say nothing.
    if top is None or Path(top).resolve() != root.resolve():
        return "unknown"
    head = _git(root, "rev-parse", "--short=12", "HEAD")
    if head is None:
        return "unknown"
    changes = _git(root, "status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
    return head if changes == "" else f"{head}-dirty"


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
