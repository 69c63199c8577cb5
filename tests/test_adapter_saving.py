"""Writing adapters: a folder is there as a whole or not at all, and nothing else is harmed."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import (
    CONFIG,
    JSON,
    TENSORS,
    assert_same_contents,
    contents,
    filled,
    save_trained,
    trained_mlp,
)
from tiny_models import (
    Int8Linear,
    mlp,
)
from torch.nn.utils import prune

from speft_kernels import SparsePattern, atomic
from speft_kernels.adapter import load_adapter, read_adapter, save_adapter
from speft_kernels.dynamic import MovingMask
from speft_kernels.errors import AdapterError, OutputError
from speft_kernels.files import new_output
from speft_kernels.model import (
    SpeftConfig,
    apply_patterns,
    merge,
    sparsify,
)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_trained(tmp_path / "adapter")


def test_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="nothing to save"):
        save_adapter(mlp().requires_grad_(False), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("extra", [{"x": object()}, {"x": math.nan}, {1j: 2}])
def test_extra_must_be_json(tmp_path: Path, extra: Any) -> None:
    with pytest.raises(AdapterError, match="extra must be JSON"):
        save_adapter(trained_mlp(), tmp_path / "a", extra=extra)
    assert list(tmp_path.iterdir()) == []


def test_values_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    model = trained_mlp()
    with torch.no_grad():
        model.second.values[0] = math.inf
    with pytest.raises(AdapterError, match=r"sparse\.second\.values holds NaN or infinite"):
        save_adapter(model, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("by", ["save_adapter", "MovingMask"])
def test_values_that_make_a_weight_infinite_are_not_saved(tmp_path: Path, by: str) -> None:
    model = mlp(dtype=torch.float16)
    sparsify(model, CONFIG)
    moving = MovingMask(model, CONFIG, "rigl")
    with torch.no_grad():
        model.second.values[0] = 1e6  # finite in float32
    save = save_adapter if by == "save_adapter" else moving.save
    with pytest.raises(AdapterError, match=r"layer 'second'.*infinite in torch\.float16"):
        save(model, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


# What trains of a sparse layer beside its values


@pytest.mark.parametrize("mode", ["resident", "additive"])
@pytest.mark.parametrize("start", ["plain", "same patterns", "bias trains"])
def test_a_bias_that_trains_is_saved(tmp_path: Path, mode: str, start: str) -> None:
    model = mlp()
    sparsify(model, CONFIG)
    model.first.bias.requires_grad_(True)
    save_adapter(filled(model), tmp_path / "a")
    assert list(read_adapter(tmp_path / "a").dense) == ["first.bias", "head.weight", "head.bias"]
    loaded = mlp()
    if start != "plain":
        sparsify(loaded, CONFIG)
        loaded.first.bias.requires_grad_(start == "bias trains")
        filled(loaded, seed=2)
    info = load_adapter(loaded, tmp_path / "a", mode=mode)
    assert info.dense == ("first.bias", "head.weight", "head.bias")
    if mode == "resident":
        assert_same_contents(loaded, contents(model))
    assert torch.equal(loaded.first.bias, model.first.bias)
    assert loaded.first.bias.requires_grad
    save_adapter(loaded, tmp_path / "b")
    assert (tmp_path / "a" / TENSORS).read_bytes() == (tmp_path / "b" / TENSORS).read_bytes()


def test_what_trains_within_an_opaque_base_is_refused(tmp_path: Path) -> None:
    model = mlp().requires_grad_(False)
    model.second = Int8Linear(model.second)
    pattern = SparsePattern((8, 10), torch.tensor([0, 33, 79]))
    apply_patterns(model, {"second": pattern}, SpeftConfig(mode="additive"))
    model.second.base.bias = torch.nn.Parameter(torch.zeros(8))
    with pytest.raises(AdapterError, match=r"'second\.base\.bias' trains.*Int8Linear.*freeze it"):
        save_adapter(model, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
    model.second.base.bias.requires_grad_(False)
    save_adapter(model, tmp_path / "a")


def test_the_bias_of_an_opaque_base_is_not_loaded(tmp_path: Path) -> None:
    model = mlp()
    sparsify(model, CONFIG)
    model.first.bias.requires_grad_(True)
    save_adapter(model, tmp_path / "a")
    other = mlp()
    other.first = Int8Linear(other.first)
    other.first.bias = torch.nn.Parameter(torch.zeros(10))
    with pytest.raises(AdapterError, match=r"'first\.bias', which is part of a sparse layer"):
        load_adapter(other, tmp_path / "a", mode="additive", check_base=False)


def test_an_existing_folder_is_kept_unless_told(saved: Path) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    model = filled(trained_mlp(), seed=3)
    with pytest.raises(AdapterError, match="exists: choose another, or overwrite=True"):
        save_adapter(model, saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    save_adapter(model, saved, overwrite=True)
    loaded = mlp()
    load_adapter(loaded, saved)
    assert_same_contents(loaded, contents(model))
    assert [path.name for path in saved.parent.iterdir()] == ["adapter"]


def test_overwriting_never_deletes_anything_else(saved: Path) -> None:
    (saved / "thesis.tex").write_text("years of work")
    with pytest.raises(AdapterError, match=r"thesis\.tex.*would delete it"):
        save_adapter(trained_mlp(), saved, overwrite=True)
    assert (saved / "thesis.tex").read_text() == "years of work"
    file = saved.parent / "file"
    file.write_text("x")
    with pytest.raises(AdapterError, match="not a folder"):
        save_adapter(trained_mlp(), file, overwrite=True)
    assert file.read_text() == "x"


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot be written"):
        save_adapter(trained_mlp(), tmp_path / "file" / "adapter")


def test_a_merged_model_saves_the_same_adapter(tmp_path: Path) -> None:
    config = replace(CONFIG, mode="additive")
    model = trained_mlp(config)
    save_adapter(model, tmp_path / "a")
    merge(model)
    save_adapter(model, tmp_path / "b")
    for file in (TENSORS, JSON):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("failing", ["fsync", "replace", "second replace"])
def test_a_failed_write_leaves_the_old_adapter(
    saved: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool, failing: str
) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    elif failing != "fsync":
        monkeypatch.setattr(atomic, "_exchange", lambda first, second: os.replace("no", "where"))
    calls: list[str] = []
    function = failing.split()[-1]
    original = getattr(os, function)

    def fails(*args: Any) -> Any:
        calls.append(function)
        if len(calls) == (2 if "second" in failing and not exchange else 1):
            raise OSError(28, "No space left on device")
        return original(*args)

    monkeypatch.setattr(os, function, fails)
    with pytest.raises(OutputError, match="cannot be written.*No space left"):
        save_adapter(filled(trained_mlp(), seed=3), saved, overwrite=True)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == ["adapter"]


def _write_output(output: Path) -> None:
    with new_output(output) as draft:
        (draft / "ours").write_text("ours")


@pytest.mark.parametrize("write", [_write_output, lambda out: save_adapter(trained_mlp(), out)])
def test_a_folder_that_another_process_made_meanwhile_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None]
) -> None:
    """Found to be free when the work begins, it need not be so when it ends."""
    theirs, flush = tmp_path / "out" / "letter", atomic._flush

    def meanwhile(path: Path) -> None:
        theirs.parent.mkdir(exist_ok=True)
        theirs.write_text("theirs")
        flush(path)

    monkeypatch.setattr(atomic, "_flush", meanwhile)
    with pytest.raises(OutputError, match="out cannot be written: Directory not empty"):
        write(tmp_path / "out")
    assert theirs.read_text() == "theirs"
    assert os.listdir(tmp_path) == ["out"]


def test_all_that_was_written_is_on_the_disk_before_it_is_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer has its chat templates in a folder of their own."""
    flushed, flush = [], atomic._flush
    monkeypatch.setattr(atomic, "_flush", lambda path: (flushed.append(path), flush(path)))
    with atomic.new_folder(tmp_path / "out") as draft:
        (draft / "templates" / "more").mkdir(parents=True)
        written = [draft / "a", draft / "templates" / "b", draft / "templates" / "more" / "c"]
        for path in written:
            path.write_text("new")
        written += [path.parent for path in written]
    assert set(flushed) == {*written, tmp_path}


