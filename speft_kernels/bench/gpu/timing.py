"""A case on a GPU, and how its sides are timed: interleaved rounds, cold caches, medians.

Every side is called and checked by itself before anything is timed. One that cannot run, or that
computes the wrong thing, is left out and the reason recorded; the others are measured all the same.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..harness import Case, Result, Side, Timing, Verdict
from ..machine import Light
from .device import Device, Spent

# Seconds for all timed calls of a case, and what the number of rounds may be.
CASE_SECONDS = 0.6
LEAST_ROUNDS, MOST_ROUNDS = 3, 15
# The device is kept busy this much longer than the host took the last time, and never longer than
# LONGEST_LEAD: a side that takes the host longer is bound by it in a training step, too.
LEAD, LONGEST_LEAD = 1.25, 5e-3


class DeviceLostError(RuntimeError):
    """An error left the device unusable for this process.

    Args:
        side: the one that did it; "" where nobody knows.
    """

    def __init__(self, side: str, why: str) -> None:
        super().__init__(f"{side}: {why}" if side else why)
        self.side = side


@dataclass(frozen=True)
class Floor:
    """Bytes that must be moved, at the measured bandwidth: a time to be compared with."""

    name: str
    bytes: int
    at_most: float | None = None  # goal for the ratio


@dataclass(frozen=True)
class GpuSide(Side):
    """A side with what is its own on a GPU.

    Args:
        check: takes what `run` returned; raises WrongResultError when it is wrong.
        waits: a call waits for the device. Its time until then is measured besides, and is what
            goals judge: after it comes the host, which wakes up and works while the device idles.
        beside: another side of ours -> the largest wanted ratio of the times, this one / that one.
    """

    check: Callable[[Any], None] | None = None
    floors: Sequence[Floor] = ()
    waits: bool = False
    beside: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class GpuCase:
    """Sides that are compared with each other.

    Args:
        left_out: side -> why it was not even set up.
        calls: calls of each side in a round; the median of them is the round's.
        own_bytes: side -> bytes that belong to it and are there between its calls.
        memory_goals: peer's name -> the largest wanted ratio of the memory, for sides that have a
            goal for their time.
        tokens: what a call trains on, where the case is a training step.
    """

    operation: str
    name: str
    sides: Sequence[GpuSide]
    left_out: Mapping[str, str] = field(default_factory=dict)
    calls: int = 2
    seconds: float = CASE_SECONDS
    own_bytes: Mapping[str, int] = field(default_factory=dict)
    memory_goals: Mapping[str, float] = field(default_factory=dict)
    tokens: int = 0


@dataclass(frozen=True)
class Measured:
    """What is known of a case. By side: seconds of the host for a call, and the most bytes
    allocated during one: its own, and those by which the call rises above what is there before it;
    and, where the call waits for the device, seconds of the device until then: the verdicts on
    times are of these there.
    """

    result: Result
    left_out: Mapping[str, str]
    host: Mapping[str, float]
    peaks: Mapping[str, int]
    until_wait: Mapping[str, float]
    verdicts: Sequence[Verdict]


def measure(
    case: GpuCase, device: Device, trying: Callable[[str], None] = lambda side: None
) -> Measured:
    """Check each side, time those that are right.

    Args:
        trying: told the name of each side before it is tried, and "" before the timing.

    Raises:
        DeviceLostError: a side left the device unusable.
    """
    left_out = dict(case.left_out)
    sides, expected, peaks = [], {}, {}
    for side in case.sides:
        trying(side.name)
        try:
            expected[side.name], peak = _tried(side, device)
            peaks[side.name] = peak + case.own_bytes.get(side.name, 0)
            sides.append(side)
        except Exception as error:
            left_out[side.name] = why_left_out(side.name, error, device)
    trying("")
    if left_out:
        device.free()  # what was taken in vain, and may be all there is
    peers = {side.name for side in sides if not side.ours}
    kept = [
        replace(side, goals={peer: at for peer, at in side.goals.items() if peer in peers})
        for side in sides
    ]
    once = max(sum(spent.device + _lead(spent) for spent in expected.values()), 1e-6)
    seconds = case.seconds if device.is_cuda else 0.0  # a dry run times nothing of interest
    calls = case.calls if LEAST_ROUNDS * case.calls * once <= seconds else 1
    wanted = int(seconds / (calls * once))
    rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, wanted))
    spent = _rounds(kept, expected, rounds, calls, device)
    timings = {
        side.name: Timing.of([s.device for s in spent[side.name]], calls, _light(side, device))
        for side in kept
    }
    waited = {
        name: Timing.of([_until_wait(s) for s in some], calls, timings[name].light)
        for name, some in spent.items()
        if any(s.until_wait is not None for s in some)
    }
    judged = {**timings, **waited}
    plain = Case(case.operation, case.name, kept, lambda: None, rounds, calls)
    result = Result(plain, case.name, rounds, timings)
    verdicts = [
        *replace(result, timings=judged).verdicts(),
        *(
            Verdict.of_times(side.name, judged[side.name], other, judged[other], goal)
            for side in kept
            for other, goal in side.beside.items()
            if other in judged
        ),
        *(
            _against(side, floor, judged[side.name].median, device.light)
            for side in kept
            for floor in side.floors
        ),
        *(
            Verdict(f"{side.name}, memory", peer, peaks[side.name] / peaks[peer], at_most=goal)
            for side in kept
            for peer, goal in case.memory_goals.items()
            if side.goals and peaks.get(peer)
        ),
    ]
    host = {name: statistics.median(s.host for s in some) for name, some in spent.items()}
    until_wait = {name: timing.median for name, timing in waited.items()}
    return Measured(result, left_out, host, peaks, until_wait, verdicts)


def reason(error: BaseException) -> str:
    """One short line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:200]


