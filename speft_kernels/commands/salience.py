"""`speft salience`: which weights would train, without training."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import ConfigError
from ..files import check_output, new_output
from ..finetune.config import RunConfig
from ..finetune.folder import RunFolder
from ..finetune.signals import Interrupted
from .finetune import report_interruption
from .settings import add_settings, given_settings

SETTINGS = (
    *("train", "output", "model", "task", "max_length", "pooling", "density", "salience", "scope"),
    *("selection", "sample_columns"),
    *("target_modules", "exclude_modules", "experts", "block_shape"),
    *("scoring_examples", "scoring_batches"),
    *("accumulate", "accumulator_dtype", "accumulator_device", "grasp_sign", "grasp_temperature"),
    *("lora_budget", "head_warmup_steps", "head_lr", "dtype", "seed"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, SETTINGS)


def run(args: argparse.Namespace) -> int:
    config = RunConfig.from_dict(given_settings(args)).located()
    if config.method != "speft":
        raise ConfigError(
            f"method = {config.method!r}: only method 'speft' trains weights that a score chooses"
        )
    if config.mask is not None:
        raise ConfigError(f"mask = {config.mask!r}: this command writes a mask, and takes none")
    try:
        print(_score(config))
    except Interrupted as interruption:
        return report_interruption(interruption)
    return 0


def _score(config: RunConfig) -> str:
    """Writes the mask and a report of its scores; returns a summary as text.

    The mask is an adapter whose sparse values are zero; a head is in it as its warm-up left it.
    """
    from accelerate.utils import set_seed

    from ..adapter import save_adapter
    from ..files import write_json
    from ..finetune import methods
    from ..finetune.display import Display
    from ..finetune.inputs import read_inputs
    from ..finetune.models import quiet_transformers
    from ..finetune.run import start_accelerator
    from ..finetune.signals import StopSignals
    from ..model import summary

    output = Path(config.output)
    check_output(output)
    with quiet_transformers(), StopSignals() as stop:
        accelerator = start_accelerator(config.dtype)
        set_seed(config.seed)
        inputs = read_inputs(config, Display())
        config = inputs.config  # with its budget in numbers
        model = inputs.model.to(accelerator.device)
        scoring = inputs.scoring(accelerator, stop)
        methods.warm_up_head(model, config, inputs.targets, *scoring)
        prepared = methods.prepare(model, config, inputs.targets, *scoring)
    assert prepared.report is not None
    with new_output(output) as draft:
        save_adapter(model, RunFolder(draft).adapter, config=config.speft(), extra=inputs.about())
        write_json(draft / "salience.json", prepared.report.to_dict())
    notes = "".join(f"{note}\n" for note in prepared.report.notes)
    seconds = prepared.report.seconds
    return f"{summary(model)}\n{notes}scored in {seconds:.1f} s; written to {output}"
