"""The Triton kernels, imported on first use: Triton is an optional dependency."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
from functools import lru_cache
from types import ModuleType

import torch

REMEDY = "pip install 'speft-kernels[triton]'"
OLDEST = (3, 6)

# What the kernels take; Triton has no tensor-core product in float64 on every GPU that it serves.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter, on any device, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


@lru_cache(maxsize=1)
def missing() -> str | None:
    """Return why the Triton kernels cannot run here, or None when they can."""
    try:
        version = importlib.metadata.version("triton")
        importlib.import_module("triton")
    except ImportError as error:
        return f"Triton cannot be imported ({error}); {REMEDY}"
    if tuple(map(int, version.split(".")[:2])) < OLDEST:
        return f"Triton {version} is older than {'.'.join(map(str, OLDEST))}; {REMEDY}"
    if not interpreting() and not torch.cuda.is_available():
        return (
            "there is no CUDA device (for tests on a CPU, Triton's interpreter runs the kernels "
            "where TRITON_INTERPRET=1 is set before Python starts)"
        )
    return None


def kernels(op: str) -> ModuleType:
    """Return the module of an operation's kernels. Call it only where `missing()` is None: the
    registry has checked that.
    """
    return importlib.import_module(f"speft_kernels.triton_kernels.{op}")
