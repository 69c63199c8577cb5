"""How Triton kernels are launched, and when they are said not to run."""

import importlib.metadata
import os
import subprocess
import sys

import pytest
import torch
from kernels import TF32_SETTINGS, tf32

from speft_kernels import _triton

pytest.importorskip("triton")

from speft_kernels.triton_kernels import launch
from speft_kernels.triton_kernels.keep_columns import keep_columns
from speft_kernels.triton_kernels.launch import MACHINES, Machine, recording, token_splits


@pytest.fixture
def asked_anew():
    _triton.missing.cache_clear()
    yield
    _triton.missing.cache_clear()


def test_recorded_launches_are_not_run():
    x, kept = torch.randn(40, 8), torch.full((1, 3, 48), 7.0)
    with recording(MACHINES[80]) as launches:
        assert launch.is_recording()
        assert launch.machine(torch.device("cpu")) is MACHINES[80]
        keep_columns(x, torch.tensor([0, 3, 7], dtype=torch.int32), kept)
    assert not launch.is_recording()
    assert (kept == 7).all()
    (one,) = launches
    assert one.arguments["x_ptr"] is x
    assert one.grid == (1, 1, 1)
    assert one.settings.num_warps == 4
    keep_columns(x, torch.tensor([0, 3, 7], dtype=torch.int32), kept)
    assert torch.equal(kept[0, :, :40], x[:, [0, 3, 7]].t())


def test_recordings_end_with_their_block_even_by_an_error():
    with pytest.raises(RuntimeError), recording(MACHINES[90]):
        raise RuntimeError
    assert not launch.is_recording()
    with recording(MACHINES[90]) as outer:
        with recording(MACHINES[80]) as inner:
            keep_columns(
                torch.randn(4, 8), torch.zeros(1, dtype=torch.int32), torch.zeros(1, 1, 16)
            )
        assert launch.machine(torch.device("cpu")) is MACHINES[90]
    assert (len(outer), len(inner)) == (0, 1)


def test_an_empty_grid_launches_nothing():
    with recording(MACHINES[90]) as launches:
        keep_columns(torch.randn(4, 8), torch.zeros(0, dtype=torch.int32), torch.zeros(1, 0, 16))
    assert not launches


def test_splits_fill_the_machine_and_no_more():
    machine = Machine((9, 0), 100, 1 << 17)
    assert token_splits(1, 511, 512, machine) == 1
    assert token_splits(1000, 8192, 512, machine) == 1  # ten waves: cutting gains nothing
    assert token_splits(50, 8192, 512, machine) == 2  # one wave, filled
    assert token_splits(101, 8192, 512, machine) > 2  # else a second wave for one program
    assert token_splits(1, 1 << 20, 512, machine) == 100
    assert token_splits(0, 8192, 512, machine) <= 16
    for programs in (1, 7, 99, 130):
        assert 1 <= token_splits(programs, 8192, 512, machine) <= 16


@pytest.mark.parametrize("setting", TF32_SETTINGS)
def test_float32_is_multiplied_in_full_unless_the_user_says_otherwise(setting):
    assert launch.precision(torch.float32) == "ieee"
    for allowed, mode in ((False, "ieee"), (True, "tf32")):
        with tf32(setting, allowed):
            assert launch.precision(torch.float32) == mode
            assert launch.precision(torch.bfloat16) == "ieee"
    assert launch.precision(torch.float32) == "ieee"


def test_a_torch_without_the_newer_setting_is_asked_the_older_question(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "matmul", object())
    assert launch.precision(torch.float32) == "ieee"
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert launch.precision(torch.float32) == "tf32"


def test_an_old_triton_is_refused(monkeypatch, asked_anew):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.5.1")
    assert _triton.missing() == f"Triton 3.5.1 is older than 3.6; {_triton.REMEDY}"


def test_a_missing_triton_says_how_to_get_it(monkeypatch, asked_anew):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert "cannot be imported" in _triton.missing()
    assert "pip install 'speft-kernels[triton]'" in _triton.missing()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_and_the_interpreter_the_backend_is_refused():
    program = (
        "import torch; from speft_kernels import SparsePattern, ops, _triton\n"
        "assert 'TRITON_INTERPRET=1' in _triton.missing(), _triton.missing()\n"
        "p = SparsePattern.from_indices((4, 4), torch.tensor([3]))\n"
        "try: ops.sampled_grad(torch.ones(2, 4), torch.ones(2, 4), p, backend='triton')\n"
        "except ops.registry.BackendError as error: print(error)\n"
        "print(ops.sampled_grad(torch.ones(2, 4), torch.ones(2, 4), p))\n"
    )
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=clean, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "it runs on 'cuda' tensors, these are on 'cpu'" in done.stdout
    assert "tensor([2.])" in done.stdout
