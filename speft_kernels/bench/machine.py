"""What a figure was measured on, and the speed of light of that machine.

The speed of light is measured, not looked up: the rate of reading memory is that of a sum over a
tensor no cache holds, the rate of arithmetic that of a square GEMM. A call whose data stay in the
caches can be faster than reading them from memory, and its share of the speed of light above 100 %.
"""

from __future__ import annotations

import functools
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from .._version import __version__
from ..machine import commit, installed, processor

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_USUAL_CACHE = 64 << 20  # bytes, where the system does not tell
_GEMM_SIZE = 1536
_REPEATS = 5


@dataclass(frozen=True)
class Machine:
    """The machine and the software that a figure belongs to."""

    processor: str
    cores: int
    threads: int
    python: str
    torch: str
    speft_kernels: str
    transformers: str
    peft: str
    commit: str

    def __str__(self) -> str:
        return (
            f"{self.processor}, {self.cores} cores, {self.threads} threads; "
            f"Python {self.python}, torch {self.torch}, speft-kernels {self.speft_kernels}, "
            f"transformers {self.transformers or 'none'}, peft {self.peft or 'none'}; "
            f"commit {self.commit}"
        )


def this_machine() -> Machine:
    return Machine(
        processor=processor(),
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        torch=torch.__version__,
        speft_kernels=__version__,
        transformers=installed("transformers"),
        peft=installed("peft"),
        commit=commit(),
    )


@dataclass(frozen=True)
class Light:
    """Bytes a second from memory, and operations a second of a GEMM."""

    bandwidth: float
    rate: float


def light(dtype: torch.dtype = torch.float32) -> Light:
    """The speed of light with the present number of threads; measured once for each process."""
    threads = torch.get_num_threads()
    return Light(_bandwidth(threads), _gemm_rate(dtype, threads))


@functools.cache
def _bandwidth(threads: int) -> float:
    buffer = torch.ones(max(256 << 20, 4 * last_cache_bytes()) // 4)
    return 4 * buffer.numel() / _fastest(buffer.sum)


@functools.cache
def _gemm_rate(dtype: torch.dtype, threads: int) -> float:
    a = torch.ones(_GEMM_SIZE, _GEMM_SIZE, dtype=dtype)
    out = torch.empty_like(a)
    return 2 * _GEMM_SIZE**3 / _fastest(lambda: torch.mm(a, a, out=out))


def _fastest(call: Callable[[], object]) -> float:
    """Seconds of the fastest of some calls: whatever disturbs one makes it slower."""
    spent = []
    for _ in range(1 + _REPEATS):
        start = time.perf_counter()
        call()
        spent.append(time.perf_counter() - start)
    return min(spent[1:])


def evict_caches() -> None:
    """Read twice what the last cache holds, so that nothing else is in it."""
    _eviction_buffer().sum()


@functools.cache
def _eviction_buffer() -> torch.Tensor:
    return torch.ones(2 * last_cache_bytes() // 4)


@functools.cache
def last_cache_bytes() -> int:
    """Size of the largest cache of the first processor."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = []
    for path in _CACHES.glob("index*/size"):
        text = path.read_text(encoding="ascii").strip()
        if text[:-1].isdecimal() and text[-1] in units:
            sizes.append(int(text[:-1]) * units[text[-1]])
    return max(sizes, default=_USUAL_CACHE)
