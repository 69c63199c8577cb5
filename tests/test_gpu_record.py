"""The journal of a GPU check, and the record that is made of it."""

from __future__ import annotations

import json
from pathlib import Path

from speft_kernels.bench.gpu import cases, journal, record
from speft_kernels.bench.gpu.journal import Journal

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MOST_BYTES = 500_000  # of a record: what pre-commit's check for large files takes by default


def test_a_journal_keeps_what_is_its_own_and_survives_a_cut_off_line(tmp_path):
    path = tmp_path / "journal.jsonl"
    mine = Journal(path, "kernels", "abc", "H200")
    mine.add("case", spec={"a": 1}, error="what\u2028a compiler\x85says")
    for other in (Journal(path, "step", "abc", "H200"), Journal(path, "kernels", "abd", "H200")):
        other.add("case", spec={"a": 2})
    Journal(path, "kernels", "abc", "A100").add("stage", status="complete")
    with open(path, "a") as file:
        file.write('{"kind": "case", "stage": "kern')
    mine.add("stage", status="out of time")
    (case,) = mine.entries("case")
    assert (case["spec"], case["error"]) == ({"a": 1}, "what\u2028a compiler\x85says")
    assert mine.status() == "out of time"
    mine.forget()
    assert mine.status() is None
    assert [entry["stage"] for entry in journal.read(path)] == ["step"]


def test_sources_have_a_fingerprint(tmp_path):
    for name in ("speft_kernels/a.py", "tests/b.py", "setup.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    before = {stage: journal.fingerprint(stage, tmp_path) for stage in ("test", "step")}
    (tmp_path / "speft_kernels" / "notes.txt").write_text("of no consequence")
    assert journal.fingerprint("step", tmp_path) == before["step"]
    (tmp_path / "tests" / "b.py").write_text("2")
    assert journal.fingerprint("step", tmp_path) == before["step"]
    assert journal.fingerprint("test", tmp_path) != before["test"]
    (tmp_path / "speft_kernels" / "a.py").rename(tmp_path / "speft_kernels" / "c.py")
    assert journal.fingerprint("step", tmp_path) != before["step"]


def test_the_committed_record_is_what_it_says():
    """Either nothing was ever measured, and it says so, or the table is that of the record."""
    found = json.loads((RESULTS / record.JSON).read_text(encoding="utf-8"))
    assert (RESULTS / record.TABLE).read_text(encoding="utf-8") == record.table(found)
    assert (RESULTS / record.JSON).stat().st_size < MOST_BYTES
    if found["cases"]:
        assert found["status"] != record.DRY
    else:
        assert found == record.empty()
        assert "not yet run on a GPU" in (RESULTS / record.TABLE).read_text(encoding="utf-8")


def entry_of_a_case(spec, ratio):
    """With numbers as long as any."""
    kept = [35000000, 10**9, 10**9] if spec.operation == "layer" else [35000000, None, None]
    values = [1, 12.34, 10.11, 123456789, 123456789012, 123.4, 1234.0, *kept]
    names = ["triton, x kept", "triton, x whole", "torch, x kept", "dense dW, gather", "by torch"]
    rounds = [ratio - 0.0123, ratio + 0.0123]
    ratios = [[ours, peer, ratio, None, *rounds] for ours in names[:3] for peer in names[3:]]
    ratios[0][3] = 0.15
    return {
        "spec": vars(spec),
        "operation": spec.operation,
        "case": f"{spec.projection} 14336 x 4096, {spec.tokens} tokens, {spec.mask} {spec.density}",
        "rounds": 15,
        "calls": 2,
        "tokens": 8192 if spec.operation == "step" else 0,
        "sides": dict.fromkeys(names, values),
        "ratios": ratios,
        "left_out": {"torch.sparse": "NotImplementedError: not for bf16"},
    }


def test_a_record_of_every_case_is_small_enough_to_commit(tmp_path):
    stages = {"goals": cases.goal_specs(), "kernels": cases.kernel_specs()}
    stages["step"] = cases.step_specs()
    stages["matrix"] = cases.matrix_specs()
    specs = [spec for some in stages.values() for spec in some]
    for stage, chosen in stages.items():
        book = Journal(tmp_path / journal.NAME, stage, "abc", "H200")
        book.add("machine", gpu="NVIDIA H200", commit="0123456789ab")
        book.add("light", bytes_per_second=4.3e12, operations_per_second=7.9e14, least_us=2.34)
        for i, spec in enumerate(chosen):
            book.add("case", **entry_of_a_case(spec, 0.1 if i else 0.2))
        book.add("stage", status="complete", seconds=400.0, detail="")
    tests = Journal(tmp_path / journal.NAME, "test", "abc", "H200")
    tests.add("test", id="a::b[c]", outcome="failed", seconds=1, message="it | failed")
    tests.add("test", id="a::c", outcome="passed", seconds=1, errors=[["sampled_grad, x", 0.5]])
    tests.add("test", id="a::d", outcome="skipped", seconds=0, message="one device")
    found = record.build(tmp_path, "H200", lambda stage: "abc")
    record.write(tmp_path, found)
    assert json.loads((tmp_path / record.JSON).read_text(encoding="utf-8")) == found
    assert (tmp_path / record.JSON).stat().st_size < MOST_BYTES
    table = (tmp_path / record.TABLE).read_text(encoding="utf-8")
    assert len(table) < MOST_BYTES // 2
    lacking = ("build (not run)", "small (not run)", "test (not ended)", "sanitize (not run)")
    assert found["status"] == f"complete but for {', '.join(lacking)}, tune (not run)"
    assert found["tests"]["failures"] == {"a::b[c]": "it | failed"}
    assert len(found["cases"]) == len(specs)
    # The first case of each stage misses its goal; the matrix has none.
    having = len(specs) - len(stages["matrix"])
    assert f"Goals: {having - 3} of {having} met" in table
    # Beside a goal of some microseconds stand our time, and what of it is starting a kernel.
    assert "Of each time 2.34 us are those of starting a kernel." in table
    assert "| 12.34 | 0.200 | 0.188 to 0.212 | 0.15 | NO |" in table
    assert "| sampled_grad, x | 0.5 |" in table
    assert "663,857" in table  # 8192 tokens in 12.34 ms
    assert "failed: `a::b[c]`" in table
    assert "MISSED" in record.summary(found)
    # Of each case the faster of our backends, here alike.
    assert "| operation | case | by torch | dense dW | torch | triton | fastest |" in table
    assert record.build(tmp_path, "A100", lambda stage: "abc")["status"] == record.NOT_YET
    assert record.build(tmp_path, "H200", lambda stage: "abd")["cases"] == []
