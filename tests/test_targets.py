"""Configs, and which modules of a model they mean."""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import (
    Int8Linear,
    Snapshot,
    Twins,
    bert_classifier,
    llama,
    mixtral,
    mlp,
)
from torch import Tensor, nn

from speft_kernels.errors import ConfigError
from speft_kernels.model import SpeftConfig, apply_patterns, sparsify
from speft_kernels.pattern import SparsePattern
from speft_kernels.targets import find_targets, shared_weights

DATA_FREE = SpeftConfig(density=0.1, salience="magnitude")


def config(**settings: Any) -> SpeftConfig:
    return SpeftConfig(**{"density": 0.1, "salience": "magnitude", **settings})


# The config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": 0}, "density must lie in"),
        ({"density": 1.0}, "density must lie in"),
        ({"density": -0.1}, "density must lie in"),
        ({"density": float("nan")}, "finite number"),
        ({"density": "0.1"}, "finite number"),
        ({"density": True}, "finite number"),
        ({"scope": "layers"}, "Did you mean 'layer'"),
        ({"mode": "residents"}, "Did you mean 'resident'"),
        ({"salience": "sniper"}, "Did you mean 'snip'"),
        ({"target_modules": ()}, "target_modules is empty"),
        ({"target_modules": [1]}, "target_modules must be module names"),
        ({"exclude_modules": [""]}, "exclude_modules must be module names"),
        ({"modules_to_train": {"head"}}, "modules_to_train must be module names"),
        ({"block_shape": (2,)}, "block_shape"),
        ({"block_shape": (0, 2)}, "block_shape"),
        ({"block_shape": (2.0, 2)}, "block_shape"),
        ({"block_shape": "22"}, "block_shape"),
        ({"head_warmup_steps": -1}, "head_warmup_steps"),
        ({"head_warmup_lr": 0}, "head_warmup_lr"),
        ({"seed": 1.5}, "seed"),
        ({"seed": 2**63}, r"seed must be a whole number from 0 to 2\^63 - 1, got"),
        ({"accumulator_dtype": "bf16"}, "accumulator_dtype must be one of 'float32', 'weight'"),
        ({"accumulator_device": "gpu"}, "accumulator_device"),
    ],
)
def test_config_refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SpeftConfig(**settings)


def test_config_round_trip() -> None:
    original = SpeftConfig(
        density=0.25, target_modules=["a", "b"], block_shape=(2, 4), modules_to_train=[]
    )
    assert SpeftConfig.from_dict(original.to_dict()) == original
    assert SpeftConfig.from_dict({}) == SpeftConfig()
    assert SpeftConfig(target_modules="query").target_modules == ("query",)
    with pytest.raises(ConfigError, match="unknown setting 'densty'. Did you mean 'density'"):
        SpeftConfig.from_dict({"densty": 0.1})


def test_numpys_numbers_are_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    found = SpeftConfig(
        density=numpy.float32(0.25), seed=numpy.int64(3), block_shape=(numpy.int32(2), 4)
    )
    assert found == SpeftConfig(density=0.25, seed=3, block_shape=(2, 4))
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()
    for number in (numpy.float32("nan"), numpy.bool_(True), numpy.array([0.1])):
        with pytest.raises(ConfigError, match="finite number"):
            SpeftConfig(density=number)


# Which modules are meant


def test_all_linear_is_every_linear_but_the_head() -> None:
    targets = find_targets(bert_classifier(), DATA_FREE)
    expected = {
        f"bert.encoder.layer.{i}.{name}"
        for i in (0, 1)
        for name in (
            *("attention.self.query", "attention.self.key", "attention.self.value"),
            *("attention.output.dense", "intermediate.dense", "output.dense"),
        )
    } | {"bert.pooler.dense"}
    assert set(targets.layers) == expected
    assert targets.dense_modules == ("classifier",)


@pytest.mark.parametrize("tied", [False, True])
def test_a_causal_model_trains_nothing_densely(tied: bool) -> None:
    targets = find_targets(llama(tie_word_embeddings=tied), DATA_FREE)
    assert len(targets.layers) == 14
    assert "lm_head" not in targets.layers
    assert targets.dense_modules == ()


