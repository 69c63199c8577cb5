"""What a study's folder holds, by name; to be read without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class StudyFolder:
    """The places in a study's folder."""

    root: Path

    @property
    def study(self) -> Path:
        return self.root / "study.json"

    @property
    def rows(self) -> Path:
        return self.root / "runs.csv"

    @property
    def failures(self) -> Path:
        return self.root / "failures.json"

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def lock(self) -> Path:
        return self.root / ".lock"


def is_study(root: Path) -> bool:
    places = StudyFolder(root)
    return places.study.exists() or places.rows.exists()
