"""One run, from its settings to `result.json`."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import set_seed

from .._version import __version__
from ..atomic import check_creatable
from ..errors import ConfigError, OutputError, shown
from ..files import alone, write_json, writing
from ..peak_memory import PeakMemory
from . import methods
from .checkpoint import Progress, read_checkpoint, undamaged
from .config import RunConfig, load_json
from .display import Display
from .folder import RunFolder
from .inputs import Inputs, read_inputs
from .loop import Loop, check_finite, check_moves, evaluate
from .mask import places_of
from .models import quiet_transformers
from .result import result_of
from .signals import Interrupted, StopSignals

_MIXED = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


def finetune(
    config: RunConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    display: Display | None = None,
) -> dict[str, Any]:
    """Trains as `config` says, writes the run's folder, and returns what its `result.json` holds.

    Everything that can be wrong with the settings, the data and the model is found, and the mask is
    chosen, before the folder is created: an error until then leaves nothing behind.

    Args:
        resume: continue the run in `config.output`; its settings must be the same.
        overwrite: replace an earlier run in `config.output`.

    Raises:
        SpeftError: ConfigError, DataError, AdapterError (of the mask), SalienceError or
            TrainingError, saying what to change.
        OutputError: the disk is full, or the like; the last checkpoint is whole.
        Interrupted: on Ctrl-C or SIGTERM, after a checkpoint if training had begun.
    """
    display = display or Display()
    if not config.validation:
        config.require("eval")
    config = config.located()
    folder = RunFolder(Path(config.output))
    if resume:
        check_resumable(folder, config)
    else:
        check_free(folder, overwrite)
        check_apart(folder, config)
    with quiet_transformers(), StopSignals() as stop, ExitStack() as held:
        replaces = folder.root.exists() and not resume
        if folder.root.exists():
            held.enter_context(alone(folder.root))
        accelerator = start_accelerator(config.dtype)
        set_seed(config.seed)
        inputs = read_inputs(config, display)
        check_moves(config, len(inputs.train))
        inputs.model.to(accelerator.device)
        if resume:
            loop = _resumed(inputs, accelerator, folder, display, stop)
        else:
            loop = _fresh(inputs, accelerator, folder, display, stop, replaces)
            held.enter_context(alone(folder.root))
        peak = PeakMemory([accelerator.device])
        try:
            progress = loop.run()
            tested = {} if inputs.test is None else {"test": loop.evaluate(inputs.test)}
            own = result_of(inputs, loop.prepared, progress, peak, accelerator.device)
            result = {**own, **tested}
            write_json(folder.result, result)
        except Interrupted as interruption:
            interruption.folder = folder.root
            raise
        except OutputError as error:
            raise OutputError(
                f"{error}; once that is mended, --resume --output {shlex.quote(str(folder.root))} "
                "goes on from the last checkpoint"
            ) from error
        shutil.rmtree(folder.checkpoint)
    return result


def _fresh(
    inputs: Inputs,
    accelerator: Accelerator,
    folder: RunFolder,
    display: Display,
    stop: StopSignals,
    replaces: bool,
) -> Loop:
    config, model, task = inputs.config, inputs.model, inputs.task
    before, _ = evaluate(model, task, inputs.eval, config.batch_size, accelerator, stop)
    display.note("before training: " + "  ".join(f"{k} {v:.4f}" for k, v in before.items()))
    scoring = inputs.scoring(accelerator, stop)
    warmed = methods.warm_up_head(model, config, inputs.targets, *scoring)
    patterns = None if inputs.mask is None else inputs.mask.patterns
    prepared = methods.prepare(model, config, inputs.targets, *scoring, patterns)
    if inputs.mask is not None:
        display.note(f"training what is in the mask {config.mask}, from zero")
    display.note(prepared.describe())
    check_finite(before, "before training", "use --dtype float32, or another model")
    stop.check()

    loop = Loop(inputs, prepared, accelerator, folder, display, stop)
    salience = {**prepared.salience, "head_warmup_seconds": warmed}
    loop.progress = Progress(before=before, salience=salience)
    set_seed(config.seed)  # the same dropout whatever scoring drew
    settings = {"speft_kernels": __version__, "settings": config.to_dict(), **inputs.about()}
    with writing(folder.root):
        if replaces:
            shutil.rmtree(folder.root)
        try:
            folder.root.mkdir(parents=True)
        except FileExistsError:
            raise ConfigError(
                f"output {folder.root} was made by another process meanwhile; choose another "
                "--output"
            ) from None
    try:
        write_json(folder.config, settings)
        loop.save()
    except BaseException:
        shutil.rmtree(folder.root, ignore_errors=True)  # without a checkpoint it is no run
        raise
    return loop


def _resumed(
    inputs: Inputs,
    accelerator: Accelerator,
    folder: RunFolder,
    display: Display,
    stop: StopSignals,
) -> Loop:
    state = read_checkpoint(folder.state)
    if state["facts"]["fingerprint"] != inputs.fingerprint:
        raise ConfigError(
            f"{folder.root}: the data, {'the mask, ' if inputs.mask else ''}the model or its "
            "tokenizer has changed since this run began, so it cannot go on; restore them, or "
            "start again with --overwrite"
        )
    # Now with the rate that goes with the mask, too.
    check_same(folder, inputs.config)
    now = inputs.config.to_dict()
    for key, value in state["facts"]["settings"].items():
        if now.get(key) != value:
            raise ConfigError(
                f"{folder.config} was changed: the run began with {key} = {shown(value)} and "
                f"cannot go on with {shown(now.get(key))}; put it back, or start again with "
                "--overwrite"
            )
    with undamaged(folder.state):
        patterns = methods.patterns_from(state["facts"]["patterns"])
    scoring = inputs.scoring(accelerator, stop)
    prepared = methods.prepare(inputs.model, inputs.config, inputs.targets, *scoring, patterns)
    loop = Loop(inputs, prepared, accelerator, folder, display, stop)
    loop.resume(state)
    display.note(f"resuming after step {loop.progress.step} of {loop.total_steps}")
    return loop


def start_accelerator(dtype: str) -> Accelerator:
    """Raises ConfigError for a precision that the device lacks, and for several processes."""
    AcceleratorState._reset_state(reset_partial_state=True)  # an earlier run's precision would stay
    device = PartialState().device
    if dtype == "float16" and device.type != "cuda":
        raise ConfigError(
            f"dtype float16 trains on CUDA GPUs only and this run is on {device.type}; "
            "use --dtype bfloat16 or float32"
        )
    accelerator = Accelerator(mixed_precision=_MIXED[dtype])
    if accelerator.num_processes > 1:
        raise ConfigError(
            f"{accelerator.num_processes} processes were launched; a run trains in one process"
        )
    return accelerator


def check_free(folder: RunFolder, overwrite: bool) -> None:
    """Raises ConfigError when the folder exists and is not an earlier run that may be replaced."""
    root = folder.root
    if root.exists():
        if not overwrite:
            raise ConfigError(
                f"output {root} exists already; choose another --output, or continue the run in it "
                "with --resume, or replace it with --overwrite"
            )
        if not _has_settings(folder):
            raise ConfigError(
                f"output {root} is not a run of this command, so --overwrite does not delete it; "
                "choose another --output"
            )
        check_run_alone(folder)
    try:
        check_creatable(root)
    except OSError as error:
        raise ConfigError(f"output {root} cannot be created: {error.strerror}") from error


def check_run_alone(folder: RunFolder) -> None:
    """Raises ConfigError when a run's folder holds what the run has not written."""
    check_nothing_else(folder.root, folder.names)
    if folder.adapter.is_dir():
        check_nothing_else(folder.adapter, methods.files_of(folder.adapter))
    if folder.checkpoint.is_dir():
        check_nothing_else(folder.checkpoint, {folder.state.name, folder.best.name})


