"""The package's front door: every exported name is there, and the command starts without torch."""

import subprocess
import sys

import pytest

import speft_kernels


def test_every_exported_name_is_there():
    listed = set(speft_kernels._MODULE_OF) | {"ops", "__version__"}
    assert listed == set(speft_kernels.__all__)
    for name in speft_kernels.__all__:
        assert getattr(speft_kernels, name) is not None
    assert set(speft_kernels.__all__) <= set(dir(speft_kernels))


@pytest.mark.parametrize(("command", "said"), [("finetune", "--train"), ("bench", "sampled_grad")])
def test_the_help_does_not_wait_for_torch(command, said):
    code = (
        "import sys; from speft_kernels.cli import main\n"
        f"try: main(['{command}', '--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert said in done.stdout
