"""What a run would do, found out without training and without downloading anything."""

from __future__ import annotations

from pathlib import Path

import torch

from ..targets import find_targets
from .config import ADAPTERS, FIELDS, RunConfig
from .data import Examples, read_examples
from .inputs import check_rank
from .loop import check_moves, steps_of
from .methods import budgeted
from .models import load_causal_lm, load_classifier, load_tokenizer, quiet_transformers, resolve


def resolved(config: RunConfig) -> str:
    """The settings that are not defaults, the data, the model, and the budget in numbers, as text.

    Files and folders are read. What only a download can tell (a dataset or model of the hub) is
    named as such. That the data do not fit each other (their columns, labels, lengths), or that the
    output is taken, only the run finds; its steps may be fewer by examples that it leaves out.

    Raises:
        ConfigError, DataError: the settings, a file or the model cannot be used.
    """
    if not config.validation:
        config.require("eval")
    config = config.located()
    lines = ["settings that are not the default's:"]
    # Some defaults go with others: they are those of a run that gives none of them.
    defaults = RunConfig(train="-", output="-", task=config.task, method=config.method)
    for name in FIELDS:
        value = getattr(config, name)
        if value != getattr(defaults, name) and name not in ("train", "eval", "test", "model"):
            lines.append(f"  {name}: {value}")
    lines.append(f"  learning rates: {config.learning_rate:g}, head {config.head_learning_rate:g}")
    if config.head_warmup_steps:
        lines.append(f"  the head trains alone first, for {config.head_warmup_steps} steps")
    lines.append("data:")
    train: Examples | None = None
    for name in ("train", "eval", "test"):
        source = getattr(config, name)
        if not source:
            continue
        if not _is_local(source):
            lines.append(f"  {name}: {source} (to be downloaded)")
            continue
        examples = read_examples(source, config.task)
        train = examples if name == "train" else train
        columns = ", ".join(examples.columns)
        lines.append(f"  {name}: {source} ({len(examples):,} rows of {columns})")
    if train is not None:
        rows = len(train) - round(config.validation * len(train))
        check_moves(config, rows)
        lines.append(f"  {steps_of(config, rows):,} steps")
    lines.append("model:")
    lines += [f"  {line}" for line in _model(config, train)]
    return "\n".join(lines)


def _is_local(source: str) -> bool:
    """Whether it is not the name of a dataset of the hub: then it has to be readable here."""
    path = Path(source)
    return path.exists() or path.suffix != "" or source.startswith(("/", ".", "~"))


def _model(config: RunConfig, train: Examples | None) -> list[str]:
    where = resolve(config.model)
    if not Path(where).is_dir():
        budget = f"density {config.density:g}"
        if config.lora_budget:
            budget = f"the budget of LoRA r = {config.lora_budget}"
        adapted = config.method in ADAPTERS
        return [f"{where} (to be downloaded)"] + ([f"trains at {budget}"] if adapted else [])
    with quiet_transformers(), torch.random.fork_rng():
        if config.task == "causal-lm":
            model = load_causal_lm(config.model)
        else:
            labels = sorted({row.label or "" for row in train.rows}) if train else ["0", "1"]
            tokenizer = load_tokenizer(config.model)
            model = load_classifier(
                config.model, labels, pooling=config.pooling, tokenizer=tokenizer
            )
    lines = [f"{where} ({sum(p.numel() for p in model.parameters()):,} parameters)"]
    if config.method in ADAPTERS:
        targets = find_targets(model, config.speft())
        config = budgeted(config, targets)
        check_rank(config, targets)
        size = sum(layer.weight.numel() for layer in targets.layers.values())
        lines.append(f"{len(targets.layers)} layers with {size:,} weights are adapted")
        if config.method in ("speft", "supertuning"):
            lines.append(f"{round(config.density * size):,} of them train ({config.density:.4%})")
        else:
            lines.append(f"rank {config.lora_rank}")
    return lines
