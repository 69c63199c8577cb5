"""A ready mask: which entries an adapter trains, for a run to train from zero."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ..adapter import another_base, check_shapes
from ..adapter_file import CONFIG_FILE, TENSORS_FILE, read_adapter
from ..config import SpeftConfig
from ..errors import AdapterError, ConfigError, shown
from ..files import path_of
from ..pattern import SparsePattern
from ..recipe import is_drawn
from ..targets import Targets, check_layers, find_dense_modules, refuse_dense
from .config import RunConfig
from .folder import RunFolder


@dataclass(frozen=True)
class Mask:
    """What a run uses of an adapter: neither its values nor its head, which may be large.

    Attributes:
        bases: layer -> SHA-256 of the weight that the mask was chosen on.
        config: how it was chosen, and `model` on which model, where the adapter says so.
        sha256: see `entries_digest`.
    """

    patterns: dict[str, SparsePattern]
    bases: dict[str, str]
    config: SpeftConfig | None
    model: str | None
    sha256: str

    @property
    def nnz(self) -> int:
        return sum(pattern.nnz for pattern in self.patterns.values())


def folder_of(mask: str) -> Path:
    """The adapter that is `mask`, or that lies in it as in what `speft salience` writes."""
    folder = path_of("mask", mask)
    inner = RunFolder(folder).adapter
    return inner if inner.is_dir() and not (folder / CONFIG_FILE).exists() else folder


def places_of(mask: str) -> list[Path]:
    """What is named and what is read; any of them may be a link."""
    folder = folder_of(mask)
    return [Path(mask), folder / CONFIG_FILE, folder / TENSORS_FILE]


def read_mask(config: RunConfig) -> Mask | None:
    """The mask that is `config.mask`.

    Raises AdapterError where it is missing or damaged, or trains no entry.
    """
    if config.mask is None:
        return None
    try:
        file = read_adapter(folder_of(config.mask))
    except AdapterError as error:
        raise AdapterError(f"mask {config.mask}: {error}") from error
    if not file.nnz:
        raise AdapterError(
            f"mask {config.mask} is empty: there is no entry of a linear layer in it"
        )
    bases = {name: layer.base_sha256 for name, layer in file.layers.items()}
    model = file.extra.get("model")
    known = model if isinstance(model, str) else None
    return Mask(file.patterns, bases, file.config, known, entries_digest(file.patterns))


def targets_of(mask: Mask, model: nn.Module, config: RunConfig) -> Targets:
    """The layers of the mask, and the head.

    Raises:
        AdapterError: the mask was chosen on another model.
        ConfigError: a layer cannot train sparsely, as one of the head or with a shared weight.
    """
    origin = "" if mask.model is None else f" ({shown(mask.model)})"
    try:
        check_shapes(model, mask.patterns)
    except AdapterError as error:
        raise AdapterError(
            f"mask {config.mask} does not fit the model; another one than it was chosen on{origin} "
            f"or another --pooling is the usual cause: {error}"
        ) from error
    if (name := another_base(model, mask.bases)) is not None:
        raise AdapterError(
            f"mask {config.mask} was chosen on another model: the weight of layer {shown(name)} "
            "differs, in its values or its dtype (this command loads float32 weights, so a mask "
            "of a bfloat16 model does not fit); name the model that it was chosen on"
            f"{origin}, or choose one for this model by 'speft salience'"
        )
    layers = {name: model.get_submodule(name) for name in mask.patterns}
    dense = find_dense_modules(model, config.speft().modules_to_train)
    try:
        refuse_dense(layers, dense)
        check_layers(model, layers, config.mode)
    except ConfigError as error:
        raise ConfigError(
            f"mask {config.mask}: {error}; to leave the layer out, choose the mask again by "
            "'speft salience --exclude-modules ...'"
        ) from error
    return Targets(layers, dense)


def rated(config: RunConfig, mask: Mask | None) -> RunConfig:
    """`config` with the learning rate that goes with the mask, where it has none."""
    if mask is None or config.lr is not None:
        return config
    how = mask.config
    drawn = how is not None and is_drawn(how.salience, how.selection)
    return dataclasses.replace(config, lr=config.usual_rate(drawn))


def recipe_of(config: RunConfig, mask: Mask | None) -> SpeftConfig | None:
    """How the mask of a run was chosen, to be kept with its adapter; None where it is not known."""
    if config.method != "speft":
        return None
    if mask is None:
        return config.speft()
    return mask.config and dataclasses.replace(mask.config, mode=config.mode)


def entries_digest(patterns: Mapping[str, SparsePattern]) -> str:
    """The SHA-256 of the entries; of the values, which are not trained on, it says nothing."""
    digest = hashlib.sha256()
    for name, pattern in sorted(patterns.items()):
        digest.update(f"{name!r} {pattern.shape} {pattern.block_shape}\n".encode())
        digest.update(pattern.indices.numpy().tobytes())
    return digest.hexdigest()
