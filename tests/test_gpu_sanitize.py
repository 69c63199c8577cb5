"""compute-sanitizer over the GPU kernels: what is watched, in which order, and what comes of it."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

from speft_kernels import ops
from speft_kernels.bench.gpu import journal, record, sanitize, small


def test_the_sanitizers_operations_are_the_small_ones():
    assert set(sanitize.OPERATIONS) == set(small.OPERATIONS) == {*ops.registry.OPS, "keep_columns"}


def test_each_tool_watches_each_operation_once(tmp_path, monkeypatch):
    outcomes = {"memcheck": ("passed", ""), "racecheck": ("failed", "a hazard")}
    watched = []

    def watch(tool, backend, operation, device, seconds):
        watched.append((tool, backend, operation))
        return outcomes.get(tool, ("out of time", ""))

    monkeypatch.setattr(sanitize, "watch", watch)
    command = [str(tmp_path), "--key", "H200"]
    assert sanitize.main(command) == sanitize.OUT_OF_TIME
    known, count = len(watched), len(sanitize.OPERATIONS)
    assert known == 2 + 2 * 2 * count + 1
    assert watched[:2] == [("memcheck", name, sanitize.PLANTED) for name in ("cuda", "triton")]
    assert all(tool == "memcheck" for tool, *_ in watched[: 2 + 2 * count])
    outcomes["synccheck"] = ("unavailable", "Device not supported")
    assert sanitize.main(command) == 1  # what was found before counts
    assert len(watched) == known + count
    assert len(set(watched)) == len(sanitize.CASES)
    found = record.build(tmp_path, "H200", lambda stage: journal.fingerprint("sanitize"))
    assert found["sanitizer"]["memcheck"] == {"passed": 2 + 2 * count}
    messages = found["sanitizer"]["racecheck"]["messages"]
    assert messages["block_grad"] == messages["block_grad, triton"] == "a hazard"
    table = record.table(found)
    assert f"compute-sanitizer memcheck: {2 + 2 * count} passed." in table
    assert f"compute-sanitizer synccheck: {count} unavailable." in table
    assert "- block_grad, triton: a hazard" in table


@pytest.mark.parametrize(
    ("script", "outcome"),
    [
        ("echo fine", ("passed", "")),
        ("echo ERROR SUMMARY: 1 error; exit 86", ("failed", "ERROR SUMMARY: 1 error")),
        ("echo wrong: block_grad; exit 1", ("failed", "wrong: block_grad")),
        ("echo Device not supported; exit 1", ("unavailable", "Device not supported")),
        ("sleep 20", ("out of time", "")),
    ],
)
def test_how_a_watched_process_ended(tmp_path, monkeypatch, script, outcome):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f'#!/bin/sh\nset -e\necho "$@" > {tmp_path}/called\n{script}\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert sanitize.watch("racecheck", "cuda", "block_grad", "cuda", 2.0) == outcome
    planted = {"passed": "failed", "failed": "passed"} if "exit 1" not in script else {}
    seen, _ = sanitize.watch("memcheck", "cuda", sanitize.PLANTED, "cuda", 2.0)
    assert seen == planted.get(outcome[0], outcome[0])  # what is planted has to be found
    sanitize.watch("racecheck", "cuda", "block_grad", "cuda", 2.0)
    called = (tmp_path / "called").read_text()
    assert called.startswith(
        "--tool racecheck --error-exitcode 86 --kernel-name kns=speft --report"
    )
    assert called.endswith("-m speft_kernels.bench.gpu.small block_grad --backend cuda\n")
    sanitize.watch("racecheck", "triton", "block_grad", "cuda", 2.0)
    called = (tmp_path / "called").read_text()
    assert "--kernel-name kne=_tile_products --" in called
    assert "kns" not in called
    assert called.endswith("-m speft_kernels.bench.gpu.small block_grad --backend triton\n")


def test_without_the_tool_nothing_is_watched_and_the_record_says_so(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    outcome, message = sanitize.watch("memcheck", "triton", "write_delta", "cuda", 9.0)
    assert (outcome, message) == ("unavailable", "compute-sanitizer is not on PATH")


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
