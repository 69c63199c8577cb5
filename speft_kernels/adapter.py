"""Adapters on disk: a folder with `adapter.safetensors` and `adapter_config.json`.

The tensors are `sparse.<layer>.indices` (int32, int64 only for weights of 2^31 entries or more),
`sparse.<layer>.values` (float32, float64 for a float64 base) and `dense.<name>` for what trains
densely, such as a task head, or the bias of a sparse layer; a `Conv1D`'s weight as `[N, K]`. So a
single entry takes 8 bytes. The JSON gives each layer's shape, block shape and the fingerprint of
the base weight under it, and the SHA-256 of the tensor file. Names are looked up in the model and
never used as paths.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from .adapter_file import (
    CONFIG_FILE,
    FORMAT,
    FORMAT_VERSION,
    TENSORS_FILE,
    AdapterFile,
    AdapterLayer,
    read_adapter,
)
from .atomic import new_folder
from .config import SpeftConfig
from .conv1d import is_conv1d, is_plain_linear, linear_shape
from .errors import AdapterError, ConfigError, nearest, shown
from .family import refuse_sharded, set_modes, to_linears
from .files import writing
from .install import conv1d_for_linear, install, is_sparse, sparse_state, swap_modules
from .model import refuse_delta_in_shared
from .nn import SparseDeltaLinear
from .overview import sparse_layers, unwrapped
from .pattern import SparsePattern
from .targets import is_below, remedy_for_missing

__all__ = [
    "AdapterFile",
    "AdapterInfo",
    "AdapterLayer",
    "load_adapter",
    "read_adapter",
    "save_adapter",
]


@dataclass(frozen=True)
class AdapterInfo:
    """What was loaded: sparse layers, their trained scalars in all, dense tensors."""

    folder: Path
    layers: tuple[str, ...]
    nnz: int
    dense: tuple[str, ...]
    config: SpeftConfig | None
    extra: dict[str, Any]


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    config: SpeftConfig | None = None,
    extra: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write what `model` learned into `folder`, in one step: it is there as a whole or not at all.

    That is each sparse layer's pattern and values, and the tensors that train densely
    (`modules_to_train` and whatever else requires grad, with the buffers beside it; of a sparse
    layer its bias). Every base weight is read once, for its fingerprint. Names are those in the
    model itself, also where it comes in a wrapper (see `overview.unwrapped`).

    Args:
        config: kept with the adapter, for people.
        extra: JSON data kept with the adapter.
        overwrite: replace an adapter that is there already. Any other folder is refused.

    Raises:
        AdapterError: the folder exists, or holds something else than an adapter; there is nothing
            to save, a value is not finite or makes a weight so, a parameter within an opaque base
            trains, or one of which a bias is computed, or `extra` is not JSON.
        ConfigError: a parameter is sharded.
        OutputError: the folder cannot be written; it is as it was.
    """
    refuse_sharded(unwrapped(model).named_parameters())
    _check_destination(Path(folder), overwrite)
    stored = {
        name: StoredLayer(layer.pattern, layer.values, layer.base_values, fingerprint(layer))
        for name, layer in sparse_layers(model).items()
    }
    write_adapter(model, stored, folder, config=config, extra=extra, overwrite=overwrite)


@dataclass(frozen=True)
class StoredLayer:
    """What an adapter holds of a layer: pattern, values, and the SHA-256 of the base under them.
    `base_values`: what the base's weight holds at the entries; None of an opaque base.
    """

    pattern: SparsePattern
    values: Tensor
    base_values: Tensor | None
    base_sha256: str


