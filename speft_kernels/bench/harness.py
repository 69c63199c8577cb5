"""A case, its sides, and how they are timed: all sides in interleaved rounds of one process.

A round calls each side a few times, one side after the other. The figure is the median over all
calls; beside it stands the median of each round's first call, when the side before has just used
the caches. A case is checked before anything is timed: a wrong result has no speed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..errors import SpeftError
from . import machine
from .heap import keep_heap
from .machine import Light


class WrongResultError(SpeftError, RuntimeError):
    """A side of a case computes something else than the case says, so nothing was timed."""


@dataclass(frozen=True)
class Work:
    """What one call cannot do without: bytes moved, by operand, and operations (a multiply-add
    is two).
    """

    bytes: Mapping[str, int]
    operations: int = 0
    dtype: torch.dtype = torch.float32  # the GEMM rate of this dtype bounds the operations

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes.values())

    def seconds(self, light: Light) -> float:
        """The least time that a machine of this speed of light needs."""
        return max(self.total_bytes / light.bandwidth, self.operations / light.rate)


@dataclass(frozen=True)
class Saved:
    """Bytes kept for the backward pass, and of the layers' inputs that they are compared with.

    Args:
        at_most: goal for the share.
        what, of: the two in words, where they are other bytes.
    """

    bytes: int
    inputs: int
    at_most: float | None = None
    what: str = "bytes saved for backward by the adapted layers"
    of: str = "bytes of their inputs"

    @property
    def share(self) -> float:
        return self.bytes / self.inputs


@dataclass(frozen=True)
class Side:
    """One way to do what the case is about.

    Args:
        run: one call; it leaves its operands as it found them, or as good for the next call.
        ours: whether it is this package's. The others are its peers.
        goals: peer's name -> the largest wanted ratio of the times, ours / peer.
        trained: number of entries that train, task head left out.
    """

    name: str
    run: Callable[[], object]
    ours: bool = False
    work: Work | None = None
    goals: Mapping[str, float] = field(default_factory=dict)
    saved: Saved | None = None
    trained: int | None = None


@dataclass(frozen=True)
class Case:
    """Sides that are compared with each other.

    Args:
        check: raises WrongResultError when a side computes the wrong thing.
        rounds: by default; the caller of `measure` may ask for another number.
        calls: calls of each side in a round.
    """

    operation: str
    name: str
    sides: Sequence[Side]
    check: Callable[[], None]
    rounds: int = 15
    calls: int = 4

    def __post_init__(self) -> None:
        names = [side.name for side in self.sides]
        if len(set(names)) < len(names):
            raise ValueError(f"{self.name}: two sides share a name: {names}")
        peers = {side.name for side in self.sides if not side.ours}
        for side in self.sides:
            if not set(side.goals) <= peers:
                raise ValueError(f"{self.name}: {side.name} has a goal for no peer: {side.goals}")


@dataclass(frozen=True)
class Timing:
    """Seconds: the median of all calls, of each round's first, and the speed of light; and of
    each round the median of its calls, and the first.
    """

    median: float
    first: float
    light: float | None
    rounds: tuple[float, ...]
    firsts: tuple[float, ...]

    @classmethod
    def of(cls, spent: Sequence[float], calls: int, light: float | None) -> Timing:
        """Of all calls in the order in which they were made, `calls` of them in a round."""
        firsts = tuple(spent[::calls])
        return cls(
            statistics.median(spent),
            statistics.median(firsts),
            light,
            tuple(statistics.median(spent[i : i + calls]) for i in range(0, len(spent), calls)),
            firsts,
        )


def meets(ratio: float, at_most: float | None) -> bool | None:
    """Whether a ratio meets its goal; None where there is none."""
    return None if at_most is None else ratio <= at_most


@dataclass(frozen=True)
class Verdict:
    """One ratio, ours over a peer's time, or of saved bytes over inputs, and its goal.

    `quartiles` are the lower and the upper one of the rounds' ratios, whose median is `ratio`.
    """

    ours: str
    peer: str
    ratio: float
    first_ratio: float | None = None
    at_most: float | None = None
    quartiles: tuple[float, float] | None = None

    @property
    def met(self) -> bool | None:
        return meets(self.ratio, self.at_most)

    @classmethod
    def of_times(
        cls, ours: str, mine: Timing, peer: str, theirs: Timing, at_most: float | None
    ) -> Verdict:
        """Round by round: a machine that slows down for a while slows down both sides of one."""
        ratios = _ratios(mine.rounds, theirs.rounds)
        first = statistics.median(_ratios(mine.firsts, theirs.firsts))
        return cls(ours, peer, statistics.median(ratios), first, at_most, _quartiles(ratios))

    def __str__(self) -> str:
        text = f"{self.ours} / {self.peer}: {self.ratio:.3f}"
        if self.quartiles is not None:
            text += " [{:.3f}, {:.3f}]".format(*self.quartiles)
        if self.first_ratio is not None:
            text += f" (first calls {self.first_ratio:.3f})"
        if self.at_most is not None:
            text += f", goal at most {self.at_most:g}: {'met' if self.met else 'MISSED'}"
        return text


@dataclass(frozen=True)
class Result:
    """A case as it was timed; `name` says also in which state the caches were."""

    case: Case
    name: str
    rounds: int
    timings: Mapping[str, Timing]

    def verdicts(self) -> list[Verdict]:
        """Each of our sides against each peer, then its saved bytes."""
        verdicts = []
        for ours in (side for side in self.case.sides if side.ours):
            mine = self.timings[ours.name]
            for peer in (side for side in self.case.sides if not side.ours):
                theirs, goal = self.timings[peer.name], ours.goals.get(peer.name)
                verdicts.append(Verdict.of_times(ours.name, mine, peer.name, theirs, goal))
            if (saved := ours.saved) is not None:
                what = f"{ours.name}, {saved.what}"
                verdicts.append(Verdict(what, saved.of, saved.share, at_most=saved.at_most))
        return verdicts


def _ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def _quartiles(ratios: Sequence[float]) -> tuple[float, float]:
    if len(ratios) == 1:
        return ratios[0], ratios[0]
    lower, _, upper = statistics.quantiles(ratios, n=4, method="inclusive")
    return lower, upper


def measure(
    case: Case,
    *,
    rounds: int | None = None,
    cold: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> Result:
    """Check the case, call each side once to warm up, and time it.

    Args:
        rounds: instead of the case's own number.
        cold: before each call, outside the time taken, read a buffer larger than the last cache.

    Raises:
        WrongResultError: a side is wrong; nothing was timed.
    """
    keep_heap()
    case.check()
    rounds = case.rounds if rounds is None else rounds
    for side in case.sides:
        side.run()
    spent: dict[str, list[float]] = {side.name: [] for side in case.sides}
    evict = machine.evict_caches if cold else None
    for _ in range(rounds):
        for side in case.sides:
            for _ in range(case.calls):
                if evict is not None:
                    evict()
                start = clock()
                side.run()
                spent[side.name].append(clock() - start)
    timings = {
        side.name: Timing.of(spent[side.name], case.calls, _light(side)) for side in case.sides
    }
    return Result(case, f"{case.name}, cold caches" if cold else case.name, rounds, timings)


def _light(side: Side) -> float | None:
    work = side.work
    return None if work is None else work.seconds(machine.light(work.dtype))
