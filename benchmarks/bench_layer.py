import pytest

from speft_kernels.bench.cases import layer


@pytest.mark.parametrize("case", layer.CASES)
def test_layer(measured, case):
    measured(layer.CASES[case])
