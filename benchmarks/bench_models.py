import pytest

from speft_kernels.bench.cases import models


@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", models.CASES)
def test_models(measured, case):
    measured(models.CASES[case])
