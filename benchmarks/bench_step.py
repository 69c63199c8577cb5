import pytest

from speft_kernels.bench.cases import step


@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", step.CASES)
def test_step(measured, case):
    measured(step.CASES[case])
