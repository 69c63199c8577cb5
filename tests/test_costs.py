"""The costs of the plan's model: their file, how they are measured, and `speft tune`."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch

from speft_kernels import SparsityPlan, _triton, costs, ops, tune
from speft_kernels.cli import main
from speft_kernels.costs import CROSSOVER_TOKENS, DEFAULTS, Costs, costs_of, machine_key, remember
from speft_kernels.errors import BackendError
from speft_kernels.machine import processor
from speft_kernels.ops.ways import triton_ways
from speft_kernels.testing import uniform_pattern

CPU = torch.device("cpu")
SOME = Costs(panel=1.5e-11, read=2.5e-10, tile=3.5e-11, gather=4.5e-11, pack=5.5e-10, call=6.5e-4)
NAMES = ["panel", "read", "tile", "gather", "pack", "call"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own, which does not exist yet; nothing is remembered of it."""
    folder = tmp_path / "cache" / "of speft"
    monkeypatch.setenv("SPEFT_CACHE", str(folder))
    costs._measured.cache_clear()
    yield folder
    costs._measured.cache_clear()


def write(cache, content):
    cache.mkdir(parents=True)
    path = cache / "costs.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_without_a_file_the_defaults_hold(cache):
    assert costs_of(CPU) == DEFAULTS["cpu"]
    assert costs_of(torch.device("meta")) == DEFAULTS["cpu"]
    assert not cache.exists()


def test_what_is_remembered_holds_at_once_and_in_plans(cache):
    assert costs_of(CPU) == DEFAULTS["cpu"]
    assert remember(CPU, SOME) == cache / "costs.json"
    assert costs_of(CPU) == SOME
    assert SparsityPlan.build(uniform_pattern((8, 8), 0.5)).costs == SOME
    # As another process reads it.
    costs._measured.cache_clear()
    assert costs_of(CPU) == SOME
    remember(CPU, replace(SOME, tile=1e-12))
    assert costs_of(CPU).tile == 1e-12
    assert [entry.name for entry in cache.iterdir()] == ["costs.json"]


def test_other_machines_keep_their_places(cache):
    other = {"cpu: another, 64 threads": asdict(replace(SOME, panel=7e-12))}
    path = write(cache, other)
    assert costs_of(CPU) == DEFAULTS["cpu"]
    remember(CPU, SOME)
    assert json.loads(path.read_text()) == {**other, machine_key(CPU): asdict(SOME)}


def test_a_measurement_holds_for_one_number_of_threads():
    torch.set_num_threads(1)
    assert machine_key(CPU) == f"cpu: {processor()}, 1 threads"
    remember(CPU, SOME)
    torch.set_num_threads(2)
    assert machine_key(CPU) == f"cpu: {processor()}, 2 threads"
    assert costs_of(CPU) == DEFAULTS["cpu"]
    torch.set_num_threads(1)
    assert costs_of(CPU) == SOME


def test_the_processor_has_a_name():
    assert processor()
    assert processor() == processor().strip()


