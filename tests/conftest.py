"""Settings for every test; they must be made before torch is imported."""

import ctypes
import os
from dataclasses import replace

# oneDNN picks AMX instructions by the processor's name, and a hypervisor may mask them: bf16
# products then die with SIGILL.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest
import torch

# Without a GPU Triton's kernels run in its interpreter, which is chosen when Triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _deterministic():
    """Each test starts from the same seed and leaves the number of threads as it was."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def write_sizes(monkeypatch) -> list[int]:
    """How many weights each call of `write_delta` took, as its implementation for the CPU sees it
    from here on.
    """
    from speft_kernels.ops import registry

    found = registry.resolve("write_delta", torch.device("cpu"), torch.float32)
    sizes = []

    def counted(weights, *rest):
        sizes.append(len(weights))
        found.function(weights, *rest)

    key = "write_delta", found.backend.name
    monkeypatch.setitem(registry._implementations, key, replace(found, function=counted))
    monkeypatch.setattr(registry, "_resolved", {})
    return sizes


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real datasets, as the benchmarks find it."""
    from speft_kernels.bench.masks import data_folder

    folder = data_folder()
    if not folder.is_dir():
        pytest.skip(f"no datasets: {folder} does not exist; set SPEFT_DATA to their folder")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a tiny classifier, and data to train and to test it on."""
    from tiny_runs import make_place

    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture
def memory_high_water():
    """A function that runs another and returns by how many bytes the process's peak grew: the least
    of three runs, since pages that trimming took from the rest of the process, and that come back
    during the call, only add to its own.
    """
    from speft_kernels import _native
    from speft_kernels.peak_memory import PeakMemory

    def grown(function) -> int:
        function()  # the first call may load libraries and start threads
        return min(once(function) for _ in range(3))

    def once(function) -> int:
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is None:
            pytest.skip("this C library does not give back what the first call freed")
        _native.release_scratch()
        trim(0)  # or the second call would find all it needs, and nothing would grow
        peak = PeakMemory([torch.device("cpu")])
        if "since its start" in peak.source:
            pytest.skip("this system does not let a process reset its peak memory")
        before = peak.bytes()
        function()
        return peak.bytes() - before

    return grown


@pytest.fixture
def nothing_compiled():
    """The compiler as it starts, whatever was compiled before."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
