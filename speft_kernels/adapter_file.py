"""Reading an adapter folder: everything in it is checked, and nothing in it is trusted."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from .config import SpeftConfig
from .dtypes import index_dtype
from .errors import AdapterError, ConfigError, PatternError, shown
from .pattern import SparsePattern

FORMAT = "speft-adapter"
FORMAT_VERSION = 1
TENSORS_FILE = "adapter.safetensors"
CONFIG_FILE = "adapter_config.json"

# A model of a thousand layers needs a third of a megabyte.
_LARGEST_CONFIG = 64 * 2**20
_LARGEST_SIDE = 2**40
_DENSE_DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


@dataclass(frozen=True)
class AdapterLayer:
    """One sparse layer; `values` has `pattern.values_shape`, `base_sha256` is of the base."""

    pattern: SparsePattern
    values: Tensor
    base_sha256: str


@dataclass(frozen=True)
class AdapterFile:
    """An adapter's contents: finite values, valid patterns, nothing missing or left over."""

    folder: Path
    layers: dict[str, AdapterLayer]
    dense: dict[str, Tensor]
    config: SpeftConfig | None
    extra: dict[str, Any]

    @property
    def patterns(self) -> dict[str, SparsePattern]:
        return {name: layer.pattern for name, layer in self.layers.items()}

    @property
    def nnz(self) -> int:
        """Trained scalars of the sparse layers."""
        return sum(layer.pattern.nnz for layer in self.layers.values())


