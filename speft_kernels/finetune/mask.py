"""A ready mask: which entries an adapter trains, for a run to train from zero."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

from torch import nn

from ..adapter import another_base, check_shapes
from ..adapter_file import AdapterFile, read_adapter
from ..config import SpeftConfig
from ..errors import AdapterError, shown
from ..files import path_of
from ..recipe import is_drawn
from ..targets import Targets, check_layers, find_dense_modules, refuse_dense
from .config import RunConfig
from .folder import Folder


def read_mask(config: RunConfig) -> AdapterFile | None:
    """The adapter that is `config.mask`, or that lies in it as in what `speft salience` writes.

    Raises AdapterError where it is missing or damaged, or trains no entry.
    """
    if config.mask is None:
        return None
    folder = path_of("mask", config.mask)
    inner = Folder(folder).adapter
    try:
        mask = read_adapter(inner if inner.is_dir() else folder)
    except AdapterError as error:
        raise AdapterError(f"mask {folder}: {error}") from error
    if not mask.nnz:
        raise AdapterError(f"mask {folder} is empty: there is no entry of a linear layer in it")
    return mask


def targets_of(mask: AdapterFile, model: nn.Module, config: RunConfig) -> Targets:
    """The layers of the mask, and the head.

    Raises:
        AdapterError: the mask was chosen on another model.
        ConfigError: a layer cannot train sparsely, as one of the head or with a shared weight.
    """
    try:
        check_shapes(model, mask)
    except AdapterError as error:
        raise AdapterError(f"mask {config.mask}: {error}") from error
    if (name := another_base(model, mask)) is not None:
        raise AdapterError(
            f"mask {config.mask} was chosen on another model: the weight of layer {shown(name)} "
            "differs, in its values or its dtype; name the model that it was chosen on, or choose "
            "one for this model by 'speft salience'"
        )
    layers = {name: model.get_submodule(name) for name in mask.layers}
    dense = find_dense_modules(model, config.speft().modules_to_train)
    refuse_dense(layers, dense)
    check_layers(model, layers, config.mode)
    return Targets(layers, dense)  # type: ignore[arg-type]  # check_layers knows them as linear


def rated(config: RunConfig, mask: AdapterFile | None) -> RunConfig:
    """`config` with the learning rate that goes with the mask, where it has none."""
    if mask is None or config.lr is not None:
        return config
    how = mask.config
    drawn = how is not None and is_drawn(how.salience, how.selection)
    return dataclasses.replace(config, lr=config.usual_rate(drawn))


def recipe_of(config: RunConfig, mask: AdapterFile | None) -> SpeftConfig | None:
    """How the mask of a run was chosen, to be kept with its adapter; None where it is not known."""
    if config.method != "speft":
        return None
    if mask is None:
        return config.speft()
    return mask.config and dataclasses.replace(mask.config, mode=config.mode)


def described(config: RunConfig, mask: AdapterFile) -> dict[str, Any]:
    """Which mask a run trains, for its result and its adapter."""
    return {"folder": config.mask, "sha256": mask_digest(mask)}


def mask_digest(mask: AdapterFile) -> str:
    """The SHA-256 of the entries; of the values, which are not trained on, it says nothing."""
    digest = hashlib.sha256()
    for name, pattern in sorted(mask.patterns.items()):
        digest.update(f"{name!r} {pattern.shape} {pattern.block_shape}\n".encode())
        digest.update(pattern.indices.numpy().tobytes())
    return digest.hexdigest()
