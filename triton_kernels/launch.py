"""How every Triton kernel is launched, and for which machine its settings are chosen.

All launches go through `launch`, so that they can be recorded instead of run: what is compiled
ahead of time for a GPU that is not there (`make gpu-offline`) is what would have been launched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Triton's interpreter runs kernels on the CPU, for tests. It is chosen when Triton is imported.
INTERPRETING = tl.constexpr(triton.knobs.runtime.interpret)


@dataclass(frozen=True)
class Launch:
    """Settings of a launch; each kernel's own, with its block sizes, derive from it."""

    num_warps: int = 4
    num_stages: int = 2


@dataclass(frozen=True)
class Machine:
    """What settings are chosen for.

    Attributes:
        shared_memory: bytes that one block may use.
    """

    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int


MACHINES = {
    80: Machine((8, 0), 108, 166912),  # A100
    90: Machine((9, 0), 132, 232448),  # H100, H200
    100: Machine((10, 0), 148, 232448),  # B200
}
# As small as makes every kernel cut its work: the interpreter takes milliseconds a program.
_INTERPRETED = Machine((9, 0), 2, 232448)


@dataclass(frozen=True)
class Recorded:
    """A launch that was recorded in place of being run."""

    kernel: Any
    grid: tuple[int, ...]
    settings: Launch
    arguments: dict[str, Any]


_recording: tuple[Machine, list[Recorded]] | None = None


@contextlib.contextmanager
def recording(machine: Machine) -> Iterator[list[Recorded]]:
    """Record launches as if for `machine`, and run none: outputs stay as they were allocated."""
    global _recording
    before, _recording = _recording, (machine, [])
    try:
        yield _recording[1]
    finally:
        _recording = before


def is_recording() -> bool:
    """Whether results must not be read: nothing computes them."""
    return _recording is not None


_machines: dict[int, Machine] = {}


def machine(device: torch.device) -> Machine:
    """The machine that settings are chosen for: the GPU of `device`, the recorded or the
    interpreted one.
    """
    if _recording is not None:
        return _recording[0]
    if device.type != "cuda":
        return _INTERPRETED
    index = torch.cuda.current_device() if device.index is None else device.index
    found = _machines.get(index)
    if found is None:
        seen = torch.cuda.get_device_properties(index)
        found = _machines[index] = Machine(
            (seen.major, seen.minor),
            seen.multi_processor_count,
            seen.shared_memory_per_block_optin,
        )
    return found


def launch(kernel: Any, grid: tuple[int, ...], settings: Launch, **arguments: Any) -> None:
    """Launch `kernel` on the device of its first tensor, on that device's current stream.

    A grid with nothing in it launches nothing.
    """
    if 0 in grid:
        return
    if _recording is not None:
        _recording[1].append(Recorded(kernel, grid, settings, arguments))
        return
    options = {"num_warps": settings.num_warps, "num_stages": settings.num_stages}
    with torch.cuda.device_of(next(a for a in arguments.values() if isinstance(a, Tensor))):
        kernel[grid](**arguments, **options)


def precision(dtype: torch.dtype) -> str:
    """How `dot` multiplies: float32 in full, unless the user lets torch's products use tf32."""
    return "tf32" if dtype == torch.float32 and _tf32_is_allowed() else "ieee"


def _tf32_is_allowed() -> bool:
    # The older question raises an error once the newer setting was changed. torch 2.8 has no newer
    # one.
    setting = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if setting is None:
        return torch.get_float32_matmul_precision() != "highest"
    return setting == "tf32"


def token_splits(programs: int, tokens: int, least: int, machine: Machine) -> int:
    """Into how many splits to cut the tokens of a sum, so that the programs fill the machine.

    The multiprocessors take programs in waves; a program costs what its tokens cost and, to start
    and to write its sums, about what half of the least split costs.

    Args:
        programs: how many there are of one split.
        least: tokens of a split, at least.
    """

    def cost(splits: int) -> float:
        waves = triton.cdiv(max(programs, 1) * splits, machine.multiprocessors)
        return waves * (tokens / splits + least / 2)

    return min(range(1, max(1, tokens // least) + 1), key=cost)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """`acc + a @ b`, accumulated in float32."""
    # The interpreter multiplies the bits of bfloat16 as integers. Products of widened operands are
    # those of the tensor cores: exact, then summed in float32.
    if INTERPRETING:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)
