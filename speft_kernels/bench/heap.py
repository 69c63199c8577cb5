"""The C library's heap while a process is measured: for times it is held still, for peaks small."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping

# Parameters of mallopt(3), and the largest values it takes.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER, _LARGEST_MMAP_THRESHOLD, _SMALL = 2**31 - 1, 32 << 20, 64 << 10


@functools.lru_cache(maxsize=1)
def keep_heap() -> bool:
    """Have glibc keep what is freed; return whether it does.

    By default it gives the end of the heap back to the system after a step and takes it again in
    the next: up to 26,000 page faults in a step of the model measured here, on whichever side
    happens to free its last tensor there, and none on another.
    """
    return _set({_M_TRIM_THRESHOLD: _NEVER, _M_MMAP_THRESHOLD: _LARGEST_MMAP_THRESHOLD})


def release_heap() -> bool:
    """Have glibc give back at once what is freed, but for small pieces; return whether it does."""
    return _set({_M_TRIM_THRESHOLD: 0, _M_MMAP_THRESHOLD: _SMALL})


def _set(parameters: Mapping[int, int]) -> bool:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return False
    return all(mallopt(name, value) for name, value in parameters.items())
