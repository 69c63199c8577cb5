"""A whole model made sparse: what trains, what it computes, and the way back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import (
    Snapshot,
    Twins,
    bert_classifier,
    drawn,
    llama,
    mlp,
    pair_batches,
    pair_loss,
    token_batches,
)
from torch import Tensor, nn

from speft_kernels import SparseDeltaLinear, SparsePattern
from speft_kernels.adapter import load_adapter, save_adapter
from speft_kernels.errors import ConfigError
from speft_kernels.model import (
    SpeftConfig,
    apply_patterns,
    desparsify,
    merge,
    score_and_select,
    sparse_layers,
    sparsify,
    summary,
    trainable_parameters,
    unmerge,
)

DATA_FREE = SpeftConfig(density=0.1, salience="magnitude")


def config(**settings: Any) -> SpeftConfig:
    return SpeftConfig(**{"density": 0.1, "salience": "magnitude", **settings})


# A sparse model


def test_only_values_and_the_head_train() -> None:
    model = bert_classifier().train()
    model.bert.encoder.layer[0].eval()
    model.bert.embeddings.word_embeddings.weight.grad = torch.ones(50, 16)
    report = sparsify(model, SpeftConfig(density=0.05), token_batches(1))
    training = {n for n, p in model.named_parameters() if p.requires_grad}
    layers = sparse_layers(model)
    assert training == {*(f"{n}.values" for n in layers), "classifier.weight", "classifier.bias"}
    assert len(layers) == len(report.layers) == 13
    assert trainable_parameters(model) == report.nnz + 2 * 16 + 2
    assert model.bert.embeddings.word_embeddings.weight.grad is None
    assert layers["bert.encoder.layer.1.output.dense"].training
    assert not layers["bert.encoder.layer.0.output.dense"].training


def trained(model: nn.Module, mask: dict[str, Tensor] | None = None) -> list[float]:
    """The losses of 30 Adam steps; `mask` keeps only some entries of the dense gradients."""
    batches = pair_batches(4, dtype=torch.float64)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.03)
    losses = []
    for step in range(30):
        optimizer.zero_grad()
        loss = pair_loss(model.eval(), batches[step % 4])
        loss.backward()
        for name, kept in (mask or {}).items():
            model.get_submodule(name).weight.grad *= kept
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("mode", ["resident", "additive"])
@pytest.mark.parametrize("block_shape", [(1, 1), (2, 2)])
def test_training_equals_dense_training_with_masked_gradients(
    mode: str, block_shape: tuple[int, int]
) -> None:
    model, dense = mlp(dtype=torch.float64), mlp(dtype=torch.float64)
    settings = SpeftConfig(
        density=0.2,
        target_modules=["first", "second"],
        modules_to_train=["head"],
        mode=mode,
        block_shape=block_shape,
    )
    sparsify(model, settings, pair_batches(2, dtype=torch.float64), pair_loss)
    masks = {name: layer.pattern.mask() for name, layer in sparse_layers(model).items()}
    for name, parameter in dense.named_parameters():
        parameter.requires_grad_(name.endswith(("first.weight", "second.weight")) or "head" in name)

    torch.testing.assert_close(trained(model), trained(dense, masks), rtol=1e-9, atol=0)

    desparsify(model, keep_delta=False)
    untrained = mlp(dtype=torch.float64).state_dict()
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, untrained[n])}
    assert changed == {"head.weight", "head.bias"}


@pytest.mark.parametrize("mode", ["resident", "additive"])
def test_merge_unmerge_and_desparsify_compute_the_same(mode: str) -> None:
    model = mlp(dtype=torch.float64).eval()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = pair_batches(1, dtype=torch.float64)[0][0]
    plain = model(x)
    sparsify(model, config(mode=mode, target_modules=["first", "second"]))
    torch.testing.assert_close(model(x), plain, rtol=1e-14, atol=1e-14)
    drawn(model)
    expected = copy.deepcopy(model)(x)
    assert not torch.allclose(expected, plain)
    merge(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    assert not torch.equal(model.first.weight, base["first.weight"])
    unmerge(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(model.first.weight, base["first.weight"])
    kept = copy.deepcopy(model)
    desparsify(kept)
    assert type(kept.first) is nn.Linear
    torch.testing.assert_close(kept(x), expected, rtol=1e-12, atol=1e-12)
    desparsify(model, keep_delta=False)
    assert list(model.state_dict()) == list(base)
    assert all(torch.equal(tensor, base[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(x), plain)


def test_empty_layers_under_global_scope() -> None:
    model = mlp()
    with torch.no_grad():
        model.first.weight.mul_(100)
    report = sparsify(model, config(scope="global", target_modules=["first", "second"]))
    assert [layer.nnz for layer in report.layers] == [14, 0]
    assert model.second.pattern.is_empty
    assert not model.second.values.requires_grad
    pair_loss(model, pair_batches(1)[0]).backward()
    assert summary(model).sparse == 14


def test_summary_counts_and_aligns() -> None:
    model = bert_classifier()
    total = sum(p.numel() for p in model.parameters())
    sparsify(model, SpeftConfig(density=0.05), token_batches(1))
    table = summary(model)
    assert [row.layer for row in table.rows] == list(sparse_layers(model))
    row = table.rows[0]
    mask = model.bert.encoder.layer[0].attention.self.query.pattern.mask()
    assert (row.shape, row.nnz, row.density) == ((16, 16), 13, 13 / 256)
    assert row.used_columns == int(mask.any(0).sum())
    assert row.used_rows == int(mask.any(1).sum())
    assert table.sparse == sum(row.nnz for row in table.rows)
    assert table.dense == 2 * 16 + 2
    assert table.trainable == trainable_parameters(model)
    assert table.total == total + table.sparse
    lines = str(table).splitlines()
    assert len(lines) == 2 + 13 + 1
    assert len({len(line) for line in lines[:-1]}) == 1
    assert "16 x 16" in lines[2]
    assert "5.078%" in lines[2]
    assert lines[-1].startswith(f"trainable {table.trainable:,} (")
    assert "0 sparse, 0 dense" in str(summary(nn.Sequential(nn.ReLU())))


def test_a_copy_of_a_sparse_model_is_independent() -> None:
    model = drawn(mlp())
    sparsify(model, config(modules_to_train=["head"]))
    drawn(model)
    twin = copy.deepcopy(model)
    x = pair_batches(1)[0][0]
    expected = model.eval()(x)
    drawn(twin, seed=2)
    assert not torch.equal(twin.eval()(x), expected)
    assert torch.equal(model(x), expected)
    desparsify(twin, keep_delta=False)
    assert sparse_layers(model)


# Refusals, and errors in the middle


def test_not_twice_and_not_without() -> None:
    model = mlp()
    for function in (merge, unmerge, desparsify):
        with pytest.raises(ConfigError, match="no sparse layers"):
            function(model)
    sparsify(model, DATA_FREE)
    before = Snapshot(model)
    with pytest.raises(ConfigError, match=r"sparse layers already, such as 'first'.*desparsify"):
        sparsify(model, DATA_FREE)
    with pytest.raises(ConfigError, match="desparsify"):
        score_and_select(model, DATA_FREE)
    before.assert_untouched()


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("frist", (10, 6), "no module 'frist'. Did you mean 'first'"),
        ("first", (6, 10), r"layer 'first'.*\(6, 10\)"),
        ("norm", (10, 10), "BatchNorm1d"),
        ("head", (3, 8), "trains densely already"),
        ("", (10, 6), "wrap it"),
    ],
)
def test_apply_patterns_refuses(name: str, shape: tuple[int, int], message: str) -> None:
    model = mlp()
    before = Snapshot(model)
    good = SparsePattern((8, 10), torch.tensor([3]))
    bad = SparsePattern(shape, torch.tensor([0]))
    with pytest.raises(ConfigError, match=message):
        apply_patterns(model, {"second": good, name: bad}, config(modules_to_train=["head"]))
    before.assert_untouched()


def test_an_error_in_the_middle_of_replacing_undoes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = bert_classifier().train()
    model.classifier.weight.grad = torch.ones(2, 16)
    before = Snapshot(model)
    original = SparseDeltaLinear.from_linear
    built: list[str] = []

    def fails_late(*args: Any) -> SparseDeltaLinear:
        built.append("one")
        if len(built) == 7:
            raise MemoryError
        return original(*args)

    monkeypatch.setattr(SparseDeltaLinear, "from_linear", fails_late)
    with pytest.raises(MemoryError):
        sparsify(model, SpeftConfig(head_warmup_steps=2), token_batches(2))
    before.assert_untouched()


# torch's own transformer reads weights past the layers in inference


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("mode", ["resident", "additive"])
@pytest.mark.parametrize("padded", [False, True])
def test_fused_inference_paths_see_the_delta(mode: str, padded: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(3, 5, 8)
    padding = torch.arange(5) >= torch.tensor([[5], [4], [2]]) if padded else None
    with torch.no_grad():
        plain = model(x, src_key_padding_mask=padding)
    sparsify(model, config(mode=mode))
    assert len(sparse_layers(model)) == 4
    with torch.no_grad():
        model(x, src_key_padding_mask=padding)
        drawn(model)
        inference = model(x, src_key_padding_mask=padding)
    with torch.enable_grad():
        training = model(x, src_key_padding_mask=padding)
    keep = ~padding if padded else torch.ones(3, 5, dtype=torch.bool)
    torch.testing.assert_close(inference[keep], training[keep])
    assert not torch.allclose(inference[keep], plain[keep], atol=1e-2)
    desparsify(model, keep_delta=False)
    assert model.use_nested_tensor
    assert all(layer.activation_relu_or_gelu == 1 for layer in model.layers)
    with torch.no_grad():
        assert torch.equal(model(x, src_key_padding_mask=padding), plain)


# Shared weights


def test_tied_embeddings() -> None:
    model = llama(tie_word_embeddings=True)
    settings = {"target_modules": ["lm_head"], "modules_to_train": ()}
    with pytest.raises(ConfigError, match="'lm_head' shares its weight with 'model.embed_tokens"):
        sparsify(model, config(**settings))
    sparsify(model, config(**settings, mode="additive"))
    drawn(model)
    embeddings = model.model.embed_tokens.weight.clone()
    model(**token_batches(1, causal=True)[0]).loss.backward()
    assert model.lm_head.values.grad is not None
    with pytest.raises(ConfigError, match="would change both"):
        merge(model)
    with pytest.raises(ConfigError, match="would change both"):
        desparsify(model)
    assert model.lm_head.mode == "additive"
    desparsify(model, keep_delta=False)
    assert torch.equal(model.model.embed_tokens.weight, embeddings)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("mode", ["resident", "additive"])
@pytest.mark.parametrize("keep_delta", [True, False])
def test_a_module_registered_twice_is_one_layer_in_both_places(mode: str, keep_delta: bool) -> None:
    model, x = Twins(), torch.randn(4, 6)
    plain = model.once(x)
    sparsify(model, config(target_modules=["again.0"], mode=mode))
    assert model.once is model.again[0]
    assert list(sparse_layers(model)) == ["once"]
    trained = drawn(model).once(x)
    desparsify(model, keep_delta=keep_delta)
    assert model.once is model.again[0]
    assert type(model.once) is nn.Linear
    torch.testing.assert_close(model.once(x), trained if keep_delta else plain)


@pytest.mark.parametrize("mode", ["resident", "additive"])
def test_a_block_that_is_gone_through_three_times_is_saved_as_one(
    mode: str, tmp_path: Path
) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(*[nn.Sequential(nn.Linear(6, 6), nn.Tanh())] * 3)

    model, x = build(), torch.randn(4, 6)
    sparsify(model, config(mode=mode, density=0.2))
    assert list(sparse_layers(model)) == ["0.0"]
    drawn(model)
    (gradient,) = torch.autograd.grad(model(x).sum(), model[0][0].values)
    twin = build()
    with torch.no_grad():
        twin[0][0].weight.copy_(model[0][0].effective_weight())
    twin(x).sum().backward()
    entries = model[0][0].pattern.entry_indices.long()
    torch.testing.assert_close(gradient, twin[0][0].weight.grad.flatten()[entries])
    save_adapter(model, tmp_path / "adapter")
    loaded = build()
    load_adapter(loaded, tmp_path / "adapter", mode=mode)
    assert torch.equal(loaded(x), model(x))


def test_a_layer_by_itself_cannot_be_put_back_by_desparsify() -> None:
    pattern = SparsePattern((4, 6), torch.tensor([1, 9]))
    layer = SparseDeltaLinear.from_linear(nn.Linear(6, 4), pattern)
    with pytest.raises(ConfigError, match=r"itself is a sparse layer.*to_linear\(\)"):
        desparsify(layer)


def test_a_weight_that_trains_densely_elsewhere_is_refused() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(6, 4), "out": nn.Linear(4, 6, bias=False)})
    model["out"].weight = model["embed"].weight
    before = Snapshot(model)
    settings = config(mode="additive", modules_to_train=["embed"])
    with pytest.raises(ConfigError, match=r"'out' shares its weight with 'embed\.weight', which"):
        sparsify(model, settings)
    before.assert_untouched()


def test_a_single_batch_in_the_place_of_many_is_refused() -> None:
    model = bert_classifier()
    before = Snapshot(model)
    with pytest.raises(ConfigError, match=r"this is one: pass \[batch\]"):
        sparsify(model, SpeftConfig(), token_batches(1)[0])
    before.assert_untouched()
