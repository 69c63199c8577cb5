"""The benchmark harness: what it refuses, in which order it calls, what it writes down."""

import csv
import subprocess
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from speft_kernels import ops
from speft_kernels.bench import cases, machine, masks
from speft_kernels.bench.cases import (
    block_grad,
    sampled_grad,
    sparse_delta_matmul,
    topk_salience,
    write_delta,
)
from speft_kernels.bench.cases import layer as layer_case
from speft_kernels.bench.checks import agree, rounding_bound
from speft_kernels.bench.harness import (
    Case,
    Result,
    Saved,
    Side,
    Timing,
    Work,
    WrongResultError,
    measure,
)
from speft_kernels.bench.machine import Light, Machine
from speft_kernels.bench.memory import saved_for_backward
from speft_kernels.bench.plot import bars_of, plot
from speft_kernels.bench.records import read_records, records_of, write_records
from speft_kernels.bench.report import describe, goals
from speft_kernels.bench.trainers import DenseMaskLinear
from speft_kernels.errors import DataError, OutputError
from speft_kernels.machine import commit as sources_commit
from speft_kernels.pattern import SparsePattern
from speft_kernels.testing import uniform_pattern

MACHINE = Machine("a processor", 2, 1, "3.11", "2.13", "0.1", "5.0", "", "abc")


class Script:
    """Sides that take a scripted time, on a clock of their own; `log` is the order of the calls."""

    def __init__(self, **seconds):
        self.now, self.log = 0.0, []
        self.seconds = {name: iter(times) for name, times in seconds.items()}

    def clock(self):
        return self.now

    def run(self, name):
        self.log.append(name)
        self.now += next(self.seconds[name])

    def case(self, **settings):
        sides = [
            Side(name, partial(self.run, name), ours=name == "ours", goals=goals)
            for name, goals in (("ours", {"peer": 0.5}), ("peer", {}))
        ]
        settings = {"check": lambda: self.log.append("check"), "rounds": 2, "calls": 2, **settings}
        return Case("op", "name", sides, **settings)


def test_a_case_whose_check_fails_is_refused_before_timing():
    script = Script(ours=[], peer=[])

    def check():
        raise WrongResultError("wrong")

    with pytest.raises(WrongResultError, match="wrong"):
        measure(script.case(check=check), clock=script.clock)
    assert script.log == []


def test_rounds_interleave_the_sides_and_medians_leave_the_warm_up_out():
    script = Script(ours=[100, 4, 1, 6, 3], peer=[100, 8, 9, 12, 11])
    result = measure(script.case(), clock=script.clock)
    one_round = ["ours", "ours", "peer", "peer"]
    assert script.log == ["check", "ours", "peer", *one_round, *one_round]
    assert result.timings["ours"] == Timing(3.5, 5.0, None, (2.5, 4.5), (4.0, 6.0))
    assert result.timings["peer"] == Timing(10.0, 10.0, None, (8.5, 11.5), (8.0, 12.0))
    (verdict,) = result.verdicts()
    assert verdict.ratio == pytest.approx((2.5 / 8.5 + 4.5 / 11.5) / 2)  # of the rounds' ratios
    assert (verdict.first_ratio, verdict.met) == (0.5, True)
    # Of two rounds: a quarter and three quarters of the way between them.
    low, high = 2.5 / 8.5, 4.5 / 11.5
    expected = (low + (high - low) / 4, low + 3 * (high - low) / 4)
    assert verdict.quartiles == pytest.approx(expected)


def test_cold_caches_are_made_so_before_each_call_and_outside_the_time(monkeypatch):
    script = Script(ours=[1] * 5, peer=[2] * 5)

    def evict():
        script.log.append("evict")
        script.now += 1000

    monkeypatch.setattr(machine, "evict_caches", evict)
    result = measure(script.case(rounds=1), rounds=2, cold=True, clock=script.clock)
    timed = script.log[3:]
    assert timed[::2] == ["evict"] * 8
    assert result.name == "name, cold caches"
    assert (result.rounds, result.timings["peer"].median) == (2, 2.0)


def test_a_goal_that_is_missed_is_said():
    script = Script(ours=[1] * 5, peer=[1] * 5)
    result = measure(script.case(), clock=script.clock)
    assert result.verdicts()[0].met is False
    assert (
        "ours / peer: 1.000 [1.000, 1.000] (first calls 1.000), goal at most 0.5: MISSED"
        in describe(result)
    )


