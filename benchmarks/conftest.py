"""`make bench`: every case of speft_kernels.bench, its goals asserted, the tables at the end.

Settings come first; they must be made before torch is imported.
"""

from __future__ import annotations

import os

# oneDNN picks AMX kernels where the processor reports AMX, and some hypervisors trap them.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest

from speft_kernels.bench.harness import measure
from speft_kernels.bench.machine import this_machine
from speft_kernels.bench.records import records_of, write_records
from speft_kernels.bench.report import describe, goals, heading

CSV = Path(__file__).parent / "results" / "bench.csv"
_results = []


def pytest_addoption(parser):
    parser.addoption("--record", action="store_true", help=f"write the results to {CSV.name}")
    parser.addoption("--rounds", type=int, help="rounds of each case [its own]")


@pytest.fixture
def measured(request):
    """A function that sets a case up, measures it, and asserts its goals."""

    def run(setup):
        result = measure(setup(), rounds=request.config.getoption("--rounds"))
        _results.append(result)
        if request.config.getoption("--record"):
            write_records(CSV, records_of(result, this_machine()))
        missed = [str(verdict) for verdict in result.verdicts() if verdict.met is False]
        assert not missed, "; ".join(missed)

    return run


def pytest_terminal_summary(terminalreporter):
    if _results:
        for text in (heading(this_machine()), *map(describe, _results), goals(_results)):
            terminalreporter.write_line(f"\n{text}".rstrip())
