"""How the benchmarks compare: both sides in alternating rounds of one process, by their medians."""

from __future__ import annotations

import os

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

import speft_kernels

ROUNDS = 25


@dataclass(frozen=True)
class Row:
    case: str
    ours_ms: float
    peer: str
    peer_ms: float
    goal: float | None

    @property
    def ratio(self) -> float:
        return self.peer_ms / self.ours_ms


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
        times: tuple[list[float], list[float]] = ([], [])
        for side in (ours, peer):
            side()
        for _ in range(rounds):
            for side, spent in zip((ours, peer), times, strict=True):
                start = time.perf_counter()
                side()
                spent.append(time.perf_counter() - start)
        row = Row(case, *_medians(times, peer_name), goal)
        _rows.append(row)
        benchmark.extra_info.update(
            case=case, peer=peer_name, peer_ms=row.peer_ms, ratio=row.ratio, goal=goal
        )
        benchmark.pedantic(ours, rounds=5)
        assert goal is None or row.ratio >= goal, f"{case}: {row.ratio:.1f}x, goal {goal}x"
        return row.ratio

    return run


def _medians(times: tuple[list[float], list[float]], peer_name: str) -> tuple[float, str, float]:
    ours, peer = (statistics.median(spent) * 1e3 for spent in times)
    return ours, peer_name, peer


def pytest_terminal_summary(terminalreporter):
    if not _rows:
        return
    write = terminalreporter.write_line
    write("")
    write(
        f"speft_kernels {speft_kernels.__version__}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, {platform.machine()}; medians of alternating rounds"
    )
    write(f"{'case':58} {'ours':>9} {'peer':>9}  {'faster':>7} {'goal':>6}  peer")
    for row in _rows:
        goal = "" if row.goal is None else f"{row.goal:.0f}x"
        write(
            f"{row.case:58} {row.ours_ms:6.2f} ms {row.peer_ms:6.2f} ms {row.ratio:7.1f}x {goal:>6}"
            f"  {row.peer}"
        )