def test_the_folder_follows_the_systems_custom(tmp_path, monkeypatch):
    monkeypatch.delenv("SPEFT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert costs.cache_file() == tmp_path / "speft_kernels" / "costs.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert costs.cache_file() == tmp_path / "home" / ".cache" / "speft_kernels" / "costs.json"


def damaged(**changed):
    return {machine_key(CPU): {**asdict(SOME), **changed}}


DAMAGE = {
    "not JSON": "{",
    "nothing": "",
    "a list": [1, 2],
    "a number": 3,
    "a machine without costs": {"cpu": None},
    "a machine with a list": {"cpu": [1, 2, 3, 4, 5, 6]},
    "a missing field": {"cpu": dict.fromkeys(NAMES[1:], 1e-09)},
    "negative": damaged(read=-1e-10),
    "zero": damaged(call=0),
    "NaN": damaged(tile=math.nan),
    "infinite": damaged(tile=math.inf),
    "a text": damaged(pack="fast"),
    "no value": damaged(pack=None),
    "beyond any float": damaged(panel=10**400),
    "lists without end": "[" * 100_000,
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_said_so_and_left_alone(cache, name):
    path = write(cache, DAMAGE[name])
    before = path.read_bytes()
    said = f"the measured costs in {path} cannot be used .*the defaults hold. Run `speft tune`"
    with pytest.warns(RuntimeWarning, match=re.escape(said).replace(r"\.\*", ".*")):
        assert costs_of(CPU) == DEFAULTS["cpu"]
    assert costs_of(CPU) == DEFAULTS["cpu"]  # said once
    assert path.read_bytes() == before


def test_bytes_that_are_no_text_are_said_so(cache):
    path = write(cache, "")
    path.write_bytes(b"\xff\xfe\x00{")
    with pytest.warns(RuntimeWarning, match="cannot be used"):
        assert costs_of(CPU) == DEFAULTS["cpu"]


def test_a_cache_that_no_file_can_be_in_is_said_so(monkeypatch):
    monkeypatch.setenv("SPEFT_CACHE", "a" * 300)
    with pytest.warns(RuntimeWarning, match="cannot be used .*too long"):
        assert costs_of(CPU) == DEFAULTS["cpu"]


def test_a_cache_that_is_a_pipe_is_not_waited_for(cache):
    cache.mkdir(parents=True)
    os.mkfifo(cache / "costs.json")
    with pytest.warns(RuntimeWarning, match="costs.json: not a file"):
        assert costs_of(CPU) == DEFAULTS["cpu"]


def test_a_user_without_a_home_folder_has_the_defaults(monkeypatch, quick, capsys):
    def none():
        raise RuntimeError("Could not determine home directory.")

    for name in ("SPEFT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(costs.Path, "home", none)
    assert costs_of(CPU) == DEFAULTS["cpu"]
    SparsityPlan.build(uniform_pattern((16, 16), 0.1), CPU, 8)
    assert main(["tune"]) == 2
    assert "Could not determine home directory. Set SPEFT_CACHE" in capsys.readouterr().err


def test_measuring_again_puts_a_damaged_file_right(cache):
    path = write(cache, "{")
    with pytest.warns(RuntimeWarning, match="cannot be used"):
        remember(CPU, SOME)
    assert json.loads(path.read_text()) == {machine_key(CPU): asdict(SOME)}
    assert costs_of(CPU) == SOME


def test_fields_of_a_later_version_are_no_damage(cache):
    write(cache, damaged(launch=1e-6))
    assert costs_of(CPU) == SOME


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, "fast", None])
@pytest.mark.parametrize("name", NAMES)
def test_costs_are_positive_numbers(name, value):
    with pytest.raises(ValueError, match=f"cost '{name}' must be a positive number of seconds"):
        replace(SOME, **{name: value})


def test_calibrate_measures_positive_costs():
    measured = tune.calibrate("cpu", rounds=2)
    assert list(asdict(measured)) == [*NAMES, "fused_tokens"]
    # Two rounds are noisy: some slopes may be far off, but not all, and none is a microsecond;
    # a call is the share of a panel that does not grow.
    found = asdict(measured)
    assert 0 < found.pop("call") < 1
    assert found.pop("fused_tokens") == DEFAULTS["cpu"].fused_tokens
    assert all(0 < value < 1e-6 for value in found.values()), measured
    assert sum(value > 1e-13 for value in found.values()) >= 3, measured


def test_calibrate_forces_the_work_that_it_measures(monkeypatch):
    """Each case is of the one kind that its slope is divided by."""
    plans = []
    real = SparsityPlan.build.__func__

    def build(cls, *args, **kwargs):
        plans.append(real(cls, *args, **kwargs))
        return plans[-1]

    monkeypatch.setattr(SparsityPlan, "build", classmethod(build))
    monkeypatch.setattr(tune, "_alternate", lambda cases, *_: dict.fromkeys(cases, 1.0))
    tune.calibrate()
    kinds = [max(plan.shares(), key=plan.shares().get) for plan in plans]
    assert kinds == ["gather"] * 4 + ["tiles"] * 2 + ["columns"] * 3
    assert all(max(plan.shares().values()) == 1 for plan in plans)
    assert all(plan.kept_columns is not None for plan in plans)


def test_what_is_measured_on_a_gpu_is_the_backend_that_weighs_it(monkeypatch):
    asked = []
    monkeypatch.setattr(tune.ops, "sampled_grad", lambda *_, backend, **__: asked.append(backend))
    monkeypatch.setitem(tune._SCALES, "cpu", replace(tune._SCALES["cuda"], tokens=16))
    tune.calibrate("cpu", rounds=1)
    assert asked == ["triton"] * 9


@pytest.fixture
def quick(monkeypatch):
    """`speft tune` measures for two rounds."""
    real = tune.calibrate
    monkeypatch.setattr(tune, "calibrate", lambda device: real(device, 2))


def printed_costs(text):
    lines = re.findall(r"^  (\w+) +([\d.,]+) \(([\d.,]+)\)$", text, re.MULTILINE)
    return {name: (measured, default) for name, measured, default in lines}


def test_tune_prints_all_constants_and_keeps_them(quick, cache, capsys):
    assert main(["tune", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"cpu: {processor()}, 1 threads: picoseconds, measured (default)\n")
    assert out.endswith(f"kept in {cache / 'costs.json'}\n")
    kept = json.loads((cache / "costs.json").read_text())
    assert list(kept) == [machine_key(CPU)]
    found = printed_costs(out)
    assert list(found) == NAMES
    for name, (measured, default) in found.items():
        assert measured == f"{kept[machine_key(CPU)][name] * 1e12:,.1f}"
        assert default == f"{getattr(DEFAULTS['cpu'], name) * 1e12:,.1f}"
    assert costs_of(CPU) == Costs(**kept[machine_key(CPU)])


def test_a_dry_run_keeps_nothing(quick, cache, capsys):
    assert main(["tune", "--dry-run", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert list(printed_costs(out)) == NAMES
    assert out.endswith("nothing kept\n")
    assert not cache.exists()
    assert costs_of(CPU) == DEFAULTS["cpu"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device", "tpu"], "--device must be one of cpu, cuda, got 'tpu'"),
        (["--device", "cuda"], "--device cuda: torch sees no CUDA device here"),
    ],
)
def test_what_cannot_be_measured_is_refused(flags, message, cache, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune", *flags]) == 2
    printed = capsys.readouterr()
    assert printed.err == f"speft: error: {message}\n"
    assert printed.out == ""
    assert not cache.exists()


@pytest.mark.parametrize("value", ["many", "0", "-2", "1_0", str(10**9), str(10**30), "9" * 5000])
def test_threads_that_are_no_number_are_refused(value, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["tune", "--threads", value])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert f"--threads: '{value[:50]}" in message
    assert "is not a whole number from 1 to 999999999" in message
    assert len(message) < 400


def test_more_threads_than_cores_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    with pytest.raises(SystemExit):
        main(["tune", "--threads", "5"])
    assert "--threads: 5 is more than this machine's 4 cores" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_is_the_users_to_put_right(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPEFT_CACHE", str(tmp_path / "file" / "below"))
    monkeypatch.setattr(tune, "calibrate", lambda device: SOME)
    assert main(["tune"]) == 2
    printed = capsys.readouterr()
    assert list(printed_costs(printed.out)) == NAMES  # what was measured is not lost
    assert printed.err.startswith("speft: error: the costs cannot be kept in ")


def test_the_installed_command_measures_and_keeps(cache):
    run = subprocess.run(
        [sys.executable, "-m", "speft_kernels.cli", "tune", "--threads", "1"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert list(printed_costs(run.stdout)) == NAMES
    assert (cache / "costs.json").exists()


# The way of sparse_delta_matmul


def times(*faster):
    """Of both ways, at numbers of tokens of which the fused one is the faster."""
    counts = CROSSOVER_TOKENS
    return {n: {"W read once": 1.0 if n in faster else 3.0, "W + D written": 2.0} for n in counts}


@pytest.mark.parametrize(
    ("faster", "expected"),
    [((32, 64), 64), ((32, 64, 128, 192, 256), 256), ((), 16), ((32, 128, 192), 32)],
)
def test_the_crossover_is_where_reading_once_was_last_the_faster_way(faster, expected):
    assert tune.crossover(times(*faster)) == expected


def test_a_gpus_calibration_has_the_measured_crossover(monkeypatch):
    """Injected: there is no GPU to measure."""
    gpu = torch.device("cuda")
    monkeypatch.setattr(tune, "_case", lambda *_: None)
    monkeypatch.setattr(tune, "_alternate", lambda cases, *_: dict.fromkeys(cases, 1.0))
    monkeypatch.setattr(tune, "ways_at", lambda device, rounds: times(32, 64))
    monkeypatch.setattr(tune._triton, "missing", lambda: None)
    assert tune.calibrate(gpu).fused_tokens == 64
    monkeypatch.setattr(tune._triton, "missing", lambda: "no Triton")
    with pytest.raises(BackendError, match="they cannot run: no Triton"):
        tune.calibrate(gpu)


def test_the_measured_crossover_decides_the_way(monkeypatch):
    """On either side of it, both ways give the product."""
    pytest.importorskip("triton")
    if not _triton.interpreting():
        pytest.skip("Triton's interpreter is off")
    from speft_kernels.triton_kernels import sparse_delta_matmul as kernels

    pattern = uniform_pattern((32, 48), 0.1)
    x, weight, values = torch.randn(6, 48), torch.randn(32, 48), torch.randn(pattern.nnz)
    written, compute = [], kernels.times_effective_weight

    def note(*args):
        written.append(args[0].shape[0])
        return compute(*args)

    monkeypatch.setattr(kernels, "times_effective_weight", note)
    exact = ops.sparse_delta_matmul(x, weight, values, pattern, backend="reference")
    for fused_tokens, wanted in ((128, []), (6, []), (5, [6])):
        remember(CPU, replace(SOME, fused_tokens=fused_tokens))
        y = ops.sparse_delta_matmul(x, weight, values, pattern, backend="triton")
        assert written == wanted
        torch.testing.assert_close(y, exact)
    written.clear()
    for name, way in triton_ways(x, weight, values, pattern).items():
        torch.testing.assert_close(way(), exact)
        assert bool(written) == (name == "W + D written")


def test_a_file_of_an_older_version_has_the_default_crossover(cache):
    older = asdict(SOME)
    del older["fused_tokens"]
    write(cache, {machine_key(CPU): older})
    assert costs_of(CPU) == SOME


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "many"])
def test_a_crossover_is_a_number_of_tokens(value):
    with pytest.raises(ValueError, match="fused_tokens must be a positive int"):
        replace(SOME, fused_tokens=value)
