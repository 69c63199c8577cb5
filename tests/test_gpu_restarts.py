"""What becomes of a case whose process ended, hung, lost the device or ran out of time: who is to
blame, what is measured without it, and what is tried again.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from speft_kernels.bench.gpu import cases, check, journal, record, run
from speft_kernels.bench.gpu.device import Device
from speft_kernels.bench.gpu.journal import Journal
from speft_kernels.bench.gpu.problems import TINY, Spec, Workbench
from speft_kernels.bench.gpu.timing import DeviceLostError, GpuCase, GpuSide, measure
from speft_kernels.errors import BackendError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def bench():
    return Workbench(Device("cpu"), TINY)


FAULT = RuntimeError("wild access")


@pytest.fixture
def faulty(monkeypatch):
    """A stage of three cases in which some sides lose the device."""
    specs = [Spec("block_grad", name) for name in ("q", "k", "gate")]
    monkeypatch.setitem(run.STAGES, "kernels", lambda: specs)
    monkeypatch.setattr(Workbench, "draw", lambda *_: None)

    def losing(*sides):
        lost = []

        def fail():
            lost.append(True)
            raise FAULT

        def setup(spec, bench):
            lost.clear()
            names = [name for name in ("triton", "cuda") if name not in bench.barred]
            return GpuCase(
                "block_grad",
                spec.projection,
                [
                    GpuSide(name, fail if name in sides else lambda: None, name != "dense")
                    for name in (*names, "dense")
                ],
            )

        monkeypatch.setattr(cases, "setup", setup)
        monkeypatch.setattr(Device, "is_lost", lambda _: bool(lost))

    return losing


def test_a_backend_that_loses_the_device_takes_no_others_figures_with_it(tmp_path, faulty):
    faulty("cuda")
    command = [str(tmp_path), "kernels", "--device", "cpu"]
    # In two cases, each of which is measured without it in the next process; then in none.
    assert [run.main(command) for _ in range(3)] == [check.RESTART, check.RESTART, 0]
    found = record.build(tmp_path, "cpu", lambda stage: journal.fingerprint("kernels"))
    assert [case["case"] for case in found["cases"]] == ["q", "k", "gate"]
    why = "DeviceLostError: cuda: RuntimeError: wild access"
    for case in found["cases"]:
        assert set(case["sides"]) == {"triton", "dense"}
        assert case["left_out"] == {"cuda": why}
    assert f"- block_grad, cuda, in 3 cases: {why}" in record.table(found)


def test_a_peer_that_loses_the_device_costs_its_case(tmp_path, faulty):
    faulty("dense")
    command = [str(tmp_path), "kernels", "--device", "cpu"]
    assert [run.main(command) for _ in range(4)] == [check.RESTART] * 3 + [0]
    found = record.build(tmp_path, "cpu", lambda stage: journal.fingerprint("kernels"))
    why = "DeviceLostError: dense: RuntimeError: wild access"
    assert [case["error"] for case in found["cases"]] == [why] * 3


def test_a_device_that_is_lost_while_it_is_timed_has_a_side_to_blame(monkeypatch):
    calls = []

    def fails_later():
        calls.append(True)
        if len(calls) > 4:
            raise FAULT

    case = GpuCase(
        "op", "case", [GpuSide("triton", lambda: None, True), GpuSide("cuda", fails_later, True)]
    )
    monkeypatch.setattr(Device, "is_lost", lambda _: len(calls) > 4)
    with pytest.raises(DeviceLostError, match="cuda: RuntimeError: wild access") as lost:
        measure(case, Device("cpu"))
    assert lost.value.side == "cuda"


@pytest.mark.parametrize("operation", ["sampled_grad", "layer"])
def test_a_backend_that_loses_the_device_in_a_setup_is_to_blame(operation, bench, monkeypatch):
    """Kernels run there, too, and an error of theirs would show at whoever comes next."""
    monkeypatch.setattr(Workbench, "backends", lambda *_, **__: ["torch"])
    monkeypatch.setattr(Device, "is_lost", lambda _: True)

    def fault(device):
        raise FAULT

    monkeypatch.setattr(Device, "synchronize", fault)
    tried = []
    monkeypatch.setattr(bench, "trying", tried.append)
    with pytest.raises(DeviceLostError) as lost:
        cases.setup(Spec(operation, "q", 512), bench)
    assert lost.value.side == tried[-1] == "torch"


def test_a_step_of_a_backend_that_is_barred_has_no_sides(bench, monkeypatch):
    monkeypatch.setattr(bench, "barred", {"torch": "it hung"})
    with pytest.raises(BackendError, match="it hung"):
        cases.setup(Spec("step", "1B", backend="torch"), bench)


def test_a_case_that_took_its_process_along_is_not_tried_again(tmp_path):
    specs = [Spec("layer", name) for name in ("q", "k", "gate")]
    book = Journal(tmp_path / "journal.jsonl", "kernels", "abc", "cpu")
    for spec in specs[:2]:
        book.add("begin", spec=vars(spec))
    book.add("case", spec=vars(specs[0]), operation="layer")
    assert run._not_yet(specs, book) == specs[2:]
    assert run._not_yet(specs, book) == specs[2:]
    assert [entry.get("error") for entry in book.entries("case")] == [
        None,
        "its process ended while it ran",
    ]


def barred(spec, book):
    return run._barred(spec, book.entries("barred"))


def test_a_process_that_ended_bars_the_backend_that_was_at_work(tmp_path):
    specs = [Spec("layer", name) for name in ("q", "k", "gate")]
    book = Journal(tmp_path / "journal.jsonl", "kernels", "abc", "cpu")
    book.add("begin", spec=vars(specs[0]))
    for name in ("triton, x kept", "cuda, x kept"):
        book.add("trying", spec=vars(specs[0]), side=name)
    for _ in range(2):
        assert run._not_yet(specs, book) == specs
        assert barred(specs[0], book) == {"cuda": "its process ended while cuda, x kept ran"}
        assert barred(specs[1], book) == {}
    # Another time in the same case: the other backend. What has begun to be timed blames none.
    book.add("begin", spec=vars(specs[0]))
    book.add("trying", spec=vars(specs[0]), side="triton, x kept")
    assert run._not_yet(specs, book) == specs
    assert set(barred(specs[0], book)) == {"cuda", "triton"}
    book.add("begin", spec=vars(specs[0]))
    for name in ("dense", ""):
        book.add("trying", spec=vars(specs[0]), side=name)
    assert run._not_yet(specs, book) == specs[1:]
    (entry,) = book.entries("case")
    assert entry["error"] == "its process ended while it ran"


def test_a_backend_that_hangs_is_left_out_of_all_cases_of_the_operation(tmp_path):
    specs = [Spec("layer", "q"), Spec("layer", "k"), Spec("block_grad", "k")]
    book = Journal(tmp_path / "journal.jsonl", "kernels", "abc", "cpu")
    book.add("begin", spec=vars(specs[0]))
    book.add("trying", spec=vars(specs[0]), side="cuda")
    book.add("hung", spec=vars(specs[0]))
    assert run._not_yet(specs, book) == specs
    reason = {"cuda": "its process hung while cuda ran"}
    assert [barred(spec, book) for spec in specs] == [reason, reason, {}]


def test_a_case_that_is_cut_off_is_due_again(tmp_path):
    """SIGTERM comes when the stage's time is up."""
    program = (
        "import os, signal, sys\n"
        "from dataclasses import asdict\n"
        "from pathlib import Path\n"
        "from speft_kernels.bench.gpu import cases, run\n"
        "from speft_kernels.bench.gpu.device import Device\n"
        "from speft_kernels.bench.gpu.journal import Journal\n"
        "from speft_kernels.bench.gpu.problems import TINY, Spec, Workbench\n"
        "def setup(spec, bench):\n"
        "    bench.trying('cuda')\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "cases.setup = setup\n"
        "book = Journal(Path(sys.argv[1]), 'step', 'abc', 'cpu')\n"
        "run._measure(Spec('step', '8B'), Workbench(Device('cpu'), TINY), book)\n"
    )
    path, spec = tmp_path / journal.NAME, Spec("step", "8B")
    done = subprocess.run([sys.executable, "-c", program, str(path)], cwd=ROOT)
    assert done.returncode == run.OUT_OF_TIME
    book = Journal(path, "step", "abc", "cpu")
    assert [entry["kind"] for entry in journal.read(path)] == ["begin", "trying", "cut"]
    assert run._not_yet([spec], book) == [spec]
    assert barred(spec, book) == {}


def test_a_case_that_hangs_ends_its_process_and_says_so(tmp_path):
    program = (
        "import sys, time\n"
        "from speft_kernels.bench.gpu.run import watchdog\n"
        "with watchdog(0.1, lambda: print('hung', flush=True)):\n"
        "    time.sleep(20)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (check.RESTART, "hung\n")


def test_no_step_is_begun_that_would_not_end():
    assert run.LEAST_TIME["step"] >= 150
