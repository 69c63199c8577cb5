"""Reports: a run's or a study's folder as one HTML page that needs nothing but itself."""

from __future__ import annotations

from pathlib import Path

from ..errors import ConfigError
from ..files import replaced
from ..finetune.folder import is_run
from ..study.folder import is_study

__all__ = ["write_report"]


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Write the report of a run or a study, in one step, and return where it is.

    Args:
        output: the file (default: `report.html` in the folder); one that exists is replaced.

    Raises:
        ConfigError: the folder is no run and no study, or a file of it is missing or damaged.
        OutputError: the report cannot be written.
        ModuleNotFoundError: matplotlib is not installed.
    """
    output = folder / "report.html" if output is None else output
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder")
    if not output.parent.is_dir() or (output.exists() and not output.is_file()):
        raise ConfigError(f"output {output} is no file, or in no folder; choose another --output")
    if is_study(folder):
        from .study import study_page as report_of
    elif is_run(folder):
        from .run import run_page as report_of
    else:
        raise ConfigError(
            f"{folder} is neither a run (config.json, metrics.jsonl) nor a study (study.json, "
            "runs.csv)"
        )
    text = report_of(folder)
    with replaced(output) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
    return output
