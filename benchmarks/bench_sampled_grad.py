import pytest

from speft_kernels.bench.cases import sampled_grad


@pytest.mark.parametrize("case", sampled_grad.CASES)
def test_sampled_grad(measured, case):
    measured(sampled_grad.CASES[case])
