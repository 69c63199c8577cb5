"""The GPU suite: everything here needs a CUDA device and is skipped, with the reason, without one.

`scripts/gpu_check.sh` has each outcome written into its journal as soon as it is known, so that a
suite that was cut off goes on where it was. SPEFT_GPU_DRY_RUN=1 runs the suite on the CPU, at sizes
that Triton's interpreter can bear: it finds what is broken in the tests, not in the kernels.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from rig import DRY

from speft_kernels.bench.gpu.stages import RESTART

HERE = Path(__file__).resolve().parent

# The operations come first: what is wrong in them is wrong in all that follows. Tests of many GB
# come last: all processes share the memory, and what they find is rare.
ORDER = (
    *("operations", "sampled_grad", "quantized", "promises", "layer"),
    *("library", "memory", "training", "beyond_int32"),
)

_journal = None  # where outcomes go; of the one process that collects them
_failed = set()  # tests of which it knows why
_done: frozenset[str] = frozenset()  # tests that need not run again


def pytest_configure(config):
    global _journal, _done
    path = os.environ.get("SPEFT_GPU_JOURNAL")
    if hasattr(config, "workerinput"):
        _done = frozenset(config.workerinput.get("speft_done", ()))
    elif path:
        from speft_kernels.bench.gpu.journal import Journal, fingerprint

        key = os.environ.get("SPEFT_GPU_KEY", "cpu")
        _journal = Journal(Path(path), "test", fingerprint("test"), key)
        _done = _ended(_journal)


def _ended(journal):
    """Those that passed; and all that had their turn, where this process takes the place of one
    that died. A test that began and never ended took it along.
    """
    last = {entry["id"]: entry["outcome"] for entry in journal.entries("test")}
    if not os.environ.get("SPEFT_GPU_AGAIN"):
        return frozenset(name for name, outcome in last.items() if outcome == "passed")
    begun = {entry["id"] for entry in journal.entries("begin")}
    for name in sorted(begun - set(last)):
        journal.add("test", id=name, outcome="failed", message="its process ended while it ran")
    return frozenset(begun | set(last))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    """All of pytest-xdist's workers leave out the same tests, those that start later as well."""
    node.workerinput["speft_done"] = sorted(_done)


def pytest_sessionstart(session):
    if _journal is not None:
        from speft_kernels.bench.gpu.device import Device

        _journal.add("machine", **Device("cpu" if DRY else "cuda").facts())


def pytest_collection_modifyitems(config, items):
    here = [item for item in items if HERE in item.path.parents]
    chosen, ordered = set(here), iter(sorted(here, key=_place))
    items[:] = [next(ordered) if item in chosen else item for item in items]
    reason = "needs a CUDA device: torch.cuda.is_available() is False"
    for item in here:
        item.add_marker(pytest.mark.gpu)
        if not (torch.cuda.is_available() or DRY):
            item.add_marker(pytest.mark.skip(reason=reason))
    done = [item for item in here if item.nodeid in _done]
    if done:
        config.hook.pytest_deselected(items=done)
        items[:] = [item for item in items if item.nodeid not in _done]


def _place(item):
    name = item.path.stem.removeprefix("test_gpu_")
    return ORDER.index(name) if name in ORDER else len(ORDER) - 1


def pytest_runtest_logstart(nodeid):
    if _journal is not None:
        _journal.add("begin", id=nodeid)


def pytest_runtest_logreport(report):
    """A test has one entry: of its call, or of what kept it from being called. pytest-xdist reports
    it once more if its worker ends then, as it does after a failure that loses the device.
    """
    if _journal is None or not (report.when == "call" or report.outcome != "passed"):
        return
    if report.when == "???" and report.nodeid in _failed:
        return
    facts = {"id": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
    if report.outcome == "failed":
        _failed.add(report.nodeid)
        facts["message"] = _last_words(report)
    elif report.outcome == "skipped":
        facts["message"] = str(report.longrepr[2]).removeprefix("Skipped: ")[:200]
    worst = {}
    for what, error in (value for name, value in report.user_properties if name == "error"):
        worst[what] = max(error, worst.get(what, 0.0))
    _journal.add("test", **facts, **({"errors": list(worst.items())} if worst else {}))


def _last_words(report):
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else report.longreprtext
    return " ".join(text.split())[:300]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    """After a failure that left the device unusable, end this process: another one goes on."""
    failures = item.session.testsfailed
    result = yield
    failed = item.session.testsfailed > failures or hasattr(item.config, "workerinput")
    if failed and torch.cuda.is_available() and _is_lost():
        if hasattr(item.config, "workerinput"):
            os._exit(RESTART)  # pytest-xdist starts another worker
        pytest.exit("the device is lost", returncode=RESTART)
    return result


def _is_lost():
    """After a capture that failed all is well but torch's generator, which refuses every number."""
    try:
        torch.cuda.synchronize()
        torch.randn(1, device="cuda")
    except RuntimeError:
        return True
    return False


@pytest.fixture
def contract(record_property):
    """The numbers contract, with the errors found put on record."""
    from rig import assert_as_exact_as_torch

    def check(operation, backend, ours, theirs, exact, *, operands, **more):
        error = assert_as_exact_as_torch(ours, theirs, exact, operands=operands, **more)
        record_property("error", [f"{operation}, {backend}, {str(operands)[6:]}", error])

    return check
