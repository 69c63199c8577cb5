"""What a run's folder holds, by name; to be read without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PEFT_FILE = "adapter_model.safetensors"  # beside an `adapter_config.json` of PEFT's


@dataclass(frozen=True)
class RunFolder:
    """The places in a run's folder."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.json"

    @property
    def result(self) -> Path:
        return self.root / "result.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def adapter(self) -> Path:
        return self.root / "adapter"

    @property
    def checkpoint(self) -> Path:
        return self.root / "checkpoint"

    @property
    def state(self) -> Path:
        return self.checkpoint / "state.pt"

    @property
    def best(self) -> Path:
        return self.checkpoint / "best.safetensors"

    @property
    def names(self) -> set[str]:
        """Of what a run writes there, and a report of it."""
        places = (self.config, self.result, self.metrics, self.adapter, self.checkpoint)
        return {"report.html", *(path.name for path in places)}


def is_run(root: Path) -> bool:
    """Whether a run was begun here; a model's folder has a `config.json`, too."""
    folder = RunFolder(root)
    return any(path.exists() for path in (folder.metrics, folder.result, folder.checkpoint))
