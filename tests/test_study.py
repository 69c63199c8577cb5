"""A study: what its grid is, in which order it runs, and that nothing is lost or repeated."""

import contextlib
import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Pipe
from pathlib import Path

import pytest
from tiny_text import save_bert, sentences, write_tsv

from speft_kernels.cli import main
from speft_kernels.errors import ConfigError, DataError
from speft_kernels.finetune.inputs import digest_of
from speft_kernels.finetune.signals import Interrupted
from speft_kernels.study import COLUMNS, read_rows, write_rows
from speft_kernels.study import runner as runner_module
from speft_kernels.study.config import read_study
from speft_kernels.study.runner import Places, StudyError, collect, run_study
from speft_kernels.study.schedule import best_rate, due

STUDY = """
name: tiny
output: {output}
base: {{model: {model}, validation: 0.25, batch_size: 8, epochs: 1, max_length: 32, density: 0.05,
       scoring_examples: 16, scoring_batches: 2}}
tasks:
  films: {{train: train.tsv, test: eval.tsv}}
methods:
  head: {{method: head}}
  sparse: {{salience: [snip, random]}}
lr: [1e-2, 3e-2]
seeds: [0, 1, 2]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    train = sentences(48, seed=1)
    write_tsv(folder / "train.tsv", train)
    write_tsv(folder / "eval.tsv", sentences(16, seed=2))
    save_bert(folder / "model", [text for text, _ in train])
    return folder


@pytest.fixture
def study_file(place, tmp_path):
    def write(text=STUDY, **others):
        text = text.format(output=tmp_path / "out", model=place / "model", **others)
        (tmp_path / "study.yaml").write_text(text)
        return tmp_path / "study.yaml"

    return write


@pytest.fixture
def study(study_file, place):
    return read_study(study_file(), data=str(place))


class FakeWorker:
    """Writes at once what a run would leave; `outcome` says how it ends."""

    began: list = []  # noqa: RUF012 -- reset by the fixture
    outcome = staticmethod(lambda config: None)

    def __init__(self, config, *, threads, slot):
        self.slot, self.config = slot, config
        FakeWorker.began.append(config)
        self.reason = FakeWorker.outcome(config)
        if self.reason is None:
            write_result(config)
        self.sentinel, other = Pipe()
        other.close()  # ready at once

    def failure(self):
        return self.reason

    def stop(self):
        pass


def write_result(config, after=None, **others):
    folder = runner_module.Path(config.output)
    folder.mkdir(parents=True)
    # The second rate is the better one for every method.
    score = config.lr * 10 + config.seed / 100 if after is None else after
    result = {
        **dict.fromkeys(("steps", "best_step", "train_seconds", "step_ms_median"), 1),
        **{"density": 0.05, "trainable_parameters_without_head": 9, "head_parameters": 2},
        **{"lr": config.lr, "head_lr": config.lr, "metric": "accuracy", "after": score},
        **{"test": {"accuracy": score}, "salience_seconds": 0.0, "salience": {}, "threads": 1},
        **{"peak_memory_bytes": None, "device": "cpu", "processor": "x", "versions": {}},
        "commit": "unknown",
        **others,
    }
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "config.json").write_text(json.dumps({"settings": config.to_dict()}))


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(runner_module, "Worker", FakeWorker)
    monkeypatch.setattr(FakeWorker, "began", [])
    monkeypatch.setattr(FakeWorker, "outcome", staticmethod(lambda config: None))
    return FakeWorker


def silent(line):
    pass


def test_lists_span_the_grid_and_ids_name_runs_on_any_machine(study, study_file, tmp_path):
    assert list(study.methods) == ["head", "sparse-snip", "sparse-random"]
    assert study.rates["head"] == (1e-2, 3e-2)
    ids = [run.id for cell in study.cells for run in study.search(*cell)]
    assert len(set(ids)) == 6
    # Another folder of data and of output, the same runs.
    elsewhere = read_study(study_file(), output=str(tmp_path / "other"), data=str(tmp_path))
    assert [r.id for c in elsewhere.cells for r in elsewhere.search(*c)] == ids
    assert all(run.settings["train"] == "train.tsv" for run in study.search("films", "head"))
    text = STUDY.replace("epochs: 1", "epochs: 2")
    changed = read_study(study_file(text))
    assert not {r.id for c in changed.cells for r in changed.search(*c)} & set(ids)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("methods:\n  head: {{method: head}}", "methods:\nx:", "key 'x' is unknown"),
        (STUDY[STUDY.index("methods") : STUDY.index("lr:")], "", "methods is empty, so the grid"),
        (STUDY[STUDY.index("tasks") : STUDY.index("methods")], "tasks: {{}}\n", "tasks is empty"),
        ("[snip, random]", "[]", "salience is an empty list: nothing to run"),
        ("[snip, random]", "[snip, snop]", "unknown salience metric 'snop'"),
        ("[snip, random]", "[snip, snip]", "two methods are called 'sparse-snip'"),
        ("films:", "'../films':", "a label is made of letters"),
        ("lr: [1e-2, 3e-2]", "lr: []", "must be a list of numbers with one at least"),
        ("lr: [1e-2, 3e-2]", "lr: [1e-2, 0.01]", "names a value twice"),
        ("lr: [1e-2, 3e-2]", "lr: [1e-2, -1]", "lr = -1.0 must be greater than 0"),
        ("seeds: [0, 1, 2]", "seeds: [0.5]", "seeds = .0.5. must be a list of numbers"),
        ("seeds: [0, 1, 2]", "search_seeds: 2", "search_seeds = 2 must lie between 1 and 1"),
        ("{{method: head}}", "{{method: head, seeds: []}}", "method head: seeds = .. must be"),
        (
            "random]}}\nlr:",
            "random], seeds: 7}}\nsearch_seeds: 2\nlr:",
            "search_seeds = 2 must lie between 1 and 1",
        ),
        ("seeds: [0, 1, 2]", "search: up", "search = 'up' is not one of all, climb"),
        ("seeds: [0, 1, 2]", "search_slack: -1", "search_slack = -1 must be a number from 0 on"),
        ("epochs: 1", "epoch: 1", "setting 'epoch' is unknown. Did you mean 'epochs'"),
        ("epochs: 1", "seed: 1", "'seed' is set by the study itself"),
        ("validation: 0.25", "clip: 1", "validation .or eval. is missing"),
        (", test: eval.tsv", "", "test, the data to report on, is missing"),
        ("output: {output}", "", "output, the study's folder, is missing"),
        ("name: tiny", "name: [", "cannot be read as YAML"),
    ],
)
def test_a_bad_grid_is_refused_before_anything_runs(study_file, tmp_path, old, new, message):
    assert old in STUDY
    with pytest.raises(ConfigError, match=message):
        read_study(study_file(STUDY.replace(old, new)))
    assert not (tmp_path / "out").exists()


def test_every_rate_runs_with_the_search_seeds_and_the_best_with_the_others(study, fake):
    rows = run_study(study, jobs=2, say=silent)
    runs = [(config.method, config.salience, config.lr, config.seed) for config in fake.began]
    assert len(runs) == len(set(runs)) == len(rows) == 3 * (2 + 2)
    for method, salience in (("head", "snip"), ("speft", "snip"), ("speft", "random")):
        own = {(lr, seed) for m, s, lr, seed in runs if (m, s) == (method, salience)}
        assert own == {(1e-2, 0), (3e-2, 0), (3e-2, 1), (3e-2, 2)}
    # Method by method: what is listed first is complete first, but for a run that waits its turn.
    assert {config.method for config in fake.began[:4]} == {"head"}
    assert read_rows(Places(study.output).rows) == rows
    assert due(study, {row.id: row for row in rows}) == []


def test_a_method_may_have_seeds_of_its_own(study_file, fake):
    text = STUDY.replace("{{method: head}}", "{{method: head, seeds: [0, 5]}}")
    study = read_study(study_file(text.replace("random]", "random], seeds: 0")))
    rows = run_study(study, jobs=1, say=silent)
    chosen = {(row.name, row.seed) for row in rows if row.lr == 3e-2}
    assert chosen == {("head", 0), ("head", 5), ("sparse-snip", 0), ("sparse-random", 0)}
    assert {row.id for row in rows} < set(study.grid())
    # They are no setting of a run: with other seeds, what has run is not run again.
    assert {row.id for row in rows if row.seed == 0} <= set(read_study(study_file()).grid())


def test_the_best_rate_is_that_of_the_mean_validation_and_a_lower_loss_is_better(study, fake):
    rows = run_study(study, jobs=1, say=silent)
    one, two, *_ = (row for row in rows if row.name == "head")
    low = dataclasses.replace(one, lr=1e-3, validation=0.5, score=1.0)
    high = dataclasses.replace(two, lr=1e-2, validation=0.6, score=0.0)
    assert best_rate([low, high]) == 1e-2  # by validation, whatever the score
    losses = [dataclasses.replace(row, metric="loss") for row in (low, high)]
    assert best_rate(losses) == 1e-3
    again = dataclasses.replace(high, validation=0.3)
    assert best_rate([low, low, high, again]) == 1e-3
    assert best_rate([high, dataclasses.replace(low, validation=0.6)]) == 1e-3  # ties: smaller


@pytest.mark.parametrize(
    ("validation", "searched"),
    [
        ({1: 0.1, 2: 0.2, 3: 0.3, 4: 0.2, 5: 0.9}, {2, 3, 4}),  # the middle one is a peak
        ({1: 0.1, 2: 0.2, 3: 0.3, 4: 0.295, 5: 0.9}, {2, 3, 4, 5}),  # within the slack of it
        ({1: 0.1, 2: 0.3, 3: 0.2, 4: 0.1, 5: 0.0}, {1, 2, 3, 4}),
        ({1: 0.4, 2: 0.3, 3: 0.2, 4: 0.1, 5: 0.0}, {1, 2, 3, 4}),  # up to the end of the list
        ({1: 0.0, 2: 0.1, 3: 0.2, 4: 0.3, 5: 0.2}, {2, 3, 4, 5}),
        ({1: 0.2, 2: None, 3: None, 4: None, 5: None}, {1, 2, 3, 4}),  # down where all diverge
        ({1: 0.1, 2: 0.2, 3: None, 4: None, 5: None}, {1, 2, 3, 4}),
        (dict.fromkeys((1, 2, 3, 4, 5)), {1, 2, 3, 4}),
    ],
)
def test_a_search_that_climbs_leaves_out_what_lies_beyond_a_worse_rate(
    study_file, place, fake, monkeypatch, validation, searched
):
    text = STUDY.replace(
        "lr: [1e-2, 3e-2]", "lr: [3, 1, 5, 2, 4]\nsearch: climb\nsearch_slack: 0.01"
    )
    text = text.replace("  sparse: {{salience: [snip, random]}}\n", "")
    study = read_study(study_file(text), data=str(place))
    write = write_result
    monkeypatch.setitem(
        globals(), "write_result", lambda config: write(config, validation[config.lr])
    )
    fake.outcome = staticmethod(
        lambda config: "diverged" if validation[config.lr] is None else None
    )
    with contextlib.suppress(StudyError):
        run_study(study, jobs=2, say=silent)
    assert {config.lr for config in fake.began if config.seed == 0} == searched
    finite = {lr: validation[lr] for lr in searched if validation[lr] is not None}
    best = [max(finite, key=finite.get)] * 2 if finite else []
    assert [config.lr for config in fake.began if config.seed > 0] == best


def test_a_study_goes_on_where_it_was_and_repeats_nothing(study, fake):
    run_study(study, jobs=1, say=silent, max_runs=5)
    assert len(fake.began) == 5
    places = Places(study.output)
    # A run that finished without getting its row; a row without the run's folder.
    rows = read_rows(places.rows)
    write_rows(places.rows, rows[1:])
    runner_module.Path(places.runs / rows[1].id / "result.json").unlink()
    assert sorted(collect(study)) == sorted(row.id for row in rows)
    run_study(study, jobs=1, say=silent)
    assert len(fake.began) == 12
    run_study(study, jobs=1, say=silent)
    assert len(fake.began) == 12


def test_rows_of_a_grid_that_changed_are_kept(study, study_file, fake, place):
    rows = run_study(study, jobs=1, say=silent)
    smaller = read_study(study_file(STUDY.replace("[snip, random]", "[snip]")), data=str(place))
    assert len(run_study(smaller, jobs=1, say=silent)) == 8
    assert read_rows(Places(study.output).rows) == rows


def test_a_run_that_fails_is_named_and_the_others_are_run(study, fake):
    fake.outcome = staticmethod(
        lambda config: (
            "the loss became nan" if (config.method, config.salience) == ("speft", "snip") else None
        )
    )
    said = []
    with pytest.raises(StudyError, match=r"2 runs failed(?s:.)*snip-lr0.01.*the loss became nan"):
        run_study(study, jobs=2, say=said.append)
    assert len(read_rows(Places(study.output).rows)) == 8
    assert sum("failed: the loss became nan" in line for line in said) == 2
    fake.outcome = staticmethod(lambda config: None)
    assert len(run_study(study, jobs=2, say=silent)) == 12


def test_a_rate_that_diverges_is_out_of_the_choice_and_the_others_go_on(study, fake):
    fake.outcome = staticmethod(lambda config: "the loss became inf" if config.lr == 3e-2 else None)
    with pytest.raises(StudyError, match="3 runs failed"):
        run_study(study, jobs=1, say=silent)
    rows = read_rows(Places(study.output).rows)
    assert {(row.lr, row.seed) for row in rows} == {(1e-2, seed) for seed in (0, 1, 2)}
    assert len(fake.began) == 3 * (1 + 1 + 2)


def test_a_study_runs_in_one_process_at_a_time(study, fake):
    caught = []

    def second(config):
        try:
            run_study(study, jobs=1, say=silent)
        except StudyError as error:
            caught.append(str(error))

    fake.outcome = staticmethod(second)
    run_study(study, jobs=1, say=silent, max_runs=1)
    assert caught == [f"another process runs the study in {study.output}"]


def test_a_damaged_table_is_named_with_its_line_and_left_alone(study, fake):
    run_study(study, jobs=1, say=silent, max_runs=2)
    path = Places(study.output).rows
    good = path.read_text()
    for old, new, message in (
        (",accuracy,", ",accuracy", "line 2"),
        ("0.1,", "much,", "is no number"),
        ("id,task", "id,chore", "no column 'task'"),
    ):
        path.write_text(good.replace(old, new, 1))
        with pytest.raises(DataError, match=message):
            run_study(study, jobs=1, say=silent)
        assert path.read_text() == good.replace(old, new, 1)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read as CSV"):
        run_study(study, jobs=1, say=silent)


def test_a_row_has_every_column_and_reads_back(study, fake, tmp_path):
    rows = run_study(study, jobs=1, say=silent, max_runs=3)
    assert read_rows(Places(study.output).rows) == rows
    settings = json.loads(rows[0].settings)
    assert settings["train"] == "train.tsv"  # no path of this machine
    assert str(tmp_path) not in json.dumps({**settings, "model": ""})
    assert "output" not in settings
    assert set(COLUMNS) >= {"seed", "lr", "commit", "versions", "processor", "settings"}


def test_rows_of_other_data_or_weights_are_met_by_an_error_and_kept(
    place, study_file, fake, monkeypatch, tmp_path
):
    own = shutil.copytree(place, tmp_path / "own")
    text = STUDY.replace("model: {model}", f"model: {own / 'model'}")
    study = read_study(study_file(text), data=str(own))
    path = Places(study.output).rows
    run_study(study, jobs=1, say=silent, max_runs=1)  # as a run that did not say what it read

    def inputs(config):
        return " ".join(f"{n}={digest_of(config, n)}" for n in ("train", "test", "model"))

    write = write_result
    monkeypatch.setitem(
        globals(), "write_result", lambda config: write(config, inputs=inputs(config))
    )
    run_study(study, jobs=1, say=silent, max_runs=3)
    before = read_rows(path)
    assert sum(bool(row.inputs) for row in before) == 3
    weights = next((own / "model").glob("*.safetensors"))
    for file, changed in (
        (own / "train.tsv", lambda old: old.replace(b"film", b"book", 1)),
        (own / "eval.tsv", lambda old: old.replace(b"good", b"bad", 1)),
        (weights, lambda old: old[:-1] + bytes([old[-1] ^ 1])),
    ):
        old = file.read_bytes()
        file.write_bytes(changed(old))
        named = file if file.suffix == ".tsv" else file.parent
        with pytest.raises(StudyError, match=f"{path} has rows.*(?s:.)* {named}: .* for 3 rows"):
            run_study(study, jobs=1, say=silent)
        assert (read_rows(path), len(fake.began)) == (before, 4)
        file.write_bytes(old)
    (own / "eval.tsv").rename(own / "elsewhere.tsv")  # what is not here cannot be compared
    run_study(study, jobs=1, say=silent, max_runs=0)
    (own / "elsewhere.tsv").rename(own / "eval.tsv")
    (own / "train.tsv").write_bytes((own / "train.tsv").read_bytes() + b"\n")  # the same rows
    assert len(run_study(study, jobs=1, say=silent)) == 12


def test_tables_from_before_rows_named_their_inputs_are_read_and_go_on(study, fake):
    docs = Path(__file__).resolve().parents[1] / "docs"
    for name in ("study.csv", "defaults.csv"):
        assert read_rows(docs / name)[0].settings
    path = Places(study.output).rows
    rows = run_study(study, jobs=1, say=silent, max_runs=5)
    with open(path, newline="") as file:
        table = [line[:-1] for line in csv.reader(file)]
    assert table[0][-1] == "settings"
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(table)
    assert read_rows(path) == rows
    run_study(study, jobs=1, say=silent)
    assert len(fake.began) == 12
    assert [row.inputs for row in read_rows(path)] == [""] * 12


@pytest.mark.parametrize("missing", ["lr", "test", "commit"])
def test_a_result_without_what_a_row_needs_is_refused_by_name(study, missing):
    run = study.search("films", "head")[0]
    folder = Places(study.output).runs / run.id
    write_result(run.config(folder, study.data))
    result = json.loads((folder / "result.json").read_text())
    del result[missing]
    (folder / "result.json").write_text(json.dumps(result))
    with pytest.raises(DataError, match=f"run {run.id}: its result.json lacks .*{missing}"):
        collect(study)


def test_a_run_that_was_stopped_before_its_first_checkpoint_starts_again(study, monkeypatch):
    from speft_kernels.finetune import run as run_module
    from speft_kernels.study.worker import execute

    calls = []
    monkeypatch.setattr(run_module, "finetune", lambda config, resume: calls.append(resume))
    run = study.search("films", "head")[0]
    folder = Places(study.output).runs / run.id
    config = run.config(folder, study.data)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    execute(config, threads=1, slot=0)
    assert not folder.exists()
    (folder / "checkpoint").mkdir(parents=True)
    (folder / "checkpoint" / "state.pt").write_bytes(b"")
    execute(config, threads=1, slot=0)
    assert calls == [False, True]


@pytest.mark.slow
def test_a_study_that_is_stopped_in_the_middle_of_a_run_ends_like_one_that_was_not(
    study_file, place, tmp_path
):
    """In processes, as the command runs it: SIGTERM to the study, then the same command again."""
    text = STUDY.replace("  sparse: {{salience: [snip, random]}}\n", "").replace(
        "head: {{method: head}}", "sparse: {{salience: snip, epochs: 60}}"
    )
    text = text.replace("[1e-2, 3e-2]", "[1e-2]").replace("[0, 1, 2]", "[0]")
    file = study_file(text)

    def command(output):
        return [
            *(sys.executable, "-m", "speft_kernels.cli", "study", "--config", str(file)),
            *("--data", str(place), "--output", str(output)),
        ]

    stopped = tmp_path / "stopped"
    process = subprocess.Popen(command(stopped), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(stopped.glob("runs/*/metrics.jsonl")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM; to go on:\n  speft study --config" in errors
    assert len(list(stopped.glob("runs/*/checkpoint/state.pt"))) == 1
    assert read_rows(stopped / "runs.csv") == []
    steps = len(next(stopped.glob("runs/*/metrics.jsonl")).read_text().splitlines())
    again = subprocess.run(command(stopped), capture_output=True, text=True, timeout=200)
    assert again.returncode == 0, again.stderr
    straight = subprocess.run(
        command(tmp_path / "straight"), capture_output=True, text=True, timeout=200
    )
    assert straight.returncode == 0, straight.stderr
    (one,), (two,) = (read_rows(tmp_path / n / "runs.csv") for n in ("stopped", "straight"))
    assert (one.id, one.validation, one.score) == (two.id, two.validation, two.score)
    assert one.steps == two.steps > steps
    assert not list(stopped.glob("runs/*/checkpoint"))


def test_the_command_lists_what_is_due_and_refuses_nonsense(study_file, place, tmp_path, capsys):
    arguments = ["study", "--config", str(study_file()), "--data", str(place)]
    assert main([*arguments, "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert len(out.split()) == 6
    assert err == "6 runs are due now, 0 are finished\n"
    assert not (tmp_path / "out").exists()
    assert main(["study", "--config", str(tmp_path / "none.yaml")]) == 2
    assert "no such file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*arguments, "--jobs", "0"])
    assert "not a whole number of at least 1" in capsys.readouterr().err


def test_ctrl_c_stops_the_runs_and_says_where(study, monkeypatch):
    stopped = []

    class Endless(FakeWorker):
        def __init__(self, config, *, threads, slot):
            self.slot = slot
            self.sentinel, self.other = Pipe()  # never ready

        def stop(self):
            stopped.append(self.slot)

        def failure(self):
            return None

    monkeypatch.setattr(runner_module, "Worker", Endless)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(Interrupted) as caught:
        run_study(study, jobs=2, say=silent)
    assert caught.value.folder == study.output
    assert sorted(stopped) == [0, 1]