def write_adapter(
    model: nn.Module,
    layers: Mapping[str, StoredLayer],
    folder: str | os.PathLike[str],
    *,
    config: SpeftConfig | None = None,
    extra: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """`save_adapter` with `layers` in the place of the model's own patterns and values; raises as
    it does.
    """
    folder = Path(folder)
    _check_destination(folder, overwrite)
    model = unwrapped(model)
    dense = _dense_tensors(model)
    _refuse_left_out(model, dense)
    if not layers and not dense:
        raise AdapterError(
            "nothing to save: the model has no sparse layers and nothing that trains"
        )
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors[f"sparse.{name}.indices"] = layer.pattern.indices
        tensors[f"sparse.{name}.values"] = layer.values
    laid_out = _as_of_linears(model, dense)
    tensors.update({f"dense.{name}": tensor for name, tensor in laid_out.items()})
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise AdapterError(
                f"{name} holds NaN or infinite values: training went wrong, not saved"
            )
    for name, layer in layers.items():
        held = _held(layer.values, layer.base_values)
        if not bool(torch.isfinite(held).all()):
            raise AdapterError(
                f"layer {shown(name)}: with its values the weight is infinite in {held.dtype}: "
                "training went wrong, not saved"
            )
    described = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "layers": {
            name: {
                "shape": list(layer.pattern.shape),
                "block_shape": list(layer.pattern.block_shape),
                "base_sha256": layer.base_sha256,
            }
            for name, layer in layers.items()
        },
        "dense": list(dense),
        "config": None if config is None else config.to_dict(),
        "extra": dict(extra or {}),
    }
    try:
        json.dumps(described, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise AdapterError(f"extra must be JSON data: {error}") from error
    with writing(folder), new_folder(folder, replace=overwrite) as draft:
        # Copies: safetensors refuses views and tensors that share memory.
        copies = {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}
        data = safetensors.torch.save(copies, metadata={"format": "pt"})
        (draft / TENSORS_FILE).write_bytes(data)
        described["tensors_sha256"] = hashlib.sha256(data).hexdigest()
        text = json.dumps(described, indent=1, allow_nan=False)
        (draft / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def load_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    mode: str | None = None,
    check_base: bool = True,
) -> AdapterInfo:
    """Load an adapter into `model`, in place. Everything is checked before anything is touched.

    A plain model is made sparse and frozen as by `apply_patterns`. In a model with sparse layers of
    the same patterns the values are replaced, and all weights are written at once; with other
    patterns, its base is restored first and the layers are replaced: an optimizer and a FlatValues
    must be made anew then, for they hold what no longer trains. Of what trains densely only the
    tensors that the adapter brings are changed. A model in a wrapper is loaded into as it is within
    (see `overview.unwrapped`).

    Args:
        mode: "resident" or "additive". None means resident, or what a sparse layer of the same
            pattern is already.
        check_base: refuse a base model other than the one that the adapter was trained on.

    Raises:
        AdapterError: a file is missing, damaged or hostile, or does not fit the model. The model is
            as it was.
        ConfigError: the mode is unknown or does not fit, as for a shared weight in resident mode; a
            parameter is sharded. Likewise.
    """
    file = read_adapter(folder)
    model = unwrapped(model)
    refuse_sharded(model.named_parameters())
    if mode not in (None, "resident", "additive"):
        raise ConfigError(f"mode must be 'resident' or 'additive', got {mode!r}")
    _load(model, file, mode, check_base)
    conv1d_for_linear(model)  # those that no longer train
    return AdapterInfo(
        folder=file.folder,
        layers=tuple(file.layers),
        nnz=file.nnz,
        dense=tuple(file.dense),
        config=file.config,
        extra=file.extra,
    )


def _load(model: nn.Module, file: AdapterFile, mode: str | None, check_base: bool) -> None:
    present, patterns = sparse_layers(model), file.patterns
    check_shapes(model, patterns)
    bases = {name: layer.base_sha256 for name, layer in file.layers.items()}
    if check_base and (name := another_base(model, bases)) is not None:
        raise AdapterError(
            f"the adapter was trained on another base: the weight of layer {shown(name)} differs, "
            "in its values or its dtype. Load the base model it was trained on, or pass "
            "check_base=False"
        )
    targets = _check_dense(model, file)
    with ExitStack() as undo:
        fits = (
            is_sparse(model)
            and list(present) == list(patterns)
            and all(present[name].pattern == pattern for name, pattern in patterns.items())
            and file.dense.keys() <= _dense_tensors(model).keys()
        )
        if not fits:
            _make_plain(model, present, undo)
            install(model, patterns, mode or "resident", file.dense, undo)
        elif mode == "resident":
            refuse_delta_in_shared(model, present)
        layers = sparse_layers(model)
        _check_finite(layers, file)
        # New layers leave the base behind, bit for bit; those that were there, what they held.
        undo.callback(set_modes, {x: x.mode if fits else "additive" for x in layers.values()})
        _write([(layers[name].values, layer.values) for name, layer in file.layers.items()], undo)
        _write([(targets[name], tensor) for name, tensor in file.dense.items()], undo)
        set_modes({layer: mode or layer.mode for layer in layers.values()})
        undo.pop_all()


def fingerprint(layer: nn.Module) -> str:
    """Return the SHA-256 of a linear or sparse layer's base weight: dtype, shape and bytes of W0.

    Of a base that is not a plain linear layer it covers all parameters and buffers.
    """
    if isinstance(layer, SparseDeltaLinear) and layer.base is not None:
        layer = layer.base
    tensors: Iterable[tuple[str, Tensor]]
    if isinstance(layer, SparseDeltaLinear):
        tensors = [("weight", layer.base_weight())]
    elif is_conv1d(layer):
        tensors = [("weight", layer.weight.t())]  # type: ignore[operator]
    elif is_plain_linear(layer):
        tensors = [("weight", layer.weight)]  # type: ignore[list-item]
    else:
        tensors = [*layer.named_parameters(), *layer.named_buffers()]
    digest = hashlib.sha256()
    for name, tensor in tensors:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_destination(folder: Path, overwrite: bool) -> None:
    if not folder.exists() and not folder.is_symlink():
        return
    if not folder.is_dir():
        raise AdapterError(f"{str(folder)!r} exists and is not a folder")
    if not overwrite:
        raise AdapterError(f"the folder {str(folder)!r} exists: choose another, or overwrite=True")
    others = sorted({path.name for path in folder.iterdir()} - {TENSORS_FILE, CONFIG_FILE})
    if others:
        raise AdapterError(
            f"the folder {str(folder)!r} holds more than an adapter ({shown(others[0])}): "
            "overwriting would delete it"
        )


def _dense_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return what trains outside the sparse layers, the persistent buffers beside it, and those
    layers' biases that train.
    """
    # Under every name: a layer that is registered twice is saved once, as a sparse one.
    sparse = [
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, SparseDeltaLinear)
    ]
    stored = {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if isinstance(tensor, Tensor) and (_is_bias(name, sparse) or not is_below(name, sparse))
    }
    owners = {name.rpartition(".")[0] for name, tensor in stored.items() if tensor.requires_grad}
    named = set(sparse_state(model).dense_tensors)
    dense: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in stored.items():
        beside = name.rpartition(".")[0] in owners and not isinstance(tensor, nn.Parameter)
        if (tensor.requires_grad or beside or name in named) and id(tensor) not in seen:
            seen.add(id(tensor))  # a tied tensor is stored once
            dense[name] = tensor
    return dense


def _is_bias(name: str, layers: Iterable[str]) -> bool:
    """Whether this is the bias of one of the layers itself, not one within its opaque base."""
    layer, _, last = name.rpartition(".")
    return last == "bias" and layer in layers


def _refuse_left_out(model: nn.Module, dense: Mapping[str, Tensor]) -> None:
    saved = {id(tensor) for tensor in dense.values()}
    for layer, module in sparse_layers(model).items():
        saved.add(id(module.values))
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and id(parameter) not in saved:
                part = "" if module.base is None else f"'s base ({type(module.base).__name__})"
                raise AdapterError(
                    f"{shown(f'{layer}.{name}')} trains, but it is part of a sparse layer{part}, "
                    "which an adapter does not hold: freeze it with requires_grad_(False), or save "
                    "the model's state_dict()"
                )


def check_shapes(model: nn.Module, patterns: Mapping[str, SparsePattern]) -> None:
    """Raise AdapterError where the model has no such linear layer as the adapter trains."""
    modules = dict(model.named_modules())
    for name, pattern in patterns.items():
        module = modules.get(name)
        if module is None:
            raise AdapterError(
                f"the model has no layer {shown(name)}, which the adapter "
                f"trains.{remedy_for_missing(modules, name)}"
            )
        shape = linear_shape(module)
        if shape is None:
            raise AdapterError(
                f"{shown(name)} is a {type(module).__name__} in the model; the adapter trains a "
                "linear layer there"
            )
        if shape != pattern.shape:
            raise AdapterError(
                f"layer {shown(name)} has shape {shape} in the model, {pattern.shape} in the "
                "adapter"
            )


def another_base(model: nn.Module, bases: Mapping[str, str]) -> str | None:
    """Return the first of the layers whose weight has another SHA-256 in the model, if any."""
    for name, sha256 in bases.items():
        if fingerprint(model.get_submodule(name)) != sha256:
            return name
    return None


def _check_dense(model: nn.Module, file: AdapterFile) -> dict[str, Tensor]:
    """Return the model's tensors that the adapter's dense tensors go to, by name."""
    # A layer that is sparse now and not in the adapter will be a plain one when its tensors come.
    becoming_plain = [name for name in sparse_layers(model) if name not in file.layers]
    stored = {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if not is_below(name, becoming_plain) or name.endswith((".weight", ".bias"))
    }
    stored = _as_of_linears(model, stored)
    for name, tensor in file.dense.items():
        target = stored.get(name)
        if not isinstance(target, Tensor):
            raise AdapterError(
                f"the model has no tensor {shown(name)}, which the adapter "
                f"brings.{nearest(name, stored)}"
            )
        if is_below(name, file.layers) and not (
            _is_bias(name, file.layers) and _has_plain_base(model.get_submodule(name[:-5]))
        ):
            raise AdapterError(f"the adapter brings {shown(name)}, which is part of a sparse layer")
        if target.shape != tensor.shape:
            raise AdapterError(
                f"{shown(name)} has shape {tuple(target.shape)} in the model, "
                f"{tuple(tensor.shape)} in the adapter"
            )
        if target.is_floating_point() != tensor.is_floating_point():
            raise AdapterError(
                f"{shown(name)} is {target.dtype} in the model, {tensor.dtype} in the adapter"
            )
        if not bool(torch.isfinite(tensor.to(target.dtype)).all()):
            raise AdapterError(
                f"{shown(name)} is {target.dtype} in the model and {tensor.dtype} in the adapter, "
                "where it holds values that would become infinite"
            )
    return {name: stored[name] for name in file.dense}


def _has_plain_base(layer: nn.Module) -> bool:
    if isinstance(layer, SparseDeltaLinear):
        return layer.base is None
    return is_plain_linear(layer) or is_conv1d(layer)


def _as_of_linears(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, those that are a `Conv1D`'s weight as `[N, K]`: an adapter is for either kind of
    model.
    """
    modules = model.named_modules(remove_duplicate=False)
    transposed = {f"{name}.weight" for name, module in modules if is_conv1d(module)}
    return {n: t.detach().t() if n in transposed else t for n, t in tensors.items()}


@torch.no_grad()
def _held(values: Tensor, base_values: Tensor | None) -> Tensor:
    """What a weight holds at the entries with the values; beside an opaque base those alone."""
    if base_values is None:
        return values
    return (base_values.to(values) + values).to(base_values.dtype)


def _check_finite(layers: Mapping[str, SparseDeltaLinear], file: AdapterFile) -> None:
    """Refuse values that would make a weight infinite, each layer's in the dtypes of the model."""
    for name, stored in file.layers.items():
        layer = layers[name]
        held = _held(stored.values.to(layer.values), layer.base_values)
        if not bool(torch.isfinite(held).all()):
            raise AdapterError(
                f"layer {shown(name)}: with the adapter's values its weight would be NaN or "
                f"infinite in {held.dtype}"
            )


def _make_plain(model: nn.Module, layers: Mapping[str, SparseDeltaLinear], undo: ExitStack) -> None:
    """Put plain layers with the exact base back; undone, the sparse ones return as they were."""
    for layer in layers.values():
        undo.callback(setattr, layer, "family", layer.family)
    undo.callback(set_modes, {layer: layer.mode for layer in layers.values()})
    replacements = to_linears(layers.values(), keep_delta=False)
    undo.callback(swap_modules, model, {new: old for old, new in replacements.items()})
    swap_modules(model, replacements)


@torch.no_grad()
def _write(pairs: Iterable[tuple[Tensor, Tensor]], undo: ExitStack) -> None:
    for target, contents in pairs:
        undo.callback(_copy, target, target.detach().clone())
        target.copy_(contents)


@torch.no_grad()
def _copy(target: Tensor, contents: Tensor) -> None:
    target.copy_(contents)
