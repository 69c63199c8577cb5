"""The sides of the cases on a GPU: which take part, and what is said of those that cannot."""

from __future__ import annotations

import itertools
import sys
import time
from functools import partial

import pytest
import torch

from speft_kernels import _cuda_native, _triton, ops
from speft_kernels.bench.gpu import cases, journal, record, run
from speft_kernels.bench.gpu.cases import sparse_delta_matmul as case_of_products
from speft_kernels.bench.gpu.cases import topk_salience as case_of_topk
from speft_kernels.bench.gpu.cases.layer import LORA, peft_layers
from speft_kernels.bench.gpu.device import Device, Spent
from speft_kernels.bench.gpu.journal import Journal
from speft_kernels.bench.gpu.problems import MOST_TOKENS, TINY, Spec, Workbench
from speft_kernels.bench.gpu.timing import Floor, GpuCase, GpuSide, measure
from speft_kernels.bench.machine import Light
from speft_kernels.costs import CROSSOVER_TOKENS, DEFAULTS
from speft_kernels.ops.ways import cuda_ways, topk_ways


def test_without_peft_its_layers_are_left_out_and_the_reason_is_kept(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    bench = Workbench(Device("cpu"), TINY)
    monkeypatch.setattr(Workbench, "backends", lambda *_, **__: ["torch"])
    adapters = {LORA, f"{LORA}, bf16"}
    layer = cases.setup(Spec("layer", "q", MOST_TOKENS), bench)
    step = cases.setup(Spec("step", "1B", backend="torch"), bench)
    for case, missing in (
        (layer, {*adapters, "PEFT SHiRA", "PEFT Super-Tuning"}),
        (step, adapters),
    ):
        assert set(case.left_out) == missing
        assert all("peft" in why for why in case.left_out.values())


def test_a_peft_without_one_of_the_peers_names_it(monkeypatch):
    import peft

    monkeypatch.delattr(peft, "ShiraConfig")
    monkeypatch.delattr(peft, "SupertuningConfig", raising=False)
    found, absent = peft_layers(100, 64, 64)
    assert set(found) == {LORA, f"{LORA}, bf16"}
    assert absent == {
        "PEFT SHiRA": f"PEFT {peft.__version__} has no ShiraConfig",
        "PEFT Super-Tuning": f"PEFT {peft.__version__} has no SupertuningConfig",
    }


def test_a_step_is_a_case_for_each_backend_and_one_that_is_missing_says_so(tmp_path):
    """The device of a dry run has no CUDA backend."""
    specs = cases.step_specs()
    assert [spec.projection for spec in specs[:2]] == ["8B", "1B"]
    assert {spec.backend for spec in specs} == {"triton", "cuda", "torch"}
    bench = Workbench(Device("cpu"), TINY)
    book = Journal(tmp_path / journal.NAME, "step", "abc", "cpu")
    run._measure(Spec("step", "1B", backend="cuda"), bench, book)
    (entry,) = record.build(tmp_path, "cpu", lambda stage: "abc")["cases"]
    assert entry["case"].endswith(", cuda")
    assert entry["error"].startswith("BackendError")


def test_both_ways_of_few_tokens_are_timed_around_the_crossover(tmp_path):
    assert {spec.tokens for spec in cases.goal_specs()} >= set(CROSSOVER_TOKENS)
    assert min(CROSSOVER_TOKENS) < DEFAULTS["cuda"].fused_tokens < max(CROSSOVER_TOKENS)
    bench = Workbench(Device("cpu"), TINY)
    book = Journal(tmp_path / journal.NAME, "kernels", "abc", "cpu")
    run._measure(Spec("sparse_delta_matmul", "k", 128), bench, book)
    (entry,) = book.entries("case")
    ours = {name for name, values in entry["sides"].items() if values[0]}
    both = {"triton, W read once", "triton, W + D written"}
    assert ours == {"torch"} | (both if _triton.missing() is None else set())


@pytest.mark.skipif(_cuda_native.missing("cuda-host") is not None, reason="cuda-host is not built")
@pytest.mark.parametrize(
    ("case", "ways", "spec", "stage", "expected"),
    [
        (
            *(case_of_products, cuda_ways, Spec("sparse_delta_matmul", "q", 512)),
            *(cases.kernel_specs, {"tiles of 256 tokens", "tiles of 128 tokens"}),
        ),
        (
            *(case_of_topk, topk_ways, Spec("topk_salience", "launches")),
            *(cases.goal_specs, {"five launches", "one launch"}),
        ),
    ],
)
def test_both_ways_of_cuda_are_timed(tmp_path, monkeypatch, case, ways, spec, stage, expected):
    monkeypatch.setattr(Workbench, "backends", lambda *_, **__: ["cuda"])
    monkeypatch.setattr(case, ways.__name__, partial(ways, backend="cuda-host"))
    assert spec in stage()
    book = Journal(tmp_path / journal.NAME, "kernels", "abc", "cpu")
    run._measure(spec, Workbench(Device("cpu"), TINY), book)
    (entry,) = book.entries("case")
    ours = {name for name, values in entry["sides"].items() if values[0]}
    assert ours == {f"cuda, {way}" for way in expected}


def test_the_matrix_is_all_that_is_asked_for_and_not_yet_measured():
    known, rest = [*cases.goal_specs(), *cases.kernel_specs()], cases.matrix_specs()
    assert not set(known) & set(rest)
    found = {*known, *rest}
    for projection, tokens, density, mask in itertools.product(
        ("q", "k", "gate", "down"),
        (1, 16, 512, 8192),
        (0.001, 0.005, 0.01, 0.05),
        ("realistic", "uniform", "16x16"),
    ):
        gradient = "block_grad" if mask == "16x16" else "sampled_grad"
        for operation in (gradient, "sparse_delta_matmul", "layer"):
            assert Spec(operation, projection, tokens, mask, density) in found


@pytest.mark.parametrize("operation", ["sparse_delta_matmul", "layer"])
def test_a_case_of_the_matrix_goes_through_and_is_short_in_the_record(
    operation, tmp_path, monkeypatch
):
    monkeypatch.setattr(Workbench, "backends", lambda *_, **__: ["torch"])
    book = Journal(tmp_path / journal.NAME, "matrix", "abc", "cpu")
    spec = Spec(operation, "k", 16, "16x16", 0.05)
    assert spec in cases.matrix_specs()
    run._measure(spec, Workbench(Device("cpu"), TINY), book)
    (case,) = record.build(tmp_path, "cpu", lambda stage: "abc")["cases"]
    assert "error" not in case
    assert len(case["sides"]) >= 3
    assert "ratios" not in case


@pytest.mark.parametrize("waits", [True, False])
def test_the_time_until_the_host_waits_stands_beside_that_of_the_call(waits, tmp_path):
    numbers = torch.arange(3)

    def call():
        time.sleep(0.01)
        numbers.tolist()
        time.sleep(0.03)

    sides = [GpuSide("ours", call, ours=True, waits=waits), GpuSide("peer", lambda: None)]
    case = GpuCase("topk_salience", "case", sides)
    measured = measure(case, Device("cpu"))
    book = Journal(tmp_path / journal.NAME, "kernels", "abc", "cpu")
    book.add("case", spec=vars(Spec("topk_salience", "x")), **run.entry_of(case, measured))
    found = record.build(tmp_path, "cpu", lambda stage: "abc")
    assert ("until the host waits" in record.table(found)) == waits
    assert set(measured.until_wait) == ({"ours"} if waits else set())
    if waits:
        whole = measured.result.timings["ours"].median
        assert 0.01 <= measured.until_wait["ours"] <= whole - 0.03
    assert torch.Tensor.tolist is torch._C.TensorBase.tolist


class Scripted:
    """A device whose calls take what their side says: (the whole, until the host waits)."""

    is_cuda, light = False, Light(1e9, 1e9)

    def peak(self, call):
        call()
        return 1

    def synchronize(self):
        pass

    def is_lost(self):
        return False

    def timed(self, call, lead, waits=False):
        whole, until = call()
        return lambda: Spent(whole, 1e-5, until if waits else None)


def test_a_side_that_waits_is_judged_by_its_time_until_then(tmp_path):
    """Of floors, of peers and of the quartiles; the whole call stands beside it."""
    floors = [Floor("reading", 10_000_000, 2.2)]  # 10 ms
    sides = [
        GpuSide("cuda", lambda: (0.05, 0.02), True, None, {"peer": 0.5}, waits=True, floors=floors),
        GpuSide("triton", lambda: (0.05, 0.03), True, floors=floors),
        GpuSide("peer", lambda: (0.04, 0.001)),
    ]
    measured = measure(GpuCase("topk_salience", "case", sides), Scripted())
    ratios = {(v.ours, v.peer): v.ratio for v in measured.verdicts}
    assert ratios["cuda", "peer"] == pytest.approx(0.5)
    assert ratios["cuda", "reading"] == pytest.approx(2.0)
    assert ratios["triton", "reading"] == pytest.approx(5.0)
    assert measured.result.timings["cuda"].median == 0.05
    book = Journal(tmp_path / journal.NAME, "goals", "abc", "cpu")
    book.add(
        "case", spec=vars(Spec("topk_salience", "x")), **run.entry_of(case_of(sides), measured)
    )
    found = record.build(tmp_path, "cpu", lambda stage: "abc")
    judged = {goal.what: (goal.ms, goal.met) for goal in record.goals(found)}
    assert judged == {
        "cuda, until the host waits / peer": (20.0, True),
        "cuda, until the host waits / reading": (20.0, True),
        "triton / reading": (50.0, False),
    }
    assert "| 50, 20 until the host waits |" in record.table(found)


def case_of(sides):
    return GpuCase("topk_salience", "case", sides)


@pytest.mark.parametrize(("seconds", "met"), [(1.2, False), (1.4, True)])
def test_a_side_of_ours_has_a_goal_beside_another(seconds, met):
    sides = [
        GpuSide("triton", lambda: (seconds, None), True),
        GpuSide("cuda", lambda: (1.0, None), True, beside={"triton": 1 / 1.3, "absent": 1.0}),
    ]
    (verdict,) = measure(case_of(sides), Scripted()).verdicts
    assert (verdict.ours, verdict.peer, verdict.met) == ("cuda", "triton", met)
    assert verdict.quartiles == pytest.approx((1 / seconds, 1 / seconds))


def test_a_call_that_waits_twice_is_over_at_the_second():
    numbers = torch.arange(3)

    def call():
        numbers.tolist()
        time.sleep(0.02)
        numbers.tolist()

    assert Device("cpu").timed(call, 0.0, True)().until_wait >= 0.02


@pytest.fixture
def sides_of(monkeypatch):
    """The sides of a case in which both of our backends with kernels take part."""
    keep = ops.keep_columns
    monkeypatch.setattr(
        ops, "keep_columns", lambda x, plan, backend: keep(x, plan, backend="torch")
    )
    monkeypatch.setattr(Workbench, "backends", lambda *_, **__: ["triton", "cuda"])
    bench = Workbench(Device("cpu"), TINY)
    return lambda spec: {side.name: side for side in cases.setup(spec, bench).sides}


def test_the_goals_of_the_cuda_kernels_are_judged_in_the_stage_goals(sides_of):
    selected = Spec("topk_salience", "bfloat16")
    product = Spec("sparse_delta_matmul", "q", MOST_TOKENS)
    found = {name: side.floors[0].at_most for name, side in sides_of(selected).items() if side.ours}
    assert found == {"triton": 3.0, "cuda": 2.2}
    found = {name: side.goals for name, side in sides_of(product).items() if side.ours}
    assert found == {"triton": {"x @ W alone": 1.05}, "cuda": {"x @ W alone": 1.6}}
    uniform = [Spec("sampled_grad", "q", MOST_TOKENS, "uniform", d) for d in (0.005, 0.001)]
    for spec in uniform:
        # A tiny mask of 0.1 % uses few columns, so that x is kept packed.
        (beside,) = [side.beside for side in sides_of(spec).values() if side.beside]
        assert list(beside.values()) == [1 / 1.3]
        (other,) = beside
        assert other.startswith("triton, x ")
    assert set(cases.goal_specs()) >= {selected, product, *uniform}


@pytest.mark.parametrize(
    "spec",
    [
        Spec("sampled_grad", "q", MOST_TOKENS),
        Spec("sampled_grad", "q", 512, "uniform"),
        Spec("sampled_grad", "q", MOST_TOKENS, "uniform", 0.05),
    ],
)
def test_only_uniform_masks_of_most_tokens_have_a_goal_beside_triton(spec, sides_of):
    assert not any(side.beside for side in sides_of(spec).values())


def test_topk_is_timed_until_it_waits():
    bench = Workbench(Device("cpu"), TINY)
    for side in cases.setup(Spec("topk_salience", "float32"), bench).sides:
        assert side.waits == side.ours