@pytest.mark.parametrize(
    ("architecture", "settings", "head"),
    [
        ("BertForQuestionAnswering", {}, ("qa_outputs",)),
        ("BertForTokenClassification", {}, ("classifier",)),
        ("BertForMaskedLM", {}, ()),
        ("BertModel", {}, ()),
        ("RobertaForSequenceClassification", {}, ("classifier",)),
        ("DistilBertForSequenceClassification", {}, ("pre_classifier", "classifier")),
        ("LlamaForSequenceClassification", {"pad_token_id": 0}, ("score",)),
        ("T5ForSequenceClassification", {}, ("classification_head",)),
        ("T5ForConditionalGeneration", {}, ()),
    ],
)
def test_the_task_head_is_found(
    architecture: str, settings: dict[str, Any], head: tuple[str, ...]
) -> None:
    transformers = pytest.importorskip("transformers")
    tiny = {
        "vocab_size": 50,
        "pad_token_id": 1,
        **{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        **{"intermediate_size": 24, "max_position_embeddings": 32},
        **{"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24},
        **{"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2},
    }
    model_class = getattr(transformers, architecture)
    model = model_class(model_class.config_class(**{**tiny, **settings}))
    targets = find_targets(model, DATA_FREE)
    assert targets.dense_modules == head
    assert targets.layers
    assert not any(name.startswith(root) for name in targets.layers for root in head)


@pytest.mark.parametrize(
    ("wanted", "excluded", "expected"),
    [
        (("query",), (), ["0.attention.self.query", "1.attention.self.query"]),
        (("self.query", "intermediate.dense"), ("layer.1",),
         ["0.attention.self.query", "0.intermediate.dense"]),
        ((r".*\.1\..*\.(key|value)",), (), ["1.attention.self.key", "1.attention.self.value"]),
        (("bert.encoder.layer.0.output.dense",), (), ["0.output.dense"]),
        (("dense",), ("attention", "pooler", r".*\.1\..*"),
         ["0.intermediate.dense", "0.output.dense"]),
    ],
)  # fmt: skip
def test_names_suffixes_and_expressions(
    wanted: tuple[str, ...], excluded: tuple[str, ...], expected: list[str]
) -> None:
    settings = config(target_modules=wanted, exclude_modules=excluded)
    layers = find_targets(bert_classifier(), settings).layers
    assert list(layers) == [f"bert.encoder.layer.{name}" for name in expected]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["qurey"]}, "target_modules: 'qurey' matches no linear.*'query'"),
        ({"target_modules": ["query", "nothing-like-it"]}, "'nothing-like-it' matches no linear"),
        ({"target_modules": ["attention.self"]}, "is a BertSelfAttention"),
        ({"target_modules": ["LayerNorm"]}, "is a LayerNorm"),
        ({"target_modules": ["que(ry"]}, "neither a module's name nor a regular expression"),
        ({"target_modules": ["classifier"]}, "exclude_modules or modules_to_train already name"),
        ({"exclude_modules": ["poler"]}, "exclude_modules: 'poler' matches no module.*'pooler'"),
        ({"exclude_modules": ["bert"]}, "'all-linear' found no linear layer"),
        ({"modules_to_train": ["classifer"]}, "modules_to_train: 'classifer'.*'classifier'"),
        ({"modules_to_train": ["dropout"]}, "has no parameters to train"),
        ({"block_shape": (5, 1)}, r"blocks of \(5, 1\) do not tile layer 'bert.*\(16, 16\)"),
    ],
)
def test_targets_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    model = bert_classifier()
    before = Snapshot(model)
    with pytest.raises(ConfigError, match=message):
        sparsify(model, config(**settings))
    before.assert_untouched()


def hooked(kind: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = mlp()
        getattr(model.first, f"register_{kind}")(lambda *_: None)
        return model

    return build


HOOKS = (
    *("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"),
    *("state_dict_post_hook", "state_dict_pre_hook"),
    *("load_state_dict_post_hook", "load_state_dict_pre_hook"),
)


def forward_replaced() -> nn.Module:
    model = mlp()
    model.first.forward = lambda x: x
    return model


def parametrised() -> nn.Module:
    model = mlp()
    nn.utils.parametrizations.weight_norm(model.first)
    return model


def on_meta() -> nn.Module:
    model = mlp()
    model.first.to("meta")
    return model


def transposed() -> nn.Module:
    model = mlp()
    model.first.weight = nn.Parameter(torch.randn(6, 10).t())
    return model


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def own_forward() -> nn.Module:
    model = mlp()
    model.first = Scaled(6, 10)
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        *((hooked(kind), "has hooks.*register them again") for kind in HOOKS),
        (forward_replaced, "way of its own"),
        (own_forward, "way of its own"),
        (parametrised, "remove the parametrisation"),
        (on_meta, "meta device"),
        (transposed, "not contiguous"),
        (lambda: nn.Sequential(nn.Embedding(3, 4)), "no linear layer"),
    ],
)
def test_layers_that_cannot_train_sparsely(build: Callable[[], nn.Module], message: str) -> None:
    model = build()
    before = Snapshot(model) if build is not on_meta else None
    targets = ("first",) if hasattr(model, "first") else "all-linear"
    with pytest.raises(ConfigError, match=message):
        sparsify(model, config(target_modules=targets))
    if before is not None:
        before.assert_untouched()


