"""`speft info`: this machine, or a folder."""

from __future__ import annotations

import argparse
import os
import platform
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import AdapterError, ConfigError, SpeftError, plain
from ..files import path_of
from ..finetune.folder import PEFT_FILE, RunFolder, is_run

_LIBRARIES = ("transformers", "accelerate", "datasets", "peft", "safetensors", "triton")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", help="folder of a run or of an adapter")


def run(args: argparse.Namespace) -> int:
    # A folder may come from anybody, and a terminal obeys what is in its names and settings.
    if args.folder is None:
        print(describe_machine())
    else:
        print(plain(describe_folder(path_of("folder", args.folder))))
    return 0


def describe_machine() -> str:
    """Versions, processor, GPUs, and every backend of every operation."""
    import torch

    from .. import __version__, _native
    from ..machine import installed, processor
    from ..ops import registry

    rows = [
        ("speft-kernels", __version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        *((name, installed(name) or "not installed") for name in _LIBRARIES),
        ("system", f"{platform.system()} {platform.machine()}"),
        ("processor", f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"),
        ("cpu kernels", _native.description()),
        ("gpus", ", ".join(_gpus()) or "none"),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    backends = [
        (
            row["op"],
            row["backend"],
            row["device"],
            ", ".join(row["dtypes"]),
            "yes" if row["available"] else "no",
            ", ".join(row["default"]),
            row["reason"],
        )
        for row in registry.table()
    ]
    header = (
        "operation",
        "backend",
        "device",
        "dtypes",
        "available",
        "default on",
        "what, or why not",
    )
    return "\n".join([*lines, "", table(header, backends)])


def describe_folder(folder: Path) -> str:
    """What a run's or an adapter's folder holds, or that of `speft salience`: its adapter.

    Raises AdapterError when it is neither or the adapter is damaged, ConfigError for a damaged run.
    """
    if is_run(folder):
        return _describe_run(folder)
    for place in (folder, RunFolder(folder).adapter):
        if (place / "adapter_config.json").is_file():
            return _describe_adapter(place)
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such folder")
    raise AdapterError(
        f"{folder} is neither a run (config.json, metrics.jsonl) nor an adapter "
        "(adapter_config.json)"
    )


def _describe_run(folder: Path) -> str:
    from ..finetune.config import RunConfig, without_choice
    from ..finetune.result import describe

    places = RunFolder(folder)
    with _contents(places.config) as contents:
        config = RunConfig.from_dict(_settings(contents))
    lines = [
        f"run of method {config.method}: {config.model} on {config.train}",
        *(
            f"  {key}: {value}"
            for key, value in without_choice(config.to_dict()).items()
            if value is not None
        ),
    ]
    if places.result.is_file():
        with _contents(places.result) as result:
            lines.append(describe(result, str(folder)))
    else:
        output = shlex.quote(str(folder))
        lines.append(f"not finished; go on with: speft finetune --resume --output {output}")
    return "\n".join(lines)


@contextmanager
def _contents(path: Path) -> Iterator[dict[str, Any]]:
    """The object in a JSON file; what is amiss with it becomes a ConfigError that says so."""
    from ..files import read_json

    contents = read_json(path)
    try:
        yield contents
    except SpeftError as error:
        raise ConfigError(f"{path}: {error}") from error
    except KeyError as error:
        raise ConfigError(f"{path}: damaged: it lacks {error}") from error
    except (AttributeError, OverflowError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: damaged: {error}") from error


def _settings(contents: dict[str, Any]) -> dict[str, Any]:
    settings = contents["settings"]
    if not isinstance(settings, dict):
        raise ConfigError("damaged: settings must be an object")
    return settings


def _describe_adapter(folder: Path) -> str:
    from ..adapter import read_adapter

    if (folder / PEFT_FILE).is_file():
        return f"{folder}: an adapter that PEFT wrote"
    adapter = read_adapter(folder)
    rows = [
        (
            name,
            "x".join(map(str, layer.pattern.shape)),
            "x".join(map(str, layer.pattern.block_shape)),
            f"{layer.pattern.nnz:,}",
            f"{layer.pattern.density:.3%}",
        )
        for name, layer in adapter.layers.items()
    ]
    dense = sum(tensor.numel() for tensor in adapter.dense.values())
    lines = [f"{key}: {value}" for key, value in adapter.extra.items()]
    if rows:
        lines.append(table(("layer", "shape", "blocks", "trained", "density"), rows))
    lines.append(f"{adapter.nnz:,} sparse values in {len(rows)} layers; {dense:,} dense ones")
    return "\n".join(lines)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned on the left, two spaces apart."""
    widths = [max(len(str(row[i])) for row in (header, *rows)) for i in range(len(header))]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    )


def _gpus() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
