"""The registry: automatic choice, forced choice, and refusals that say why."""

import warnings

import pytest
import torch

from speft_kernels import SparsePattern, ops
from speft_kernels.errors import BackendError
from speft_kernels.ops import registry

CPU = torch.device("cpu")


def test_the_cpu_serves_every_operation_with_compiled_kernels():
    for op in registry.OPS:
        for dtype in registry.FLOATS:
            assert registry.resolve(op, CPU, dtype).backend.name == "cpu"


def test_a_device_without_kernels_is_served_by_torch():
    for op in registry.OPS:
        assert registry.resolve(op, torch.device("meta"), torch.float32).backend.name == "torch"


def test_a_named_backend_is_used_or_refused(monkeypatch):
    with pytest.raises(BackendError, match=r"backend='cpu' cannot serve .*'meta'"):
        registry.resolve("sampled_grad", torch.device("meta"), torch.float32, "cpu")
    with pytest.raises(BackendError, match=r"backend='cpu' cannot serve .* not torch.int8"):
        registry.resolve("sampled_grad", CPU, torch.int8, "cpu")
    with pytest.raises(BackendError, match=r"backend='tritn' is not a backend.*Known:"):
        registry.resolve("sampled_grad", CPU, torch.float32, "tritn")
    monkeypatch.setenv("SPEFT_BACKEND", "reference")
    assert registry.resolve("sampled_grad", CPU, torch.float32).backend.name == "reference"
    assert registry.resolve("sampled_grad", CPU, torch.float32, "torch").backend.name == "torch"
    monkeypatch.setenv("SPEFT_BACKEND", "nonsense")
    with pytest.raises(BackendError, match="SPEFT_BACKEND='nonsense'"):
        registry.resolve("sampled_grad", CPU, torch.float32)


def test_missing_kernels_are_said_once_and_torch_serves(monkeypatch):
    class Gone:
        name, device, description = "cpu", "cpu", ""

        @staticmethod
        def missing():
            return "the compiled CPU kernels cannot be loaded; build them"

    monkeypatch.setattr(registry, "_warned", set())
    monkeypatch.setattr(registry, "_resolved", {})
    for (op, name), found in list(registry._implementations.items()):
        if name == "cpu":
            gone = registry.Implementation(op, Gone, found.dtypes, found.function)
            monkeypatch.setitem(registry._implementations, (op, name), gone)
    pattern = SparsePattern.from_mask(torch.ones(2, 2, dtype=torch.bool))
    with pytest.warns(RuntimeWarning, match="'cpu' is not available: .*build them"):
        ops.sampled_grad(torch.ones(1, 2), torch.ones(1, 2), pattern)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = ops.sampled_grad(torch.ones(1, 2), torch.ones(1, 2), pattern)
    assert result.tolist() == [1.0] * 4
    with pytest.raises(BackendError, match="cannot serve sampled_grad: the compiled"):
        ops.sampled_grad(torch.ones(1, 2), torch.ones(1, 2), pattern, backend="cpu")


def test_the_table_lists_each_implementation():
    table = registry.table()
    assert {row["op"] for row in table} == {*registry.OPS, *registry.HELPERS}
    assert {row["backend"] for row in table} == set(registry.BACKENDS)
    defaults = [(row["op"], row["backend"]) for row in table if "cpu" in row["default"]]
    assert defaults == [(op, "cpu") for op in (*registry.OPS, *registry.HELPERS)]
