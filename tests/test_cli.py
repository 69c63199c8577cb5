import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_runs import make_place
from tiny_text import save_bert

from speft_kernels import __version__
from speft_kernels.adapter import load_adapter, read_adapter
from speft_kernels.cli import COMMANDS, build_parser, main
from speft_kernels.commands.settings import GROUPS
from speft_kernels.finetune import load_classifier, loop
from speft_kernels.finetune.config import FIELDS


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("place"), 64, 24)


def flags(place, folder, /, *more, **replaced):
    given = {
        "--model": place / "model",
        "--train": place / "train.tsv",
        "--eval": place / "eval.tsv",
        "--output": folder,
        "--batch-size": 8,
        "--scoring-examples": 16,
        "--scoring-batches": 2,
        "--pooling": "mean",
        **{f"--{name.replace('_', '-')}": value for name, value in replaced.items()},
    }
    return ["finetune", *(str(part) for pair in given.items() for part in pair), *map(str, more)]


@pytest.fixture(scope="module")
def trained(place, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained") / "run"
    assert main(flags(place, output, density=0.05, lr=2e-2, epochs=2)) == 0
    return output


def test_flags_give_a_run_and_its_summary(place, tmp_path, capsys):
    output = tmp_path / "run"
    assert main(flags(place, output, epochs=1, seed=7)) == 0
    printed = capsys.readouterr()
    assert re.search(r"accuracy: 0\.\d+ before, 0\.\d+ after \(step 8 of 8\)", printed.out)
    assert f"written to {output}" in printed.out
    assert "step 8/8  loss" in printed.err
    assert json.loads((output / "config.json").read_text())["settings"]["seed"] == 7


def test_yaml_gives_the_same_run_and_flags_override_it(place, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {place}/model\ntrain: {place}/train.tsv\neval: {place}/eval.tsv\n"
        f"output: {tmp_path}/yaml\nbatch-size: 8\nscoring_examples: 16\nscoring_batches: 2\n"
        "lr: 5e-3\npooling: mean\nmax_steps: 5\n"
    )
    assert main(["finetune", "--config", str(config), "--max-steps", "3"]) == 0
    assert main(flags(place, tmp_path / "flags", lr=5e-3, max_steps=3)) == 0

    def logged(name):
        return (tmp_path / name / "metrics.jsonl").read_text()

    losses = [re.findall(r'"loss": ([0-9.]+)', logged(name)) for name in ("yaml", "flags")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3 + 1  # each step and the evaluation


def bad_data(tmp_path):
    """Files with one fault each."""
    contents = {
        "empty.tsv": b"",
        "unknown.tsv": b"sentence\tlabel\nx\tgood\ny\tgod\n",
        "one.tsv": b"sentence\tlabel\nx\tgood\ny\tgood\n",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


@pytest.mark.parametrize(
    ("replaced", "parts"),
    [
        ({"train": "{}/nothing.tsv"}, ["nothing.tsv: no such file"]),
        ({"eval": "{}/empty.tsv"}, ["empty.tsv: the file is empty", "name the columns"]),
        ({"eval": "{}/unknown.tsv"}, ["line 3", "label 'god'", "Did you mean 'good'?"]),
        ({"train": "{}/one.tsv"}, ["every row has the label 'good'"]),
        ({"train": "no-such-dataset-anywhere"}, ["neither a file here nor a dataset"]),
        ({"model": "{}"}, ["has no config.json"]),
        ({"model": "./missing"}, ["no such folder"]),
        ({"model": "surely/not-a-model"}, ["could not be loaded", "hub id"]),
        ({"density": "many"}, ["density = 'many' is not a number"]),
        ({"salience": "snap"}, ["'snap'", "Did you mean 'snip'?"]),
        ({"target-modules": "querry"}, ["'querry' matches no", "Did you mean 'query'?"]),
        ({"target-modules": "classifier"}, ["classifier"]),
        ({"exclude-modules": "backbone"}, ["found no linear layer"]),
        ({"method": "lorra"}, ["Did you mean 'lora'?"]),
        (
            {"metric": "loss"},
            ["metric 'loss' does not exist for task 'classification'", "accuracy, f1, matthews"],
        ),
        ({"config": "{}/none.yaml"}, ["none.yaml: no such file"]),
        ({"output": "{}/empty.tsv/run"}, ["cannot be created"]),
        ({"output": "{}"}, ["exists already", "--overwrite"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(place, tmp_path, capsys, replaced, parts):
    inputs = bad_data(tmp_path)
    replaced = {key: value.format(inputs) for key, value in replaced.items()}
    before = sorted(path.name for path in tmp_path.rglob("*"))
    assert main(flags(place, tmp_path / "run", **replaced)) == 2
    printed = capsys.readouterr()
    message = printed.err.strip().splitlines()[-1]
    assert message.startswith("speft: error: ")
    for part in parts:
        assert part in message
    assert printed.out == ""
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["finetune", "--trian", "x"], "Did you mean '--train'?"),
        (["finetune", "--train", "x.tsv", "--output", "y"], "--eval is missing"),
        (["finetune", "--train", "x.tsv"], "--output is missing"),
        (["finetune", "--eval", "x.tsv"], "--eval without --train"),
        (["finetune", "--mask", "x"], "--mask without --train"),
        (["finetune", "--resume"], "--resume needs --output"),
        (["finetune", "--resume", "--output", "nowhere"], "no run to resume"),
        (["finetune", "--resume", "--overwrite"], "exclude each other"),
        (["merge", "--adapter", "nowhere", "--output", "x"], "no adapter folder"),
        (["info", "nowhere"], "no such folder"),
        (["fintune"], "invalid choice: 'fintune'"),
    ],
)
def test_wrong_commands_exit_with_2(argv, part, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(argv)
    except SystemExit as exit:  # argparse's own way
        code = exit.code
    assert code == 2
    assert part in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_fault_of_the_package_keeps_its_traceback(place, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr("speft_kernels.finetune.run.read_inputs", broken)
    with pytest.raises(ZeroDivisionError):
        main(flags(place, tmp_path / "run"))


@pytest.mark.parametrize(("module", "extra"), [("transformers", "finetune"), ("peft", "peft")])
def test_a_missing_extra_is_named(monkeypatch, capsys, module, extra):
    from speft_kernels.commands import info

    def missing(_):
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(info, "run", missing)
    assert main(["info"]) == 2
    assert f"pip install 'speft-kernels[{extra}]'" in capsys.readouterr().err


def test_what_may_not_be_read_is_no_fault_of_the_package(monkeypatch, capsys):
    from speft_kernels.commands import info

    def closed(_):
        raise PermissionError(13, "Permission denied", "/closed/run")

    monkeypatch.setattr(info, "run", closed)
    assert main(["info", "/closed/run"]) == 2
    assert capsys.readouterr().err == "speft: error: /closed/run: Permission denied\n"


def test_help_names_every_setting_and_command(capsys):
    assert sorted(FIELDS) == sorted(name for names in GROUPS.values() for name in names)
    with pytest.raises(SystemExit) as caught:
        main(["finetune", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for name in FIELDS:
        assert f"--{name.replace('_', '-')}" in text
    assert main([]) == 2
    assert all(command in capsys.readouterr().out for command in ("finetune",))


def test_the_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"speft {__version__}\n"


def test_info_shows_versions_and_every_backend(capsys):
    from speft_kernels.ops import registry

    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text
    for row in registry.table():
        pattern = rf"^{row['op']} +{row['backend']} .*{re.escape(row['reason'])}$"
        assert re.search(pattern, text, re.M)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_names_only_flags_of_its_own_in_its_help(command):
    commands = next(action.choices for action in build_parser(command)._actions if action.choices)
    assert commands.keys() == COMMANDS.keys()
    parser = commands[command]
    helps = " ".join(action.help or "" for action in parser._actions)
    assert set(re.findall(r"--[a-z][a-z-]*", helps)) <= parser._option_string_actions.keys()


def test_info_describes_runs_and_adapters(trained, capsys):
    assert main(["info", str(trained)]) == 0
    text = capsys.readouterr().out
    assert "run of method speft" in text
    assert "density: 0.05" in text
    assert "accuracy:" in text
    assert main(["info", str(trained / "adapter")]) == 0
    text = capsys.readouterr().out
    assert re.search(r"layer\.1\.output\.dense +32x48 +1x1 +77 +5\.013%", text)
    assert "716 sparse values in 12 layers; 66 dense ones" in text


def test_a_damaged_adapter_is_refused(trained, tmp_path, capsys):
    import shutil

    folder = tmp_path / "adapter"
    shutil.copytree(trained / "adapter", folder)
    path = folder / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    for argv in (["info", folder], ["merge", "--adapter", folder, "--output", tmp_path / "out"]):
        assert main([str(part) for part in argv]) == 2
        assert "truncated" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_merge_writes_a_plain_model_that_computes_the_same(place, trained, tmp_path, capsys):
    output = tmp_path / "merged"
    assert main(["merge", "--adapter", str(trained / "adapter"), "--output", str(output)]) == 0
    assert "merged in" in capsys.readouterr().out
    merged = load_classifier(str(output), ("bad", "good")).eval()
    assert merged.config.id2label == {0: "bad", 1: "good"}
    sparse = load_classifier(str(place / "model"), ("bad", "good"), pooling="mean").eval()
    load_adapter(sparse, trained / "adapter")
    ids = torch.tensor([[2, 5, 9, 7, 3]])
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, sparse(ids).logits)
    assert main(["merge", "--adapter", str(trained), "--output", str(output)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_trained_head_is_merged_too(place, tmp_path):
    run, output = tmp_path / "run", tmp_path / "merged"
    assert main(flags(place, run, method="head", max_steps=2)) == 0
    assert main(["merge", "--adapter", str(run), "--output", str(output)]) == 0
    merged = load_classifier(str(output), ("bad", "good"))
    head = read_adapter(run / "adapter").dense["classifier.weight"]
    assert torch.equal(merged.classifier.weight, head)


def test_merge_refuses_another_base_and_other_kinds_of_adapters(place, trained, tmp_path, capsys):
    save_bert(tmp_path / "other", ["some other words"], dropout=0.0)
    argv = ["merge", "--adapter", str(trained), "--output", str(tmp_path / "out"), "--model"]
    assert main([*argv, str(tmp_path / "other")]) == 2
    assert "another base" in capsys.readouterr().err
    of_peft = "is an adapter of PEFT; merge it with PEFT"
    for method, part in (("shira", of_peft), ("full", "nothing to merge")):
        run = tmp_path / method
        settings = {"method": method, "max_steps": 1, "lora_rank": 2}
        assert main(flags(place, run, **settings)) == 0
        assert main(["merge", "--adapter", str(run), "--output", str(tmp_path / "x")]) == 2
        assert part in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    assert main(["info", str(tmp_path / "shira" / "adapter")]) == 0  # SHiRA is no LoRA
    assert "an adapter that PEFT wrote" in capsys.readouterr().out


def test_salience_writes_the_mask_that_finetune_would_train(place, tmp_path, capsys):
    argv = flags(place, tmp_path / "mask", density=0.05)
    at = argv.index("--eval")
    argv = ["salience", *argv[1:at], *argv[at + 2 :]]
    at = argv.index("--batch-size")
    del argv[at : at + 2]
    assert main(argv) == 0
    text = capsys.readouterr().out
    assert re.search(r"layer\.1\.output\.dense +32 x 48 +77 +5\.013%", text)
    report = json.loads((tmp_path / "mask" / "salience.json").read_text())
    assert (report["nnz"], report["examples"]) == (716, 16)
    assert (report["metric"], report["selection"]) == ("snip", "sample")
    mask = read_adapter(tmp_path / "mask" / "adapter")
    assert all(not layer.values.any() for layer in mask.layers.values())
    assert main(flags(place, tmp_path / "run", density=0.05, max_steps=1)) == 0
    trained = read_adapter(tmp_path / "run" / "adapter")
    assert {n: layer.pattern for n, layer in trained.layers.items()} == {
        n: layer.pattern for n, layer in mask.layers.items()
    }
    model = load_classifier(str(place / "model"), ("bad", "good"), pooling="mean")
    load_adapter(model, tmp_path / "mask" / "adapter")
    own = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert own == {*(f"{n}.values" for n in mask.layers), "classifier.weight", "classifier.bias"}
    assert main(argv) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_command_says_how_to_go_on_and_does(
    place, tmp_path, signum, code, monkeypatch, capsys
):
    output = tmp_path / "a run"
    argv = flags(place, output, epochs=400, eval_every=10_000, save_every=10_000)
    command = [sys.executable, "-m", "speft_kernels.cli"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, *argv], stderr=subprocess.PIPE, text=True, env=environment
    )
    log = output / "metrics.jsonl"
    deadline = time.monotonic() + 100
    while not (log.exists() and log.read_text().count("\n") >= 3):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert (hint := f"speft finetune --resume --output '{output}'\n") in errors
    assert "Traceback" not in errors
    assert main(["info", str(output)]) == 0
    assert hint in capsys.readouterr().out
    done = json.loads(log.read_text().splitlines()[-1])["step"]
    assert 3 <= done < 3200

    def stop_again(self, window):
        os.kill(os.getpid(), signum)
        return step(self, window)

    step = loop.Loop._step
    monkeypatch.setattr(loop.Loop, "_step", stop_again)
    assert main(["finetune", "--resume", "--output", str(output)]) == code
    assert f"resuming after step {done} of 3200" in capsys.readouterr().err
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(1, done + 2))


def test_the_demo_in_small(place, tmp_path, capsys, monkeypatch):
    """The demo's own path from end to end, on few steps and a tiny model."""
    from speft_kernels.commands import demo
    from speft_kernels.finetune.demo_data import DemoData

    data = demo.collect()
    few = DemoData(data.train[::20], data.eval[::20], data.test[::20], data.labels)
    monkeypatch.setattr(demo, "collect", lambda: few)
    save_bert(tmp_path / "model", [example.text for example in few.train])
    monkeypatch.chdir(tmp_path)
    argv = ["finetune", "--model", str(tmp_path / "model"), "--output", "demo"]
    argv += ["--epochs", "1", "--max-steps", "3", "--scoring-examples", "32"]
    for refused, message in (
        (["--metric", "f1"], "the training data has 16"),
        (["--positive-label", "json"], "the training data has 16"),
        (["--dynamic", "rigl"], "the mask would never move"),
    ):
        assert main([*argv, *refused]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "demo").exists()
    # Of these two the run of the head alone knows nothing.
    beside_the_head = ["--lora-budget", "1", "--dynamic", "rigl", "--dynamic-every", "1"]
    assert main([*argv, "--scoring-batches", "2", *beside_the_head, "--output", "other"]) == 0
    result = json.loads((tmp_path / "other" / "speft" / "result.json").read_text())
    assert result["dynamic"]["strategy"] == "rigl"
    assert main([*argv, "--scoring-batches", "2"]) == 0
    text = capsys.readouterr().out
    table = text[text.rindex("Held-out accuracy") :]
    assert re.search(r"\d\.\d%  majority class", table)
    assert re.search(r"\d\.\d%  frozen encoder, trained head", table)
    assert re.search(r"\d\.\d%  SPEFT \([0-9,]+ trained weights, 0\.5\d%\)", table)
    for method in ("head", "speft"):
        result = json.loads((tmp_path / "demo" / method / "result.json").read_text())
        assert result["method"] == method
        assert 0 <= result["test"]["accuracy"] <= 1
    assert main([*argv, "--scoring-batches", "2"]) == 2
    assert "exists already" in capsys.readouterr().err
    for stray in ("thesis.md", "data/mine.jsonl", "speft/notes.txt"):
        (tmp_path / "demo" / stray).write_text("dear")
        assert main([*argv, "--scoring-batches", "2", "--overwrite"]) == 2
        assert "so --overwrite does not delete it" in capsys.readouterr().err
        assert (tmp_path / "demo" / stray).read_text() == "dear"
        (tmp_path / "demo" / stray).unlink()


def test_the_example_for_any_model_runs(tmp_path):
    script = Path(__file__).resolve().parents[1] / "examples" / "sparsify_your_model.py"
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"loss ([0-9.]+)", done.stdout)]
    assert losses[-1] < 0.5 * losses[0]


def test_a_reader_that_leaves_early_is_no_error():
    command = f"{sys.executable} -m speft_kernels.cli info"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} | head -1"], capture_output=True, text=True
    )
    assert done.stdout.startswith("speft-kernels")
    assert "Traceback" not in done.stderr
