"""Whether data, weights and settings are still those that a study's rows were made with."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import AdapterError, ConfigError, DataError
from ..finetune.config import RunConfig, without_choice
from .config import PATHS, Run, Study
from .rows import Row


def changed_inputs(study: Study, runs: Mapping[str, Run], rows: Mapping[str, Row]) -> list[str]:
    """A line for each source of data, model, score of the user's own, or mask, that is not what
    some of `rows` name; with its path or name.

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
        for name in (*PATHS, "model", "salience", "mask"):
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


def changed_settings(study: Study, runs: Mapping[str, Run], rows: Mapping[str, Row]) -> list[str]:
    """A line for each setting that has another value now than in some of `rows`.

    What the study's file says is in the ids; this is for the defaults of the rest.

    Args:
        runs: the study's, by id, that of each row among them.
    """
    others: dict[str, list[str]] = {}
    for id, row in rows.items():
        config = runs[id].config(Path(), study.data)
        now, unread = without_choice(config.to_dict()), _unread(config)
        for key, value in _recorded(row).items():
            if key in now and key not in unread and now[key] != value:
                change = f"{key}: it was {value} and is {now[key]}"
                others.setdefault(change, []).append(id)
    return [f"{change}, for {len(ids)} rows, such as {ids[0]}" for change, ids in others.items()]


def _recorded(row: Row) -> dict[str, Any]:
    with contextlib.suppress(ValueError, RecursionError):
        settings = json.loads(row.settings)
        if isinstance(settings, dict):
            return settings
    raise DataError(f"run {row.id}: the settings in its row are no JSON object")


def _unread(config: RunConfig) -> set[str]:
    """The settings that do not matter to such a run, and those that rows tell in another way."""
    sparse, drawn = config.method == "speft", config.selection == "sample"
    read = {
        # A row has the density and the rank to which a budget led.
        "density": config.method in ("speft", "supertuning") and not config.lora_budget,
        "lora_rank": config.method in ("lora", "pissa", "shira") and not config.lora_budget,
        "sample_columns": sparse and drawn,
        **dict.fromkeys(("salience", "scope", "selection", "block_shape", "mode"), sparse),
        "experts": sparse,
        **dict.fromkeys(("accumulate", "accumulator_dtype", "accumulator_device"), sparse),
        **dict.fromkeys(("grasp_sign", "grasp_temperature"), config.salience == "grasp"),
        **dict.fromkeys(("dynamic_every", "dynamic_share", "dynamic_until"), config.dynamic),
    }
    # Paths are of one machine; digests say what lies there.
    return {
        "output",
        "model",
        "mask",
        *PATHS,
        *(name for name, matters in read.items() if not matters),
    }


def _digest(config: RunConfig, name: str) -> str:
    """Empty for what is not here: no new row can come from it."""
    from ..finetune.inputs import digest_of

    with contextlib.suppress(AdapterError, ConfigError, DataError, OSError):
        return digest_of(config, name)
    return ""
