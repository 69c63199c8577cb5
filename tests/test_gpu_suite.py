"""The GPU suite itself, with the CUDA kernels' sources on a CPU in the place of the backend "cuda".

What is wrong in its tests, such as a dtype that the backend does not take, would else be found on
a GPU that is there for some minutes.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from speft_kernels import _cuda_native

ROOT = Path(__file__).resolve().parents[1]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        _cuda_native.missing("cuda-host") is not None, reason="cuda-host is not built"
    ),
]


@pytest.mark.timeout(600)
def test_no_test_of_the_suite_is_wrong_for_the_cuda_kernels():
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-m", "gpu", "-k", "cuda-host", "-q"]
    environment = {**os.environ, "SPEFT_GPU_DRY_RUN": "1", "SPEFT_BUILD_CUDA_HOST": "1"}
    for name in [name for name in environment if name.startswith("PYTEST_")]:
        del environment[name]
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout[-5000:]
    passed = int(done.stdout.rsplit(" passed", 1)[0].split()[-1])
    assert passed > 100  # the suite asks for the backends by what the registry declares
