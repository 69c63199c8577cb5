"""Studies in real processes: side by side, each on its device, and killed without a warning."""

import json
import os
import signal
import subprocess
import sys
import time
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch
from accelerate.state import PartialState
from tiny_runs import Silent, make_place

from speft_kernels.finetune import run as run_module
from speft_kernels.finetune.inputs import digest_of
from speft_kernels.finetune.run import finetune
from speft_kernels.study import read_rows
from speft_kernels.study import runner as runner_module
from speft_kernels.study.config import read_study
from speft_kernels.study.folder import StudyFolder
from speft_kernels.study.runner import run_study
from speft_kernels.study.worker import Worker, execute

STUDY = """
name: tiny
output: {output}
base: {{model: model, validation: 0.25, batch_size: 8, epochs: 2, max_length: 32, density: 0.05,
       scoring_examples: 16, scoring_batches: 2, save_every: 10}}
tasks: {{films: {{train: train.tsv, test: eval.tsv}}}}
methods: {methods}
lr: 1e-2
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working folder, with data and a model; the processes find the model from there."""
    monkeypatch.chdir(tmp_path)
    return make_place(tmp_path, 48, 16)


def study_file(place, methods):
    (place / "study.yaml").write_text(STUDY.format(output=place / "out", methods=methods))
    return place / "study.yaml"


def losses(folder):
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]


def is_running(pid):
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(") ")[2][0] not in "ZX"  # nobody may be there to bury an orphan


