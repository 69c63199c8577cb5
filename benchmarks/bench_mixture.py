import pytest

from speft_kernels.bench.cases import mixture


@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", mixture.CASES)
def test_mixture(measured, case):
    measured(mixture.CASES[case])