def test_hooks_that_were_removed_and_those_of_a_layer_that_is_kept_are_no_hindrance() -> None:
    model = mlp()
    model.first.register_full_backward_hook(lambda *_: None).remove()
    model.second = Scaled(model.second.in_features, model.second.out_features)
    loaded = []
    model.second.register_load_state_dict_pre_hook(lambda *_: loaded.append(1))
    patterns = {
        name: SparsePattern(tuple(model.get_submodule(name).weight.shape), torch.arange(3))
        for name in ("first", "second")
    }
    apply_patterns(model, patterns, config(mode="additive"))
    model.load_state_dict(model.state_dict())
    assert loaded == [1]


def test_all_linear_passes_over_layers_with_a_way_of_their_own() -> None:
    assert list(find_targets(own_forward(), DATA_FREE).layers) == ["second", "head"]
    attention = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8))
    assert list(find_targets(attention, DATA_FREE).layers) == ["1"]
    with pytest.raises(ConfigError, match="MultiheadAttention reads its weight"):
        find_targets(attention, config(target_modules=["0.out_proj"]))


@pytest.mark.parametrize("targets", ["all-linear", ["second"], ["net"]])
def test_a_quantised_layer_needs_a_mask_from_elsewhere(targets: Any) -> None:
    """Nothing can be scored of it; `apply_patterns` takes a mask that the float model gave."""
    model = mlp()
    model.second = Int8Linear(model.second)
    net = nn.Sequential(OrderedDict(net=model.second))
    with pytest.raises(ConfigError, match='Int8Linear.*apply_patterns and mode="additive"'):
        find_targets(net if targets != ["second"] else model, config(target_modules=targets))


def test_the_model_itself_cannot_be_the_layer() -> None:
    with pytest.raises(ConfigError, match="wrap it in an nn.Sequential"):
        sparsify(nn.Linear(4, 4), DATA_FREE)


# Layers that are not served


def test_a_module_without_linear_layers_is_no_target() -> None:
    with pytest.raises(ConfigError, match="a BatchNorm1d; .*: there is none in it"):
        find_targets(mlp(), config(target_modules=["norm"]))


@pytest.mark.parametrize("mode", ["resident", "additive"])
def test_a_lazy_layer_is_to_be_given_its_shape_first(mode: str) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.LazyLinear(3))
    with pytest.raises(
        ConfigError, match="'1.weight' .*has no shape yet: run the model on a batch"
    ):
        find_targets(model, config(mode=mode))
    model(torch.randn(2, 4))
    assert list(find_targets(model, config(mode=mode)).layers) == ["0", "1"]


def test_experts_that_are_no_linear_layers_are_said_to_be_left_out() -> None:
    """Those of a layer are parameters of three dimensions in transformers."""
    (note,) = sparsify(mixtral(), DATA_FREE).notes
    assert re.search(
        r"leaves out 8\d% of .*: mlp.experts.gate_up_proj, mlp.experts.down_proj, mlp.gate"
        r".* stay frozen; experts that are split train: split_experts\(model\)",
        note,
    )
    excluded = config(exclude_modules=["mlp"])
    for model, named in (
        (mixtral(), excluded),
        (llama(), DATA_FREE),
        (bert_classifier(), DATA_FREE),
    ):
        assert sparsify(model, named).notes == ()
    assert sparsify(mixtral(), config(target_modules=["q_proj"])).notes == ()


# Shared weights


def test_shared_weights_are_found() -> None:
    model = Twins()
    whole = torch.randn(12, 6)
    model.top, model.bottom = nn.Linear(6, 6), nn.Linear(6, 6)
    model.top.weight, model.bottom.weight = nn.Parameter(whole[:6]), nn.Parameter(whole[6:])
    shared = shared_weights(model)
    assert shared["left.weight"] == "right.weight"
    assert shared["right.weight"] == "left.weight"
    assert "once.weight" not in shared  # one layer, under two names
    assert "top.weight" not in shared  # one storage, but no byte in common
    model.bottom.weight = nn.Parameter(whole[5:11])
    assert shared_weights(model)["bottom.weight"] == "top.weight"


def test_a_shared_weight_is_refused_in_resident_mode() -> None:
    model = Twins()
    before = Snapshot(model)
    with pytest.raises(
        ConfigError, match=r"'left' shares its weight with 'right\.weight'.*additive"
    ):
        sparsify(model, config(target_modules=["left"]))
    before.assert_untouched()
