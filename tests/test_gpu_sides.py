"""The sides of the cases on a GPU: which take part, and what is said of those that cannot."""

from __future__ import annotations

import sys
from types import SimpleNamespace

from speft_kernels.bench.gpu import cases, journal, record, run
from speft_kernels.bench.gpu.cases.layer import LORA, peft_layers
from speft_kernels.bench.gpu.device import Device
from speft_kernels.bench.gpu.journal import Journal
from speft_kernels.bench.gpu.problems import MOST_TOKENS, TINY, Spec, Workbench
from speft_kernels.ops import panels


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


def test_panels_on_a_gpu_take_few_stretches_of_bounded_size():
    """Of gate's 8192 x 14336 gradient; the CPU's would be 113."""
    dy = SimpleNamespace(is_cuda=True, shape=(8192, 14336))
    stretches = list(panels._stretches(dy, 14336))
    assert len(stretches) == 4
    assert max(s.stop - s.start for s in stretches) * 14336 * 4 <= 128 << 20
    assert [s.start for s in stretches[1:]] == [s.stop for s in stretches[:-1]]
    assert (stretches[0].start, stretches[-1].stop) == (0, 8192)
    dy.is_cuda = False
    assert len(list(panels._stretches(dy, 14336))) == 113
