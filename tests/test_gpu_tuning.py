"""The stage that times other settings of the Triton kernels, in the interpreter."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

pytest.importorskip("triton")

from speft_kernels.triton_kernels.keep_columns import PackLaunch

from speft_kernels import _triton
from speft_kernels.bench.gpu import journal, record, tuning
from speft_kernels.bench.gpu.device import Device
from speft_kernels.bench.gpu.journal import Journal
from speft_kernels.bench.gpu.problems import MOST_TOKENS, TINY, Spec, Workbench

pytestmark = pytest.mark.skipif(not _triton.interpreting(), reason="Triton's interpreter is off")

SMALL = PackLaunch(block_c=32, block_t=32)


def problem(*settings):
    return tuning.Problem(
        Spec("keep_columns", "q", MOST_TOKENS), PackLaunch, lambda *_: iter(settings)
    )


@pytest.fixture
def book(tmp_path):
    return Journal(tmp_path / journal.NAME, "tune", journal.fingerprint("tune"), "cpu")


def test_every_problem_goes_through_and_nothing_is_timed_twice(tmp_path, book):
    assert tuning.main([str(tmp_path), "--device", "cpu"]) == 0
    names = [one.name for one in tuning.problems()]
    assert len(set(names)) == len(names)
    # W + D is not written out for as few tokens as in a dry run.
    names = [name for name in names if not name.endswith("RowLaunch")]
    tried = list(book.entries("tuned"))
    assert [entry["problem"] for entry in tried] == names
    assert all("error" not in entry for entry in tried)
    assert all(entry["settings"] != entry["default"] for entry in tried)
    assert tuning.main([str(tmp_path), "--device", "cpu"]) == 0
    assert len(list(book.entries("tuned"))) == len(tried)
    found = record.build(tmp_path, "cpu", lambda stage: journal.fingerprint("tune"))
    assert [one["problem"] for one in found["tuned"]] == names
    assert all(name in record.table(found) for name in names)


def test_the_best_stands_beside_the_default_and_failures_are_counted(tmp_path, book):
    for settings, ms in (("a", 0.9), ("b", 0.7), ("c", None)):
        facts = {"problem": "p", "settings": settings, "default": "d"}
        timed = {"error": "spills"} if ms is None else {"ms": ms, "default_ms": 1.0}
        book.add("tuned", **facts, **timed)
    (found,) = record.build(tmp_path, "cpu", lambda stage: book.sources)["tuned"]
    assert found == {
        **{"problem": "p", "tried": 3, "failed": 1, "default": "d", "default_ms": 1.0},
        **{"ms": 0.7, "settings": "b"},
    }


def test_a_candidate_takes_the_place_of_the_default_and_only_then():
    before = PackLaunch.default()
    with tuning.settings_of(PackLaunch, SMALL) as asked:
        assert PackLaunch.default() is SMALL
    assert asked == [()]
    assert PackLaunch.default() == before != SMALL


def test_wrong_candidates_and_those_that_ended_their_process_are_put_down(book, monkeypatch):
    monkeypatch.setattr(tuning, "FEW", 9)
    wrong = PackLaunch(block_c=24, block_t=32)  # tl.arange takes powers of two alone
    died = replace(SMALL, num_warps=2)
    one = problem(SMALL, wrong, died)
    book.add("begin", problem=one.name, settings=str(died), default=str(PackLaunch.default()))
    assert tuning.tune(one, Workbench(Device("cpu"), TINY), book, float("inf"))
    found = {entry["settings"]: entry for entry in book.entries("tuned")}
    assert set(found) == {str(SMALL), str(wrong), str(died)}
    assert found[str(SMALL)]["ms"] > 0
    assert "error" in found[str(wrong)]
    assert found[str(died)]["error"] == "its process ended while it ran"


def test_a_candidate_that_the_stages_end_cut_off_is_due_again(book):
    one = problem(SMALL)
    facts = {"settings": str(SMALL), "default": str(PackLaunch.default()), "problem": one.name}
    book.add("begin", **facts)
    book.add("cut", **facts)
    assert tuning.tune(one, Workbench(Device("cpu"), TINY), book, float("inf"))
    (entry,) = book.entries("tuned")
    assert entry["ms"] > 0


def test_only_triton_takes_part(tmp_path, monkeypatch):
    """Another backend that loses the device would end the stage."""
    seen = []
    monkeypatch.setattr(tuning, "problems", lambda: [problem(SMALL)])
    monkeypatch.setattr(tuning, "tune", lambda one, bench, *_: seen.append(bench))
    assert tuning.main([str(tmp_path), "--device", "cpu"]) == tuning.OUT_OF_TIME
    assert seen[0].backends("keep_columns") == ["triton"]


def test_what_is_out_of_time_goes_on_later(book):
    bench = Workbench(Device("cpu"), TINY)
    assert not tuning.tune(problem(SMALL), bench, book, time.monotonic())
    assert not list(book.entries("tuned"))


def test_the_nearest_settings_are_tried_first():
    far, near = PackLaunch(8, 3, 32, 32), PackLaunch(block_c=128)
    default = PackLaunch.default()
    assert tuning._nearest([far, default, near], default) == [near, far]
