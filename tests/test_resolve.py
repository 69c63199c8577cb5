"""The examples' settings, and what a dry run says of them."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from tiny_text import save_bert, sentences, write_tsv
from torch import nn

from speft_kernels.cli import main
from speft_kernels.finetune.config import RunConfig, load_yaml
from speft_kernels.study import read_rows
from speft_kernels.study.config import read_study
from speft_kernels.targets import find_targets

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").rglob("*.yaml"))
PAPER = ROOT / "examples" / "paper"


def empty(config, cls):
    """The model with weights that nobody writes or reads: they take address space and no memory."""
    with torch.device("meta"):
        model = getattr(transformers, cls)(config)
    return model.to(torch.bfloat16).to_empty(device="cpu")


def opt_350m():
    config = transformers.OPTConfig(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        ffn_dim=4096,
        word_embed_proj_dim=512,
        do_layer_norm_before=False,
        num_labels=2,
    )
    return empty(config, "OPTForSequenceClassification")


def gemma2_2b():
    config = transformers.Gemma2Config(
        hidden_size=2304,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        intermediate_size=9216,
    )
    return empty(config, "Gemma2ForCausalLM")


def size_of(model: nn.Module, settings):
    config = RunConfig.from_dict(settings).speft()
    return sum(layer.weight.numel() for layer in find_targets(model, config).layers.values())


@pytest.mark.parametrize(
    ("name", "model", "trained"),
    [
        ("opt-350m-glue", opt_350m, 1_179_648),
        ("gemma2-2b-maths", gemma2_2b, 25_559_040),
        ("gemma2-2b-alpaca", gemma2_2b, 25_559_040),
    ],
)
def test_the_papers_budgets_are_met_on_its_models(name, model, trained):
    settings = load_yaml(PAPER / f"{name}.yaml")
    assert settings["scope"] == "global"  # so that one rounding decides
    assert round(settings["density"] * size_of(model(), settings)) == trained


def test_the_papers_hyper_parameters_are_those_of_the_paper():
    glue = RunConfig.from_dict(load_yaml(PAPER / "opt-350m-glue.yaml"))
    assert (glue.batch_size, glue.grad_accumulation, glue.epochs) == (32, 2, 30)
    assert (glue.max_length, glue.lr, glue.salience) == (196, 5e-5, "gradient")
    maths = RunConfig.from_dict(load_yaml(PAPER / "qwen2-7b-maths.yaml"))
    assert (maths.batch_size, maths.grad_accumulation, maths.epochs) == (4, 4, 1)
    assert (maths.lr, maths.weight_decay) == (2e-5, 0)
    for config in (glue, maths):
        assert config.scoring_examples == 64 * 16


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_passes_a_dry_run(path, capsys):
    assert main(["finetune", "--config", str(path), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "(to be downloaded)" in out
    assert "learning rates:" in out


def test_the_study_that_is_documented_can_be_read():
    study = read_study(ROOT / "docs" / "study.yaml")
    assert len(study.seeds) == 3
    assert all(len(rates) >= 4 for rates in study.rates.values())
    assert list(study.tasks) == ["sst2", "cola", "mrpc"]


@pytest.mark.parametrize("name", ["study", "defaults"])
def test_the_rows_that_are_documented_are_of_that_study_and_name_no_machines_folders(name):
    study = read_study(ROOT / "docs" / f"{name}.yaml")
    known = {
        study.run(task, name, lr, seed).id
        for task, name in study.cells
        for lr in study.rates[name]
        for seed in study.seeds
    }
    rows = read_rows(ROOT / "docs" / f"{name}.csv")
    assert rows
    assert {row.id for row in rows} <= known
    for row in rows:
        settings = json.loads(row.settings)
        assert not [value for value in settings.values() if str(value).startswith("/")], row.id


def test_a_dry_run_counts_what_is_here_and_trains_nothing(tmp_path, capsys):
    train = sentences(40, seed=1)
    write_tsv(tmp_path / "train.tsv", train)
    save_bert(tmp_path / "model", [text for text, _ in train])
    arguments = [
        *("finetune", "--dry-run", "--train", str(tmp_path / "train.tsv"), "--validation", "0.2"),
        *("--model", str(tmp_path / "model"), "--output", str(tmp_path / "run")),
        *("--batch-size", "8", "--epochs", "2", "--lora-budget", "1", "--pooling", "mean"),
    ]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    size, budget = 2 * (4 * 32 * 32 + 2 * 32 * 48), 2 * (4 * 64 + 2 * 80)
    assert "40 rows of sentence" in out
    assert "8 steps" in out  # 32 rows, batches of 8, two epochs
    assert f"12 layers with {size:,} weights are adapted" in out
    assert f"{budget:,} of them train" in out
    assert not (tmp_path / "run").exists()
    assert main([*arguments, "--target-modules", "querry"]) == 2
    assert "query" in capsys.readouterr().err
    arguments[3] = str(tmp_path / "none.tsv")
    assert main(arguments) == 2
    assert "no such file" in capsys.readouterr().err
