"""One stage of measurements in a process of its own: `python -m speft_kernels.bench.gpu.run`.

Each case is written into the journal as soon as it is measured; one that is there already is not
measured again. Exits with OUT_OF_TIME when the time is up, and with RESTART when an error has left
the device unusable: a new process goes on with the next case.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from . import cases
from .device import Device
from .journal import NAME, Journal, fingerprint, stage_parser
from .problems import LLAMA, TINY, Spec, Workbench
from .timing import DeviceLostError, GpuCase, Measured, measure, reason

STAGES = {
    "kernels": cases.kernel_specs,
    "step": cases.step_specs,
    "matrix": cases.matrix_specs,
}
OUT_OF_TIME, RESTART = 3, 75
# A case is not begun with less time than this left, in seconds.
LEAST_TIME = {"kernels": 10.0, "step": 60.0, "matrix": 10.0}
# One that takes longer hangs.
LONGEST_CASE = {"kernels": 120.0, "step": 330.0, "matrix": 120.0}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = stage_parser("run")
    parser.add_argument("stage", choices=STAGES)
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + options.seconds
    device = Device(options.device)
    bench = Workbench(device, LLAMA if device.is_cuda else TINY)
    journal = Journal(options.out / NAME, options.stage, fingerprint(options.stage), options.key)
    journal.add("machine", **device.facts())
    light = device.light
    journal.add("light", bytes_per_second=light.bandwidth, operations_per_second=light.rate)
    print(
        f"ceilings: {light.bandwidth / 1e12:.2f} TB/s copied, {light.rate / 1e12:.0f} TFLOP/s bf16",
        flush=True,
    )
    specs = STAGES[options.stage]()
    left = _not_yet(specs, journal)
    if len(left) < len(specs):
        print(f"{len(specs) - len(left)} of {len(specs)} cases are there already", flush=True)
    if options.stage != "step":
        bench.draw(_masks(left, bench))
    for number, spec in enumerate(left):
        if time.monotonic() > deadline - LEAST_TIME[options.stage]:
            print(f"out of time: {len(left) - number} cases are left", flush=True)
            return OUT_OF_TIME
        try:
            _measure(spec, bench, journal)
        except DeviceLostError as error:
            print(f"the device is lost: {error}", flush=True)
            return RESTART
        device.free()
    return 0


@contextlib.contextmanager
def watchdog(seconds: float) -> Iterator[None]:
    """End this process if the block takes longer: a kernel that hangs lets nothing else end it."""
    timer = threading.Timer(seconds, os._exit, (RESTART,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _not_yet(specs: Iterable[Spec], journal: Journal) -> list[Spec]:
    """Cases that were not measured. One that was begun and never ended took its process with it: it
    is not tried again.
    """
    ended = {_key(entry["spec"]) for entry in journal.entries("case")}
    for entry in journal.entries("begin"):
        if _key(entry["spec"]) not in ended:
            journal.add("case", spec=entry["spec"], error="its process ended while it ran")
            ended.add(_key(entry["spec"]))
    return [spec for spec in specs if _key(asdict(spec)) not in ended]


def _key(spec: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(spec.values())


def _masks(specs: Iterable[Spec], bench: Workbench) -> Iterable[tuple[Any, ...]]:
    for spec in specs:
        if spec.projection in bench.scale.projections:
            yield bench.shape(spec), spec.mask, spec.density, 0


def _measure(spec: Spec, bench: Workbench, journal: Journal) -> None:
    start = time.monotonic()
    journal.add("begin", spec=asdict(spec))
    try:
        with watchdog(LONGEST_CASE[journal.stage]):
            case = cases.setup(spec, bench)
            measured = measure(case, bench.device)
    except Exception as error:
        traceback.print_exc()
        journal.add("case", spec=asdict(spec), error=reason(error))
        if isinstance(error, DeviceLostError) or bench.device.is_lost():
            raise DeviceLostError(reason(error)) from error
        return
    entry = entry_of(case, measured)
    journal.add("case", spec=asdict(spec), seconds=round(time.monotonic() - start, 2), **entry)
    _print(case, measured)


def entry_of(case: GpuCase, measured: Measured) -> dict[str, Any]:
    """What the journal keeps of a case. By side: ours or not, ms, ms at the speed of light, bytes,
    operations, host's microseconds, peak in MB, entries trained, bytes saved, bytes of inputs, and
    ms until the host waited, where it did.
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
        "ratios": [[v.ours, v.peer, short(v.ratio), v.at_most] for v in measured.verdicts],
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
        print(f"  {side.name:38} {timing.median * 1e3:10.4f} ms {light}")
    for verdict in measured.verdicts:
        if verdict.at_most is not None:
            print(f"  {verdict}")
    for name, why in measured.left_out.items():
        print(f"  {name} left out: {why}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