def check_nothing_else(root: Path, names: Collection[str], flag: str = "--overwrite") -> None:
    """Raises ConfigError when a folder that `flag` would replace holds more than these names."""
    others = sorted(path.name for path in root.iterdir() if path.name not in names)
    if others:
        raise ConfigError(
            f"output {root} holds what no run has written ({', '.join(map(shown, others[:5]))}"
            f"{', ...' if len(others) > 5 else ''}), so {flag} does not delete it; move that, "
            "or choose another --output"
        )


def check_apart(folder: RunFolder, config: RunConfig) -> None:
    """Raises ConfigError when the run's data, model or mask lie in the folder it replaces."""
    root = os.path.realpath(folder.root)
    for name in ("train", "eval", "test", "model", "mask"):
        value = getattr(config, name)
        if not value:
            continue
        places = places_of(value) if name == "mask" else [Path(value)]
        if any(Path(os.path.realpath(place)).is_relative_to(root) for place in places):
            raise ConfigError(f"{name} {value} lies in the output {folder.root}; choose another")


def check_resumable(folder: RunFolder, config: RunConfig) -> None:
    """Raises ConfigError unless the folder holds an unfinished run with the same settings."""
    load_json(folder.config)  # without it there is no run at all
    if folder.result.exists():
        raise ConfigError(f"the run in {folder.root} is finished; its result is {folder.result}")
    if not folder.state.exists():
        raise ConfigError(
            f"{folder.root} holds no checkpoint to resume from; start again with --overwrite"
        )
    check_places(folder)
    # What a budget means, and which rate goes with a mask, is found out again with the model.
    left_out = {"density", "lora_rank"} if config.lora_budget else set()
    if config.mask is not None and config.lr is None:
        left_out.add("lr")
    check_same(folder, config, left_out)


def check_places(folder: RunFolder) -> None:
    """Raises ConfigError where a run that goes on would write elsewhere, or over what it has not
    written: a folder that comes from somebody else may hold links.
    """
    folders = (folder.adapter, folder.checkpoint)
    for place in (*folders, folder.state, folder.best, folder.metrics):
        known = place.is_dir() if place in folders else place.is_file()
        if place.is_symlink() or (place.exists() and not known):
            raise ConfigError(
                f"{place} is a link, or no {'folder' if place in folders else 'file'}, so --resume "
                "does not write there; put in its place what the run wrote"
            )
    if folder.adapter.is_dir():
        check_nothing_else(folder.adapter, methods.files_of(folder.adapter), "--resume")


def check_same(folder: RunFolder, config: RunConfig, left_out: Collection[str] = ()) -> None:
    """Raises ConfigError where the run in the folder has another value of some other setting."""
    own, stored = config.to_dict(), RunConfig.from_dict(load_json(folder.config)).to_dict()
    del stored["output"]
    if own["mask"] and stored["mask"]:
        del stored["mask"]  # a mask may be moved: its digest says whether it is the same
    for key, value in stored.items():
        if key not in left_out and own[key] != value:
            raise ConfigError(
                f"the run in {folder.root} has {key} = {value!r} and cannot go on with "
                f"{own[key]!r}; drop the setting, or start again with --overwrite"
            )


def _has_settings(folder: RunFolder) -> bool:
    try:
        load_json(folder.config)
    except ConfigError:
        return False
    return True