def test_the_closing_table_has_every_goal_and_says_what_was_missed():
    met, missed = (
        result_of(t, name, {"peer, dense": 0.5}) for t, name in ((1e-3, "a"), (3e-3, "b"))
    )
    heading, columns, *lines = goals([met, missed]).splitlines()
    assert heading == "goals: 3 met, 1 missed"
    assert columns.split() == ["measured", "quartiles", "at", "most", "goal", "what"]
    memory = "ours, bytes saved for backward by the adapted layers / bytes of their inputs"
    assert [" ".join(line.split()) for line in lines] == [
        "0.250 0.225-0.275 0.5 met op, a: ours / peer, dense",
        f"0.250 0.3 met op, a: {memory}",
        "0.750 0.675-0.825 0.5 MISSED op, b: ours / peer, dense",
        f"0.250 0.3 met op, b: {memory}",
    ]
    assert goals([]) == ""


def test_speed_of_light():
    light = Light(bandwidth=1e9, rate=1e12)
    assert Work({"a": 3_000_000, "b": 1_000_000}, 10**9).seconds(light) == pytest.approx(4e-3)
    assert Work({"a": 3_000_000}, 5 * 10**9).seconds(light) == pytest.approx(5e-3)
    side = Side("ours", lambda: None, True, Work({"a": 4_000_000}, 2 * 10**9))
    case = Case("op", "name", [side], lambda: None)
    text = describe(Result(case, "name", 1, {"ours": Timing(8e-3, 8e-3, 4e-3, (8e-3,), (8e-3,))}))
    milliseconds, _, gbytes, gflops, share = text.splitlines()[2].split()[1:]
    assert (milliseconds, gbytes, gflops, share) == ("8.000", "0.5", "250.0", "50%")


def test_the_rounding_bound_holds_and_is_no_carte_blanche():
    a, b = torch.randn(1000), torch.randn(1000)
    exact = (a.double() @ b.double()).view(1)
    bound = rounding_bound(1000, (a.double().abs() @ b.double().abs()).view(1))
    agree([Side("sum", lambda: (a * b).sum().view(1))], exact, bound)
    for wrong in ((a[1:] * b[1:]).sum(), torch.tensor(torch.nan)):
        with pytest.raises(WrongResultError, match="bad: wrong in 1 of 1"):
            agree([Side("bad", lambda wrong=wrong: wrong.view(1))], exact, bound)
    with pytest.raises(WrongResultError, match="2 entries, expected 1"):
        agree([Side("bad", lambda: torch.zeros(2))], exact, bound)


def small_cases():
    pattern = uniform_pattern((24, 16), 0.1)
    return {
        "sampled_grad": lambda: sampled_grad.setup("small", [pattern, pattern], tokens=9),
        "block_grad": lambda: block_grad.setup((16, 16)),
        "topk_salience": lambda: topk_salience.setup("small", 32, 2, torch.bfloat16),
        "sparse_delta_matmul": lambda: sparse_delta_matmul.setup(3),
        "write_delta": write_delta.setup,
    }


@pytest.fixture
def small(monkeypatch):
    for module in (block_grad, sparse_delta_matmul, write_delta):
        monkeypatch.setattr(module, "SIZE", 64)
        monkeypatch.setattr(module, "DENSITY", 0.1)
    return small_cases()


def test_there_is_a_case_for_every_operation(small):
    assert set(small) == set(cases.KERNELS)


@pytest.mark.parametrize("operation", cases.KERNELS)
def test_the_check_of_each_operation_notices_a_broken_one(small, monkeypatch, operation):
    small[operation]().check()
    working = getattr(ops, operation)

    def broken(*args, **kwargs):
        output = working(*args, **kwargs)
        if operation == "write_delta":
            args[0].view(-1)[args[1].indices[0]] += 1
        elif operation == "topk_salience":
            output[0][0] = output[0][1]
        else:
            output.view(-1)[0] += 1
        return output

    monkeypatch.setattr(ops, operation, broken)
    with pytest.raises(WrongResultError):
        small[operation]().check()


SPREAD = (0.8, 1, 1.2)  # of the rounds: quartiles of 0.9 and 1.1


def result_of(median, name="case", goals=None):
    work = Work({"x": 40}, 7)
    sides = [
        Side("ours", lambda: None, True, work, goals or {}, Saved(3, 12, 0.3), 5),
        Side("peer, dense", lambda: None),
    ]
    case = Case("op", name, sides, lambda: None)
    timings = {
        "ours": Timing(median, 2e-3, 1e-3, tuple(spread * median for spread in SPREAD), (2e-3,)),
        "peer, dense": Timing(4e-3, 4e-3, None, (4e-3,) * len(SPREAD), (4e-3,)),
    }
    return Result(case, name, 3, timings)


