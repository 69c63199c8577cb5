"""Studies whose folder holds what no study writes there: one line that names the file."""

import errno
import fcntl
import json
import os
import tracemalloc
from dataclasses import replace

import pytest
from tiny_studies import STUDY, fake_workers, silent, write_result

from speft_kernels.cli import main
from speft_kernels.errors import ConfigError, DataError
from speft_kernels.files import alone, write_json
from speft_kernels.study import read_rows, write_rows
from speft_kernels.study.config import read_study
from speft_kernels.study.folder import StudyFolder
from speft_kernels.study.runner import StudyError, collect, run_study
from speft_kernels.study.worker import execute


@pytest.fixture
def study_file(tmp_path):
    (tmp_path / "study.yaml").write_text(STUDY.format(output=tmp_path / "out", model="model"))
    return tmp_path / "study.yaml"


@pytest.fixture
def study(study_file):
    return read_study(study_file)


@pytest.fixture
def fake(monkeypatch):
    return fake_workers(monkeypatch)


@pytest.fixture
def finished(study):
    """The folder of a run that has finished and has no row yet."""
    run = study.search("films", "head")[0]
    folder = StudyFolder(study.output).runs / run.id
    write_result(run.config(folder, study.data))
    return folder


def test_a_damaged_table_is_named_with_its_line_and_left_alone(study, fake):
    run_study(study, jobs=1, say=silent, max_runs=2)
    path = StudyFolder(study.output).rows
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


@pytest.mark.parametrize("missing", ["lr", "test", "commit"])
def test_a_result_without_what_a_row_needs_is_refused_by_name(study, finished, missing):
    result = json.loads((finished / "result.json").read_text())
    del result[missing]
    (finished / "result.json").write_text(json.dumps(result))
    with pytest.raises(DataError, match=f"run {finished.name}: its result.json lacks .*{missing}"):
        collect(study)


@pytest.mark.parametrize("name", ["result.json", "config.json"])
def test_a_result_that_is_nested_too_deep_is_refused_by_name(study, finished, name):
    (finished / name).write_text("[" * 100_000)
    with pytest.raises(ConfigError, match=f"{finished}: not the folder of a finished run"):
        collect(study)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"after": "high"}, "validation = 'high' is no number"),
        ({"after": None}, "validation = '' is no number"),
        ({"steps": 1.5}, "steps = '1.5' is no number"),
        ({"device": "\ud800"}, r"device = '.ud800' is no text"),
        ({"salience": [1]}, "lacks what a row needs: 'list' object"),
        ({"dynamic": [1]}, "lacks what a row needs: 'list' object"),
    ],
)
def test_a_result_that_no_table_could_give_back_is_refused(study, finished, changes, message):
    result = json.loads((finished / "result.json").read_text())
    (finished / "result.json").write_text(json.dumps({**result, **changes}))
    with pytest.raises(DataError, match=f"run {finished.name}.*result.json.*{message}"):
        run_study(study, jobs=1, say=silent, max_runs=0)
    assert not StudyFolder(study.output).rows.exists()


@pytest.mark.parametrize("inputs", [None, [1]])
def test_inputs_that_are_no_text_say_nothing(study, fake, finished, inputs):
    result = json.loads((finished / "result.json").read_text())
    (finished / "result.json").write_text(json.dumps({**result, "inputs": inputs}))
    assert len(run_study(study, jobs=1, say=silent, max_runs=0)) == 1


@pytest.mark.parametrize("name", [".lock", "runs/.lock"])
def test_a_lock_that_is_no_file_is_named(study, fake, name):
    (study.output / name).mkdir(parents=True)
    with pytest.raises(StudyError, match=f"{study.output / name}, the study's lock, .*directory"):
        run_study(study, jobs=1, say=silent)
    assert fake.began == []


@pytest.mark.parametrize("name", [".lock", "runs/.lock"])
def test_a_lock_is_taken_of_nothing_but_itself(study, fake, tmp_path, name):
    """To open a file for writing empties it, also the one that a link leads to."""
    other, lock = tmp_path / "letter", study.output / name
    other.write_text("mine")
    lock.parent.mkdir(parents=True)
    lock.symlink_to(other)
    with pytest.raises(StudyError, match=f"{lock}, the study's lock, .*remove it"):
        run_study(study, jobs=1, say=silent)
    assert other.read_text() == "mine"
    lock.unlink()
    os.mkfifo(lock)
    run_study(study, jobs=1, say=silent, max_runs=1)


