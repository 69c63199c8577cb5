"""A trained model again, from what a run or `speft merge` left."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..adapter import load_adapter
from ..adapter_file import CONFIG_FILE, TENSORS_FILE, read_adapter
from ..errors import AdapterError, ConfigError, shown
from ..experts import join_experts, names_experts, split_experts
from ..files import read_json
from ..model import desparsify, sparse_layers
from . import baselines
from .config import TASKS
from .folder import PEFT_FILE, RunFolder, is_run
from .methods import ABOUT
from .models import load_causal_lm, load_classifier, load_tokenizer
from .tasks import CausalLM, Classification, Task, positive_label

# A whole model's folder holds it, an adapter's does not.
WHOLE_FILE = "config.json"


@dataclass(frozen=True)
class Trained:
    """A model with what was trained in it, in evaluation mode on the CPU: a plain one; of LoRA and
    the like a `PeftModel`.

    `task` makes examples into batches as in training. `labels` are the class names in the order of
    the model's outputs, none of a language model; `positive_label` is the one of two that F1 is of.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    task: Task
    labels: tuple[str, ...]
    positive_label: str | None


def load_trained(
    folder: str | Path, *, model: str | None = None, max_length: int | None = None
) -> Trained:
    """The model of a run's folder, of its adapter, or of what `speft merge` wrote.

    Args:
        model: folder or hub id of the adapter's base model; by default as recorded with it.
        max_length: longest input in tokens; by default that of training.

    Raises:
        AdapterError: the folder holds no such thing, or is damaged.
        ConfigError: the base model cannot be loaded, or is named for a folder that needs none.
    """
    folder = trained_folder(Path(folder))
    about = about_of(folder)
    whole = (folder / WHOLE_FILE).is_file()
    if whole and model is not None:
        raise ConfigError(
            f"{folder} holds a whole model, so the base {shown(model)} would not be read; leave it "
            "out"
        )
    where = str(folder) if whole else model or about["model"]
    tokenizer = load_tokenizer(where)
    length = max_length or about["max_length"]
    labels = tuple(about["labels"])
    positive = positive_label(about.get("positive_label"), labels)
    network: Any
    task: Task
    if about["task"] == "causal-lm":
        task = CausalLM(tokenizer, length)
        network = load_causal_lm(where)
    else:
        numbers = {label: i for i, label in enumerate(labels)}
        task = Classification(tokenizer, numbers, length, positive)
        network = load_classifier(
            where, labels, pooling=about["pooling"], tokenizer=tokenizer, whole=whole
        )
    if (folder / PEFT_FILE).is_file():
        network = baselines.load(network, folder)
    elif not whole:
        split = names_experts(network, read_adapter(folder).layers)
        if split:
            split_experts(network)
        load_adapter(network, folder)
        if sparse_layers(network):
            desparsify(network)
        if split:
            join_experts(network)
    return Trained(network.eval(), tokenizer, task, labels, positive)


def trained_folder(folder: Path) -> Path:
    """The adapter's folder where that of its run was given.

    Raises AdapterError where the run has not come to its end.
    """
    if not is_run(folder):
        return folder
    if not RunFolder(folder).adapter.is_dir():
        output = shlex.quote(str(folder))
        raise AdapterError(
            f"{folder} is a run that is not finished: go on with speft finetune --resume "
            f"--output {output}"
        )
    return RunFolder(folder).adapter


def about_of(folder: Path) -> dict[str, Any]:
    """What was saved beside the tensors: task, model, labels, pooling, max_length, and where there
    are two labels the positive one (null in what an earlier version wrote: the second); checked.

    Raises AdapterError for a folder that this package did not write, and for a damaged one.
    """
    if (folder / ABOUT).is_file():
        path, about = folder / ABOUT, read_json(folder / ABOUT, AdapterError)
    elif (folder / TENSORS_FILE).is_file() or (folder / CONFIG_FILE).is_file():
        path, about = folder / CONFIG_FILE, read_adapter(folder).extra
    else:
        raise AdapterError(
            f"{folder} is no folder of a run, of an adapter or of a merged model"
            if folder.is_dir()
            else f"there is no adapter folder {str(folder)!r}"
        )
    missing = [k for k in ("task", "model", "labels", "pooling", "max_length") if k not in about]
    if missing:
        raise AdapterError(
            f"{folder}: was not written by 'speft finetune', so the kind of model is not known; "
            "load it in Python with load_adapter(model, folder) and desparsify(model)"
        )
    headed, length = about["task"] == "classification", about["max_length"]
    names = "a list of distinct names" if headed else "empty, as a language model has none"
    for key, fits, wanted in (
        ("task", about["task"] in TASKS, f"one of {', '.join(TASKS)}"),
        ("model", isinstance(about["model"], str), "a folder or hub id"),
        ("labels", _are_labels(about["labels"]) if headed else about["labels"] == [], names),
        ("positive_label", _is_one_of(about), "null or one of two labels"),
        ("pooling", not headed or about["pooling"] in ("mean", "model"), "mean or model"),
        ("max_length", type(length) is int and 0 < length < 2**31, "a number of tokens"),
    ):
        if not fits:
            raise AdapterError(f"{path}: {key} must be {wanted}, got {shown(about.get(key))}")
    return about


def _is_one_of(about: dict[str, Any]) -> bool:
    positive, labels = about.get("positive_label"), about["labels"]
    return positive is None or (
        isinstance(labels, list) and len(labels) == 2 and positive in labels
    )


def _are_labels(value: object) -> bool:
    return (
        isinstance(value, list)
        and all(isinstance(label, str) for label in value)
        and len(set(value)) == len(value) >= 2
    )
