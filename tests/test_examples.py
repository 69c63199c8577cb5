"""The settings in `examples` and `docs`, and that a dry run takes them."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from speft_kernels.cli import main
from speft_kernels.finetune.config import RunConfig, load_yaml
from speft_kernels.finetune.methods import budgeted
from speft_kernels.study import read_rows
from speft_kernels.study.config import read_study
from speft_kernels.study.inputs import changed_settings
from speft_kernels.targets import find_targets

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").rglob("*.yaml"))
PAPER = ROOT / "examples" / "paper"


# What the authors' scripts say (github.com/0-ml/speft, scripts/sparse), with their GLUE program's
# defaults: run_sparse_math.sh, run_sparse_mmlu.sh and run_sparse_glue.sh. gemma2-2b-maths has no
# script of its own: it is the first one with the model and k of the second.
MATHS = {
    "train": "meta-math/MetaMathQA:train[:100000]",
    **{"salience": "gradient", "scope": "global", "scoring_examples": 1024},
    **{"epochs": 1, "batch_size": 4, "grad_accumulation": 4, "scoring_batches": 1024 // 4},
    **{"max_length": 1024, "lr": 2e-5, "weight_decay": 0.0, "warmup_ratio": 0.03},
}
SCRIPTS = {
    "qwen2-7b-maths": {**MATHS, "model": "Qwen/Qwen2-7B", "k": 40_370_176},
    "gemma2-2b-maths": {**MATHS, "model": "google/gemma-2-2b", "k": 25_559_040},
    "gemma2-2b-alpaca": {
        **{"model": "google/gemma-2-2b", "k": 25_559_040, "train": "tatsu-lab/alpaca:train"},
        **{"salience": "gradient", "scope": "global", "scoring_examples": 1024},
        **{"max_steps": 2000, "batch_size": 4, "grad_accumulation": 4, "lr": 1e-5, "seed": 242},
        **{"warmup_ratio": 0.03, "validation": 0.01, "eval_every": 200},
        "scoring_batches": 1024 // 4,
    },
    "opt-350m-glue": {
        **{"model": "facebook/opt-350m", "k": 1_179_648, "train": "nyu-mll/glue@sst2:train"},
        **{"salience": "gradient", "scope": "global", "scoring_examples": 1024},
        **{"epochs": 30, "batch_size": 32, "grad_accumulation": 2, "max_length": 196, "lr": 5e-5},
        **{"warmup_ratio": 0.0, "weight_decay": 0.0, "clip": 0, "scheduler": "linear", "seed": 42},
        "head_warmup_steps": 0,
        **{"scoring_batches": 1024 // 32, "target_modules": ("q_proj", "k_proj", "v_proj")},
    },
}


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
    return transformers.OPTForSequenceClassification(config)


def gemma2_2b():
    config = transformers.Gemma2Config(
        hidden_size=2304,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        intermediate_size=9216,
    )
    return transformers.Gemma2ForCausalLM(config)


def qwen2_7b():
    config = transformers.Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        intermediate_size=18944,
        tie_word_embeddings=False,
    )
    return transformers.Qwen2ForCausalLM(config)


SHAPES = {
    "facebook/opt-350m": opt_350m,
    "google/gemma-2-2b": gemma2_2b,
    "Qwen/Qwen2-7B": qwen2_7b,
}


def trained_weights(config: RunConfig) -> int:
    """How many entries a global mask has, on a model of the right shapes."""
    with torch.device("meta"):
        model = SHAPES[config.model]()
    # Weights that nobody writes or reads: they take address space and no memory.
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    targets = find_targets(model, config.speft())
    size = sum(layer.weight.numel() for layer in targets.layers.values())
    return round(budgeted(config, targets).density * size)


@pytest.mark.parametrize("name", sorted(path.stem for path in PAPER.glob("*.yaml")))
def test_the_papers_examples_are_the_authors_commands(name):
    config = RunConfig.from_dict(load_yaml(PAPER / f"{name}.yaml"))
    expected = dict(SCRIPTS[name])
    assert trained_weights(config) == expected.pop("k")
    assert {key: getattr(config, key) for key in expected} == expected


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_passes_a_dry_run(path, capsys):
    assert main(["finetune", "--config", str(path), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "(to be downloaded)" in out
    assert "learning rates:" in out


def test_defaults_that_go_with_others_are_not_listed_as_choices(capsys, tmp_path):
    (tmp_path / "train.tsv").write_text("sentence\tlabel\nfine\t1\nbad\t0\n")
    data = ["--train", str(tmp_path / "train.tsv"), "--eval", str(tmp_path / "train.tsv")]
    command = ["finetune", *data, "--output", str(tmp_path / "run"), "--dry-run"]
    assert main(command) == 0
    chosen = capsys.readouterr().out.split("learning rates")[0]
    assert chosen.splitlines()[1:] == [f"  output: {tmp_path / 'run'}", "  "]
    assert main([*command, "--salience", "snip", "--head-warmup-steps", "0"]) == 0
    chosen, rest = capsys.readouterr().out.split("learning rates")
    assert "  selection: top\n" in chosen  # which a salience that is named brings with it
    assert "  head_warmup_steps: 0\n" in chosen
    assert "trains alone" not in rest
    assert main([*command, "--method", "full"]) == 0
    assert "  method: full\n" in capsys.readouterr().out  # on which the other defaults hang


def test_a_language_model_is_named_as_such_and_has_no_head(capsys):
    assert main(["finetune", "--config", str(PAPER / "qwen2-7b-maths.yaml"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "  task: causal-lm\n" in out
    assert "  learning rates: 2e-05\n" in out


def test_the_study_that_is_documented_can_be_read():
    study = read_study(ROOT / "docs" / "study.yaml")
    assert {len(seeds) for seeds in study.seeds.values()} == {3}
    assert all(len(rates) >= 4 for rates in study.rates.values())
    assert list(study.tasks) == ["sst2", "cola", "mrpc"]


@pytest.mark.parametrize("name", ["study", "defaults", "settings", "language_model"])
def test_the_studies_that_are_documented_go_on_and_name_no_machines_folders(name):
    study = read_study(ROOT / "docs" / f"{name}.yaml")
    rows = read_rows(ROOT / "docs" / f"{name}.csv")
    assert rows
    assert {row.id for row in rows} <= set(grid := study.grid())
    assert changed_settings(study, grid, {row.id: row for row in rows}) == []
    for row in rows:
        settings = json.loads(row.settings)
        assert not [value for value in settings.values() if str(value).startswith("/")], row.id
        # Settings that are newer than a row must not mean something else when it is repeated.
        config = study.run(row.task, row.name, row.lr, row.seed).config(Path("run"), ROOT)
        again = RunConfig.from_dict({**settings, "output": "run"})
        if config.method == "speft":
            for key in ("salience", "selection", "sample_columns", "scope", "head_warmup_steps"):
                assert getattr(again, key) == getattr(config, key), (row.id, key)
