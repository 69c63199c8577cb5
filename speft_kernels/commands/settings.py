"""The settings of a run as command-line flags, made from the fields of `RunConfig`."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..finetune.config import DEFAULT_LR, DRAWN_LR, FIELDS, coerce, load_yaml

GROUPS = {
    "data and model": (
        *("train", "eval", "test", "validation", "output", "model", "task", "max_length"),
        "pooling",
    ),
    "what trains": (
        *("method", "mask", "density", "salience", "scope", "selection", "sample_columns"),
        *("target_modules", "exclude_modules", "experts"),
        *("block_shape", "mode", "scoring_examples", "scoring_batches", "accumulate"),
        *("accumulator_dtype", "accumulator_device", "grasp_sign", "grasp_temperature"),
        *("dynamic", "dynamic_every", "dynamic_share", "dynamic_until", "head_warmup_steps"),
        *("lora_rank", "lora_budget"),
    ),
    "training": (
        *("epochs", "max_steps", "lr", "head_lr", "batch_size", "grad_accumulation", "clip"),
        *("scheduler", "warmup_ratio", "weight_decay", "metric", "positive_label", "dtype"),
        *("eval_every", "save_every", "seed"),
    ),
}
_SEVERAL = ("target_modules", "exclude_modules")


def add_settings(parser: argparse.ArgumentParser, names: Sequence[str] | None = None) -> None:
    """Adds `--config` and a flag for each of `names` (default: all settings).

    A flag that is not given leaves no attribute, so that a YAML file or a default can speak.
    """
    parser.add_argument("--config", metavar="FILE", help="YAML file with these settings as keys")
    for title, members in GROUPS.items():
        group = parser.add_argument_group(title)
        for name in members:
            if names is None or name in names:
                add_flag(group, name)


def add_flag(group: argparse._ActionsContainer, name: str, default: str | None = None) -> None:
    """Adds the flag of one setting; `default` is said in the place of the setting's own."""
    spec = FIELDS[name]
    choices = spec.metadata["choices"]
    help = spec.metadata["help"].replace("%", "%%")
    if choices:
        help += f" ({', '.join(choices)})"
    if name == "lr":
        rates = ", ".join(f"{method} {lr:g}" for method, lr in DEFAULT_LR.items())
        help += f" ({rates}; with a mask that is drawn {DRAWN_LR:g})"
    if default is not None:
        help += f" [{default}]"
    elif spec.default not in (None, "", ()):
        value: Any = spec.default
        default = "x".join(map(str, value)) if name == "block_shape" else value
        help += f" [{default}]"
    group.add_argument(
        f"--{name.replace('_', '-')}",
        dest=f"setting_{name}",
        metavar=name.rpartition("_")[2].upper(),
        nargs="+" if name in _SEVERAL else None,
        default=argparse.SUPPRESS,
        help=textwrap.dedent(help),
    )


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of the YAML file, overridden by the flags."""
    file = vars(args).get("config")
    settings = load_yaml(Path(file)) if file is not None else {}
    for key, value in vars(args).items():
        if key.startswith("setting_"):
            name = key.removeprefix("setting_")
            if value == ["all-linear"]:
                value = "all-linear"
            settings[name] = coerce(name, value)
    return settings
