import pytest

from speft_kernels.bench.cases import sparse_delta_matmul


@pytest.mark.parametrize("case", sparse_delta_matmul.CASES)
def test_sparse_delta_matmul(measured, case):
    measured(sparse_delta_matmul.CASES[case])