def test_records_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "bench.csv"
    rows = records_of(result_of(1.25e-3, goals={"peer, dense": 0.5}), MACHINE)
    assert write_records(path, rows) == rows
    assert read_records(path) == rows
    ours, peer = rows
    assert (ours.median_ms, ours.bytes, ours.operations, ours.trained) == (1.25, 40, 7, 5)
    assert (ours.saved_bytes, ours.input_bytes, ours.saved_goal) == (3, 12, 0.3)
    assert ours.limits == {"peer, dense": 0.5}
    assert ours.measured == {"peer, dense": 0.3125}
    assert ours.quartiles == {"peer, dense": (0.28125, 0.34375)}
    assert (peer.light_ms, peer.bytes, peer.limits) == (None, None, {})


def test_a_file_from_before_there_were_quartiles_is_read_and_goes_on(tmp_path):
    path = tmp_path / "bench.csv"
    committed = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "bench.csv"
    rows = records_of(result_of(1e-3, "old"), MACHINE)
    write_records(path, rows)
    with open(path, newline="") as file:
        table = [line[:26] for line in csv.reader(file)]
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(table)
    found = read_records(path)
    assert found == [replace(row, lower_quartiles="", upper_quartiles="") for row in rows]
    assert found[0].quartiles == {}
    fresh = records_of(result_of(2e-3, "new"), MACHINE)
    assert write_records(path, fresh) == read_records(path) == [*found, *fresh]
    assert read_records(committed)


def test_a_row_with_the_same_key_is_replaced_where_it_stands(tmp_path):
    path = tmp_path / "bench.csv"
    write_records(path, records_of(result_of(1e-3, "first"), MACHINE))
    write_records(path, records_of(result_of(2e-3, "second"), MACHINE))
    write_records(path, records_of(result_of(9e-3, "first"), MACHINE))
    assert len(read_records(path)) == 4  # two sides of two cases
    other = replace(MACHINE, commit="def")
    write_records(path, records_of(result_of(5e-3, "first"), other))
    found = [(row.case, row.commit, row.median_ms) for row in read_records(path)[::2]]
    assert found == [("first", "abc", 9.0), ("second", "abc", 2.0), ("first", "def", 5.0)]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: "", "no column 'processor', 'cores'"),
        (lambda text: text.replace("median_ms", "median"), "no column 'median_ms'"),
        (lambda text: text.replace("\n", ",more\n"), "an unknown column 'more'"),
        (lambda text: text.replace(",1.25,", ",fast,"), "line 2: median_ms = 'fast' is no number"),
        (lambda text: text + "a,2\n", "line 4: the line ends before column 'threads'"),
        (lambda text: text[:-1] + ",1\n", "line 3: the line has more fields"),
        (lambda text: text.replace("=0.28125", "=low"), "and the quartiles 'peer=ratio'"),
        (lambda text: text.replace("=0.34375", ""), "and the quartiles 'peer=ratio'"),
        (lambda text: text.replace("<=0.5", "<=half"), "line 2: goals = 'peer, dense<=half'"),
        (lambda text: text.replace("<=0.5", "<=inf"), "line 2: goals = 'peer, dense<=inf'"),
        (lambda text: text.replace("=0.28125", "=nan"), "and the quartiles 'peer=ratio'"),
        (lambda text: text + '"', "cannot be read as CSV"),
        (lambda text: text.replace("a processor", "\udce9"), "cannot be read"),
    ],
)
def test_a_malformed_file_is_refused_and_left_alone(tmp_path, spoil, message):
    path = tmp_path / "bench.csv"
    rows = records_of(result_of(1.25e-3, goals={"peer, dense": 0.5}), MACHINE)
    write_records(path, rows)
    spoilt = spoil(path.read_text()).encode(errors="surrogateescape")
    path.write_bytes(spoilt)
    with pytest.raises(DataError, match=message):
        write_records(path, rows)
    assert path.read_bytes() == spoilt
    assert list(tmp_path.iterdir()) == [path]


def test_the_figure_divides_only_within_one_run():
    old = records_of(result_of(1e-3, goals={"peer, dense": 0.5}), MACHINE)
    new = records_of(result_of(3e-3, goals={"peer, dense": 0.5}), replace(MACHINE, commit="def"))
    (bar,) = bars_of(old)
    assert (bar.ratio, bar.at_most, bar.met) == (0.25, 0.5, True)
    (bar,) = bars_of([*old, *new])
    assert (bar.ratio, bar.met) == (0.75, False)
    assert bars_of([*old, new[0]]) == []


