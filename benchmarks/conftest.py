"""How the benchmarks compare: both sides in alternating rounds of one process, by their medians.

A round calls one side `CALLS` times and then the other. The median over all calls is the figure;
the median of each round's first call, when the other side has just used the caches, stands beside
it.
"""

from __future__ import annotations

import os

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import pytest
import torch

import speft_kernels

ROUNDS = 15
CALLS = 4


@dataclass(frozen=True)
class Row:
    case: str
    peer: str
    ours_ms: float
    peer_ms: float
    ours_first_ms: float
    peer_first_ms: float
    goal: float | None

    @property
    def ratio(self) -> float:
        return self.peer_ms / self.ours_ms

    @property
    def first_ratio(self) -> float:
        return self.peer_first_ms / self.ours_first_ms


_rows: list[Row] = []


@pytest.fixture
def compare(benchmark):
    """A function that times ours against a peer and records the ratio of the medians.

    `goal` is the ratio that ours must reach; None only records.
    """

    def run(
        case: str,
        ours: Callable[[], object],
        peer: Callable[[], object],
        peer_name: str,
        goal: float | None = None,
        rounds: int = ROUNDS,
    ) -> float:
        sides = (ours, peer)
        times: tuple[list[float], list[float]] = ([], [])
        for side in sides:
            side()
        for _ in range(rounds):
            for side, spent in zip(sides, times, strict=True):
                for _ in range(CALLS):
                    start = time.perf_counter()
                    side()
                    spent.append((time.perf_counter() - start) * 1e3)
        every = [statistics.median(spent) for spent in times]
        first = [statistics.median(spent[::CALLS]) for spent in times]
        row = Row(case, peer_name, *every, *first, goal)
        _rows.append(row)
        benchmark.extra_info.update(asdict(row), ratio=row.ratio, first_ratio=row.first_ratio)
        benchmark.pedantic(ours, rounds=5)
        assert goal is None or row.ratio >= goal, f"{case}: {row.ratio:.1f}x, goal {goal}x"
        return row.ratio

    return run


def pytest_terminal_summary(terminalreporter):
    if not _rows:
        return
    write = terminalreporter.write_line
    write("")
    write(
        f"speft_kernels {speft_kernels.__version__}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, {platform.machine()}; medians of alternating rounds"
    )
    write(f"{'case':52} {'ours':>9} {'peer':>9}  {'faster':>7} {'first':>7} {'goal':>5}  peer")
    for row in _rows:
        goal = "" if row.goal is None else f"{row.goal:.0f}x"
        write(
            f"{row.case:52} {row.ours_ms:6.2f} ms {row.peer_ms:6.2f} ms {row.ratio:7.1f}x"
            f" {row.first_ratio:6.1f}x {goal:>5}  {row.peer}"
        )
