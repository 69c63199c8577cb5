"""Where an operation's time goes: every side of each case has its kernels named."""

from __future__ import annotations

import pytest
import torch

from speft_kernels.bench.gpu import profiling
from speft_kernels.bench.gpu.device import Device
from speft_kernels.bench.gpu.problems import TINY, Workbench


def test_a_calls_kernels_are_counted_by_the_call():
    a = torch.ones(64, 64)
    kernels = profiling.kernels_of(lambda: torch.mm(torch.mm(a, a), a), Device("cpu"))
    (product,) = [kernel for kernel in kernels if kernel.name == "aten::mm"]
    assert product.launches == 2
    assert product.microseconds > 0
    times = [kernel.microseconds for kernel in kernels]
    assert times == sorted(times, reverse=True)


def test_each_side_has_its_kernels_named(capsys):
    assert profiling.main(["sparse_delta_matmul", "topk_salience", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("## sparse_delta_matmul: ") == 2
    assert printed.count("## topk_salience: ") == 1
    assert "## layer" not in printed
    assert "torch" in printed
    assert "aten::" in printed


def test_a_side_that_fails_takes_no_other_with_it(monkeypatch):
    bench = Workbench(Device("cpu"), TINY)
    spec = profiling.SPECS[0]

    def fail(run, device):
        fail.calls += 1
        if fail.calls == 1:
            raise RuntimeError("an illegal address")
        return [profiling.Kernel("product", 2.0, 1.0)]

    fail.calls = 0
    monkeypatch.setattr(profiling, "kernels_of", fail)
    lines = list(profiling.tables(spec, bench))
    assert any("an illegal address" in line for line in lines)
    assert any("product" in line for line in lines)


def test_an_unknown_operation_is_refused(capsys):
    with pytest.raises(SystemExit):
        profiling.main(["gemm", "--device", "cpu"])
    assert "there is no case of gemm" in capsys.readouterr().err
