"""Offsets that do not fit into 32 bits, on every backend."""

import far
import pytest
from kernels import backends

CALLS = [
    pytest.param(name, backend, id=f"{name}, {backend}")
    for name, case in far.CASES.items()
    for backend in backends(case.op, far.DTYPE)
]


@pytest.mark.parametrize(("name", "backend"), CALLS)
def test_rows_far_apart(name, backend):
    far.CASES[name].check(backend, "cpu")
