import pytest

from speft_kernels.bench.cases import topk_salience


@pytest.mark.parametrize("case", topk_salience.CASES)
def test_topk_salience(measured, case):
    measured(topk_salience.CASES[case])
