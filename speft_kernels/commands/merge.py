"""`speft merge`: base model and adapter in, plain model out."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import AdapterError, shown
from ..files import check_output, new_output, path_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", help="folder or hub id of the base model (default: as recorded in the adapter)"
    )
    parser.add_argument("--adapter", required=True, help="folder of the adapter, or of its run")
    parser.add_argument("--output", required=True, help="folder to write; it must not exist yet")


def run(args: argparse.Namespace) -> int:
    from ..adapter import load_adapter
    from ..finetune.models import (
        load_causal_lm,
        load_classifier,
        load_tokenizer,
        quiet_transformers,
    )
    from ..model import desparsify, sparse_layers

    output = path_of("output", args.output)
    check_output(output)
    folder = adapter_folder(args.adapter)
    about = _about(folder)
    name = args.model or about["model"]
    tokenizer = load_tokenizer(name)
    if about["task"] == "causal-lm":
        model = load_causal_lm(name)
    else:
        model = load_classifier(
            name, about["labels"], pooling=about["pooling"], tokenizer=tokenizer
        )
    load_adapter(model, folder)
    if sparse_layers(model):
        desparsify(model)
    with quiet_transformers(), new_output(output) as draft:
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
    print(f"{output}: {type(model).__name__} with the adapter of {folder} merged in")
    return 0


def adapter_folder(given: str) -> Path:
    """The adapter's folder where that of its run was given.

    Raises AdapterError, with the reason, for one that another library or method wrote.
    """
    folder = path_of("adapter", given)
    if (folder / "result.json").is_file() or (folder / "metrics.jsonl").is_file():
        folder = folder / "adapter"
    if (folder / "adapter_model.safetensors").is_file():
        raise AdapterError(
            f"{folder} is a LoRA adapter; merge it with PEFT: "
            "PeftModel.from_pretrained(model, folder).merge_and_unload()"
        )
    if (folder / "model.safetensors").is_file():
        raise AdapterError(f"{folder} is a whole model (method full); there is nothing to merge")
    return folder


def _about(folder: Path) -> dict[str, Any]:
    from ..adapter_file import CONFIG_FILE, read_adapter
    from ..finetune.config import TASKS

    about = read_adapter(folder).extra
    missing = [key for key in ("task", "model", "labels", "pooling") if key not in about]
    if missing:
        raise AdapterError(
            f"{folder}: was not written by 'speft finetune', so the kind of model is not known; "
            "load it in Python with load_adapter(model, folder) and desparsify(model)"
        )
    headed = about["task"] == "classification"
    for key, fits, wanted in (
        ("task", about["task"] in TASKS, f"one of {', '.join(TASKS)}"),
        ("model", isinstance(about["model"], str), "a folder or hub id"),
        ("labels", not headed or _are_labels(about["labels"]), "a list of distinct names"),
        ("pooling", not headed or about["pooling"] in ("mean", "model"), "mean or model"),
    ):
        if not fits:
            raise AdapterError(
                f"{folder / CONFIG_FILE}: {key} must be {wanted}, got {shown(about[key])}"
            )
    return about


def _are_labels(value: object) -> bool:
    return (
        isinstance(value, list)
        and all(isinstance(label, str) for label in value)
        and len(set(value)) == len(value)
    )
