"""One stage of measurements in a process of its own: `python -m speft_kernels.bench.gpu.run`.

Each case is written into the journal as soon as it is measured; one that is there already is not
measured again. Exits with OUT_OF_TIME when the time is up, and with RESTART when an error has left
the device unusable: a new process goes on. One of our backends that was at work then is left out
of the case, which is measured without it: it must not take the others' figures with it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from types import FrameType
from typing import Any

from . import cases, drawn
from .device import Device
from .journal import NAME, Journal, fingerprint, stage_parser
from .problems import LLAMA, TINY, Spec, Workbench
from .record import UNTIL_WAIT, backend_of
from .stages import OUT_OF_TIME, RESTART
from .timing import DeviceLostError, GpuCase, Measured, measure, reason

STAGES = {
    "goals": cases.goal_specs,
    "kernels": cases.kernel_specs,
    "step": cases.step_specs,
    "matrix": cases.matrix_specs,
}
# A case is not begun with less time than this left, in seconds.
LEAST_TIME = {"goals": 10.0, "kernels": 10.0, "step": 150.0, "matrix": 10.0}
# One that takes longer hangs.
LONGEST_CASE = {"goals": 120.0, "kernels": 120.0, "step": 330.0, "matrix": 120.0}
# A backend that ends the process in so many cases of an operation is left out of all of them: a
# restart takes a quarter of a minute. One that hangs has taken minutes the first time.
MOST_FAULTS = 2


def main(arguments: Sequence[str] | None = None) -> int:
    parser = stage_parser("run")
    parser.add_argument("stage", choices=STAGES)
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + options.seconds
    device = Device(options.device)
    bench = Workbench(device, LLAMA if device.is_cuda else TINY, options.out / drawn.FOLDER)
    journal = Journal(options.out / NAME, options.stage, fingerprint(options.stage), options.key)
    journal.add("machine", **device.facts())
    light = device.light
    journal.add(
        "light",
        bytes_per_second=light.bandwidth,
        operations_per_second=light.rate,
        least_us=short(device.least_time * 1e6),
    )
    print(
        f"ceilings: {light.bandwidth / 1e12:.2f} TB/s copied, {light.rate / 1e12:.0f} TFLOP/s "
        f"bf16; no call takes less than {device.least_time * 1e6:.2f} us",
        flush=True,
    )
    specs = STAGES[options.stage]()
    left = _not_yet(specs, journal)
    barred = list(journal.entries("barred"))
    if len(left) < len(specs):
        print(f"{len(specs) - len(left)} of {len(specs)} cases are there already", flush=True)
    if options.stage != "step":
        bench.draw(_masks(left, bench))
    for number, spec in enumerate(left):
        if time.monotonic() > deadline - LEAST_TIME[options.stage]:
            print(f"out of time: {len(left) - number} cases are left", flush=True)
            return OUT_OF_TIME
        bench.barred = _barred(spec, barred)
        try:
            _measure(spec, bench, journal)
        except DeviceLostError as error:
            print(f"the device is lost: {error}", flush=True)
            return RESTART
        device.free()
    return 0


@contextlib.contextmanager
def watchdog(seconds: float, note: Callable[[], None] = lambda: None) -> Iterator[None]:
    """End this process if the block takes longer: a kernel that hangs lets nothing else end it."""

    def end() -> None:
        note()
        os._exit(RESTART)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def cut_off_noted(journal: Journal, **facts: Any) -> Iterator[None]:
    """If the stage's time ends in the block, say so: it was no crash, and is tried again."""

    def cut(number: int, frame: FrameType | None) -> None:
        journal.add("cut", **facts)
        os._exit(OUT_OF_TIME)

    before = signal.signal(signal.SIGTERM, cut)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _not_yet(specs: Iterable[Spec], journal: Journal) -> list[Spec]:
    """Cases that are due. One that was begun and never ended took its process with it: it is tried
    again without the backend of ours that was at work, and not at all where that was none.
    """
    for spec, side, hung in _unfinished(journal):
        how = "hung" if hung else "ended"
        _put_down(journal, spec, side, f"its process {how} while {side or 'it'} ran", hung=hung)
    ended = {_key(entry["spec"]) for entry in journal.entries("case")}
    return [spec for spec in specs if _key(asdict(spec)) not in ended]


def _unfinished(journal: Journal) -> list[tuple[dict[str, Any], str, bool]]:
    """Of each case that was begun and came to no end: its spec, the side that was being tried, and
    whether it hung.
    """
    found: dict[tuple[Any, ...], tuple[dict[str, Any], str, bool]] = {}
    for entry in journal.entries("begin", "trying", "hung", "cut", "barred", "case"):
        spec, kind = entry["spec"], entry["kind"]
        key = _key(spec)
        if kind == "begin":
            found[key] = spec, "", False
        elif kind == "trying" and key in found:
            found[key] = spec, entry["side"], False
        elif kind == "hung" and key in found:
            found[key] = (*found[key][:2], True)
        else:
            found.pop(key, None)
    return list(found.values())


