"""What a run would do, found out without training and without downloading anything."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn

from ..errors import shown
from ..salience.draw import budget
from ..targets import Targets, note_of_left_out
from .config import ADAPTERS, RunConfig, usual_settings
from .data import Examples, is_local, label_ids
from .display import Display
from .folder import RunFolder
from .inputs import SPLITS, Sources, load_model, read_source, read_sources, with_model
from .loop import check_moves, steps_of
from .mask import Mask, rated, read_mask
from .models import folder_or_id, load_tokenizer, quiet_transformers
from .run import check_apart, check_free, start_accelerator


def dry_run(config: RunConfig, *, overwrite: bool = False, display: Display | None = None) -> str:
    """The settings that are not defaults, the data, the model, and the budget in numbers, as text.

    Where data and model are on this machine they are read and checked as the run itself does it.
    What only a download can tell (a dataset or model of the hub) is named as such.

    Args:
        overwrite: whether the run would replace an earlier one in `config.output`.

    Raises:
        ConfigError, DataError: the settings, a file or the model cannot be used, or the output is
            taken.
        AdapterError: the mask cannot be used, or was chosen on another model.
    """
    if not config.validation:
        config.require("eval")
    config = config.located()
    folder = RunFolder(Path(config.output))
    check_free(folder, overwrite)
    check_apart(folder, config)
    start_accelerator(config.dtype)
    mask = read_mask(config)
    lines = ["settings that are not the default's:"]
    usual = usual_settings(config.task, config.method)
    for name, value in config.to_dict().items():
        if value != usual[name] and name not in (*SPLITS, "model"):
            lines.append(f"  {name}: {getattr(config, name)}")
    config = rated(config, mask)
    head = "" if config.task == "causal-lm" else f", head {config.head_learning_rate:g}"
    lines.append(f"  learning rates: {config.learning_rate:g}{head}")
    if config.head_warmup_steps:
        lines.append(f"  the head trains alone first, for {config.head_warmup_steps} steps")

    given = {name: getattr(config, name) for name in SPLITS if getattr(config, name)}
    here = {name for name, source in given.items() if is_local(source)}
    sources = read_sources(config) if len(here) == len(given) else None
    read = sources.given if sources else {name: read_source(config, name) for name in here}
    with quiet_transformers(), torch.random.fork_rng():
        rows, model = _model(config, mask, sources, read.get("train"), display or Display())
    lines.append("data:")
    for name, source in given.items():
        about = "to be downloaded"
        if name in here:
            about = f"{len(read[name]):,} rows of {', '.join(read[name].columns)}"
        lines.append(f"  {name}: {source} ({about})")
    if sources is not None and config.metric_name == "f1":
        lines.append(f"  f1 is of the label {shown(sources.positive_label)}")
    if rows is not None:
        check_moves(config, rows)
        lines.append(f"  {steps_of(config, rows):,} steps")
    lines.append("model:")
    lines += [f"  {line}" for line in model]
    return "\n".join(lines)


def _model(
    config: RunConfig,
    mask: Mask | None,
    sources: Sources | None,
    train: Examples | None,
    display: Display,
) -> tuple[int | None, list[str]]:
    """How many examples train, where that is known without a download, and lines on the model."""
    where = folder_or_id(config.model)
    rows = None if sources is None else len(sources.used["train"])
    if not Path(where).is_dir():
        lines = [f"{where} (to be downloaded)"]
        if config.method in ADAPTERS:
            lora = config.lora_budget
            share = f"the budget of LoRA r = {lora}" if lora else f"density {config.density:g}"
            lines.append(f"trains at {share}" if mask is None else f"{mask.nnz:,} weights train")
        return rows, lines
    if sources is not None:
        inputs = with_model(config, sources, mask, display)
        return len(inputs.train), _budget(inputs.model, inputs.targets, inputs.config, mask, where)
    labels = ["0", "1"] if train is None or config.task != "classification" else label_ids(train)
    tokenizer = load_tokenizer(config.model)
    model, targets, config, _ = load_model(config, list(labels), mask, tokenizer, display)
    return None, _budget(model, targets, config, mask, where)


def _budget(
    model: nn.Module, targets: Targets, config: RunConfig, mask: Mask | None, where: str
) -> list[str]:
    lines = [f"{where} ({sum(p.numel() for p in model.parameters()):,} parameters)"]
    if config.method not in ADAPTERS:
        return lines
    sizes = [n * k for n, k in targets.shapes.values()]
    lines.append(f"{len(sizes)} layers with {sum(sizes):,} weights are adapted")
    if mask is None:
        lines += note_of_left_out(model, targets, config.speft())
    if config.method not in ("speft", "supertuning"):
        return [*lines, f"rank {config.lora_rank}"]
    if mask is not None:
        return [*lines, f"{mask.nnz:,} of them train ({mask.nnz / sum(sizes):.4%})"]
    scored = sizes if config.scope == "layer" else [sum(sizes)]
    block = math.prod(config.block_shape)
    trained = block * sum(budget(size // block, config.density) for size in scored)
    return [*lines, f"{trained:,} of them train ({trained / sum(sizes):.4%})"]
