"""The peak memory of a stretch of work: of the device's allocator, or of the process."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Measures from its construction on.

    On CUDA the peak statistics of the devices' allocators are reset, and their maxima summed. On
    Linux the resident high-water mark of the process is reset and read; where the kernel refuses
    the reset, and on other systems, the mark counts from the start of the process. `source` says
    which of these it is.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._cuda = sorted({device for device in devices if device.type == "cuda"}, key=str)
        if self._cuda:
            self.source = "cuda allocator"
            for device in self._cuda:
                torch.cuda.reset_peak_memory_stats(device)
        elif _reset_high_water_mark():
            self.source = "process high-water mark"
        else:
            self.source = "process high-water mark since its start"

    def bytes(self) -> int | None:
        """Return the peak so far in bytes; None on a system that does not tell."""
        if self._cuda:
            return sum(torch.cuda.max_memory_allocated(device) for device in self._cuda)
        return _high_water_mark()


def _reset_high_water_mark() -> bool:
    try:
        _CLEAR_REFS.write_text("5")  # proc(5): 5 resets the peak resident set size
    except OSError:
        return False
    return _linux_mark() is not None


def _linux_mark() -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    marks = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return int(marks[0]) * 1024 if marks else None


def _high_water_mark() -> int | None:
    mark = _linux_mark()
    if mark is not None:
        return mark
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
