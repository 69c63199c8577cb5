"""The GPU kernels on small tensors, alone and under compute-sanitizer: what is run, how many at a
time, and what comes of it.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import signal
import subprocess
import sys
import time

import pytest

from speft_kernels import ops
from speft_kernels.bench.gpu import check, install, journal, processes, record, sanitize, small
from speft_kernels.bench.gpu.processes import Job

COUNT = len(sanitize.OPERATIONS)
RACE = ("racecheck", "cuda", "block_grad")


def test_the_sanitizers_operations_are_the_small_ones():
    assert set(sanitize.OPERATIONS) == set(small.OPERATIONS) == {*ops.registry.OPS, "keep_columns"}


def test_the_stage_small_has_each_operation_by_each_backend():
    assert set(sanitize.STAGES["small"]) == {
        ("alone", backend, operation)
        for backend in ("cuda", "triton")
        for operation in sanitize.OPERATIONS
    }
    command = sanitize.command("alone", "cuda", "block_grad", "cuda")
    assert command[-4:] == ["speft_kernels.bench.gpu.small", "block_grad", "--backend", "cuda"]


@pytest.fixture
def scripted(monkeypatch):
    """Processes that end at once, with what a function says of their case."""
    asked = []

    def says(outcome):
        def outcomes(jobs, at_a_time, more):
            for job in jobs:
                asked.append(job)
                yield job, *outcome(*job.name)

        monkeypatch.setattr(sanitize, "outcomes", outcomes)

    monkeypatch.setattr(sanitize, "cuda_tool", lambda name: f"/usr/bin/{name}")
    return asked, says


def test_each_tool_watches_each_operation_once(tmp_path, scripted):
    asked, says = scripted
    command = [str(tmp_path), "sanitize", "--key", "H200"]

    def first(tool, backend, operation):
        if tool == "memcheck":
            return (86 if operation == sanitize.PLANTED else 0), ""
        return (86, "========= COMPUTE-SANITIZER\n========= Race reported between")

    def then(tool, backend, operation):
        assert tool == "synccheck"
        return 1, "Device not supported"

    says(lambda *case: first(*case) if case[0] != "synccheck" else (None, ""))
    assert sanitize.main([*command, "--seconds", "60"]) == sanitize.OUT_OF_TIME
    watched = [job.name for job in asked]
    assert watched == list(sanitize.CASES)
    assert watched[:2] == [("memcheck", name, sanitize.PLANTED) for name in ("cuda", "triton")]
    assert all(tool == "memcheck" for tool, *_ in watched[: 2 + 2 * COUNT])
    asked.clear()
    says(then)
    assert sanitize.main([*command, "--seconds", "60"]) == 1  # what was found before counts
    assert len(asked) == 1  # a tool that refuses the machine is not asked again
    found = record.build(tmp_path, "H200", lambda stage: journal.fingerprint("sanitize"))
    assert found["sanitizer"]["memcheck"] == {"passed": 2 + 2 * COUNT}
    messages = found["sanitizer"]["racecheck"]["messages"]
    assert messages["block_grad"] == "========= Race reported between"
    assert messages["block_grad, triton"] == messages["block_grad"]
    table = record.table(found)
    assert f"compute-sanitizer memcheck: {2 + 2 * COUNT} passed." in table
    assert "compute-sanitizer synccheck: 1 unavailable." in table
    assert "- block_grad, triton: ========= Race" in table


def test_a_process_that_hangs_is_an_outcome_and_not_run_again(tmp_path, scripted):
    asked, says = scripted
    says(lambda tool, backend, operation: (None if operation == "write_delta" else 0, ""))
    command = [str(tmp_path), "small", "--key", "H200"]
    assert sanitize.main(command) == 1
    assert {job.seconds for job in asked} == {sanitize.LONGEST["small"]}
    asked.clear()
    assert sanitize.main(command) == 1
    assert asked == []
    found = record.build(tmp_path, "H200", lambda stage: journal.fingerprint("small"))
    assert found["small"]["passed"] == 2 * (COUNT - 1)
    assert found["small"]["timed out"] == 2
    table = record.table(found)
    counts = f"{2 * (COUNT - 1)} passed, 2 timed out"
    assert f"Operations alone on small tensors: {counts}." in table
    assert "- write_delta, triton: it hung, and was ended" in table


def test_a_backend_that_cannot_run_is_asked_once_and_again_the_next_time(tmp_path, scripted):
    asked, says = scripted
    says(lambda tool, backend, _: (sanitize.MISSING, "no nvcc") if backend == "cuda" else (0, ""))
    command = [str(tmp_path), "small", "--key", "H200"]
    assert sanitize.main(command) == 1
    assert [job.name[1] for job in asked].count("cuda") == 1
    assert [job.name[1] for job in asked].count("triton") == COUNT
    asked.clear()
    says(lambda *_: (0, ""))
    assert sanitize.main(command) == 0
    assert [job.name[1] for job in asked] == ["cuda"] * COUNT


def test_small_tells_of_a_backend_that_cannot_run(monkeypatch, capsys):
    monkeypatch.setattr(small._cuda_native, "missing", lambda backend: f"no {backend}")
    monkeypatch.setattr(sys, "argv", ["small", "write_delta", "--backend", "cuda"])
    assert small.main() == sanitize.MISSING
    assert capsys.readouterr().out == "no cuda\n"


REPORT = """
========= COMPUTE-SANITIZER
a line of the process
========= Invalid __global__ write of size 4 bytes
=========     at void speft::add<float>()+0x90
=========     by thread (0,0,0) in block (0,0,0)
"""
ENDS = "\n".join(f"=========     Host Frame: {number}" for number in range(200))


@pytest.mark.parametrize(
    ("script", "outcome", "words"),
    [
        ("echo fine", "passed", ""),
        (f"echo '{REPORT}{ENDS}'; exit 86", "failed", "========= Invalid __global__ write"),
        ("echo wrong: block_grad; exit 1", "failed", "wrong: block_grad"),
        ("echo Device not supported; exit 1", "unavailable", "Device not supported"),
        ("echo begun; sleep 20", "timed out", "it hung, and was ended"),
    ],
)
def test_how_a_watched_process_ended(tmp_path, monkeypatch, capsys, script, outcome, words):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f'#!/bin/sh\nset -e\necho "$@" > {tmp_path}/called\n{script}\n')
    tool.chmod(0o755)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setitem(sanitize.LONGEST, "sanitize", 1.0)
    monkeypatch.setitem(sanitize.STAGES, "sanitize", (RACE,))
    sanitize.main([str(tmp_path), "sanitize", "--key", "H200"])
    book = journal.Journal(
        tmp_path / journal.NAME, "sanitize", journal.fingerprint("sanitize"), "H200"
    )
    (entry,) = book.entries("sanitizer")
    assert entry["outcome"] == outcome
    assert entry["message"].startswith(words)
    # Whoever reads the stage's log has all of it.
    whole = {"failed": ENDS[-30:] if "86" in script else words, "timed out": "begun"}
    assert whole.get(outcome, "") in capsys.readouterr().out
    called = (tmp_path / "called").read_text()
    assert called.startswith(
        "--tool racecheck --error-exitcode 86 --kernel-name kns=speft --report"
    )
    assert "--show-backtrace device --print-limit 20" in called
    assert called.endswith("-m speft_kernels.bench.gpu.small block_grad --backend cuda\n")


def test_a_report_begins_with_the_first_error_and_its_kernel():
    _, kept = sanitize.judged(RACE, 86, REPORT + ENDS)
    first, second, *_ = kept.splitlines()
    assert first == "========= Invalid __global__ write of size 4 bytes"
    assert "speft::add" in second
    assert len(kept) == 800


@pytest.mark.parametrize(("status", "outcome"), [(86, "passed"), (0, "failed"), (1, "failed")])
def test_what_is_planted_has_to_be_found(status, outcome):
    assert sanitize.judged(("memcheck", "cuda", sanitize.PLANTED), status, "")[0] == outcome


def test_triton_s_kernels_are_watched_by_their_names(monkeypatch):
    monkeypatch.setattr(sanitize, "cuda_tool", lambda name: name)
    called = " ".join(sanitize.command("racecheck", "triton", "block_grad", "cuda"))
    assert "--kernel-name kne=_tile_products --" in called
    assert "kns" not in called
    assert called.endswith("-m speft_kernels.bench.gpu.small block_grad --backend triton")


def test_without_the_tool_nothing_is_watched_and_the_record_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(sanitize, "cuda_tool", lambda name: None)
    assert sanitize.main([str(tmp_path), "sanitize", "--key", "H200"]) == 0
    found = record.build(tmp_path, "H200", lambda stage: journal.fingerprint("sanitize"))
    assert set(found["sanitizer"]) == set(sanitize.TOOLS)
    for said in found["sanitizer"].values():
        assert set(said["messages"].values()) == {sanitize.NO_SANITIZER}


def test_every_kernel_of_triton_is_watched():
    pytest.importorskip("triton")
    from speft_kernels.triton_kernels import launch
    from triton.runtime.jit import KernelInterface

    from speft_kernels import triton_kernels

    functions = set()
    for one in pkgutil.iter_modules(triton_kernels.__path__, f"{triton_kernels.__name__}."):
        module = importlib.import_module(one.name)
        functions |= {f.__name__ for f in vars(module).values() if isinstance(f, KernelInterface)}
    assert set(sanitize._of_triton()) == functions
    with launch.recording(launch.MACHINES[90]) as launches:
        assert small.wrong([sanitize.PLANTED], small.Place("cpu", "triton")) == []
    assert [one.kernel.__name__ for one in launches] == ["_write"]


# Several processes at a time


def shell(name, script, seconds=20.0):
    return Job(name, ["/bin/sh", "-c", script], seconds)


def test_processes_run_beside_each_other_and_never_more_than_asked_for(tmp_path):
    running = []

    def jobs():
        for number in range(5):
            running.append(number)
            assert len(running) <= 3
            yield shell(number, f"sleep 0.3; echo {number} $MORE; exit {number}")

    found = {}
    for job, status, output in processes.outcomes(jobs(), 3, {"MORE": "more"}):
        running.remove(job.name)
        found[job.name] = status, output
    assert found == {number: (number, f"{number} more\n") for number in range(5)}


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_process_that_takes_too_long_ends_with_its_children(tmp_path):
    pid = tmp_path / "pid"
    jobs = [shell("hangs", f"sleep 60 & echo $! > {pid}; echo begun; wait", 1.0)]
    started = time.monotonic()
    (found,) = processes.outcomes(jobs, 2, {})
    assert time.monotonic() - started < 10
    assert found == (jobs[0], None, "begun\n")
    assert not is_running(int(pid.read_text()))


def test_a_stage_that_is_ended_takes_its_processes_along(tmp_path):
    pid = tmp_path / "pid"
    program = (
        "from speft_kernels.bench.gpu.processes import Job, outcomes\n"
        f"script = 'sleep 60 & echo $! > {pid}; wait'\n"
        "list(outcomes([Job(0, ['/bin/sh', '-c', script], 60.0)], 1, {}))\n"
    )
    stage = subprocess.Popen([sys.executable, "-c", program])
    while not (pid.exists() and pid.read_text()):
        assert stage.poll() is None
        time.sleep(0.05)
    stage.send_signal(signal.SIGTERM)
    assert stage.wait(20) == 143
    assert not is_running(int(pid.read_text()))


def test_the_command_of_the_stage_small(tmp_path):
    machine = install.Machine("2.11.0", "H200", (9, 0), 139.0, 16, False, True)
    checking = check.Check(tmp_path, machine, False, float("inf"))
    for stage in ("small", "sanitize"):
        command, _ = checking._command(stage, sys.executable, 60.0, again=False)
        where = command.index("speft_kernels.bench.gpu.sanitize")
        assert command[where + 1 : where + 3] == [os.fspath(tmp_path), stage]
