"""Folders that come from elsewhere, and outputs that cannot be: one line on standard error."""

import json
import os
import shutil
import sys

import pytest
from tiny_runs import make_place, run
from tiny_text import write_tsv

from speft_kernels.cli import main


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    place = make_place(tmp_path_factory.mktemp("place"))
    run(place, place / "run", max_steps=12)
    return place / "run"


@pytest.fixture
def folder(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def change_extra(folder, **changes):
    path = folder / "adapter" / "adapter_config.json"
    described = json.loads(path.read_text())
    described["extra"].update(changes)
    path.write_text(json.dumps(described))


def error_of(capsys, *argv):
    assert main([str(part) for part in argv]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    message = printed.err.strip().splitlines()[-1]
    assert message.startswith("speft: error: ")
    return message


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("result.json", "{", "not JSON"),
        ("result.json", "[]", "must hold an object"),
        ("result.json", "{}", "lacks 'metric'"),
        ("result.json", "[" * 100_000, "nested too deeply"),
        ("result.json", {"train_seconds": float("nan")}, "cannot convert float NaN"),
        ("result.json", {"after": "high"}, "damaged"),
        ("result.json", {"after": 10**400}, "damaged"),
        ("result.json", {"test": [1]}, "damaged"),
        ("config.json", "[" * 100_000, "nested too deeply"),
        ("config.json", "{}", "lacks 'settings'"),
        ("config.json", {"settings": []}, "settings must be an object"),
        ("config.json", {"settings": {"epochs": 1}}, "--train is missing"),
    ],
)
def test_info_names_the_damaged_file_of_a_run(folder, capsys, name, content, part):
    path = folder / name
    if isinstance(content, dict):
        content = json.dumps({**json.loads(path.read_text()), **content})
    path.write_text(content)
    message = error_of(capsys, "info", folder)
    assert str(path) in message
    assert part in message


def test_what_an_adapter_says_does_not_reach_the_terminal_raw(folder, capsys):
    change_extra(folder, note="\ud800 \x1b[31mred", **{"\x1b[2J": "für später"})
    assert main(["info", str(folder / "adapter")]) == 0
    text = capsys.readouterr().out
    assert "note: \ufffd \ufffd[31mred" in text
    assert "\ufffd[2J: für später" in text
    assert "\x1b" not in text


def test_what_utf_8_does_not_hold_is_written_as_json_says_it(folder, tmp_path, capsys):
    change_extra(folder, labels=["\ud800 é", "good"], note="\udfff")
    write_tsv(tmp_path / "data.tsv", [("dull cold clumsy bitter", "good"), ("warm", "good")])
    merged, labels = tmp_path / "merged", tmp_path / "labels.jsonl"
    assert main(["merge", "--adapter", str(folder), "--output", str(merged)]) == 0
    assert json.loads((merged / "speft.json").read_text("utf-8"))["note"] == "\udfff"
    command = ["evaluate", str(merged), "--data", str(tmp_path / "data.tsv")]
    assert main([*command, "--predictions", str(labels)]) == 0
    assert labels.read_text("utf-8").startswith('{"label": "\\ud800 é"}\n')


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("labels", value) for value in (5, None, [[1], [2]], ["a", "a"], "ab")),
        ("labels", {"a": 1, "b": 2}),
        *(("task", value) for value in ("zzz", [1])),
        *(("pooling", value) for value in (["mean"], "max", None)),
        ("model", 5),
    ],
)
def test_merge_refuses_an_adapter_of_no_model(folder, tmp_path, capsys, key, value):
    change_extra(folder, **{key: value})
    output = tmp_path / "merged"
    message = error_of(capsys, "merge", "--adapter", folder, "--output", output)
    assert f"adapter_config.json: {key} must be" in message
    assert not output.exists()


def test_a_language_model_has_no_labels_to_predict(folder, tmp_path, capsys):
    change_extra(folder, task="causal-lm")
    predictions = tmp_path / "labels.jsonl"
    command = ("evaluate", folder, "--data", "x.tsv", "--predictions", predictions)
    assert "labels must be empty, as a language model has none" in error_of(capsys, *command)
    assert not predictions.exists()


@pytest.mark.parametrize(
    "argv", [("merge", "--adapter", "nowhere"), ("salience", "--train", "nowhere.tsv")]
)
@pytest.mark.parametrize(
    "output",
    [
        "file/merged",
        "x" * 250,  # the folder could be, the one beside it that becomes it could not
        pytest.param(
            "/proc/merged",
            marks=pytest.mark.skipif(sys.platform != "linux", reason="there is no /proc"),
        ),
    ],
)
def test_an_output_that_cannot_be_is_found_first(tmp_path, monkeypatch, capsys, argv, output):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    message = error_of(capsys, *argv, "--output", output)
    assert f"{output} cannot be written: " in message
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_output_that_fails_late_is_one_line_too(folder, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    message = error_of(capsys, "merge", "--adapter", folder, "--output", tmp_path / "merged")
    assert "merged cannot be written: No space left on device" in message
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("method", ["lora", "head"])
def test_salience_is_for_sparse_masks(tmp_path, capsys, method):
    config = tmp_path / "run.yaml"
    config.write_text(f"method: {method}\ntrain: nowhere.tsv\noutput: {tmp_path}/mask\n")
    message = error_of(capsys, "salience", "--config", config)
    assert f"method = {method!r}: only method 'speft'" in message


def test_salience_takes_no_mask(tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(f"mask: {tmp_path}\ntrain: nowhere.tsv\noutput: {tmp_path}/mask\n")
    message = error_of(capsys, "salience", "--config", config)
    assert f"mask = '{tmp_path}': this command writes a mask" in message


def test_a_terminal_obeys_nothing_that_an_error_quotes(folder, tmp_path, capsys):
    change_extra(folder, model="/x\x1b[2J\x1b]0;pwned\x07y")
    message = error_of(capsys, "merge", "--adapter", folder, "--output", tmp_path / "merged")
    assert message.isprintable()
    assert "/x\ufffd[2J" in message


def test_a_number_beyond_any_float_is_refused(folder, capsys):
    path = folder / "adapter" / "adapter_config.json"
    described = json.loads(path.read_text())
    described["config"]["density"] = 10**400
    path.write_text(json.dumps(described))
    assert "density must be a finite number" in error_of(capsys, "info", folder / "adapter")


def test_an_empty_name_of_a_config_is_no_demo(tmp_path, capsys):
    output = tmp_path / "run"
    assert "cannot be read as YAML" in error_of(
        capsys, "finetune", "--config", "", "--output", output
    )


def test_a_name_that_is_too_long_is_refused(capsys):
    assert "folder = " in error_of(capsys, "info", "x" * 300)
