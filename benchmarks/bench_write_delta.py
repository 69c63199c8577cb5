import pytest

from speft_kernels.bench.cases import write_delta


@pytest.mark.parametrize("case", write_delta.CASES)
def test_write_delta(measured, case):
    measured(write_delta.CASES[case])