def why_left_out(side: str, error: Exception, device: Device) -> str:
    """The reason, where the others can go on.

    Raises:
        DeviceLostError: they cannot.
    """
    if device.is_lost():
        raise DeviceLostError(side, reason(error)) from error
    return reason(error)


def _tried(side: GpuSide, device: Device) -> tuple[Spent, int]:
    """Call a side until it is warm, and check it; return its time and its peak."""
    outputs: list[object] = []
    device.peak(lambda: outputs.append(side.run()))  # compiles and plans
    device.synchronize()
    if side.check is not None:
        side.check(outputs[0])
    outputs.clear()
    peak = device.peak(side.run)
    device.synchronize()
    read = device.timed(side.run, 0.0, side.waits)
    device.synchronize()
    return read(), peak


def _lead(spent: Spent) -> float:
    return min(LEAD * spent.host, LONGEST_LEAD)


def _rounds(
    sides: Sequence[GpuSide],
    expected: Mapping[str, Spent],
    rounds: int,
    calls: int,
    device: Device,
) -> dict[str, list[Spent]]:
    spent: dict[str, list[Spent]] = {side.name: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            lead = _lead(expected[side.name])
            try:
                readings = [device.timed(side.run, lead, side.waits) for _ in range(calls)]
                device.synchronize()
            except Exception as error:
                why_left_out(side.name, error, device)
                raise
            spent[side.name] += [read() for read in readings]
    return spent


def _light(side: GpuSide, device: Device) -> float | None:
    return None if side.work is None else side.work.seconds(device.light)


def _until_wait(spent: Spent) -> float:
    """A call that did not wait ended with its kernels."""
    return spent.device if spent.until_wait is None else spent.until_wait


def _against(side: GpuSide, floor: Floor, seconds: float, light: Light) -> Verdict:
    return Verdict(
        side.name, floor.name, seconds * light.bandwidth / floor.bytes, at_most=floor.at_most
    )