def wait_for(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def workers_of(pid):
    """Its runs' processes; multiprocessing has another one, which ends after them."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(p) for p in found if b"spawn_main" in Path(f"/proc/{p}/cmdline").read_bytes()]


@pytest.mark.slow
def test_runs_side_by_side_are_those_of_one_process(place, monkeypatch):
    together = []

    class Seen(Worker):
        alive: dict = {}  # noqa: RUF012 -- one study

        def __init__(self, config, *, threads, slot):
            super().__init__(config, threads=threads, slot=slot)
            self.alive[self] = slot
            together.append(sorted(self.alive.values()))

        def failure(self):
            del self.alive[self]
            return super().failure()

    monkeypatch.setattr(runner_module, "Worker", Seen)
    torch.set_num_threads(2)
    methods = "{head: {method: head}, sparse: {salience: [snip, random]}}"
    study = read_study(study_file(place, methods))
    rows = run_study(study, jobs=2, say=lambda line: None)
    assert together == [[0], [0, 1], [0, 1]]  # two at a time, never two in one place
    assert {row.name for row in rows} == {"head", "sparse-snip", "sparse-random"}
    assert {row.threads for row in rows} == {1}
    torch.set_num_threads(1)
    for row in rows:
        (run,) = study.search("films", row.name)
        config = run.config(place / f"alone-{row.name}", study.data)
        result = finetune(config, display=Silent())
        assert (row.validation, row.score) == (result["after"], result["test"]["accuracy"])
        alone = losses(Path(config.output))
        assert losses(StudyFolder(study.output).runs / row.id) == alone
        assert len(alone) == row.steps > 0
        assert row.inputs == " ".join(
            f"{name}={digest_of(config, name)}" for name in ("train", "test", "model")
        )


@pytest.mark.parametrize(("slot", "device"), [(0, "cuda:0"), (1, "cuda:1"), (2, "cuda:0")])
def test_runs_side_by_side_take_the_gpus_in_turn(place, monkeypatch, slot, device):
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cpu")  # taken back afterwards
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found = []

    def stand_in(config, resume):
        # What `start_accelerator` asks for the device, in the process as the run finds it.
        PartialState._reset_state()
        found.append(str(PartialState().device))
        PartialState._reset_state()

    monkeypatch.setattr(run_module, "finetune", stand_in)
    study = read_study(study_file(place, "{head: {method: head}}"))
    (run,) = study.search("films", "head")
    runs = StudyFolder(study.output).runs
    runs.mkdir(parents=True)
    execute(run.config(runs / run.id, study.data), threads=1, slot=slot)
    assert found == [device]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "settled", "reason"),
    [
        ("method: full, lr: 1e+30, weight_decay: 0.01", True, "the loss became nan"),
        ("salience: absent:score", False, "absent"),  # may be there next time
    ],
)
def test_a_process_says_whether_its_run_would_fail_again(place, settings, settled, reason):
    study = read_study(study_file(place, f"{{odd: {{{settings}}}}}"))
    (run,) = study.search("films", "odd")
    runs = StudyFolder(study.output).runs
    runs.mkdir(parents=True)
    worker = Worker(run.config(runs / run.id, study.data), threads=1, slot=0)
    failure = worker.failure()
    assert failure.settled == settled, failure
    assert reason in failure.reason


@pytest.mark.slow
def test_a_reason_of_any_length_ends_the_run(place):
    """A pipe takes 64 KiB before it is read."""
    (place / "long_score.py").write_text("raise ValueError('a' * 200_000)\n\nscore = None\n")
    study = read_study(study_file(place, "{odd: {salience: long_score:score}}"))
    (run,) = study.search("films", "odd")
    runs = StudyFolder(study.output).runs
    runs.mkdir(parents=True)
    worker = Worker(run.config(runs / run.id, study.data), threads=1, slot=0)
    ended = wait([worker.sentinel], 100)
    failure = worker.failure()
    assert ended == [worker.sentinel]
    assert "a" * 200_000 in failure.reason


def test_a_run_that_was_stopped_before_its_first_checkpoint_starts_again(place, monkeypatch):
    calls = []
    monkeypatch.setattr(run_module, "finetune", lambda config, resume: calls.append(resume))
    study = read_study(study_file(place, "{head: {method: head}}"))
    (run,) = study.search("films", "head")
    folder = StudyFolder(study.output).runs / run.id
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
def test_a_study_that_is_stopped_in_the_middle_of_a_run_ends_like_one_that_was_not(place, tmp_path):
    """In processes, as the command runs it: SIGTERM to the study, then the same command again."""
    file = study_file(place, "{sparse: {salience: snip, epochs: 60, save_every: null}}")

    def command(output):
        return [
            *(sys.executable, "-m", "speft_kernels.cli", "study", "--config", str(file)),
            *("--output", str(output)),
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


@pytest.mark.slow
def test_a_study_that_is_killed_goes_on_and_repeats_nothing(place, request):
    """SIGKILL: nobody tells the runs, one of which is at that moment too busy to notice."""
    file = study_file(
        place, "{head: {method: head, epochs: 1}, sparse: {salience: [snip, random], epochs: 100}}"
    )
    runs = place / "out" / "runs"
    study = read_study(file)
    (head,) = study.search("films", "head")
    runs.mkdir(parents=True)
    finetune(head.config(runs / head.id, study.data), display=Silent())  # it has no row yet
    command = [sys.executable, "-m", "speft_kernels.cli", "study", "--config", str(file)]
    with open(place / "errors.txt", "w") as errors:
        process = subprocess.Popen([*command, "--jobs", "2"], stderr=errors)
    request.addfinalizer(process.kill)

    def in_the_middle():
        assert process.poll() is None, (place / "errors.txt").read_text()
        return len(list(runs.glob("*sparse*/metrics.jsonl"))) == 2

    wait_for(in_the_middle)
    assert [row.name for row in read_rows(place / "out" / "runs.csv")] == ["head"]
    workers = workers_of(process.pid)
    assert len(workers) == 2
    busy = max(workers)
    request.addfinalizer(lambda: is_running(busy) and os.kill(busy, signal.SIGKILL))
    os.kill(busy, signal.SIGSTOP)
    process.kill()
    process.wait()
    wait_for(lambda: [pid for pid in workers if is_running(pid)] == [busy])

    before = {path: path.stat().st_mtime_ns for path in runs.glob("*head*/*") if path.is_file()}
    done = {folder.name: losses(folder) for folder in runs.glob("*sparse*")}
    said = []

    def say(line):
        if not said:
            os.kill(busy, signal.SIGCONT)
        said.append(line)

    rows = run_study(study, jobs=2, say=say)
    assert "waits for runs of a study that was killed" in said[0]
    assert not is_running(busy)
    assert sorted(row.name for row in rows) == ["head", "sparse-random", "sparse-snip"]
    assert read_rows(place / "out" / "runs.csv") == rows
    assert len(said) == 3
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for name, steps in done.items():
        (row,) = [row for row in rows if row.id == name]
        now = losses(runs / name)
        assert [step for step, _ in now] == list(range(1, row.steps + 1))
        assert now[: len(steps) // 10 * 10] == steps[: len(steps) // 10 * 10]
        assert len(steps) < row.steps
