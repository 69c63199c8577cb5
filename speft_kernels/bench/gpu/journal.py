"""What a run found, as it found it: one line of JSON for each fact, appended when it is known.

A process that dies, or a machine that is taken away, loses only what it was working on; the next
run reads the journal and goes on. Nothing here imports torch.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
NAME = "journal.jsonl"

# What decides a result: a change here makes what was found before another program's.
_SOURCES = ("speft_kernels", "triton_kernels", "csrc", "setup.py", "pyproject.toml")
_SUFFIXES = (".py", ".toml", ".cpp", ".h", ".cu", ".cuh")


def fingerprint(stage: str, root: Path = ROOT) -> str:
    """Sixteen digits that tell the sources of a stage; the tests count for the test stage alone."""
    digest = hashlib.sha256()
    for name in (*_SOURCES, "tests") if stage == "test" else _SOURCES:
        found = [root / name] if (root / name).is_file() else (root / name).rglob("*")
        for path in sorted(p for p in found if p.suffix in _SUFFIXES):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0")
            digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def stage_parser(module: str) -> argparse.ArgumentParser:
    """What every process of a stage is called with."""
    parser = argparse.ArgumentParser(prog=f"python -m speft_kernels.bench.gpu.{module}")
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="time for the stage")
    parser.add_argument("--key", default="cpu", help="name of the device in the journal")
    return parser


@dataclass(frozen=True)
class Journal:
    """The journal of one stage on one device, in the file that all stages share.

    Attributes:
        device: the card's name; "cpu" in a dry run. Entries of other devices or of other sources
            are as if they were not there.
    """

    path: Path
    stage: str
    sources: str
    device: str

    def add(self, kind: str, **facts: Any) -> None:
        """Append an entry, safe from the end of this process."""
        who = {"stage": self.stage, "sources": self.sources, "device": self.device}
        line = json.dumps({"kind": kind, **who, **facts}, ensure_ascii=False) + "\n"
        with open(self.path, "ab+") as file:
            # A line that was cut off must not swallow this one.
            if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                line = "\n" + line
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())

    def entries(self, *kinds: str) -> Iterator[dict[str, Any]]:
        for entry in read(self.path):
            if entry["kind"] in kinds and self._owns(entry):
                yield entry

    def status(self) -> str | None:
        """How the stage ended the last time: "complete", "failed", "out of time"; None where it
        was never run.
        """
        return next((e["status"] for e in reversed(list(self.entries("stage")))), None)

    def forget(self) -> None:
        """Take the stage's entries out of the file."""
        kept = [e for e in read(self.path) if e["stage"] != self.stage]
        text = "".join(json.dumps(e, ensure_ascii=False) + "\n" for e in kept)
        self.path.write_text(text, encoding="utf-8")

    def _owns(self, entry: dict[str, Any]) -> bool:
        return (entry["stage"], entry["sources"], entry["device"]) == (
            self.stage,
            self.sources,
            self.device,
        )


def read(path: Path) -> list[dict[str, Any]]:
    """The entries of a file, but for a last line that was cut off while it was written."""
    if not path.exists():
        return []
    entries = []
    # Not `splitlines`: it ends one at marks that JSON has within a text, too.
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return entries
