"""The compiled CPU kernels, loaded on first use.

torch is imported before the extension on purpose: both need `libgomp.so.1`, torch ships one, and
whichever is loaded first serves both. Two OpenMP runtimes would mean two thread pools that spin
against each other.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

REMEDY = "build them with `pip install -e .` (or `make build`) in the project's folder"

# The codes of csrc/dtypes.h.
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


@lru_cache(maxsize=1)
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("speft_kernels._C"), None
    except ImportError as error:
        return None, f"the compiled CPU kernels cannot be loaded ({error}); {REMEDY}"


def missing() -> str | None:
    """Return why the compiled kernels are not available, or None when they are."""
    return _load()[1]


def kernels() -> ModuleType:
    """Return the extension module. Call it only where `missing()` is None: the registry has checked
    that.
    """
    module, reason = _load()
    if module is None:
        raise ImportError(reason)
    return module


def description() -> str:
    """Say in a few words what the kernels run on here, or why they do not."""
    module, reason = _load()
    if module is None:
        return reason or ""
    threads = f"{torch.get_num_threads()} threads" if module.openmp else "one thread, no OpenMP"
    return f"{module.instruction_set()}, {threads}"


def release_scratch() -> None:
    """Free the memory that the calls of this thread keep for the next one, 16 MB at most."""
    module, _ = _load()
    if module is not None:
        module.release_scratch()


def dtype_code(tensor: Tensor) -> int:
    return DTYPE_CODES[tensor.dtype]


def rows_contiguous(tensor: Tensor) -> Tensor:
    """Return a 2-D tensor whose rows are contiguous: itself wherever its last stride is 1
    already.
    """
    if tensor.is_contiguous() or tensor.stride(1) == 1 or tensor.shape[1] <= 1:
        return tensor
    return tensor.contiguous()
