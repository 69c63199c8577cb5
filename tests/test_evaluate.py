"""`speft evaluate` and `load_trained`: what a run left computes what the run measured."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import METHODS, make_place, run
from tiny_text import save_bert, save_llama, sentences, write_sums, write_tsv
from transformers import AutoModelForSequenceClassification

from speft_kernels.cli import main
from speft_kernels.errors import AdapterError, SpeftError
from speft_kernels.finetune import MeanPoolClassifier, load_trained


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = make_place(tmp_path_factory.mktemp("place"))
    write_tsv(folder / "test.tsv", sentences(30, seed=3))
    return folder


@pytest.fixture(scope="module")
def trained(place, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "run"
    return output, run(place, output, max_steps=12, test=str(place / "test.tsv"))


def evaluated(capsys, *argv):
    assert main(["evaluate", *map(str, argv)]) == 0
    out = capsys.readouterr().out
    return {key: float(value) for key, value in re.findall(r"^  (\w+): +([\d.]+)$", out, re.M)}


def error_of(capsys, *argv):
    assert main([str(part) for part in argv]) == 2
    return capsys.readouterr().err.strip()


@pytest.mark.parametrize("pooling", ["mean", "model"])
@pytest.mark.parametrize("method", METHODS)
def test_a_trained_model_measures_what_its_run_measured(place, tmp_path, capsys, method, pooling):
    data, output = place / "test.tsv", tmp_path / "run"
    result = run(place, output, method, max_steps=12, test=str(data), pooling=pooling)
    labels = tmp_path / "labels.jsonl"
    found = evaluated(capsys, output, "--data", data, "--batch-size", "7", "--predictions", labels)
    # Other batches sum in another order, and four digits are printed.
    assert found == pytest.approx(result["test"], abs=2e-4)
    rows = [json.loads(line)["label"] for line in labels.read_text().splitlines()]
    true = [label for _, label in sentences(30, seed=3)]
    right = sum(a == b for a, b in zip(rows, true, strict=True))
    assert right / 30 == pytest.approx(result["test"]["accuracy"])


@pytest.mark.parametrize("pooling", ["mean", "model"])
def test_a_merged_model_is_loaded_without_its_run(place, tmp_path, capsys, pooling):
    own = shutil.copytree(place, tmp_path / "own")
    run(own, own / "run", max_steps=12, pooling=pooling)
    expected = load_trained(own / "run")
    merged = tmp_path / "merged"
    assert main(["merge", "--adapter", str(own / "run"), "--output", str(merged)]) == 0
    said = capsys.readouterr().out
    for command in ("report", "info"):
        assert "neither a run" in error_of(capsys, command, merged)
    assert "nothing to merge" in error_of(capsys, "merge", "--adapter", merged, "--output", "m")
    shutil.rmtree(own)
    data = place / "test.tsv"
    assert evaluated(capsys, merged, "--data", data)["accuracy"] > 0.5
    command = ["evaluate", merged, "--data", data]
    assert "would not be read" in error_of(capsys, *command, "--model", place / "model")
    assert ("MeanPoolClassifier.from_pretrained" in said) == (pooling == "mean")
    kind = MeanPoolClassifier if pooling == "mean" else AutoModelForSequenceClassification
    plain = kind.from_pretrained(str(merged)).eval()
    found = load_trained(merged)
    assert found.labels == expected.labels == ("bad", "good")
    inputs = found.tokenizer(["the film was lovely"], return_tensors="pt")
    with torch.no_grad():
        wanted = expected.model(**inputs).logits
        torch.testing.assert_close(found.model(**inputs).logits, wanted)
        torch.testing.assert_close(plain(**inputs).logits, wanted)


@pytest.mark.parametrize("method", ["speft", "lora"])
def test_a_language_model(tmp_path, capsys, method):
    save_llama(tmp_path / "model", [row["prompt"] for row in write_sums(tmp_path)])
    data = ["--train", "--eval", "--test"]
    argv = [part for name in data for part in (name, str(tmp_path / "train.jsonl"))]
    argv += ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "run")]
    argv += ["--task", "causal-lm", "--max-steps", "2", "--method", method, "--max-length", "24"]
    assert main(["finetune", *argv]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    capsys.readouterr()
    found = evaluated(capsys, tmp_path / "run", "--data", tmp_path / "train.jsonl")
    assert found == pytest.approx(result["test"], rel=1e-4)
    assert load_trained(tmp_path / "run").task.max_length == 24
    command = ["evaluate", tmp_path / "run", "--data", tmp_path / "train.jsonl"]
    message = error_of(capsys, *command, "--predictions", tmp_path / "p.jsonl")
    assert "a language model has none" in message
    assert not (tmp_path / "p.jsonl").exists()


def test_what_cannot_be_evaluated_is_said(place, trained, tmp_path, capsys):
    output, _ = trained
    command = ["evaluate", output, "--data"]
    write_tsv(tmp_path / "other.tsv", [("fine", "so-so")])
    assert "label 'so-so' does not occur" in error_of(capsys, *command, tmp_path / "other.tsv")
    assert "no such file" in error_of(capsys, *command, tmp_path / "none.tsv")
    data = place / "test.tsv"
    assert "batch_size" in error_of(capsys, *command, data, "--batch-size", "0")
    taken = tmp_path / "taken.jsonl"
    taken.write_text("dear")
    assert "exists already" in error_of(capsys, *command, data, "--predictions", taken)
    assert taken.read_text() == "dear"
    for where, reason in ((tmp_path, "is a folder"), (tmp_path / "x" / "p.jsonl", "not exist")):
        message = error_of(capsys, *command, data, "--predictions", where)
        assert f"--predictions {where}" in message
        assert reason in message
    save_bert(tmp_path / "base", ["other words"])
    assert "another base" in error_of(capsys, *command, data, "--model", tmp_path / "base")
    assert "no folder of a run" in error_of(capsys, "evaluate", tmp_path, "--data", data)
    assert "no adapter folder" in error_of(capsys, "evaluate", tmp_path / "x", "--data", data)
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "metrics.jsonl").touch()
    message = error_of(capsys, "evaluate", unfinished, "--data", data)
    assert f"is not finished: go on with speft finetune --resume --output {unfinished}" in message
    write_tsv(tmp_path / "long.tsv", [("film " * 100, "good")])
    long = [*command, tmp_path / "long.tsv", "--max-length", "500"]
    assert "positions for 64" in error_of(capsys, *long)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ({"labels": ["a"]}, "labels must be"),
        ({"max_length": 0}, "max_length must be"),
        ({"max_length": True}, "max_length must be"),
        ("[1]", "must hold an object"),
        ("[" * 100_000, "damaged"),
        (b"\xff", "damaged"),
    ],
)
def test_what_goes_along_with_another_librarys_adapter_is_not_trusted(
    place, tmp_path, spoil, message
):
    run(place, tmp_path / "run", "lora", max_steps=1)
    path = tmp_path / "run" / "adapter" / "speft.json"
    if isinstance(spoil, dict):
        spoil = json.dumps({**json.loads(path.read_text()), **spoil})
    path.write_bytes(spoil if isinstance(spoil, bytes) else spoil.encode())
    with pytest.raises(AdapterError, match=message):
        load_trained(tmp_path / "run")


def test_a_damaged_adapter_of_another_library_is_named(place, tmp_path):
    run(place, tmp_path / "run", "lora", max_steps=1)
    path = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(AdapterError, match="PEFT cannot load it"):
        load_trained(tmp_path / "run")


@pytest.mark.parametrize("method", ["full", "merged", "lora"])
def test_weights_that_are_not_there_are_not_drawn_anew(place, tmp_path, method):
    folder, name = tmp_path / "run" / "adapter", "model.safetensors"
    run(place, tmp_path / "run", "speft" if method == "merged" else method, max_steps=1)
    if method == "merged":
        folder = tmp_path / "merged"
        assert main(["merge", "--adapter", str(tmp_path / "run"), "--output", str(folder)]) == 0
    elif method == "lora":
        name = "adapter_model.safetensors"
    load_trained(folder)
    tensors = load_file(folder / name)
    del tensors[sorted(key for key in tensors if "layer.1" in key)[0]]
    save_file(tensors, folder / name, metadata={"format": "pt"})
    with pytest.raises(SpeftError, match="lacks the weights|missing adapter keys"):
        load_trained(folder)
