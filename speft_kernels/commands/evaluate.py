"""`speft evaluate`: a trained model on data of the user's, and what it says of each row."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import ConfigError, shown
from ..files import json_bytes, path_of, replaced
from ..finetune.config import RunConfig
from .outputs import output_file
from .settings import add_flag, given_settings

_SETTINGS = ("max_length", "batch_size", "dtype")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", help="folder of a run, of its adapter, or of what 'speft merge' wrote"
    )
    parser.add_argument("--data", required=True, help="a TSV, CSV or JSONL file, or a dataset name")
    parser.add_argument(
        "--model", help="folder or hub id of the base model (default: as recorded in the adapter)"
    )
    for name in _SETTINGS:
        add_flag(parser, name, default="as in training" if name == "max_length" else None)
    parser.add_argument(
        "--predictions", metavar="FILE", help="write the label of each row as JSON lines"
    )


def run(args: argparse.Namespace) -> int:
    from ..finetune.data import check_labels, read_examples
    from ..finetune.display import Display
    from ..finetune.inputs import check_fit, encode
    from ..finetune.loop import evaluate
    from ..finetune.models import quiet_transformers
    from ..finetune.run import start_accelerator
    from ..finetune.signals import Interrupted, StopSignals
    from ..finetune.trained import load_trained
    from .finetune import report_interruption

    settings = given_settings(args)
    config = RunConfig.from_dict({**settings, "train": args.data, "output": args.folder})
    output = output_file("predictions", args.predictions)
    if output is not None and output.exists():
        raise ConfigError(f"--predictions {output} exists already; choose another file")
    with quiet_transformers(), StopSignals() as stop:
        accelerator = start_accelerator(config.dtype)
        trained = load_trained(
            path_of("folder", args.folder),
            model=args.model,
            max_length=config.max_length if "max_length" in settings else None,
        )
        task, labels = trained.task, trained.labels
        if output is not None and not labels:
            raise ConfigError("--predictions are labels, and a language model has none")
        kind = "classification" if labels else "causal-lm"
        examples = read_examples(args.data, kind, default_split="test")
        if labels:
            check_labels(examples, {label: i for i, label in enumerate(labels)})
        encoded = encode(task, examples, Display())
        check_fit(trained.model, trained.tokenizer, {"data": examples}, {"data": encoded})
        model = trained.model.to(accelerator.device)
        try:
            metrics, predicted = evaluate(
                model, task, encoded, config.batch_size, accelerator, stop
            )
        except Interrupted as interruption:
            return report_interruption(interruption)
    if output is not None:
        _write(output, [labels[number] for number in predicted])
    print(f"{examples.source}: {len(encoded):,} examples")
    for name, value in metrics.items():
        print(f"  {name + ':':12}{value:.4f}")
    if "f1" in metrics:
        print(f"  f1 is of the label {shown(trained.positive_label)}")
    return 0


def _write(output: Path, labels: list[str]) -> None:
    with replaced(output) as temporary:
        temporary.write_bytes(b"".join(json_bytes({"label": label}) + b"\n" for label in labels))