def _put_down(
    journal: Journal, spec: dict[str, Any], side: str, why: str, *, hung: bool = False
) -> None:
    """Bar the backend of a side that ended the process, or the case where it was none of ours."""
    if (backend := backend_of(side)) in cases.BACKENDS:
        journal.add("barred", spec=spec, backend=backend, why=why, hung=hung)
    else:
        journal.add("case", spec=spec, error=why)


def _barred(spec: Spec, entries: Iterable[dict[str, Any]]) -> dict[str, str]:
    """Backend -> why it takes no part in a case: it ended the process in this one, or in others of
    the operation.

    Args:
        entries: those of the journal that say so.
    """
    of_operation = [e for e in entries if e["spec"]["operation"] == spec.operation]
    faults = Counter[str]()
    for entry in of_operation:
        faults[entry["backend"]] += MOST_FAULTS if entry["hung"] else 1
    return {
        entry["backend"]: entry["why"]
        for entry in of_operation
        if entry["spec"] == asdict(spec) or faults[entry["backend"]] >= MOST_FAULTS
    }


def _key(spec: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(spec.values())


def _masks(specs: Iterable[Spec], bench: Workbench) -> Iterable[drawn.Mask]:
    for spec in specs:
        if spec.projection in bench.scale.projections:
            yield drawn.Mask(bench.shape(spec), spec.mask, spec.density)


def _measure(spec: Spec, bench: Workbench, journal: Journal) -> None:
    start, named = time.monotonic(), asdict(spec)
    bench.trying = lambda side: journal.add("trying", spec=named, side=side)
    hung = partial(journal.add, "hung", spec=named)
    journal.add("begin", spec=named)
    with cut_off_noted(journal, spec=named):
        try:
            with watchdog(LONGEST_CASE[journal.stage], hung):
                case = cases.setup(spec, bench)
                case = replace(case, left_out={**case.left_out, **bench.barred})
                measured = measure(case, bench.device, bench.trying)
        except Exception as error:
            traceback.print_exc()
            lost = isinstance(error, DeviceLostError) or bench.device.is_lost()
            _put_down(journal, named, getattr(error, "side", "") if lost else "", reason(error))
            if lost:
                raise DeviceLostError("", reason(error)) from error
            return
        entry = entry_of(case, measured)
        journal.add("case", spec=named, seconds=round(time.monotonic() - start, 2), **entry)
    _print(case, measured)


def entry_of(case: GpuCase, measured: Measured) -> dict[str, Any]:
    """What the journal keeps of a case. By side: ours or not, ms, ms at the speed of light, bytes,
    operations, host's microseconds, peak in MB, entries trained, bytes saved, bytes of inputs, and
    ms until the host waited, where it did. Of each ratio: ours, the peer, the median, the goal, and
    the quartiles of the rounds' ratios where it is one of times; of a side that waited they are of
    its time until then.
    """
    sides = {}
    for side in measured.result.case.sides:
        timing, work, saved = measured.result.timings[side.name], side.work, side.saved
        waited = measured.until_wait.get(side.name)
        sides[side.name] = [
            int(side.ours),
            short(timing.median * 1e3),
            None if timing.light is None else short(timing.light * 1e3),
            None if work is None else work.total_bytes,
            None if work is None else work.operations,
            short(measured.host[side.name] * 1e6),
            short(measured.peaks[side.name] / 1e6),
            side.trained,
            None if saved is None else saved.bytes,
            None if saved is None else saved.inputs,
            *([] if waited is None else [short(waited * 1e3)]),
        ]
    return {
        "operation": case.operation,
        "case": case.name,
        "rounds": measured.result.rounds,
        "calls": measured.result.case.calls,
        "tokens": case.tokens,
        "sides": sides,
        "ratios": [
            [v.ours, v.peer, short(v.ratio), v.at_most, *map(short, v.quartiles or ())]
            for v in measured.verdicts
        ],
        "left_out": dict(measured.left_out),
    }


def short(number: float) -> float:
    """Four digits: more than a timing on a GPU holds, few enough for a record of hundreds."""
    return float(f"{number:.4g}")


def _print(case: GpuCase, measured: Measured) -> None:
    print(f"{case.operation}: {case.name}", flush=True)
    for side in measured.result.case.sides:
        timing = measured.result.timings[side.name]
        light = "" if timing.light is None else f"{timing.light / timing.median:6.0%} of light"
        until = measured.until_wait.get(side.name)
        waited = "" if until is None else f"; judged by {until * 1e3:.4f} ms{UNTIL_WAIT}"
        print(f"  {side.name:38} {timing.median * 1e3:10.4f} ms {light}{waited}")
    for verdict in measured.verdicts:
        if verdict.at_most is not None:
            print(f"  {verdict}")
    for name, why in measured.left_out.items():
        print(f"  {name} left out: {why}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
