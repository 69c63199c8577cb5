"""Adapters: exact round trips, and loading that works as a whole or not at all."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import (
    CONFIG,
    JSON,
    TENSORS,
    assert_same_contents,
    contents,
    filled,
    save_trained,
    trained_mlp,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import (
    Int8Linear,
    Snapshot,
    bert_classifier,
    llama,
    mlp,
    pair_batches,
    token_batches,
)
from torch import Tensor, nn

from speft_kernels import SparsePattern, adapter, ops
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


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_trained(tmp_path / "adapter")


# Round trips


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["resident", "additive"])
@pytest.mark.parametrize("block_shape", [(1, 1), (2, 2)])
def test_round_trip(
    tmp_path: Path, dtype: torch.dtype, mode: str, block_shape: tuple[int, int]
) -> None:
    config = replace(CONFIG, mode=mode, block_shape=block_shape)
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
    config = replace(CONFIG, mode="additive")
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


def test_a_quantised_base_takes_an_additive_delta_only(tmp_path: Path) -> None:
    def build(seed: int = 0) -> nn.Module:
        model = mlp(seed).requires_grad_(False)
        model.second = Int8Linear(model.second)
        return model

    model = build()
    pattern = {"second": SparsePattern((8, 10), torch.tensor([0, 33, 79]))}
    before = Snapshot(model)
    with pytest.raises(ConfigError, match="layer 'second'.*use mode=\"additive\""):
        apply_patterns(model, pattern, SpeftConfig())
    before.assert_untouched()
    x = pair_batches(1)[0][0]
    plain = model.eval()(x)
    apply_patterns(model, pattern, SpeftConfig(mode="additive"))
    assert torch.equal(model(x), plain)
    filled(model)
    model(x).sum().backward()
    assert model.second.values.grad is not None
    save_adapter(model, tmp_path / "a")
    loaded = build()
    with pytest.raises(ConfigError, match='use mode="additive"'):
        load_adapter(loaded, tmp_path / "a")
    load_adapter(loaded, tmp_path / "a", mode="additive")
    assert torch.equal(loaded.eval()(x), model(x))
    with pytest.raises(AdapterError, match="another base"):
        load_adapter(build(seed=1), tmp_path / "a", mode="additive")
    for function in (merge, desparsify):
        with pytest.raises(ConfigError, match="Int8Linear, which cannot hold a delta"):
            function(loaded)
    desparsify(loaded, keep_delta=False)
    assert torch.equal(loaded(x), plain)


# Refusals, and errors in the middle


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


@pytest.mark.parametrize("start", ["plain", "same patterns", "other patterns"])
def test_values_that_overflow_with_the_base_are_refused(tmp_path: Path, start: str) -> None:
    def build(config: SpeftConfig | None, weight: float = 4e4) -> nn.Module:
        model = mlp(dtype=torch.float16)
        with torch.no_grad():
            model.first.weight.fill_(weight)
        if config is not None:
            sparsify(model, config)
        return model

    trained = build(CONFIG, weight=1.0)
    with torch.no_grad():
        trained.first.values.fill_(4e4)
    save_adapter(trained, tmp_path / "a")
    other = SpeftConfig(density=0.5, salience="magnitude")
    model = build({"plain": None, "same patterns": CONFIG, "other patterns": other}[start])
    before = Snapshot(model)
    with pytest.raises(AdapterError, match=r"layer 'first'.*infinite in torch\.float16"):
        load_adapter(model, tmp_path / "a", check_base=False)
    before.assert_untouched()


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


@pytest.mark.parametrize("mode", [None, "additive"])
def test_an_error_while_writing_the_weights_undoes_it(
    saved: Path, monkeypatch: pytest.MonkeyPatch, mode: str | None
) -> None:
    model = filled(trained_mlp(), seed=2)
    before = Snapshot(model)
    original, called = ops.write_deltas, []

    def fails_once(*arguments: Any) -> None:
        original(*arguments)
        called.append(arguments)
        if len(called) == 1:
            raise MemoryError

    monkeypatch.setattr(ops, "write_deltas", fails_once)
    with pytest.raises(MemoryError):
        load_adapter(model, saved, mode=mode)
    assert {layer.mode for layer in sparse_layers(model).values()} == {"resident"}
    before.assert_untouched()


def test_a_dense_head_trains_after_loading_into_the_same_patterns(saved: Path) -> None:
    model = mlp()
    sparsify(model, replace(CONFIG, modules_to_train=[]))
    assert not model.head.weight.requires_grad
    load_adapter(model, saved)
    assert model.head.weight.requires_grad
    assert_same_contents(model, contents(trained_mlp()))


def test_fused_paths_stay_off_while_there_is_a_delta(tmp_path: Path) -> None:
    def build() -> nn.TransformerEncoder:
        torch.manual_seed(0)
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)

    def fused(model: nn.TransformerEncoder) -> tuple[bool, bool]:
        return bool(model.use_nested_tensor), bool(model.layers[0].activation_relu_or_gelu)

    model = build()
    sparsify(model, SpeftConfig(density=0.1, salience="magnitude"))
    save_adapter(model, tmp_path / "a")
    loaded = build()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapter, "_write", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            load_adapter(loaded, tmp_path / "a")
    assert fused(loaded) == (True, True)
    sparsify(loaded, SpeftConfig(density=0.3, salience="magnitude"))
    load_adapter(loaded, tmp_path / "a")
    assert fused(loaded) == (False, False)
    desparsify(loaded)
    assert fused(loaded) == (True, True)
