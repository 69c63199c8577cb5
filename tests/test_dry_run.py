"""A dry run promises what the run then does, and refuses what the run would refuse."""

import re
import shutil

import pytest
import torch
from tiny_runs import Silent, run, settings
from tiny_text import save_llama, write_jsonl, write_sums, write_tsv
from transformers import MixtralConfig, MixtralForCausalLM

from speft_kernels.cli import main
from speft_kernels.errors import ConfigError, SpeftError
from speft_kernels.finetune import RunConfig
from speft_kernels.finetune.dry_run import dry_run
from speft_kernels.finetune.run import finetune


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sums")
    rows = write_sums(folder)
    rows += [{"prompt": "what is one plus " * 9, "response": "two"}] * 3  # to be cut off
    write_jsonl(folder / "train.jsonl", rows)
    save_llama(folder / "model", [row["prompt"] for row in rows])
    return folder


def number(text, after):
    return int(re.search(rf"^ *([\d,]+) {after}", text, re.M)[1].replace(",", ""))


def test_a_terminal_obeys_nothing_that_a_file_of_settings_holds(place, tmp_path, capsys):
    write_tsv(tmp_path / "data.tsv", [("a warm film", "good"), ("a cold film", "\x1b[2Jbad")])
    data, model, run = tmp_path / "data.tsv", place / "model", tmp_path / "run"
    (tmp_path / "settings.yaml").write_text(
        f"{{train: {data}, eval: {data}, model: {model}, output: {run}, "
        'positive_label: "\\e[2Jbad"}'
    )
    assert main(["finetune", "--dry-run", "--config", str(tmp_path / "settings.yaml")]) == 0
    text = capsys.readouterr().out
    assert "positive_label: \ufffd[2Jbad" in text
    assert "\x1b" not in text


@pytest.mark.parametrize(
    "others",
    [
        {},
        {"scope": "global", "density": 0.031},
        {"density": 1e-5},  # one entry of each layer
        {"block_shape": (4, 8), "density": 0.07, "salience": "gradient"},
        {"lora_budget": 1, "validation": 0.25, "eval": None, "grad_accumulation": 3},
    ],
)
def test_a_dry_run_counts_what_the_run_trains(place, tmp_path, others):
    random = torch.get_rng_state()
    text = dry_run(RunConfig.from_dict(settings(place, tmp_path / "run", **others)))
    assert torch.equal(torch.get_rng_state(), random)
    assert not list(tmp_path.iterdir())
    result = run(place, tmp_path / "run", **others)
    assert number(text, "of them train") == result["trainable_parameters_without_head"]
    assert number(text, "steps$") == result["steps"]
    assert "96 rows of sentence" in text
    assert "12 layers with 14,336 weights are adapted" in text


def test_examples_that_the_tokenizer_cuts_off_make_no_steps(sums, tmp_path):
    own = {
        **{"model": str(sums / "model"), "train": str(sums / "train.jsonl")},
        **{"eval": str(sums / "eval.jsonl"), "output": str(tmp_path / "run")},
        **{"task": "causal-lm", "max_length": 16, "batch_size": 3, "epochs": 1},
    }
    assert "15 rows of prompt, response" in (text := dry_run(RunConfig.from_dict(own)))
    assert number(text, "steps$") == 4


def test_experts_that_stay_frozen_are_said(sums, tmp_path):
    model = shutil.copytree(sums / "model", tmp_path / "model")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 400, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}
    MixtralForCausalLM(MixtralConfig(**sizes, **heads)).save_pretrained(model)
    data = {name: str(sums / f"{name}.jsonl") for name in ("train", "eval")}
    own = {"model": str(model), "task": "causal-lm", "output": str(tmp_path / "run"), **data}
    for method in ("speft", "lora"):
        text = dry_run(RunConfig.from_dict({**own, "method": method, "lora_rank": 2}))
        assert "'all-linear' leaves out 8" in text
        assert "mlp.experts.gate_up_proj, mlp.experts.down_proj" in text


BAD = [
    ({"salience": "speft_kernels:none"}, "none"),
    ({"dtype": "float16"}, "float16"),
    ({"validation": 0.001, "eval": None}, "leaves one side empty"),
    ({"target_modules": ("querry",)}, "query"),
    ({"train": "{}/none.tsv"}, "no such file"),
    ({"eval": "{}/other.tsv"}, "label 'so-so' does not occur"),
    ({"eval": "{}/pairs.tsv"}, "text columns"),
    ({"train": "{}/three.tsv", "eval": "{}/three.tsv", "metric": "f1"}, "'f1' is .* has 3"),
    (
        {"test": "{}/long.tsv", "max_length": 512},
        r"long.tsv: its longest example has \d+ tokens, .* positions for 64; lower",
    ),
    ({"output": "{}/taken"}, "exists already"),
    ({"method": "lora", "lora_rank": 40}, "lora_rank = 40 is too high"),
    ({"eval": None}, "--eval is missing"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_a_dry_run_refuses_what_the_run_refuses_in_the_same_words(place, tmp_path, change, message):
    (tmp_path / "taken").mkdir()
    write_tsv(tmp_path / "other.tsv", [("fine", "good"), ("well", "so-so")])
    write_tsv(tmp_path / "pairs.tsv", [("a", "b", "good")], "sentence1\tsentence2\tlabel")
    write_tsv(tmp_path / "three.tsv", [("a", "good"), ("b", "bad"), ("c", "so-so")])
    write_tsv(tmp_path / "long.tsv", [("film " * 100, "good")])
    own = {**settings(place, tmp_path / "run"), **change}
    own = {key: v.format(tmp_path) if isinstance(v, str) else v for key, v in own.items()}
    with pytest.raises(SpeftError, match=message) as dry:
        dry_run(RunConfig.from_dict(own), display=Silent())
    with pytest.raises(SpeftError) as wet:
        finetune(RunConfig.from_dict(own), display=Silent())
    assert str(dry.value) == str(wet.value)
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_there_is_replaced_or_resumed_by_the_run_alone(place, tmp_path, capsys):
    run(place, tmp_path / "run", max_steps=2)
    config = RunConfig.from_dict(settings(place, tmp_path / "run"))
    with pytest.raises(ConfigError, match="exists already"):
        dry_run(config)
    assert "96 rows" in dry_run(config, overwrite=True)
    assert (tmp_path / "run" / "result.json").is_file()
    command = ["finetune", "--dry-run", "--resume", "--output", str(tmp_path / "run")]
    assert main([*command, "--train", str(place / "train.tsv")]) == 2
    assert "nothing to try" in capsys.readouterr().err


def test_what_is_to_be_downloaded_is_named_and_the_rest_is_checked(place, tmp_path):
    own = settings(place, tmp_path / "run", eval="someone/reviews:validation")
    text = dry_run(RunConfig.from_dict(own))
    assert "eval: someone/reviews:validation (to be downloaded)" in text
    assert "96 rows of sentence" in text
    assert number(text, "of them train") == 716
    text = dry_run(RunConfig.from_dict({**settings(place, tmp_path / "run"), "model": "a/b"}))
    assert "a/b (to be downloaded)" in text
    assert number(text, "steps$") == 36
