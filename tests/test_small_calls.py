"""The CPU kernels wake no more threads than there is work for."""

import subprocess
import sys
from pathlib import Path

import pytest

from speft_kernels import _native

pytestmark = [
    pytest.mark.skipif(_native.missing() is not None, reason="no compiled kernels"),
    pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc"),
]

# In a process of its own, in which OpenMP has started no thread yet.
COUNT = """
import os, sys, torch
torch.set_num_threads(1)
from speft_kernels import SparsePattern, ops
from speft_kernels.plan import plan_of

def woken(name, size, tokens):
    if name == "block_grad":
        blocks = torch.arange(0, (size // 4) ** 2, 11)
        pattern = SparsePattern.from_blocks((size, size), (4, 4), blocks)
    else:
        mask = torch.rand(size, size) < 0.1
        mask[:, size // 2 :] = False
        pattern = SparsePattern.from_mask(mask)
    x, values, plan = torch.randn(tokens, size), torch.randn(pattern.values_shape), plan_of(pattern)
    run = {
        "delta_matmul": lambda: ops.delta_matmul(x, values, pattern, backend="cpu"),
        "sampled_grad": lambda: ops.sampled_grad(x, x, pattern, plan=plan, backend="cpu"),
        "block_grad": lambda: ops.block_grad(x, x, pattern, backend="cpu"),
        "keep_columns": lambda: ops.keep_columns(x, plan, backend="cpu"),
    }[name]
    run()
    before = len(os.listdir("/proc/self/task"))
    torch.set_num_threads(3)
    run()
    torch.set_num_threads(1)
    return len(os.listdir("/proc/self/task")) - before

name, *sizes = sys.argv[1:]
print(*(woken(name, *map(int, case.split("x"))) for case in sizes))
"""


@pytest.mark.parametrize(
    ("name", "small", "large"),
    [
        ("delta_matmul", (96, 1), (768, 4)),  # few tokens, which share the rows
        ("delta_matmul", (96, 40), (256, 700)),
        ("sampled_grad", (192, 32), (256, 700)),
        ("block_grad", (96, 64), (256, 900)),
        ("keep_columns", (96, 700), (1024, 700)),
    ],
)
@pytest.mark.skipif(
    _native.missing() is None and not _native.kernels().openmp, reason="compiled without OpenMP"
)
def test_a_small_call_wakes_no_thread(name, small, large):
    command = [sys.executable, "-c", COUNT, name, *(f"{n}x{m}" for n, m in (small, large))]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["0", "2"]
