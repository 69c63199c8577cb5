"""A study: in which order its grid runs, and that nothing is lost or repeated."""

import csv
import dataclasses
import json
import os
import re
import shutil
import signal
import sys
import threading
from multiprocessing.connection import Pipe

import pytest
import tiny_studies
from tiny_runs import make_place
from tiny_studies import STUDY, FakeWorker, fake_workers, silent, write_result

from speft_kernels.cli import main
from speft_kernels.errors import DataError
from speft_kernels.finetune.inputs import digest_of
from speft_kernels.finetune.signals import Interrupted
from speft_kernels.study import COLUMNS, read_rows, write_rows
from speft_kernels.study import runner as runner_module
from speft_kernels.study.config import read_study
from speft_kernels.study.folder import StudyFolder
from speft_kernels.study.runner import StudyError, collect, run_study
from speft_kernels.study.schedule import best_rate, due
from speft_kernels.study.worker import Failure


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("place"), 48, 16)


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


@pytest.fixture
def fake(monkeypatch):
    return fake_workers(monkeypatch)


def test_every_rate_runs_with_the_search_seeds_and_the_best_with_the_others(study, fake):
    rows = run_study(study, jobs=2, say=silent)
    runs = [(config.method, config.salience, config.lr, config.seed) for config in fake.began]
    assert len(runs) == len(set(runs)) == len(rows) == 3 * (2 + 2)
    for method, salience in (("head", "snip"), ("speft", "snip"), ("speft", "random")):
        own = {(lr, seed) for m, s, lr, seed in runs if (m, s) == (method, salience)}
        assert own == {(1e-2, 0), (3e-2, 0), (3e-2, 1), (3e-2, 2)}
    # Method by method: what is listed first is complete first, but for a run that waits its turn.
    assert {config.method for config in fake.began[:4]} == {"head"}
    assert read_rows(StudyFolder(study.output).rows) == rows
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
    monkeypatch.setattr(
        tiny_studies, "write_result", lambda config: write(config, validation[config.lr])
    )
    fake.outcome = staticmethod(
        lambda config: None if validation[config.lr] is not None else Failure("diverged", True)
    )
    run_study(study, jobs=2, say=silent)
    assert {config.lr for config in fake.began if config.seed == 0} == searched
    finite = {lr: validation[lr] for lr in searched if validation[lr] is not None}
    best = [max(finite, key=finite.get)] * 2 if finite else []
    assert [config.lr for config in fake.began if config.seed > 0] == best


def test_a_study_goes_on_where_it_was_and_repeats_nothing(study, fake):
    run_study(study, jobs=1, say=silent, max_runs=5)
    assert len(fake.began) == 5
    places = StudyFolder(study.output)
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
    assert read_rows(StudyFolder(study.output).rows) == rows


def test_a_run_that_fails_is_named_and_the_others_are_run(study_file, place, fake, capsys):
    """What others gave is told first; the same command tries again."""
    arguments = ["study", "--config", str(study_file()), "--data", str(place), "--jobs", "2"]
    places = StudyFolder(read_study(study_file()).output)
    fake.outcome = staticmethod(
        lambda config: (
            Failure("its process died")
            if (config.method, config.salience) == ("speft", "snip")
            else None
        )
    )
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert len(read_rows(places.rows)) == 8
    assert out.count("failed: its process died") == 2
    assert f"8 runs are in {places.rows}\n\n| method |" in out
    assert out.endswith(f"report: {places.root / 'report.html'}\n")
    assert err.startswith("speft: error: 2 runs failed; all others are in")
    assert "-snip-lr0.01-" in err
    assert not places.failures.exists()
    fake.outcome = staticmethod(lambda config: None)
    assert main(arguments) == 0
    assert len(read_rows(places.rows)) == 12