def read_adapter(folder: str | os.PathLike[str]) -> AdapterFile:
    """Read and check an adapter folder.

    Raises:
        AdapterError: a file is missing, truncated, damaged or of another format; a tensor is
            missing, left over, of the wrong dtype or shape, or not finite; indices do not make a
            valid pattern.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise AdapterError(f"there is no adapter folder {str(folder)!r}")
    described = _parse(_read(folder / CONFIG_FILE, _LARGEST_CONFIG))
    _check_header(described)
    data = _read(folder / TENSORS_FILE, None)
    if hashlib.sha256(data).hexdigest() != described["tensors_sha256"]:
        raise AdapterError(
            f"{TENSORS_FILE} does not have the checksum in {CONFIG_FILE}: it is truncated, "
            "damaged, or not from the same adapter"
        )
    tensors = _tensors(data)
    layers = {
        name: _layer(name, entry, tensors)
        for name, entry in _object(described["layers"], "layers").items()
    }
    dense: dict[str, Tensor] = {}
    for name in _list(described["dense"], "dense"):
        if not isinstance(name, str) or name in dense:
            raise _bad(f"dense must list tensor names once each, got {shown(name)}")
        dense[name] = _take(tensors, f"dense.{name}", _DENSE_DTYPES)
    if tensors:
        raise AdapterError(f"{TENSORS_FILE} has a tensor too many: {shown(next(iter(tensors)))}")
    config = described["config"]
    try:
        config = None if config is None else SpeftConfig.from_dict(_object(config, "config"))
    except ConfigError as error:
        raise _bad(f"config: {error}") from error
    return AdapterFile(folder, layers, dense, config, _object(described["extra"], "extra"))


def _bad(fact: str) -> AdapterError:
    return AdapterError(f"{CONFIG_FILE}: {fact}")


def _read(path: Path, limit: int | None) -> bytes:
    try:
        # Without O_NONBLOCK a pipe in the file's place would wait for a writer.
        descriptor = os.open(
            path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        )
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise AdapterError(f"{str(path)!r} is not a regular file")
            if limit is not None and status.st_size > limit:
                raise AdapterError(f"{str(path)!r} is {status.st_size} bytes long, over {limit}")
            try:
                return file.read()
            except MemoryError:
                raise AdapterError(
                    f"{str(path)!r} is {status.st_size} bytes long, more than memory holds"
                ) from None
    except FileNotFoundError:
        raise AdapterError(
            f"the adapter has no {path.name}: {str(path)!r} does not exist"
        ) from None
    except OSError as error:
        raise AdapterError(f"{str(path)!r} cannot be read: {error.strerror or error}") from error


def _parse(data: bytes) -> dict[str, Any]:
    try:
        described = json.loads(
            data.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant
        )
    except RecursionError:
        raise _bad("it is nested too deeply") from None
    except ValueError as error:  # of the decoding, the parsing and the hooks
        raise _bad(f"it is not valid JSON in UTF-8: {error}") from None
    return _object(described, "the whole")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("an object has a key twice")
    return result


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


_HEADER = ("format", "format_version", "tensors_sha256", "layers", "dense", "config", "extra")


def _check_header(described: dict[str, Any]) -> None:
    if "peft_type" in described:
        raise AdapterError(
            f"it is an adapter of PEFT ({shown(described['peft_type'])}), not one of sparse entries"
        )
    if described.get("format") != FORMAT:
        raise _bad(f"format must be {FORMAT!r}, got {shown(described.get('format'))}")
    version = described.get("format_version")
    if isinstance(version, bool) or version != FORMAT_VERSION:
        raise _bad(
            f"format_version {shown(version)} is unknown; this release reads version "
            f"{FORMAT_VERSION}: a newer one may read it"
        )
    _check_keys(described, _HEADER, "the adapter")
    _check_sha256(described["tensors_sha256"], "tensors_sha256")


def _check_keys(found: dict[str, Any], wanted: tuple[str, ...], where: str) -> None:
    for key in wanted:
        if key not in found:
            raise _bad(f"{where} lacks {key!r}")
    for key in found:
        if key not in wanted:
            raise _bad(f"{where} has an unknown key {shown(key)}")


def _check_sha256(value: object, where: str) -> None:
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
        raise _bad(f"{where} must be 64 hexadecimal digits, got {shown(value)}")


def _object(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _bad(f"{where} must be an object, got {shown(value)}")
    return value


def _list(value: object, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise _bad(f"{where} must be a list, got {shown(value)}")
    return value


def _pair(value: object, where: str) -> tuple[int, int]:
    sides = _list(value, where)
    whole = [
        isinstance(side, int) and not isinstance(side, bool) and 0 < side < _LARGEST_SIDE
        for side in sides
    ]
    if len(sides) != 2 or not all(whole):
        raise _bad(f"{where} must be two whole numbers above 0")
    return sides[0], sides[1]


def _tensors(data: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError, MemoryError) as error:
        raise AdapterError(f"{TENSORS_FILE} is not a valid safetensors file: {error}") from error


def _layer(name: str, entry: object, tensors: dict[str, Tensor]) -> AdapterLayer:
    where = f"layer {shown(name)}"
    described = _object(entry, where)
    _check_keys(described, ("shape", "block_shape", "base_sha256"), where)
    shape = _pair(described["shape"], f"{where}: shape")
    block_shape = _pair(described["block_shape"], f"{where}: block_shape")
    _check_sha256(described["base_sha256"], f"{where}: base_sha256")
    indices = _take(tensors, f"sparse.{name}.indices", (index_dtype(shape[0] * shape[1]),))
    values = _take(tensors, f"sparse.{name}.values", (torch.float32, torch.float64))
    try:
        pattern = SparsePattern(shape, indices, block_shape)
    except PatternError as error:
        raise AdapterError(f"{where}: {error}") from error
    if tuple(values.shape) != pattern.values_shape:
        raise AdapterError(
            f"{where}: values must have shape {pattern.values_shape}, got {tuple(values.shape)}"
        )
    return AdapterLayer(pattern, values, described["base_sha256"])


def _take(tensors: dict[str, Tensor], key: str, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    tensor = tensors.pop(key, None)
    if tensor is None:
        raise AdapterError(f"{TENSORS_FILE} lacks the tensor {shown(key)}")
    if tensor.dtype not in dtypes:
        names = " or ".join(str(dtype) for dtype in dtypes)
        raise AdapterError(f"the tensor {shown(key)} must be {names}, got {tensor.dtype}")
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise AdapterError(f"the tensor {shown(key)} holds NaN or infinite values")
    return tensor