def test_a_dollar_in_the_name_of_a_case_begins_no_formula(tmp_path):
    pytest.importorskip("matplotlib")
    rows = records_of(result_of(1e-3, goals={"peer, dense": 0.5}), MACHINE)
    plot([replace(row, case="$x_{$") for row in rows], tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").stat().st_size


def test_a_figure_that_cannot_be_written_leaves_the_former_one(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure").Figure
    monkeypatch.setattr(figure, "savefig", full_disk)
    (tmp_path / "figure.svg").write_text("the former one")
    rows = records_of(result_of(1e-3, goals={"peer, dense": 0.5}), MACHINE)
    with pytest.raises(OutputError, match=r"figure\.svg cannot be written: No space left"):
        plot(rows, tmp_path / "figure.svg")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["the former one"]


def full_disk(figure, path, **settings):
    Path(path).write_text("half")
    raise OSError(28, "No space left on device")


def test_bytes_saved_for_backward():
    x, once, twice = torch.randn(8, 4, requires_grad=True), nn.Linear(4, 4), nn.Linear(4, 4)
    frozen = nn.Linear(4, 4).requires_grad_(False)
    layers = [once, twice, frozen]
    # `once` and `twice` keep x, one and the same; `frozen` keeps its weight alone.
    saved = saved_for_backward(layers, lambda: frozen(once(x) + twice(x)))
    assert saved == Saved(x.nbytes, 2 * x.nbytes)
    assert saved_for_backward([frozen], lambda: frozen(x)).bytes == 0
    assert all(not layer._forward_hooks and not layer._forward_pre_hooks for layer in layers)


@pytest.mark.slow
def test_the_peak_of_a_crowded_layers_backward(monkeypatch):
    case = layer_case.setup()
    case.check()
    ours = case.sides[0]
    if ours.saved is None:
        pytest.skip("this system does not let a process reset its peak memory")
    assert ours.saved.inputs == 4 * layer_case.SIZE**2
    # The gradient of the values alone is a quarter of the dense one; the mark is of whole pages.
    assert layer_case.DENSITY * 0.95 <= ours.saved.share <= ours.saved.at_most < 1

    def broken(self, layer):
        return run(self, layer) * (2 if layer is self.ours else 1)

    run = layer_case.Passes.run
    monkeypatch.setattr(layer_case.Passes, "run", broken)
    with pytest.raises(WrongResultError, match="25%-dense layer: wrong"):
        case.check()


def test_a_dense_delta_under_a_mask_trains_the_masked_entries_alone():
    linear, x = nn.Linear(6, 5).requires_grad_(False), torch.randn(7, 6)
    pattern = SparsePattern.from_indices((5, 6), torch.tensor([3, 8, 29]))
    layer, before = DenseMaskLinear(linear, pattern), linear(x)
    assert torch.equal(layer(x), before)
    layer(x).sum().backward()
    layer.gather()
    expected = x.sum(0)[pattern.cols.long()]
    torch.testing.assert_close(layer.values.grad, expected)
    assert layer.delta.grad is None
    torch.optim.SGD([layer.values], lr=1.0).step()
    layer.scatter()
    delta = torch.zeros(30).index_put_((pattern.indices.long(),), -expected).view(5, 6)
    torch.testing.assert_close(layer(x), before + x @ delta.t())


def test_the_commit_says_when_the_tree_is_dirty_and_nothing_of_other_repositories(tmp_path):
    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    commit = sources_commit.__wrapped__
    assert commit(tmp_path) == "unknown"
    git("init")
    (tmp_path / "source.py").write_text("1")
    git("add", ".")
    git("commit", "-m", "first")
    clean = commit(tmp_path)
    assert len(clean) == 12
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (results / "bench.csv").write_text("rows")
    assert commit(tmp_path) == clean
    (tmp_path / "source.py").write_text("2")
    assert commit(tmp_path) == f"{clean}-dirty"
    assert commit(tmp_path / "benchmarks") == "unknown"


def test_without_sst2_the_text_is_the_demos_and_the_label_says_so(tmp_path, monkeypatch):
    from speft_kernels.finetune import demo_data

    docstring = demo_data.Docstring("a text", "json")
    data = demo_data.DemoData((docstring,), (), (), ("json",))
    monkeypatch.setattr(demo_data, "collect", lambda: data)
    monkeypatch.setenv("SPEFT_DATA", str(tmp_path))
    assert masks._examples() == ("docstrings, no SST-2", [("a text", "json")])
    (tmp_path / "sst2").mkdir()
    (tmp_path / "sst2" / "train.tsv").write_text("sentence\tlabel\nfine\t1\n")
    assert masks._examples() == ("SST-2", [("fine", "1")])