def test_a_run_that_would_fail_again_is_noted_and_the_study_is_done(
    study_file, place, fake, capsys, monkeypatch
):
    """Its rate is out of the choice; taken out of the notes, it is tried again."""
    arguments = ["study", "--config", str(study_file()), "--data", str(place)]
    study = read_study(study_file(), data=str(place))
    places = StudyFolder(study.output)
    places.root.mkdir()
    places.failures.write_text('{"of-an-earlier-grid": "the loss became inf"}')
    fake.outcome = staticmethod(
        lambda config: Failure("the loss became inf", True) if config.lr == 3e-2 else None
    )
    for _ in range(2):
        assert main(arguments) == 0
        out = capsys.readouterr().out
        told = f"3 failed and would fail again; to try one again .* {places.failures}, or delete"
        assert re.search(f"{told}.*\n  films-head-lr0.03-s0-.{{8}}: the loss became inf", out)
        assert "of-an-earlier-grid" not in out
        rows = read_rows(places.rows)
        assert {(row.lr, row.seed) for row in rows} == {(1e-2, seed) for seed in (0, 1, 2)}
        assert len(fake.began) == 3 * (1 + 1 + 2)
    assert main([*arguments, "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert (out.strip(), err.count("the loss became inf")) == ("", 3)
    assert err.startswith("0 runs are due now, 9 are finished\n3 failed and would")
    notes = json.loads(places.failures.read_text())
    assert len(notes) == 1 + 3
    places.failures.write_text("{")
    with pytest.raises(DataError, match=f"{places.failures}: damaged: not JSON"):
        run_study(study, jobs=1, say=silent)
    places.failures.unlink()
    fake.outcome = staticmethod(lambda config: None)
    assert main(arguments) == 0
    assert len(read_rows(places.rows)) == 18  # the rate that is better now has its repeats


@pytest.mark.parametrize(("lost", "score"), [(1, "11.00 ± 1.00"), (2, "30.50 ± 0.71")])
def test_the_report_has_the_rate_that_the_study_chose(study_file, place, fake, capsys, lost, score):
    """Another one where a run of the search diverged; a repeat that did changes nothing."""
    file = study_file(STUDY.replace("seeds: [0, 1, 2]", "seeds: [0, 1, 2]\nsearch_seeds: 2"))
    failure = Failure("the loss became inf", True)
    fake.outcome = staticmethod(
        lambda config: failure if (config.lr, config.seed) == (3e-2, lost) else None
    )
    assert main(["study", "--config", str(file), "--data", str(place)]) == 0
    assert f"| head | 5.000% | **{score}** |" in capsys.readouterr().out
    page = (read_study(file).output / "report.html").read_text(encoding="utf-8")
    assert page.count(score) == 3  # of each method
    assert page.count("not compared") == (3 if lost == 1 else 0)


def test_without_matplotlib_the_table_is_told_all_the_same(
    study_file, place, fake, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["study", "--config", str(study_file()), "--data", str(place)]) == 2
    out, err = capsys.readouterr()
    assert "| method |" in out
    assert "pip install 'speft-kernels[report]'" in err


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


def test_a_row_has_every_column_and_reads_back(study, fake, tmp_path):
    rows = run_study(study, jobs=1, say=silent, max_runs=3)
    assert read_rows(StudyFolder(study.output).rows) == rows
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
    path = StudyFolder(study.output).rows
    run_study(study, jobs=1, say=silent, max_runs=1)  # as a run that did not say what it read

    def inputs(config):
        return " ".join(f"{n}={digest_of(config, n)}" for n in ("train", "test", "model"))

    write = write_result
    monkeypatch.setattr(
        tiny_studies, "write_result", lambda config: write(config, inputs=inputs(config))
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


def test_rows_of_another_score_of_the_users_are_met_by_an_error_and_kept(
    place, study_file, fake, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    score = tmp_path / "score_of_mine.py"
    code = "def score(w, g):\n    return (w * g).abs()\n"
    score.write_text(code)
    text = STUDY.replace("[snip, random]", "'score_of_mine:score'")
    assert text != STUDY
    study = read_study(study_file(text), data=str(place))
    write = write_result
    monkeypatch.setattr(
        tiny_studies,
        "write_result",
        lambda config: write(config, inputs=f"salience={digest_of(config, 'salience')}"),
    )
    run_study(study, jobs=1, say=silent)
    path = StudyFolder(study.output).rows
    before = read_rows(path)
    ours = [row for row in before if row.salience == "score_of_mine:score"]
    assert ours
    assert all(row.inputs == "salience=" for row in before if row not in ours)
    score.write_text(code.replace("w * g", "w + g"))
    with pytest.raises(StudyError, match="salience score_of_mine:score: it was another one"):
        run_study(study, jobs=1, say=silent)
    assert read_rows(path) == before
    score.write_text(code)
    run_study(study, jobs=1, say=silent)
    score.unlink()  # what is not here cannot be compared
    run_study(study, jobs=1, say=silent)
    assert "score_of_mine" not in sys.modules


def test_rows_made_with_other_defaults_are_met_by_an_error_and_kept(study, fake):
    run_study(study, jobs=1, say=silent, max_runs=2)
    path = StudyFolder(study.output).rows

    def made_with(**settings):
        rows = read_rows(path)
        changed = json.dumps({**json.loads(rows[0].settings), **settings})
        write_rows(path, [dataclasses.replace(rows[0], settings=changed), *rows[1:]])
        return rows[0].id

    # Of a version that had other settings, of another machine, and what a head does not read.
    made_with(later=1, model="elsewhere", salience="fisher", density=0.3)
    run_study(study, jobs=1, say=silent, max_runs=1)
    id = made_with(clip=2.0)
    before = path.read_bytes()
    with pytest.raises(StudyError, match=f"clip: it was 2.0 and is 1.0, for 1 rows, such as {id}"):
        run_study(study, jobs=1, say=silent)
    assert (path.read_bytes(), len(fake.began)) == (before, 3)


def test_tables_from_before_rows_named_their_inputs_are_read_and_go_on(study, fake):
    path = StudyFolder(study.output).rows
    rows = run_study(study, jobs=1, say=silent, max_runs=5)
    with open(path, newline="") as file:
        table = [line[:-2] for line in csv.reader(file)]
    assert table[0][-1] == "settings"
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(table)
    assert read_rows(path) == rows
    run_study(study, jobs=1, say=silent)
    assert len(fake.began) == 12
    assert [row.inputs for row in read_rows(path)] == [""] * 12


def test_reading_what_has_finished_writes_nothing(study, study_file, place, capsys):
    """Not even the row of a run that has none yet; `mask_seconds` is of dynamic runs."""
    ids = []
    for run, others in zip(
        study.search("films", "head"), ({}, {"dynamic": {"seconds": 1.5}}), strict=True
    ):
        write_result(run.config(StudyFolder(study.output).runs / run.id, study.data), **others)
        ids.append(run.id)
    assert [collect(study)[id].mask_seconds for id in ids] == [None, 1.5]
    assert main(["study", "--config", str(study_file()), "--data", str(place), "--dry-run"]) == 0
    assert capsys.readouterr().err == "6 runs are due now, 2 are finished\n"
    assert [path.name for path in study.output.iterdir()] == ["runs"]
    rows = run_study(study, jobs=1, say=silent, max_runs=0)
    assert read_rows(StudyFolder(study.output).rows) == rows
    assert {row.mask_seconds for row in rows} == {None, 1.5}


def test_the_command_lists_what_is_due_and_refuses_nonsense(study_file, place, tmp_path, capsys):
    arguments = ["study", "--config", str(study_file()), "--data", str(place)]
    assert main([*arguments, "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert len(out.split()) == 6
    assert err == "6 runs are due now, 0 are finished\n"
    assert not (tmp_path / "out").exists()
    assert main(["study", "--config", str(tmp_path / "none.yaml")]) == 2
    assert "no such file" in capsys.readouterr().err


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
