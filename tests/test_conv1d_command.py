"""The command on a GPT-2, whose layers are `Conv1D`: trained, evaluated, merged, with its peers."""

import json
import warnings

import pytest
from tiny_text import save_gpt2, write_sums, write_tsv

from speft_kernels.cli import main
from speft_kernels.conv1d import is_conv1d
from speft_kernels.finetune import load_trained

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    """Sums to learn, and a GPT-2 to learn them with."""
    folder = tmp_path_factory.mktemp("sums")
    rows = write_sums(folder)
    pairs = [(row["prompt"], str(i % 2)) for i, row in enumerate(rows)]
    write_tsv(folder / "train.tsv", pairs)
    save_gpt2(folder / "model", [row["prompt"] for row in rows])
    return folder


def command(sums, output, *more, task="causal-lm"):
    kind = "jsonl" if task == "causal-lm" else "tsv"
    own = {"model": sums / "model", "train": sums / f"train.{kind}", "output": output}
    own |= {"eval": sums / f"{'eval' if kind == 'jsonl' else 'train'}.{kind}"}
    own |= {"task": task, "max-length": 16, "batch-size": 4, "epochs": 2}
    words = [str(part) for key, value in own.items() for part in (f"--{key}", value)]
    return main(["finetune", *words, *more])


@pytest.mark.parametrize("task", ["causal-lm", "classification"])
def test_the_command_trains_evaluates_and_merges(sums, task, tmp_path, capsys):
    run, merged = tmp_path / "run", tmp_path / "merged"
    assert command(sums, run, "--density", "0.1", task=task) == 0
    data = str(sums / ("eval.jsonl" if task == "causal-lm" else "train.tsv"))
    capsys.readouterr()
    assert main(["evaluate", str(run), "--data", data]) == 0
    of_the_run = capsys.readouterr().out.splitlines()[-1]
    assert main(["merge", "--adapter", str(run), "--output", str(merged)]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(merged), "--data", data]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == of_the_run
    name = f"{'transformer.' if task == 'causal-lm' else ''}h.0.mlp.c_fc"
    kind = transformers.AutoModelForCausalLM if task == "causal-lm" else transformers.AutoModel
    assert kind.from_pretrained(merged).get_submodule(name).weight.shape == (32, 128)
    trained = load_trained(run)
    assert sum(map(is_conv1d, trained.model.modules())) == 8
    # The mask of that run trains anew.
    assert command(sums, tmp_path / "again", "--mask", str(run / "adapter"), task=task) == 0


def test_a_dry_run_knows_what_trains(sums, tmp_path, capsys):
    for more in ([], ["--lora-budget", "2"], ["--block-shape", "4x4"]):
        assert command(sums, tmp_path / "run", "--dry-run", *more) == 0
        told = capsys.readouterr().out
        assert "8 layers with 24,576 weights are adapted" in told
        assert "stay frozen" not in told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["lora", "pissa", "shira", "supertuning", "full"])
def test_the_peers_train_it_too(sums, method, tmp_path, capsys):
    pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*fan_in_fan_out")
        assert command(sums, tmp_path / "run", "--method", method, "--lora-rank", "2") == 0
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run"), "--data", str(sums / "eval.jsonl")]) == 0
    if method != "full":
        merged = load_trained(tmp_path / "run").model.merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        name = "transformer.h.0.mlp.c_fc"
        assert is_conv1d(whole.get_submodule(name))
        assert whole.get_submodule(name).weight.shape == (32, 128)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert f"{result['eval']['loss']:.4f}" in capsys.readouterr().out
    assert result["after"] != result["before"]
