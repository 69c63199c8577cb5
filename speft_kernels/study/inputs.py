"""Whether the data and the weights are still those that a study's rows were made from."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

from ..errors import ConfigError, DataError
from ..finetune.config import RunConfig
from .config import PATHS, Run, Study
from .rows import Row


def changed_inputs(study: Study, runs: Mapping[str, Run], rows: Mapping[str, Row]) -> list[str]:
    """A line for each source of data, or model, that is not what some of `rows` name; with its
    path.

    Args:
        runs: the study's, by id, that of each row among them.
    """
    present: dict[tuple[str, str, str], str] = {}
    others: dict[tuple[str, str], list[str]] = {}
    for id, row in rows.items():
        recorded = dict(part.split("=", 1) for part in row.inputs.split() if "=" in part)
        if not recorded:
            continue  # from before rows named their inputs
        config = runs[id].config(Path(), study.data)
        for name in (*PATHS, "model"):
            source = getattr(config, name)
            if not source or name not in recorded:
                continue
            key = (name, config.task, source)
            if key not in present:
                present[key] = _digest(config, name)
            if present[key] not in ("", recorded[name]):
                others.setdefault((name, source), []).append(id)
    return [
        f"{name} {source}: it was another one for {len(ids)} rows, such as {ids[0]}"
        for (name, source), ids in others.items()
    ]


def _digest(config: RunConfig, name: str) -> str:
    """Empty for what is not here: no new row can come from it."""
    from ..finetune.inputs import digest_of

    with contextlib.suppress(ConfigError, DataError, OSError):
        return digest_of(config, name)
    return ""
