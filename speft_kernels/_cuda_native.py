"""The compiled CUDA kernels, loaded on first use; and the same sources compiled for the CPU.

Backend "cuda" is `_cuda`, on GPUs. Backend "cuda-host" is `_cuda_host`: the kernels' own files
against a header that gives threads, barriers and matrix instructions a meaning on a CPU
(csrc/cuda/host). It is slow and there for tests: `SPEFT_BUILD_CUDA_HOST=1` builds it.
"""

from __future__ import annotations

import importlib
from functools import cache, lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

MODULES = {"cuda": "speft_kernels._cuda", "cuda-host": "speft_kernels._cuda_host"}
REMEDIES = {
    "cuda": "build them where nvcc is found (CUDA_HOME, PATH or /usr/local/cuda): "
    "`pip install -e .` or `make build`",
    "cuda-host": "build them with SPEFT_BUILD_CUDA_HOST=1 `make build`; they are for tests",
}

# What the tensor cores multiply.
DTYPES = (torch.bfloat16, torch.float16)


@cache
def _load(backend: str) -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module(MODULES[backend]), None
    except ImportError as error:
        return None, f"the compiled kernels cannot be loaded ({error}); {REMEDIES[backend]}"


def missing(backend: str) -> str | None:
    """Return why the kernels of `backend` cannot run here, or None when they can."""
    reason = _load(backend)[1]
    if reason is None and backend == "cuda" and not torch.cuda.is_available():
        return "there is no CUDA device"
    return reason


def kernels(backend: str) -> ModuleType:
    """Return the extension module. Call it only where `missing()` is None: the registry has checked
    that.
    """
    module, reason = _load(backend)
    if module is None:
        raise ImportError(reason)
    return module


def launch(backend: str, name: str, tensor: Tensor, *arguments: object) -> Any:
    """Call a function of the extension on the tensor's device, with torch's current stream there
    as the last argument, and return what it returns.

    It launches on the current device. torch makes that the tensor's and goes back without making a
    context on a device that has none: a process whose model is on the second GPU takes no memory of
    the first.
    """
    with torch.cuda.device_of(tensor):
        stream = torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0
        return getattr(kernels(backend), name)(*arguments, stream)


# Sums of all splits of the tokens together, at most: 8 MB.
SCRATCH = 1 << 21
# What a thread block costs beside its tokens, to start and to write its sums, in tokens.
_START = 128


def splits(
    blocks: int, tokens: int, stretch: int, entries: int, device: torch.device, resident: int = 1
) -> int:
    """Return in how many splits the tokens are summed, so that the device is busy and the sums of
    the splits take no more than SCRATCH.

    Args:
        blocks: thread blocks of one split.
        stretch: tokens that a block takes at a time; a split has eight of them at least, so that
            what a split costs by itself stays small.
        entries: sums of one split.
        resident: thread blocks that a multiprocessor holds at once.
    """
    most = min(tokens // (8 * stretch), SCRATCH // max(1, entries))
    at_once = multiprocessors(device) * resident
    return _filling(max(1, blocks), -(-tokens // stretch), stretch, most, at_once)


@lru_cache(1 << 12)
def _filling(blocks: int, stretches: int, stretch: int, most: int, at_once: int) -> int:
    """The splits, `most` at most, after which the last wave of blocks ends first."""

    def cost(splits: int) -> int:
        waves = -(-blocks * splits // at_once)
        return waves * (-(-stretches // splits) * stretch + _START)

    return min(range(1, max(1, most) + 1), key=cost)


@cache
def multiprocessors(device: torch.device) -> int:
    """Return how many the device has."""
    if device.type != "cuda":
        return 2  # few blocks, and still several splits in the tests
    return torch.cuda.get_device_properties(device).multi_processor_count
