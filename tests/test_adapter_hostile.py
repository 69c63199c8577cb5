"""Damaged and hostile adapters: each gets its own message, and the model is not touched."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from adapters import (
    JSON,
    TENSORS,
    filled,
    save_trained,
)
from tiny_models import (
    Snapshot,
    mlp,
)
from torch import Tensor

from speft_kernels import adapter_file
from speft_kernels.adapter import load_adapter
from speft_kernels.errors import AdapterError
from speft_kernels.model import (
    SpeftConfig,
    sparsify,
)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_trained(tmp_path / "adapter")


Json = dict[str, Any]
Tensors = dict[str, Tensor]


def rewrite(folder: Path, tensors: Callable[[Tensors], Any] | None, text: Any = None) -> None:
    """Change an adapter and give it the right checksum again, as an attacker would."""
    described = json.loads((folder / JSON).read_text())
    if tensors is not None:
        loaded = safetensors.torch.load((folder / TENSORS).read_bytes())
        tensors(loaded)
        data = safetensors.torch.save({k: t.contiguous() for k, t in loaded.items()})
        (folder / TENSORS).write_bytes(data)
        described["tensors_sha256"] = hashlib.sha256(data).hexdigest()
    if text is not None:
        text(described)
    (folder / JSON).write_text(json.dumps(described))


def raw_tensors(folder: Path, data: bytes) -> None:
    (folder / TENSORS).write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    rewrite(folder, None, lambda d: d.update(tensors_sha256=digest))


def header(entries: Any, length: int | None = None) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


def set_tensor(key: str, make: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda t: t.update({key: make(t[key])}))


def set_json(change: Callable[[Json], Any]) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, None, change)


def rename_layer(new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        def tensors(t: Tensors) -> None:
            for part in ("indices", "values"):
                t[f"sparse.{new}.{part}"] = t.pop(f"sparse.first.{part}")

        rewrite(folder, tensors, lambda d: d["layers"].update({new: d["layers"].pop("first")}))

    return change


def rename_dense(new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        rewrite(
            folder,
            lambda t: t.update({f"dense.{new}": t.pop("dense.head.bias")}),
            lambda d: d.update(dense=["head.weight", new]),
        )

    return change


def make_pipe(folder: Path) -> None:
    (folder / TENSORS).unlink()
    os.mkfifo(folder / TENSORS)


def make_link_loop(folder: Path) -> None:
    (folder / JSON).unlink()
    (folder / JSON).symlink_to(JSON)


def duplicate_key(folder: Path) -> None:
    text = (folder / JSON).read_text()
    (folder / JSON).write_text('{"format": "speft-adapter",' + text.lstrip()[1:])


def with_value(value: float) -> Callable[[Tensor], Tensor]:
    return lambda t: torch.cat([t[:-1], t.new_tensor([value])])


FIRST = "sparse.first"
HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    # files
    "no folder": (lambda f: shutil.rmtree(f), "no adapter folder"),
    "a file for a folder": (lambda f: (shutil.rmtree(f), f.write_text("x")), "no adapter folder"),
    "no tensors": (lambda f: (f / TENSORS).unlink(), "has no adapter.safetensors"),
    "no config": (lambda f: (f / JSON).unlink(), "has no adapter_config.json"),
    "tensors are a folder": (
        lambda f: ((f / TENSORS).unlink(), (f / TENSORS).mkdir()), "not a regular|cannot be read",
    ),
    "tensors are a pipe": (make_pipe, "not a regular file"),
    "config links to itself": (make_link_loop, "cannot be read"),
    "tensors truncated": (
        lambda f: (f / TENSORS).write_bytes((f / TENSORS).read_bytes()[:-7]), "checksum",
    ),
    "tensors empty": (lambda f: (f / TENSORS).write_bytes(b""), "checksum"),
    "one bit flipped": (
        lambda f: (f / TENSORS).write_bytes(
            (d := (f / TENSORS).read_bytes())[:-1] + bytes([d[-1] ^ 1])
        ), "checksum",
    ),
    # the tensor file, with the right checksum
    "a pickle": (lambda f: raw_tensors(f, b"\x80\x04\x95\x00\x00."), "not a valid safetensors"),
    "an empty file": (lambda f: raw_tensors(f, b""), "not a valid safetensors"),
    "header longer than the file": (
        lambda f: raw_tensors(f, header({}, 2**62)), "not a valid safetensors",
    ),
    "header of 2^64 - 1": (lambda f: raw_tensors(f, header({}, 2**64 - 1)), "not a valid"),
    "header is no JSON": (lambda f: raw_tensors(f, struct.pack("<Q", 4) + b"\xff{]x"), "valid"),
    "header is a list": (lambda f: raw_tensors(f, header([1])), "not a valid safetensors"),
    "offsets out of range": (
        lambda f: raw_tensors(
            f, header({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 2**40]}})
        ), "not a valid safetensors",
    ),
    "offsets backwards": (
        lambda f: raw_tensors(
            f, header({"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}) + b"0000"
        ), "not a valid safetensors",
    ),
    "shape overflows": (
        lambda f: raw_tensors(
            f, header({"x": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}})
        ), "not a valid safetensors",
    ),
    "unknown dtype": (
        lambda f: raw_tensors(
            f, header({"x": {"dtype": "PICKLE", "shape": [0], "data_offsets": [0, 0]}})
        ), "not a valid safetensors",
    ),
    "no tensor in it": (lambda f: raw_tensors(f, header({})), "lacks the tensor"),
    # the config as a file
    "config empty": (lambda f: (f / JSON).write_text(""), "not valid JSON"),
    "config truncated": (
        lambda f: (f / JSON).write_text((f / JSON).read_text()[:-9]), "not valid JSON",
    ),
    "config not UTF-8": (lambda f: (f / JSON).write_bytes(b'{"format": "\xff"}'), "UTF-8"),
    "config nested": (lambda f: (f / JSON).write_text("[" * 200_000), "nested too deeply"),
    "config nested objects": (lambda f: (f / JSON).write_text('{"a":' * 200_000), "nested|valid"),
    "config huge": (
        lambda f: os.truncate(f / JSON, 2**30), "bytes long, over",
    ),
    "config huge number": (lambda f: (f / JSON).write_text("1" * 10_000), "not valid JSON"),
    "config NaN": (lambda f: (f / JSON).write_text('{"format": NaN}'), "no JSON number"),
    "config list": (lambda f: (f / JSON).write_text("[]"), "must be an object"),
    "config number": (lambda f: (f / JSON).write_text("3"), "must be an object"),
    "config with a key twice": (duplicate_key, "key twice"),
    # what the config says
    "another format": (set_json(lambda d: d.update(format="lora")), "format must be"),
    "no format": (set_json(lambda d: d.pop("format")), "format must be"),
    "a newer version": (set_json(lambda d: d.update(format_version=2)), "format_version 2 is"),
    "version true": (set_json(lambda d: d.update(format_version=True)), "format_version True"),
    "version text": (set_json(lambda d: d.update(format_version="1")), "format_version '1'"),
    "no layers": (set_json(lambda d: d.pop("layers")), "lacks 'layers'"),
    "unknown key": (set_json(lambda d: d.update(hook="os.system")), "unknown key 'hook'"),
    "layers list": (set_json(lambda d: d.update(layers=[])), "layers must be an object"),
    "layer text": (set_json(lambda d: d["layers"].update(first="x")), "must be an object"),
    "layer without shape": (set_json(lambda d: d["layers"]["first"].pop("shape")), "lacks 'shape'"),
    "layer with more": (
        set_json(lambda d: d["layers"]["first"].update(path="/etc/passwd")), "unknown key 'path'",
    ),
    "shape of three": (set_json(lambda d: d["layers"]["first"].update(shape=[10, 6, 1])), "shape"),
    "shape of text": (set_json(lambda d: d["layers"]["first"].update(shape=["10", 6])), "shape"),
    "shape of bools": (set_json(lambda d: d["layers"]["first"].update(shape=[True, 6])), "shape"),
    "shape negative": (set_json(lambda d: d["layers"]["first"].update(shape=[-10, -6])), "shape"),
    "shape zero": (set_json(lambda d: d["layers"]["first"].update(shape=[0, 6])), "shape"),
    "shape of floats": (set_json(lambda d: d["layers"]["first"].update(shape=[10.0, 6])), "shape"),
    "shape endless": (set_json(lambda d: d["layers"]["first"].update(shape=[10**400, 6])), "shape"),
    "shape beyond int32": (
        set_json(lambda d: d["layers"]["first"].update(shape=[2**20, 2**20])), "be torch.int64",
    ),
    "blocks do not tile": (
        set_json(lambda d: d["layers"]["first"].update(block_shape=[3, 1])), "do not tile",
    ),
    "blocks for entries": (
        set_json(lambda d: d["layers"]["first"].update(block_shape=[2, 2])),
        "out of range|values must have shape",
    ),
    "hash too short": (
        set_json(lambda d: d["layers"]["first"].update(base_sha256="00")), "64 hexadecimal",
    ),
    "hash no text": (set_json(lambda d: d.update(tensors_sha256=None)), "64 hexadecimal"),
    "dense object": (set_json(lambda d: d.update(dense={})), "dense must be a list"),
    "dense numbers": (set_json(lambda d: d.update(dense=[1])), "dense must list"),
    "dense twice": (
        set_json(lambda d: d.update(dense=["head.weight", "head.weight"])), "once each",
    ),
    "extra list": (set_json(lambda d: d.update(extra=[])), "extra must be an object"),
    "config text": (set_json(lambda d: d.update(config="x")), "config must be an object"),
    "config unknown key": (set_json(lambda d: d.update(config={"x": 1})), "unknown setting 'x'"),
    "config bad value": (set_json(lambda d: d.update(config={"density": 7})), "density must lie"),
    "config odd types": (
        set_json(lambda d: d.update(config={"target_modules": {"a": []}})), "must be module names",
    ),
    # tensors against the config
    "tensor missing": (
        lambda f: rewrite(f, lambda t: t.pop(f"{FIRST}.values")), "lacks the tensor",
    ),
    "tensor too many": (
        lambda f: rewrite(f, lambda t: t.update(more=torch.ones(1))), "a tensor too many: 'more'",
    ),
    "dense missing": (
        set_json(lambda d: d.update(dense=["head.weight", "head.bias", "x"])), "lacks the tensor",
    ),
    "dense not listed": (set_json(lambda d: d.update(dense=["head.weight"])), "a tensor too many"),
    "indices out of range": (set_tensor(f"{FIRST}.indices", with_value(60)), "out of range"),
    "indices negative": (
        set_tensor(f"{FIRST}.indices", lambda t: torch.cat([t.new_tensor([-1]), t[1:]])),
        "out of range",
    ),
    "indices duplicated": (
        set_tensor(f"{FIRST}.indices", lambda t: torch.cat([t[:1], t[:-1]])), "duplicated",
    ),
    "indices unsorted": (set_tensor(f"{FIRST}.indices", lambda t: t.flip(0)), "increasing"),
    "indices int64": (set_tensor(f"{FIRST}.indices", lambda t: t.long()), "must be torch.int32"),
    "indices float": (set_tensor(f"{FIRST}.indices", lambda t: t.float()), "must be torch.int32"),
    "indices 2-D": (set_tensor(f"{FIRST}.indices", lambda t: t[None]), "1-D"),
    "indices too few": (set_tensor(f"{FIRST}.indices", lambda t: t[:-1]), "values must have shape"),
    "values too many": (
        set_tensor(f"{FIRST}.values", lambda t: torch.cat([t, t])), "values must have shape",
    ),
    "values 2-D": (set_tensor(f"{FIRST}.values", lambda t: t[:, None]), "values must have shape"),
    "values half": (set_tensor(f"{FIRST}.values", lambda t: t.half()), "must be torch.float32"),
    "values NaN": (set_tensor(f"{FIRST}.values", with_value(math.nan)), "NaN or infinite"),
    "values infinite": (set_tensor(f"{FIRST}.values", with_value(-math.inf)), "NaN or infinite"),
    "values beyond float32": (
        set_tensor(f"{FIRST}.values", lambda t: t.double() + 1e300),
        "layer 'first': with the adapter's values.*infinite",
    ),
    "dense beyond float32": (
        set_tensor("dense.head.bias", lambda t: t.double() - 1e300), "would become infinite",
    ),
    "dense NaN": (set_tensor("dense.head.bias", with_value(math.nan)), "NaN or infinite"),
    "dense complex": (
        set_tensor("dense.head.bias", lambda t: t.to(torch.complex64)), "must be torch.float64",
    ),
    # against the model
    "unknown layer": (rename_layer("frist"), "no layer 'frist'.*Did you mean 'first'"),
    "a path for a layer": (rename_layer("../../etc/passwd"), "no layer '../../etc/passwd'"),
    "an attribute for a layer": (rename_layer("first.__class__"), "no layer 'first.__class__'"),
    "no name": (rename_layer(""), "is a Mlp in the model"),
    "a very long name": (rename_layer("x" * 100_000), r"no layer 'x+\.\.\.x+'"),
    "another kind of layer": (rename_layer("norm"), "is a BatchNorm1d"),
    "another layer": (rename_layer("head"), r"has shape \(3, 8\) in the model, \(10, 6\)"),
    "another shape": (
        set_json(lambda d: d["layers"]["first"].update(shape=[6, 10])),
        r"layer 'first' has shape \(10, 6\) in the model, \(6, 10\) in the adapter",
    ),
    "another base": (
        set_json(lambda d: d["layers"]["first"].update(base_sha256="0" * 64)),
        "another base: the weight of layer 'first'.*check_base=False",
    ),
    "unknown dense": (rename_dense("head.bais"), "no tensor 'head.bais'.*Did you mean 'head.bias'"),
    "dense into a sparse weight": (rename_dense("first.weight"), "part of a sparse layer"),
    "dense of another shape": (rename_dense("first.bias"), r"shape \(10,\) in the model, \(3,\)"),
    "dense into the norm": (rename_dense("norm.weight"), r"shape \(10,\) in the model, \(3,\)"),
    "dense into values": (rename_dense("head.values"), "no tensor 'head.values'"),
    "dense integers": (
        set_tensor("dense.head.bias", lambda t: t.long()), "float32 in the model, torch.int64",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(HOSTILE))
@pytest.mark.parametrize("sparse", [False, True])
def test_hostile_adapters_touch_nothing(saved: Path, case: str, sparse: bool) -> None:
    tamper, message = HOSTILE[case]
    model = mlp()
    if sparse:  # other patterns, and a sparse head
        sparsify(model, SpeftConfig(density=0.05, salience="magnitude"))
        filled(model, seed=2)
    before = Snapshot(model)
    tamper(saved)
    with pytest.raises(AdapterError, match=f"(?s){message}") as caught:
        load_adapter(model, saved)
    assert len(str(caught.value)) < 1000
    before.assert_untouched()


def test_a_file_larger_than_memory(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless(io.FileIO):
        def read(self, size: int | None = -1) -> bytes:
            raise MemoryError

    def opened(descriptor: int, mode: str) -> io.IOBase:
        large = os.fstat(descriptor).st_size == (saved / TENSORS).stat().st_size
        return Endless(descriptor) if large else open(descriptor, mode)

    monkeypatch.setattr(adapter_file, "open", opened, raising=False)
    size = (saved / TENSORS).stat().st_size
    with pytest.raises(AdapterError, match=rf"safetensors' is {size} bytes long, more than memory"):
        load_adapter(mlp(), saved)