def test_a_worker_takes_its_lock_of_nothing_but_itself(study, tmp_path, monkeypatch):
    monkeypatch.setattr("speft_kernels.finetune.run.finetune", lambda config, resume: None)
    run = study.search("films", "head")[0]
    folder, other = StudyFolder(study.output).runs / run.id, tmp_path / "letter"
    other.write_text("mine")
    folder.mkdir(parents=True)
    (folder.parent / ".lock").symlink_to(other)
    with pytest.raises(OSError, match=r"\.lock"):
        execute(run.config(folder, study.data), threads=1, slot=0)
    assert other.read_text() == "mine"


def test_a_file_system_without_locks_takes_a_study(study, fake, monkeypatch):
    def none(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    ran = []
    monkeypatch.setattr(fcntl, "flock", none)
    monkeypatch.setattr(
        "speft_kernels.finetune.run.finetune", lambda config, resume: ran.append(config)
    )
    said = []
    assert len(run_study(study, jobs=1, say=said.append, max_runs=1)) == len(said) == 1
    run = study.search("films", "head")[1]
    execute(run.config(StudyFolder(study.output).runs / run.id, study.data), threads=1, slot=0)
    with alone(study.output):
        assert len(ran) == 1


def test_a_table_that_is_a_pipe_is_not_waited_for(study, fake):
    StudyFolder(study.output).root.mkdir()
    os.mkfifo(StudyFolder(study.output).rows)
    with pytest.raises(DataError, match="runs.csv: not a file"):
        collect(study)


def test_a_column_that_stands_twice_is_refused(study, fake):
    run_study(study, jobs=1, say=silent, max_runs=1)
    path = StudyFolder(study.output).rows
    header, row = path.read_text().splitlines()
    path.write_text(f"{header},score\n{row},0.99\n")
    with pytest.raises(DataError, match="a second column 'score'"):
        collect(study)


def test_a_terminal_obeys_nothing_that_a_studys_folder_holds(study, study_file, fake, capsys):
    places = StudyFolder(study.output)
    run_study(study, jobs=1, say=silent, max_runs=1)
    write_rows(places.rows, [replace(r, task="\x1b[2J") for r in read_rows(places.rows)])
    run = next(run for id, run in study.grid().items() if id not in collect(study))
    write_json(places.failures, {run.id: "\x1b]0;lost\x07"})
    for more in (["--dry-run"], []):
        assert main(["study", "--config", str(study_file), "--max-runs", "1", *more]) == 0
        out, err = capsys.readouterr()
        assert "\ufffd]0;lost\ufffd" in out + err
        assert "\x1b" not in out + err
    assert "\ufffd[2J" in out


@pytest.mark.parametrize("name", ["study.json", "runs.csv", "failures.json"])
def test_a_folder_in_the_place_of_a_file_is_named(study, study_file, fake, capsys, name):
    (study.output / name).mkdir(parents=True)
    assert main(["study", "--config", str(study_file)]) == 2
    message = capsys.readouterr().err
    assert f"{study.output / name}" in message
    assert message.count("\n") == 1
    assert fake.began == []


@pytest.mark.parametrize("flag", ["--jobs", "--max-runs"])
@pytest.mark.parametrize("value", [str(10**30), "-1", "0", "1_0", "9" * 5000])
def test_numbers_of_runs_have_bounds(study_file, fake, capsys, flag, value):
    with pytest.raises(SystemExit) as stopped:
        main(["study", "--config", str(study_file), flag, value])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert f"{flag}: '{value[:50]}" in message
    assert "is not a whole number from 1 to 999999999" in message
    assert len(message) < 400
    assert fake.began == []


def test_many_jobs_take_no_memory(study, fake):
    tracemalloc.start()
    try:
        assert len(run_study(study, jobs=1_000_000, say=silent)) == 12
        assert tracemalloc.get_traced_memory()[1] < 10e6  # numbers up to a million take 60 MB
    finally:
        tracemalloc.stop()
