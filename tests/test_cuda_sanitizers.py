"""The CUDA kernels' sources on a CPU under sanitizers: nothing beyond its bounds, and no races.

Both see what results do not show. Between two threads that nothing orders the thread sanitizer
finds a race in any order of theirs, also where fibers never part: within a warp between two of its
operations, and between blocks. csrc/cuda/host/races.h says what orders two threads.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from cuda_host import (
    BOUNDS,
    CSRC,
    RACES,
    Fault,
    Processes,
    build,
    instead,
    missing,
    readers,
    script,
    without,
)

from speft_kernels.bench.gpu.small import OPERATIONS

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Sanitized:
    """A module under a sanitizer, and the processes that run it."""

    module: Path
    processes: Processes
    faults: list[Fault]

    def run(self, script, fault=None):
        number = 0 if fault is None else 1 + self.faults.index(fault)
        return self.processes.run(self.module, script, number)


def built(folder, sanitizer, faults):
    reason = missing(sanitizer)
    if reason is None:
        processes = Processes(folder, sanitizer)
        reason = processes.start()
    if reason is not None:
        required = os.environ.get("SPEFT_REQUIRE_SANITIZERS") == "1"
        (pytest.fail if required else pytest.skip)(reason)
    try:
        yield Sanitized(build(folder, sanitizer, faults), processes, faults)
    finally:
        processes.close()


# (kernel, file, what stands there, what shall stand there)
BEYOND = (
    ("write_batch", "write_delta.cu", "e >= delta.nnz", "e > delta.nnz"),
    ("write_kept", "topk_kept.h", "tie++ >= ties", "tie++ > ties"),
)


@pytest.fixture(scope="module")
def bounded(tmp_path_factory):
    """The kernels under the address and undefined-behaviour sanitizers."""
    yield from built(
        tmp_path_factory.mktemp("bounded"), BOUNDS, [instead(*of) for _, *of in BEYOND]
    )


@pytest.fixture(scope="module")
def raced(tmp_path_factory):
    """The kernels under the thread sanitizer."""
    yield from built(tmp_path_factory.mktemp("raced"), RACES, [without(*of) for of in ORDERS])


# One order of the threads: modules compiled so are slow, and what is found depends on none.
@pytest.mark.parametrize("operation", OPERATIONS)
def test_nothing_beyond_its_bounds(bounded, operation):
    done = bounded.run(script(operation, orders=1))
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_race(raced, operation):
    done = raced.run(script(operation, orders=1))
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


@pytest.mark.parametrize("beyond", BEYOND, ids=[beyond[0] for beyond in BEYOND])
def test_a_planted_access_beyond_the_bounds_is_found(bounded, beyond):
    kernel, file, *_ = beyond
    (operation,) = readers(file)
    done = bounded.run(script(operation, orders=1), instead(*beyond[1:]))
    assert "heap-buffer-overflow" in done.stderr
    assert re.search(rf"\b{kernel}<", done.stderr)


def test_what_compute_sanitizer_has_to_find_is_a_write_beyond_a_weight(bounded):
    spoil = 'list(small.planted(small.Place("cpu", "cuda-host")))'
    done = bounded.run(f"from speft_kernels.bench.gpu import small\n{spoil}")
    assert "heap-buffer-overflow" in done.stderr
    assert "WRITE of size 4" in done.stderr
    assert "write_delta" in done.stderr


ORDER = re.compile(r"(sync_block\(\)|sync_grid\(\)|fence\(\)|cp_async_wait<[^;]*>\(\))(?=;)")
# Each barrier, fence and wait of the kernels, on its own.
ORDERS = [
    (path.name, place)
    for path in sorted((CSRC / "cuda").glob("*.*"))
    if path.name not in ("device.h", "gpu.h")
    for place in ORDER.finditer(path.read_text())
]


def line_of(order):
    file, place = order
    return f"{file}:{place.string.count(chr(10), 0, place.start()) + 1}"


@pytest.mark.parametrize("order", ORDERS, ids=map(line_of, ORDERS))
def test_what_orders_threads_is_needed_and_missed(raced, order):
    # The sanitizer remembers the latest four accesses of a place. What one block has written and
    # all of its lanes have read is seen only in an order in which another one comes first.
    orders = 4 if order[1].group() == "sync_grid()" else 1
    done = raced.run(script(*readers(order[0]), orders=orders), without(*order))
    # Or what is read too early is an address that the system or the emulation refuses.
    assert re.search("ThreadSanitizer: (data race|SEGV)|16 bytes at an address", done.stderr), (
        done.stderr
    )
