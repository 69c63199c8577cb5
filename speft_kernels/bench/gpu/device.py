"""The device that is measured: its facts, its two ceilings, its clock, and its caches made cold.

Without a GPU the same calls work on the CPU, with the host's clock and sizes that mean nothing: a
dry run goes through every line that a run on a GPU goes through, but for those of CUDA itself.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ...machine import installed
from ..machine import Light, this_machine

# Cycles a second of `torch.cuda._sleep`, at most: a spin is then at least as long as asked for.
_SPIN_CLOCK = 2e9


@dataclass(frozen=True)
class Spent:
    """One timed call.

    Attributes:
        device: seconds on the device.
        host: seconds until the host had issued the call, or waited for its numbers.
        until_wait: seconds on the device until the host waited for the last time; None where it did
            not, or where nobody asked.
    """

    device: float
    host: float
    until_wait: float | None = None


class Device:
    """A CUDA device, or the CPU in a dry run."""

    def __init__(self, name: str) -> None:
        self.torch = torch.device(name)
        self.is_cuda = self.torch.type == "cuda"
        self.generator = torch.Generator(self.torch).manual_seed(0)

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.torch)

    def is_lost(self) -> bool:
        """Whether an error has made the device unusable for this process, as a wild access does."""
        try:
            self.synchronize()
        except RuntimeError:
            return True
        return False

    def randn(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Random numbers, never zeros: a product of zeros draws less power and runs faster."""
        return torch.randn(*shape, device=self.torch, dtype=dtype, generator=self.generator)

    @functools.cached_property
    def _flushed(self) -> Tensor:
        cache = 1 << 20
        if self.is_cuda:
            cache = torch.cuda.get_device_properties(self.torch).L2_cache_size
        return torch.ones(2 * cache // 4, device=self.torch)

    def make_cold(self) -> None:
        """Read twice what the L2 cache holds. Reading leaves lines that need not be written back; a
        buffer that was zeroed would have its own traffic billed to the call after it.
        """
        self._flushed.sum()

    def timed(
        self, call: Callable[[], object], lead: float, waits: bool = False
    ) -> Callable[[], Spent]:
        """Issue one call with cold caches; what is returned tells its time once the device is done.

        Args:
            lead: seconds by which the host may be ahead: the device is kept busy for as long, so
                that the time of a call of many small kernels is not that of launching them.
            waits: the call reads numbers that the device has computed. What follows is then issued
                to a device that does nothing, so the time until there is told, too.
        """
        if not self.is_cuda:
            start = time.perf_counter()
            with self._marking(waits, time.perf_counter) as seen:
                call()
            spent = time.perf_counter() - start
            until = seen[-1] - start if seen else None
            return lambda: Spent(spent, spent, until)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.make_cold()
        torch.cuda._sleep(int(lead * _SPIN_CLOCK))
        begin.record()
        start = time.perf_counter()

        def mark() -> tuple[torch.cuda.Event, float]:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event, time.perf_counter() - start

        with self._marking(waits, mark) as marks:
            call()
        host = marks[0][1] if marks else time.perf_counter() - start
        end.record()

        def read() -> Spent:
            # A call that reads what it has found and goes on is done at the last wait.
            until = begin.elapsed_time(marks[-1][0]) / 1e3 if marks else None
            return Spent(begin.elapsed_time(end) / 1e3, host, until)

        return read

    @contextlib.contextmanager
    def _marking(self, waits: bool, mark: Callable[[], Any]) -> Iterator[list[Any]]:
        """Collect a mark whenever the host is about to read a tensor of this device by `tolist`."""
        marks: list[Any] = []
        if not waits:
            yield marks
            return
        read = Tensor.tolist

        def marked(tensor: Tensor) -> Any:
            if tensor.device.type == self.torch.type:
                marks.append(mark())
            return read(tensor)

        with mock.patch.object(Tensor, "tolist", marked):
            yield marks

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self.torch) if self.is_cuda else 0

    def peak(self, call: Callable[[], object]) -> int:
        """Run `call`; return by how many bytes the allocations of tensors rose above what was
        there.
        """
        if not self.is_cuda:
            call()
            return 0
        before = self.allocated()
        torch.cuda.reset_peak_memory_stats(self.torch)
        call()
        return torch.cuda.max_memory_allocated(self.torch) - before

    def free(self) -> None:
        """Give back what no tensor holds; tensors in circles of references first, where they may
        hold much.
        """
        if not self.is_cuda:
            return
        if 4 * self.allocated() > torch.cuda.get_device_properties(self.torch).total_memory:
            gc.collect()
        torch.cuda.empty_cache()

    @functools.cached_property
    def least_time(self) -> float:
        """Seconds that `timed` tells of a kernel that does nothing: what it tells of any other has
        them, too, which counts where a goal is some microseconds.
        """
        one = torch.ones(1, device=self.torch)
        return self._median(one.zero_, lead=1e-4)

    @functools.cached_property
    def light(self) -> Light:
        """The ceilings, measured: bytes a second of a large copy, read and written both counted,
        and operations a second of a large bf16 product of random numbers.
        """
        size, side = (1 << 31, 8192) if self.is_cuda else (1 << 20, 64)
        light = Light(2 * size / self._copying(size), 2 * side**3 / self._multiplying(side))
        self.free()
        return light

    def _copying(self, size: int) -> float:
        source = self.randn(size // 2)
        target = torch.empty_like(source)
        return self._median(lambda: target.copy_(source))

    def _multiplying(self, side: int) -> float:
        a, b = self.randn(side, side), self.randn(side, side)
        out = torch.empty_like(a)
        return self._median(lambda: torch.mm(a, b, out=out))

    def _median(self, call: Callable[[], object], lead: float = 0.0) -> float:
        for _ in range(3):
            call()
        readings = [self.timed(call, lead) for _ in range(10)]
        self.synchronize()
        return statistics.median(read().device for read in readings)

    def facts(self) -> dict[str, Any]:
        """What a figure belongs to: the card, and the software."""
        facts: dict[str, Any] = {
            **asdict(this_machine()),
            "cuda": torch.version.cuda or "",
            "triton": installed("triton"),
        }
        facts["commit"] = os.environ.get("SPEFT_COMMIT") or facts["commit"]
        if self.is_cuda:
            seen = torch.cuda.get_device_properties(self.torch)
            facts.update(
                gpu=seen.name,
                capability=f"{seen.major}.{seen.minor}",
                multiprocessors=seen.multi_processor_count,
                memory_gib=round(seen.total_memory / 2**30, 1),
                l2_mb=round(seen.L2_cache_size / 1e6, 1),
            )
            self._keep_busy()
            facts.update(_reported(str(getattr(seen, "uuid", ""))))
            self.synchronize()
            self.free()
        return facts

    def _keep_busy(self) -> None:
        """Issue large products, some 1.5 ms each on an H200, and do not wait for them."""
        a = self.randn(8192, 8192)
        out = torch.empty_like(a)
        for _ in range(600):  # as many as a queue takes without making the host wait
            torch.mm(a, a, out=out)


def _reported(uuid: str) -> dict[str, str]:
    """Driver, clocks and power limit as the card is found, which is to be at work: an idle one's
    clock says nothing. Nothing of it is ever set.

    Args:
        uuid: as torch tells it. Numbers are no names: nvidia-smi counts all cards, torch those of
            CUDA_VISIBLE_DEVICES.
    """
    if not uuid:
        return {}
    fields = {
        "driver": "driver_version",
        "sm_mhz_busy": "clocks.sm",
        "sm_mhz_max": "clocks.max.sm",
        "memory_mhz_max": "clocks.max.memory",
        "power_limit_w": "power.limit",
    }
    query = f"--query-gpu={','.join(fields.values())}"
    try:
        done = subprocess.run(
            [
                "nvidia-smi",
                query,
                "--format=csv,noheader,nounits",
                f"--id=GPU-{uuid.removeprefix('GPU-')}",
            ],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (cell.strip() for cell in done.stdout.split(",")), strict=False))
