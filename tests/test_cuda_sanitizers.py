"""The CUDA kernels' sources on a CPU under sanitizers: nothing beyond its bounds, and no races.

Both see what results do not show. Between two threads that nothing orders the thread sanitizer
finds a race in any order of theirs, also where fibers never part: within a warp between two of its
operations, and between blocks. csrc/cuda/host/races.h says what orders two threads.
"""

import os
import re

import pytest
from cuda_host import (
    BOUNDS,
    CSRC,
    RACES,
    build,
    build_with_fault,
    instead,
    missing,
    readers,
    run_with,
    script,
    without,
)

from speft_kernels.bench.gpu.small import OPERATIONS

pytestmark = pytest.mark.slow


def module_of(folder):
    return next(folder.glob("_cuda_host*"))


def built(folder, sanitizer):
    if reason := missing(sanitizer):
        required = os.environ.get("SPEFT_REQUIRE_SANITIZERS") == "1"
        (pytest.fail if required else pytest.skip)(reason)
    build(folder, sanitizer)
    return folder


@pytest.fixture(scope="module")
def bounded(tmp_path_factory):
    """The folder of a module under the address and undefined-behaviour sanitizers."""
    return built(tmp_path_factory.mktemp("bounded"), BOUNDS)


@pytest.fixture(scope="module")
def raced(tmp_path_factory):
    """The folder of a module under the thread sanitizer."""
    return built(tmp_path_factory.mktemp("raced"), RACES)


# One order of the threads: modules compiled so are slow, and what is found depends on none.
@pytest.mark.parametrize("operation", OPERATIONS)
def test_nothing_beyond_its_bounds(bounded, operation):
    done = run_with(module_of(bounded), script(operation, orders=1), BOUNDS)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_race(raced, operation):
    done = run_with(module_of(raced), script(operation, orders=1), RACES)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


# (kernel, file, what stands there, what shall stand there)
BEYOND = (
    ("write_batch", "write_delta.cu", "if (e >= delta.nnz)", "if (e > delta.nnz)"),
    ("write_kept", "topk_kernels.h", "tie++ >= ties)", "tie++ > ties)"),
)


@pytest.mark.parametrize("beyond", BEYOND, ids=[beyond[0] for beyond in BEYOND])
def test_a_planted_access_beyond_the_bounds_is_found(bounded, tmp_path, beyond):
    kernel, file, *change = beyond
    planted = build_with_fault(tmp_path / "planted", bounded, file, instead(*change), BOUNDS)
    (operation,) = readers(file)
    done = run_with(planted, script(operation, orders=1), BOUNDS)
    assert "heap-buffer-overflow" in done.stderr
    assert re.search(rf"\b{kernel}<", done.stderr)


def test_what_compute_sanitizer_has_to_find_is_a_write_beyond_a_weight(bounded):
    spoil = 'list(small.planted(small.Place("cpu", "cuda-host")))'
    load = "from speft_kernels.bench.gpu import small"
    done = run_with(module_of(bounded), f"{load}\n{spoil}", BOUNDS)
    assert "heap-buffer-overflow" in done.stderr
    assert "WRITE of size 4" in done.stderr
    assert "write_delta" in done.stderr


ORDER = re.compile(r"(sync_block\(\)|fence\(\)|cp_async_wait<[^;]*>\(\));")
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
def test_what_orders_threads_is_needed_and_missed(raced, tmp_path, order):
    file, place = order
    planted = build_with_fault(tmp_path / "planted", raced, file, without(place), RACES)
    done = run_with(planted, script(*readers(file), orders=1), RACES)
    # Or what is read too early is an address that the system or the emulation refuses.
    assert re.search("ThreadSanitizer: (data race|SEGV)|16 bytes at an address", done.stderr), (
        done.stderr
    )
