"""Adapters on disk: exact round trips, refusals that touch nothing, no half-written folder."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import (
    Snapshot,
    bert_classifier,
    llama,
    mlp,
    pair_batches,
    token_batches,
)
from torch import Tensor, nn

from speft_kernels import SparsePattern, adapter, atomic
from speft_kernels.adapter import load_adapter, read_adapter, save_adapter
from speft_kernels.errors import AdapterError, ConfigError
from speft_kernels.model import (
    SpeftConfig,
    apply_patterns,
    desparsify,
    merge,
    sparse_layers,
    sparsify,
)

CONFIG = SpeftConfig(
    density=0.1,
    salience="magnitude",
    target_modules=("first", "second"),
    modules_to_train=("head",),
)
TENSORS, JSON = "adapter.safetensors", "adapter_config.json"


def filled(model: nn.Module, seed: int = 1) -> nn.Module:
    """Give everything that trains random contents, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(noise)
        for layer in sparse_layers(model).values():
            layer.sync()
    return model


def trained_mlp(config: SpeftConfig = CONFIG, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = mlp(dtype=dtype)
    sparsify(model, config)
    return filled(model)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The folder of an adapter of `trained_mlp()`."""
    save_adapter(trained_mlp(), tmp_path / "adapter", config=CONFIG, extra={"note": "für später"})
    return tmp_path / "adapter"


def contents(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_contents(model: nn.Module, expected: dict[str, Tensor]) -> None:
    found = model.state_dict()
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


# Round trips


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["resident", "additive"])
@pytest.mark.parametrize("block_shape", [(1, 1), (2, 2)])
def test_round_trip(
    tmp_path: Path, dtype: torch.dtype, mode: str, block_shape: tuple[int, int]
) -> None:
    config = SpeftConfig.from_dict({**CONFIG.to_dict(), "mode": mode, "block_shape": block_shape})
    model = trained_mlp(config, dtype)
    save_adapter(model, tmp_path / "a", config=config)
    loaded = mlp(dtype=dtype)
    info = load_adapter(loaded, tmp_path / "a", mode=mode)
    assert_same_contents(loaded, contents(model))
    assert [n for n, p in loaded.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]
    assert info.layers == ("first", "second")
    assert info.dense == ("head.weight", "head.bias")
    assert info.nnz == sum(layer.pattern.nnz for layer in sparse_layers(model).values())
    assert info.config == config
    x = pair_batches(1, dtype=dtype)[0][0]
    assert torch.equal(loaded.eval()(x), model.eval()(x))
    # What was loaded can be saved again, and taken out again.
    save_adapter(loaded.requires_grad_(False), tmp_path / "b")
    assert (tmp_path / "b" / TENSORS).read_bytes() == (tmp_path / "a" / TENSORS).read_bytes()
    desparsify(loaded, keep_delta=False)
    assert torch.equal(loaded.first.weight, mlp(dtype=dtype).first.weight)


@st.composite
def patterns(draw: st.DrawFn) -> SparsePattern:
    bh, bw = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    rows, cols = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    chosen = draw(st.lists(st.integers(0, rows * cols - 1), unique=True).map(sorted))
    indices = torch.tensor(chosen, dtype=torch.int64)
    return SparsePattern((rows * bh, cols * bw), indices, (bh, bw))


@settings(max_examples=50, deadline=None)
@given(st.lists(patterns(), min_size=1, max_size=3), st.integers(0, 2**32), st.booleans())
def test_any_patterns_round_trip(found: list[SparsePattern], seed: int, double: bool) -> None:
    def build() -> nn.Module:
        torch.manual_seed(seed)
        layers = [nn.Linear(p.shape[1], p.shape[0]) for p in found]
        return nn.ModuleList(layers).to(torch.float64 if double else torch.float32)

    model = build()
    named = {str(i): pattern for i, pattern in enumerate(found)}
    apply_patterns(model, named, SpeftConfig())
    filled(model, seed)
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "adapter"
        save_adapter(model, folder)
        file = read_adapter(folder)
        assert {name: layer.pattern for name, layer in file.layers.items()} == named
        fresh = build()
        load_adapter(fresh, folder)
        assert_same_contents(fresh, contents(model))
        # indices of 4 bytes and values of 4 (or 8), and a header
        entries = sum(p.num_blocks * 4 + p.nnz * (8 if double else 4) for p in found)
        assert entries <= (folder / TENSORS).stat().st_size <= entries + 512 * (1 + len(found))


@pytest.mark.parametrize("causal", [False, True])
def test_transformers_round_trip(tmp_path: Path, causal: bool) -> None:
    build = llama if causal else bert_classifier
    batches = token_batches(2, causal=causal)
    model = build()
    sparsify(model, SpeftConfig(density=0.05, scope="global"), batches)
    filled(model)
    save_adapter(model, tmp_path / "a")
    # Another process starts from the same base with another, freshly initialised head.
    other = build()
    if not causal:
        nn.init.normal_(other.classifier.weight)
    info = load_adapter(other, tmp_path / "a")
    assert info.dense == (() if causal else ("classifier.weight", "classifier.bias"))
    assert_same_contents(other, contents(model))
    assert torch.equal(other.eval()(**batches[0]).logits, model.eval()(**batches[0]).logits)


def test_the_same_model_gives_the_same_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_adapter(trained_mlp(), tmp_path / name, config=CONFIG)
    for file in (TENSORS, JSON):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_what_else_trains_is_saved_with_its_buffers(tmp_path: Path) -> None:
    model = trained_mlp()
    model.norm.weight.requires_grad_(True)
    model.norm.running_mean.fill_(3.0)
    save_adapter(model, tmp_path / "a")
    expected = {"head.weight", "head.bias", "norm.weight"} | {
        f"norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert set(read_adapter(tmp_path / "a").dense) == expected
    loaded = mlp()
    load_adapter(loaded, tmp_path / "a")
    assert loaded.norm.running_mean.tolist() == [3.0] * 10
    assert loaded.norm.weight.requires_grad
    assert not loaded.norm.bias.requires_grad


def test_a_tied_tensor_is_stored_once(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    sparsify(model, SpeftConfig(salience="magnitude", modules_to_train=["lm_head"]))
    filled(model)
    save_adapter(model, tmp_path / "a")
    assert len(read_adapter(tmp_path / "a").dense) == 1
    loaded = llama(tie_word_embeddings=True)
    load_adapter(loaded, tmp_path / "a")
    assert_same_contents(loaded, contents(model))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_a_dense_head_alone(tmp_path: Path) -> None:
    model = mlp()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("head"))
    save_adapter(filled(model), tmp_path / "a")
    loaded = mlp()
    info = load_adapter(loaded, tmp_path / "a")
    assert (info.layers, info.nnz) == ((), 0)
    assert torch.equal(loaded.head.weight, model.head.weight)
    assert not loaded.first.weight.requires_grad


# Loading into a sparse model


def test_the_same_patterns_only_take_values(saved: Path) -> None:
    expected = contents(trained_mlp())
    model = trained_mlp()
    filled(model, seed=2)
    layers, values = sparse_layers(model), model.first.values
    load_adapter(model, saved)
    assert sparse_layers(model) == layers
    assert model.first.values is values
    assert_same_contents(model, expected)


@pytest.mark.parametrize("mode", ["resident", "additive"])
def test_other_patterns_are_replaced_on_the_exact_base(saved: Path, mode: str) -> None:
    model = mlp()
    other = SpeftConfig(density=0.3, salience="force", target_modules=["head", "first"])
    sparsify(model, other, pair_batches(1), lambda m, b: m(b[0]).square().sum())
    filled(model)
    with torch.no_grad():
        mlp_head = mlp().head.weight
    load_adapter(model, saved, mode=mode)
    assert list(sparse_layers(model)) == ["first", "second"]
    assert {layer.mode for layer in sparse_layers(model).values()} == {mode}
    if mode == "resident":
        assert_same_contents(model, contents(trained_mlp()))
    desparsify(model, keep_delta=False)
    assert torch.equal(model.first.weight, mlp().first.weight)
    assert not torch.equal(model.head.weight, mlp_head)  # the adapter's dense head


def test_a_sparse_layer_keeps_its_mode_unless_told(saved: Path) -> None:
    config = SpeftConfig.from_dict({**CONFIG.to_dict(), "mode": "additive"})
    model = trained_mlp(config)
    load_adapter(model, saved)
    assert model.first.mode == "additive"
    load_adapter(model, saved, mode="resident")
    assert model.first.mode == "resident"
    assert_same_contents(model, contents(trained_mlp()))
    with pytest.raises(ConfigError, match="'resident' or 'additive', got 'merged'"):
        load_adapter(model, saved, mode="merged")


def test_a_shared_weight_takes_an_additive_delta_only(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return llama(tie_word_embeddings=True)

    model = build()
    additive = SpeftConfig(salience="magnitude", target_modules=["lm_head"], mode="additive")
    sparsify(model, additive)
    save_adapter(filled(model), tmp_path / "a")
    for target in (build(), model):
        before = Snapshot(target)
        with pytest.raises(ConfigError, match="shares its weight"):
            load_adapter(target, tmp_path / "a", mode="resident")
        before.assert_untouched()
    loaded = build()
    load_adapter(loaded, tmp_path / "a", mode="additive")
    batch = token_batches(1, causal=True)[0]
    assert torch.equal(loaded.eval()(**batch).logits, model.eval()(**batch).logits)


# Refusals

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
    "dense NaN": (set_tensor("dense.head.bias", with_value(math.nan)), "NaN or infinite"),
    "dense complex": (
        set_tensor("dense.head.bias", lambda t: t.to(torch.complex64)), "must be torch.float64",
    ),
    # against the model
    "unknown layer": (rename_layer("frist"), "no layer 'frist'.*Did you mean 'first'"),
    "a path for a layer": (rename_layer("../../etc/passwd"), "no layer '../../etc/passwd'"),
    "an attribute for a layer": (rename_layer("first.__class__"), "no layer 'first.__class__'"),
    "no name": (rename_layer(""), "is a Mlp in the model"),
    "a very long name": (rename_layer("x" * 100_000), r"no layer 'x{116}\.\.\."),
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
    "dense of another shape": (rename_dense("first.bias"), "part of a sparse layer"),
    "dense into the norm": (rename_dense("norm.weight"), r"shape \(10,\) in the model, \(3,\)"),
    "dense integers": (
        set_tensor("dense.head.bias", lambda t: t.long()), "float32 in the model, torch.int64",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(HOSTILE))
@pytest.mark.parametrize("sparse", [False, True])
def test_hostile_adapters_touch_nothing(saved: Path, case: str, sparse: bool) -> None:
    tamper, message = HOSTILE[case]
    model = filled(trained_mlp(), seed=2) if sparse else mlp()
    before = Snapshot(model)
    tamper(saved)
    with pytest.raises(AdapterError, match=f"(?s){message}") as caught:
        load_adapter(model, saved)
    assert len(str(caught.value)) < 1000
    before.assert_untouched()


def test_a_different_base_is_named_and_can_be_accepted(saved: Path) -> None:
    other = mlp(seed=5)
    with pytest.raises(AdapterError, match="another base"):
        load_adapter(other, saved)
    base = other.first.weight.clone()
    load_adapter(other, saved, check_base=False)
    trained = trained_mlp()
    torch.testing.assert_close(
        other.first.weight - base, trained.first.weight - mlp().first.weight, atol=1e-6, rtol=0
    )
    with pytest.raises(AdapterError, match="another base.*dtype"):
        load_adapter(mlp(dtype=torch.float64), saved)


def test_the_fingerprint_is_of_the_base_without_the_delta(tmp_path: Path) -> None:
    model = trained_mlp()
    plain = adapter.fingerprint(mlp().first)
    assert adapter.fingerprint(model.first) == plain
    model.first.unmerge()
    assert adapter.fingerprint(model.first) == plain
    assert adapter.fingerprint(mlp(seed=1).first) != plain
    desparsify(model)
    assert adapter.fingerprint(model.first) != plain


@pytest.mark.parametrize("start", ["plain", "same patterns", "other patterns"])
@pytest.mark.parametrize("failing", [1, 3, 5])
def test_an_error_while_loading_undoes_it(
    saved: Path, monkeypatch: pytest.MonkeyPatch, start: str, failing: int
) -> None:
    model = mlp()
    if start == "same patterns":
        model = filled(trained_mlp(), seed=2)
    elif start == "other patterns":
        sparsify(model, SpeftConfig(density=0.5, salience="magnitude"))
        filled(model)
    before = Snapshot(model)
    original, written = Tensor.copy_, []

    def fails_late(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.is_meta:
            return original(self, *args, **kwargs)
        written.append(self)
        if len(written) == failing:
            raise MemoryError
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Tensor, "copy_", fails_late)
    if failing <= 4:  # two layers and two dense tensors are written
        with pytest.raises(MemoryError):
            load_adapter(model, saved)
        before.assert_untouched()
    else:
        load_adapter(model, saved)
        assert len(written) == 4
        monkeypatch.undo()
        assert_same_contents(model, contents(trained_mlp()))


# Saving


def test_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="nothing to save"):
        save_adapter(mlp().requires_grad_(False), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("extra", [{"x": object()}, {"x": math.nan}, {1j: 2}])
def test_extra_must_be_json(tmp_path: Path, extra: Any) -> None:
    with pytest.raises(AdapterError, match="extra must be JSON"):
        save_adapter(trained_mlp(), tmp_path / "a", extra=extra)
    assert list(tmp_path.iterdir()) == []


def test_values_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    model = trained_mlp()
    with torch.no_grad():
        model.second.values[0] = math.inf
    with pytest.raises(AdapterError, match=r"sparse\.second\.values holds NaN or infinite"):
        save_adapter(model, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept_unless_told(saved: Path) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    model = filled(trained_mlp(), seed=3)
    with pytest.raises(AdapterError, match="exists: choose another, or overwrite=True"):
        save_adapter(model, saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    save_adapter(model, saved, overwrite=True)
    loaded = mlp()
    load_adapter(loaded, saved)
    assert_same_contents(loaded, contents(model))
    assert [path.name for path in saved.parent.iterdir()] == ["adapter"]


def test_overwriting_never_deletes_anything_else(saved: Path) -> None:
    (saved / "thesis.tex").write_text("years of work")
    with pytest.raises(AdapterError, match=r"thesis\.tex.*would delete it"):
        save_adapter(trained_mlp(), saved, overwrite=True)
    assert (saved / "thesis.tex").read_text() == "years of work"
    file = saved.parent / "file"
    file.write_text("x")
    with pytest.raises(AdapterError, match="not a folder"):
        save_adapter(trained_mlp(), file, overwrite=True)
    assert file.read_text() == "x"


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(AdapterError, match="cannot be written"):
        save_adapter(trained_mlp(), tmp_path / "file" / "adapter")


def test_a_merged_model_saves_the_same_adapter(tmp_path: Path) -> None:
    config = SpeftConfig.from_dict({**CONFIG.to_dict(), "mode": "additive"})
    model = trained_mlp(config)
    save_adapter(model, tmp_path / "a")
    merge(model)
    save_adapter(model, tmp_path / "b")
    for file in (TENSORS, JSON):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("failing", ["fsync", "replace", "second replace"])
def test_a_failed_write_leaves_the_old_adapter(
    saved: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool, failing: str
) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    elif failing != "fsync":
        monkeypatch.setattr(atomic, "_exchange", lambda first, second: os.replace("no", "where"))
    calls: list[str] = []
    function = failing.split()[-1]
    original = getattr(os, function)

    def fails(*args: Any) -> Any:
        calls.append(function)
        if len(calls) == (2 if "second" in failing and not exchange else 1):
            raise OSError(28, "No space left on device")
        return original(*args)

    monkeypatch.setattr(os, function, fails)
    with pytest.raises(AdapterError, match="cannot be written.*No space left"):
        save_adapter(filled(trained_mlp(), seed=3), saved, overwrite=True)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == ["adapter"]


_CRASHING = """
import importlib.util, os, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("atomic", sys.argv[1])
atomic = importlib.util.module_from_spec(spec)
spec.loader.exec_module(atomic)
folder, last, exchange = Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "True"
steps = 0


def crashing(function):
    def call(*args, **kwargs):
        global steps
        if steps == last:
            os._exit(9)
        steps += 1
        return function(*args, **kwargs)
    return call


atomic._exchange = crashing(atomic._exchange if exchange else lambda *_: False)
os.fsync, os.replace = crashing(os.fsync), crashing(os.replace)
atomic.shutil.rmtree = crashing(atomic.shutil.rmtree)
with atomic.new_folder(folder) as draft:
    (draft / "one").write_text("new")
    (draft / "two").write_text("new")
"""


@pytest.mark.parametrize("exchange", [True, False])
def test_a_crash_at_any_moment_leaves_one_whole_folder(tmp_path: Path, exchange: bool) -> None:
    script = tmp_path / "crash.py"
    script.write_text(_CRASHING)
    outcomes = []
    for last in range(20):
        folder = tmp_path / str(last) / "adapter"
        folder.mkdir(parents=True)
        for name in ("one", "two"):
            (folder / name).write_text("old")
        done = subprocess.run(
            [sys.executable, script, atomic.__file__, folder, str(last), str(exchange)], check=False
        )
        assert done.returncode in (0, 9)
        if not folder.exists():
            # Without an atomic exchange there is one such moment; the old folder is beside it.
            assert not exchange
            (folder,) = folder.parent.glob(".adapter.*.old")
            outcomes.append("beside")
        else:
            outcomes.append((folder / "one").read_text())
        assert {path.name for path in folder.iterdir()} == {"one", "two"}
        assert (folder / "one").read_text() == (folder / "two").read_text()
        if done.returncode == 0:
            break
    assert done.returncode == 0
    assert set(outcomes) == ({"old", "new"} if exchange else {"old", "beside", "new"})