_CRASHING = """
import importlib.util, os, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("atomic", sys.argv[1])
atomic = importlib.util.module_from_spec(spec)
spec.loader.exec_module(atomic)
folder, last, exchange = Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "True"
steps = 0


def crashing(function):
    def call(*args, **kwargs):
        global steps
        if steps == last:
            os._exit(9)
        steps += 1
        return function(*args, **kwargs)
    return call


atomic._exchange = crashing(atomic._exchange if exchange else lambda *_: False)
os.fsync, os.replace = crashing(os.fsync), crashing(os.replace)
atomic.shutil.rmtree = crashing(atomic.shutil.rmtree)
with atomic.new_folder(folder) as draft:
    (draft / "one").write_text("new")
    (draft / "two").write_text("new")
"""


@pytest.mark.parametrize("exchange", [True, False])
def test_a_crash_at_any_moment_leaves_one_whole_folder(tmp_path: Path, exchange: bool) -> None:
    script = tmp_path / "crash.py"
    script.write_text(_CRASHING)
    outcomes = []
    for last in range(20):
        folder = tmp_path / str(last) / "adapter"
        folder.mkdir(parents=True)
        for name in ("one", "two"):
            (folder / name).write_text("old")
        done = subprocess.run(
            [sys.executable, script, atomic.__file__, folder, str(last), str(exchange)], check=False
        )
        assert done.returncode in (0, 9)
        if not folder.exists():
            # Without an atomic exchange there is one such moment; the old folder is beside it.
            assert not exchange
            (folder,) = folder.parent.glob(".adapter.*.old")
            outcomes.append("beside")
        else:
            outcomes.append((folder / "one").read_text())
        assert {path.name for path in folder.iterdir()} == {"one", "two"}
        assert (folder / "one").read_text() == (folder / "two").read_text()
        if done.returncode == 0:
            break
    assert done.returncode == 0
    assert set(outcomes) == ({"old", "new"} if exchange else {"old", "beside", "new"})


def test_a_computed_bias_that_trains_is_refused(tmp_path: Path) -> None:
    model = trained_mlp()
    prune.l1_unstructured(model.first, "bias", 0.5)
    model.first.bias_orig.requires_grad_(True)
    with pytest.raises(AdapterError, match=r"'first\.bias_orig' trains.*which an adapter does not"):
        save_adapter(model, tmp_path / "a")
    model.first.bias_orig.requires_grad_(False)
    save_adapter(model, tmp_path / "a")
