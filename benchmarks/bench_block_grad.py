import pytest

from speft_kernels.bench.cases import block_grad


@pytest.mark.parametrize("case", block_grad.CASES)
def test_block_grad(measured, case):
    measured(block_grad.CASES[case])
