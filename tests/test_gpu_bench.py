"""What judges the kernels on a GPU, gone through without one: every case at tiny sizes, and all
that a crash, a hang or a wrong result must not break.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from speft_kernels import ops
from speft_kernels.bench.gpu import (
    cases,
    check,
    install,
    journal,
    record,
    run,
)
from speft_kernels.bench.gpu.bounds import summation_bound
from speft_kernels.bench.gpu.device import Device
from speft_kernels.bench.gpu.journal import Journal
from speft_kernels.bench.gpu.problems import MOST_TOKENS, TINY, Spec, Workbench, rotated
from speft_kernels.bench.gpu.stages import Stage
from speft_kernels.bench.gpu.timing import Floor, GpuCase, GpuSide, measure
from speft_kernels.bench.harness import WrongResultError
from speft_kernels.bench.machine import Light
from speft_kernels.costs import CROSSOVER_TOKENS
from speft_kernels.testing import clustering_of, realistic_pattern

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def bench():
    return Workbench(Device("cpu"), TINY)


def representatives():
    """A case for each operation, kind of mask, and of many tokens and few."""
    chosen = {}
    for spec in [*cases.goal_specs(), *cases.kernel_specs(), *cases.step_specs()]:
        of = spec.projection if spec.operation in ("topk_salience", "quantized", "step") else ""
        if spec.operation != "step" or (spec.backend == "torch" and of != "8B"):
            chosen.setdefault((spec.operation, spec.mask, spec.tokens == MOST_TOKENS, of), spec)
    return list(chosen.values())


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "spec", representatives(), ids=lambda spec: "-".join(map(str, vars(spec).values()))
)
def test_every_case_goes_through_on_the_cpu(spec, bench, tmp_path, monkeypatch):
    """Its setup, its peers, its checks and its entry in the journal: nothing is found broken only
    on a GPU. Triton is interpreted, so it takes part where that takes a second, not ten.
    """
    if spec.operation in ("topk_salience", "layer", "step"):
        monkeypatch.setattr(Workbench, "backends", lambda *_, **__: ["torch"])
    # A slow CPU, where Inductor calls a compiler, is no GPU that hangs: this process is not to end.
    monkeypatch.setitem(run.LONGEST_CASE, "kernels", 900.0)
    journal = Journal(tmp_path / "journal.jsonl", "kernels", "sources", "cpu")
    run._measure(spec, bench, journal)
    (entry,) = journal.entries("case")
    assert "error" not in entry, entry
    # What torch has not on a CPU.
    missing = {"torch.sparse CSR, added"}
    assert set(entry["left_out"]) <= missing, entry["left_out"]
    ours = [name for name, values in entry["sides"].items() if values[0]]
    assert {name.removeprefix("SPEFT ").split(",")[0] for name in ours} >= {"torch"}
    assert len(entry["sides"]) > len(ours)
    assert all(values[1] > 0 for values in entry["sides"].values())
    assert len(entry["ratios"]) >= len(ours)


def test_the_goals_come_first_and_every_case_once():
    specs = [*cases.goal_specs(), *cases.kernel_specs()]
    assert len(set(specs)) == len(specs)
    assert {spec.operation for spec in specs} == {
        *ops.registry.OPS,
        *("keep_columns", "layer", "quantized"),
    }
    # What decides on the CUDA kernels, and then whatever else has a goal.
    assert specs[:4] == [
        Spec("sampled_grad", "q", MOST_TOKENS, "uniform", 0.005),
        Spec("sampled_grad", "q", MOST_TOKENS, "uniform", 0.001),
        Spec("topk_salience", "bfloat16"),
        Spec("sparse_delta_matmul", "q", MOST_TOKENS),
    ]
    known = {"topk_salience", "sampled_grad", "layer", "sparse_delta_matmul"}
    assert {spec.operation for spec in specs[:27]} == known
    assert all(spec.tokens in (MOST_TOKENS, 16, 1, 0) for spec in specs[:27])
    # As many as are counted on to fit into the 100 seconds of the stage, at two for each.
    assert len(cases.goal_specs()) <= 54
    assert {spec.tokens for spec in specs} == {0, *cases.TOKENS, *CROSSOVER_TOKENS}
    assert {spec.density for spec in specs} == set(cases.DENSITIES)


@pytest.mark.parametrize(
    ("operation", "spec"),
    [
        ("sampled_grad", Spec("sampled_grad", "q", 512)),
        ("block_grad", Spec("block_grad", "q", 512, "16x16")),
        ("sparse_delta_matmul", Spec("sparse_delta_matmul", "q", 512)),
        ("sparse_delta_matmul", Spec("quantized", "int4", 16)),
        ("topk_salience", Spec("topk_salience", "bfloat16")),
        ("write_deltas", Spec("write_delta", "layers")),
        ("keep_columns", Spec("keep_columns", "q", 512)),
    ],
)
def test_a_wrong_result_is_noticed_and_the_peers_are_measured(bench, monkeypatch, operation, spec):
    working = getattr(ops, operation)

    def broken(*args, **kwargs):
        output = working(*args, **kwargs)
        if operation == "write_deltas":
            args[0][0].view(-1)[args[1][0].indices[0]] += 1
        elif operation == "topk_salience":
            output[0][0] = output[0][1]
        elif operation == "keep_columns":
            output[0, 0, 0] += 1
        else:
            output.view(-1)[0] += 0.5 * output.abs().max()
        return output

    monkeypatch.setattr(ops, operation, broken)
    monkeypatch.setattr(Workbench, "backends", lambda *_, **__: ["torch"])
    measured = measure(cases.setup(spec, bench), bench.device)
    assert {name.split(",")[0] for name in measured.left_out} >= {"torch"}
    assert all("WrongResultError" in why for why in list(measured.left_out.values())[:1])
    assert measured.result.timings
    assert not any(side.ours for side in measured.result.case.sides)


def test_masks_are_turned_to_other_places_and_stay_as_clustered():
    pattern = realistic_pattern((192, 128), 0.01)
    others = [rotated(pattern, number) for number in (1, 2)]
    assert all(other.nnz == pattern.nnz and other != pattern for other in others)
    assert others[0] != others[1]
    assert all(clustering_of(other) == clustering_of(pattern) for other in others)


# Timing


class Clock:
    """The host's clock for timed calls: it moves by what a side is to take, however busy the
    machine is.
    """

    now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("speft_kernels.bench.gpu.device.time", clock)
    return clock


def side(name, clock=None, seconds=0.0, ours=False, goals=None, error=None, **more):
    def call():
        if error is not None:
            raise error
        if clock is not None:
            clock.now += seconds
        return name

    return GpuSide(name, call, ours, goals=goals or {}, **more)


def refuse(output):
    raise WrongResultError(f"{output} is wrong")


def test_what_fails_is_left_out_and_the_others_are_timed(clock):
    case = GpuCase(
        "op",
        "case",
        [
            side("ours", clock, 0.02, True, goals={"peer": 1.5, "absent": 1.0}),
            side("wrong", ours=True, check=refuse),
            side("peer", clock, 0.01),
            side("absent", error=NotImplementedError("not for\nthis dtype")),
        ],
        {"never": "no such library"},
    )
    measured = measure(case, Device("cpu"))
    assert measured.left_out == {
        "never": "no such library",
        "wrong": "WrongResultError: wrong is wrong",
        "absent": "NotImplementedError: not for this dtype",
    }
    assert list(measured.result.timings) == ["ours", "peer"]
    (verdict,) = measured.verdicts
    assert (verdict.ours, verdict.peer, verdict.at_most) == ("ours", "peer", 1.5)
    assert verdict.ratio == pytest.approx(2.0)
    assert verdict.met is False


def test_what_a_kernel_that_does_nothing_takes_is_measured_and_kept(tmp_path, monkeypatch):
    monkeypatch.setitem(run.STAGES, "kernels", list)
    assert run.main([str(tmp_path), "kernels", "--device", "cpu"]) == 0
    light = record.build(tmp_path, "cpu", lambda stage: journal.fingerprint("kernels"))["light"]
    assert 0 < light["least_us"] < 1e4


def test_the_quartiles_of_ratios_are_kept(clock):
    sides = [side("ours", clock, 0.02, True, {"peer": 1e9}), side("peer", clock, 0.01)]
    case = GpuCase(
        "op", "case", sides, memory_goals={"peer": 1.0}, own_bytes={"ours": 1, "peer": 2}
    )
    entry = run.entry_of(case, measure(case, Device("cpu")))
    assert [len(ratio) for ratio in entry["ratios"]] == [6, 4]
    found = record.goals({"cases": [entry]})
    assert found[0].quartiles == pytest.approx([2.0, 2.0])
    assert found[0].ms == pytest.approx(20.0)
    assert found[1].ms is None


def test_floors_and_memory_are_compared_with(clock):
    device = Device("cpu")
    device.light = Light(1e9, 1e9)
    floors = [Floor("reading", 10_000_000, 3.0)]
    sides = [
        side("ours", clock, 0.02, True, {"peer": 1e9}, floors=floors),
        side("peer", clock, 0.01),
    ]
    own, goals = {"ours": 30, "peer": 40}, {"peer": 1.0}
    measured = measure(GpuCase("op", "case", sides, own_bytes=own, memory_goals=goals), device)
    found = {(v.ours, v.peer): (v.ratio, v.met) for v in measured.verdicts}
    ratio, met = found["ours", "reading"]
    assert ratio == pytest.approx(2.0)
    assert met
    assert found["ours, memory", "peer"] == (0.75, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bound_holds_for_sums_in_the_worst_order_and_for_no_worse_arithmetic(dtype):
    """One product after the other in float32; and as tensor cores do, 16 at a time, cut off."""
    tokens = 4096
    a, b = (torch.randn(tokens, 200).to(dtype).double() for _ in range(2))
    products = a * b
    exact = products.sum(0)
    found = torch.zeros(200)
    if dtype == torch.float32:
        for row in products.float():
            found += row
    else:
        for some in products.view(-1, 16, 200).sum(1):
            total = found.double() + some
            rounded = total.float()
            toward_zero = torch.nextafter(rounded, torch.zeros(()))
            found = torch.where(rounded.double().abs() > total.abs(), toward_zero, rounded)
    bound = summation_bound(tokens, float(exact.abs().max()), dtype)
    assert float((found - exact).abs().max()) <= bound
    # One product forgotten, or a sum that is kept in bf16.
    assert float(products[0].abs().max()) > 10 * bound
    assert float((exact.bfloat16() - exact).abs().max()) > 10 * bound


# The command


@pytest.fixture
def probed(monkeypatch):
    """A machine without a GPU."""
    machine = install.Machine("2.11.0", None, None, 0.0, 2, False, True)
    monkeypatch.setattr(install, "probe", lambda python: machine)


def test_without_a_gpu_it_says_so_and_writes_nothing(probed, tmp_path, capsys):
    assert check.main([str(tmp_path / "out")]) == 2
    assert "there is no CUDA GPU that torch 2.11.0 sees" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_stages_are_listed_and_unknown_ones_refused(probed, capsys):
    assert check.main(["--list"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    # Which kernels run at all is known first, then what has goals and what is right.
    assert listed[:5] == ["build", "small", "goals", "test", "kernels"]
    assert listed[5:] == ["step", "sanitize", "matrix", "tune"]
    for words, message in (
        (["kernel"], "unknown stage 'kernel'. Did you mean 'kernels'?"),
        (["out", "stepp"], "unknown stage 'stepp'"),
    ):
        with pytest.raises(SystemExit) as ended:
            check.main(words)
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("capability", "archs"), [((8, 0), "80"), ((9, 0), "90a"), ((10, 0), "100a"), (None, "")]
)
def test_the_targets_are_those_of_the_gpu(capability, archs):
    assert install.Machine("2.11.0", "a GPU", capability, 80.0, 2, True, True).archs == archs


def test_a_python_without_torch_is_named(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'No module named torch' >&2\nexit 1\n")
    python.chmod(0o755)
    assert install.probe(str(python)) == f"{python} cannot import torch: No module named torch"


@pytest.fixture
def checking(tmp_path, monkeypatch):
    """A check whose stages are scripts, and which has nothing to build."""
    machine = install.Machine("2.11.0", "H200", (9, 0), 139.0, 16, False, True)
    found = check.Check(tmp_path, machine, False, float("inf"), True, sys.executable)

    def scripted(*scripts):
        left = list(scripts)

        def command(stage, python, seconds, *, again):
            assert again == (len(left) < len(scripts))
            return [python, "-c", left.pop(0)], {}

        monkeypatch.setattr(found, "_command", command)
        return left

    found.scripted = scripted
    return found


def test_a_stage_goes_on_after_a_lost_device_or_a_crash(checking, capsys):
    left = checking.scripted(
        "import sys; print('first'); sys.exit(75)",
        "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
        "print('third')",
        "never",
    )
    checking.run("kernels", force=False)
    assert checking.journal("kernels").status() == "complete"
    assert left == ["never"]
    assert (checking.out / "kernels.log").read_text() == "first\nthird\n"
    assert "third" in capsys.readouterr().out
    checking.run("kernels", force=False)
    assert left == ["never"]  # complete: not run again


def test_a_stage_that_is_out_of_time_is_ended_and_its_finds_are_kept(checking, monkeypatch):
    monkeypatch.setattr(check, "_GRACE", 0.3)
    monkeypatch.setitem(check.STAGES, "kernels", Stage(1.0, "other sizes"))
    entry = {"kind": "case", "stage": "kernels", "spec": {"a": 1}, "device": "H200"}
    entry["sources"] = journal.fingerprint("kernels")
    values = {"operation": "layer", "case": "c", "error": "none"}
    values["spec"] = vars(Spec("layer", "q"))
    line = json.dumps({**entry, **values})
    started = time.monotonic()
    checking.scripted(
        f"import time; open({str(checking.out / journal.NAME)!r}, 'a').write({line + chr(10)!r});"
        "print('begun', flush=True); time.sleep(60)"
    )
    checking.run("kernels", force=False)
    assert time.monotonic() - started < 20
    assert checking.journal("kernels").status() == "out of time"
    assert (checking.out / "kernels.log").read_text() == "begun\n"
    found = json.loads((checking.out / record.JSON).read_text())
    assert found["stages"]["kernels"]["status"] == "out of time"
    assert [case["operation"] for case in found["cases"]] == ["layer"]


@pytest.mark.parametrize("xdist", [False, True])
def test_a_test_that_hangs_does_not_keep_the_others_from_running(checking, xdist):
    """It ends pytest as a failure does; pytest-xdist replaces its worker by itself."""
    checking.machine = replace(checking.machine, xdist=xdist)
    left = checking.scripted("import sys; sys.exit(1)", "import sys; sys.exit(5)", "never")
    checking.run("test", force=False)
    assert checking.journal("test").status() == "failed"
    assert left == (["import sys; sys.exit(5)"] * xdist + ["never"])


def test_processes_that_share_the_tests_start_few_compilers(checking):
    _, more = checking._command("test", sys.executable, 100.0, again=False)
    assert int(more["TORCHINDUCTOR_COMPILE_THREADS"]) * 8 <= checking.machine.cores


def test_the_suites_outcomes_are_recorded_and_not_repeated(tmp_path):
    """Two tests of the GPU suite in a dry run; the second time there is nothing left to run."""
    path = tmp_path / journal.NAME
    environment = {**os.environ, "SPEFT_GPU_DRY_RUN": "1", "SPEFT_GPU_JOURNAL": str(path)}
    files = [f"tests/gpu/test_gpu_{name}.py" for name in ("library", "sampled_grad")]
    chosen = "test_an_index_beyond_int32 or library and keep_columns-torch"
    suite = [sys.executable, "-m", "pytest", *files, "-m", "gpu", "-p", "no:cacheprovider"]
    for status in (0, 5):
        # As after a crash: else a test that was skipped is asked again whether it can run.
        more = {"SPEFT_GPU_AGAIN": "1"} if status else {}
        command = [*suite, "-k", chosen]
        done = subprocess.run(
            command, cwd=ROOT, env={**environment, **more}, capture_output=True, text=True
        )
        assert done.returncode == status, done.stdout + done.stderr
    entries = [entry for entry in journal.read(path) if entry["kind"] == "test"]
    outcomes = {entry["id"].rpartition("::")[2]: entry["outcome"] for entry in entries}
    assert outcomes == {
        "test_operations_are_what_torch_takes_them_for[keep_columns-torch]": "passed",
        "test_an_index_beyond_int32_has_room": "skipped",
    }
    assert {entry.get("message") for entry in entries} == {None, "4.4 GB"}
