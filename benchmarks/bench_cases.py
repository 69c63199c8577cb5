"""The cases of every operation."""

import importlib

import pytest

from speft_kernels.bench.cases import OPERATIONS

LONG = ("models", "step")


def cases():
    for operation in sorted(OPERATIONS):
        module = importlib.import_module(f"speft_kernels.bench.cases.{operation}")
        marks = pytest.mark.timeout(900) if operation in LONG else ()
        for name, setup in module.CASES.items():
            yield pytest.param(setup, id=f"{operation}, {name}", marks=marks)


@pytest.mark.parametrize("setup", list(cases()))
def test_case(measured, setup):
    measured(setup)
