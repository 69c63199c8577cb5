"""Settings of the Triton kernels in place of their default ones: `python -m
speft_kernels.bench.gpu.tuning`.

On a few problems, those candidates that are nearest to the default settings, each in the same
rounds as these. What is found is put on record and changes nothing: a default is changed by hand,
with the figure that decided it. A candidate that does not compile, or computes the wrong thing, is
put down as failed.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any
from unittest import mock

from ... import _triton
from ...strips import GROUP_STRIPS, STRIP_ROWS
from . import cases, drawn
from .device import Device
from .journal import NAME, Journal, fingerprint, stage_parser
from .problems import LLAMA, MOST_TOKENS, TINY, Spec, Workbench
from .run import cut_off_noted, short, watchdog
from .stages import OUT_OF_TIME, RESTART
from .timing import DeviceLostError, GpuCase, GpuSide, measure

# Candidates of a problem, on a GPU and in a dry run.
MOST, FEW = 24, 1
SECONDS = 0.3  # of the timed calls of a candidate and of the default settings
LONGEST = 60.0  # seconds after which a candidate hangs


@dataclass(frozen=True)
class Problem:
    """A case whose Triton side is timed with other settings of one kernel.

    Attributes:
        kind: the class of the settings.
        candidates: takes what the default was chosen by, and the machine.
    """

    spec: Spec
    kind: Any
    candidates: Callable[[tuple[Any, ...], Any], Iterable[Any]]

    @property
    def name(self) -> str:
        spec = self.spec
        what = [spec.projection, f"{spec.tokens} tokens" if spec.tokens else "", spec.mask]
        return f"{spec.operation}, {', '.join(filter(None, what))}: {self.kind.__name__}"


def problems() -> list[Problem]:
    """Where most time goes in a training step, and in choosing what it trains."""
    from ...triton_kernels._fused_settings import FusedLaunch
    from ...triton_kernels._topk_select import DigitLaunch, RunLaunch
    from ...triton_kernels.block_grad import EntryLaunch, TileLaunch
    from ...triton_kernels.effective_weight import RowLaunch
    from ...triton_kernels.keep_columns import PackLaunch
    from ...triton_kernels.sampled_grad import StripLaunch
    from ...triton_kernels.topk_salience import ChunkLaunch, SampleLaunch
    from ...triton_kernels.write_delta import WriteLaunch

    def strips(chosen_by: tuple[Any, ...], machine: Any) -> Iterable[Any]:
        return StripLaunch.candidates(STRIP_ROWS, GROUP_STRIPS, chosen_by[0], machine)

    def tiles(chosen_by: tuple[Any, ...], machine: Any) -> Iterable[Any]:
        return TileLaunch.candidates(*chosen_by[:2], machine)

    def fused(chosen_by: tuple[Any, ...], machine: Any) -> Iterable[Any]:
        return FusedLaunch.candidates(chosen_by[0], machine)

    found = [
        Problem(Spec("sampled_grad", "q", MOST_TOKENS), StripLaunch, strips),
        Problem(Spec("sparse_delta_matmul", "q", 16), FusedLaunch, fused),
        Problem(Spec("sparse_delta_matmul", "q", 1), FusedLaunch, fused),
        Problem(Spec("block_grad", "q", MOST_TOKENS, "16x16"), TileLaunch, tiles),
    ]
    for spec, *kinds in (
        (Spec("sparse_delta_matmul", "q", MOST_TOKENS), RowLaunch),
        (Spec("keep_columns", "q", MOST_TOKENS), PackLaunch),
        (Spec("topk_salience", "bfloat16"), ChunkLaunch, SampleLaunch, DigitLaunch, RunLaunch),
        (Spec("write_delta", "layers"), WriteLaunch),
        (Spec("block_grad", "q", MOST_TOKENS, "2x2"), EntryLaunch),
    ):
        found += [Problem(spec, kind, lambda *_, kind=kind: kind.candidates()) for kind in kinds]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    options = stage_parser("tuning").parse_args(arguments)
    deadline = time.monotonic() + options.seconds
    device = Device(options.device)
    bench = Workbench(device, LLAMA if device.is_cuda else TINY, options.out / drawn.FOLDER)
    bench.barred = dict.fromkeys(("cuda", "torch"), "not tuned")  # a fault of theirs would end it
    journal = Journal(options.out / NAME, "tune", fingerprint("tune"), options.key)
    if (why := _triton.missing()) is not None:
        print(f"nothing to tune: {why}", flush=True)
        return 0
    ended = {entry["problem"] for entry in journal.entries("tuned all")}
    for problem in problems():
        if problem.name in ended:
            continue
        try:
            if not tune(problem, bench, journal, deadline):
                print("out of time", flush=True)
                return OUT_OF_TIME
        except DeviceLostError as error:
            print(f"the device is lost: {error}", flush=True)
            return RESTART
        journal.add("tuned all", problem=problem.name)
        device.free()
    return 0


def tune(problem: Problem, bench: Workbench, journal: Journal, deadline: float) -> bool:
    """Time the candidates that the journal does not have; False where the time was up before."""
    from ...triton_kernels.launch import machine

    if time.monotonic() > deadline - LONGEST / 4:
        return False
    print(problem.name, flush=True)
    case = cases.setup(problem.spec, bench)
    side = next(side for side in case.sides if side.name.startswith("triton"))
    with settings_of(problem.kind) as asked:
        side.run()
    if not asked:  # as few tokens as in a dry run go another way
        print("  not launched", flush=True)
        return True
    default = problem.kind.default(*asked[0])
    near = _nearest(problem.candidates(asked[0], machine(bench.device.torch)), default)
    known = {e["settings"] for e in journal.entries("tuned") if e["problem"] == problem.name}
    # One that was begun and never ended took its process with it, unless the stage was cut off.
    begun = {}
    for entry in journal.entries("begin", "cut"):
        if entry["problem"] == problem.name and entry["settings"] not in known:
            begun[entry["settings"]] = entry
    for entry in begun.values():
        if entry["kind"] == "begin":
            known.add(entry["settings"])
            journal.add("tuned", **_only(entry), error="its process ended while it ran")
    for settings in near[: MOST if bench.device.is_cuda else FEW]:
        if str(settings) in known:
            continue
        if time.monotonic() > deadline - LONGEST / 4:
            return False
        facts = {"problem": problem.name, "settings": str(settings), "default": str(default)}
        journal.add("begin", **facts)
        with cut_off_noted(journal, **facts), watchdog(LONGEST):
            journal.add("tuned", **facts, **_timed(side, problem.kind, settings, bench.device))
    return True


def _only(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: entry[name] for name in ("problem", "settings", "default")}


def _timed(side: GpuSide, kind: Any, settings: Any, device: Device) -> dict[str, Any]:
    """Milliseconds with the settings and with the default ones; or why not.

    Raises:
        DeviceLostError: as `measure`.
    """

    def run() -> object:
        with settings_of(kind, settings):
            return side.run()

    plain = replace(side, goals={}, beside={}, floors=(), ours=False)
    tried = replace(plain, name="tried", run=run)
    case = GpuCase("tune", kind.__name__, [replace(plain, name="default"), tried], seconds=SECONDS)
    measured = measure(case, device)
    if (error := measured.left_out.get("tried")) is not None:
        return {"error": error}
    seconds = {name: timing.median for name, timing in measured.result.timings.items()}
    times = {name: short(s * 1e3) for name, s in {**seconds, **measured.until_wait}.items()}
    print(f"  {times['tried']:10.4f} ms, default {times['default']:10.4f}  {settings}", flush=True)
    return {"ms": times["tried"], "default_ms": times["default"]}


def _nearest(candidates: Iterable[Any], default: Any) -> list[Any]:
    """Those that differ from the default in the fewest fields first; without the default."""

    def distance(settings: Any) -> int:
        fields = asdict(default)
        return sum(value != fields[name] for name, value in asdict(settings).items())

    return sorted((one for one in candidates if one != default), key=distance)


@contextlib.contextmanager
def settings_of(kind: Any, settings: Any = None) -> Iterator[list[tuple[Any, ...]]]:
    """Have a kernel launched with these settings, else with its default ones. Collects what the
    default was asked for with.
    """
    asked: list[tuple[Any, ...]] = []
    real = kind.default

    def default(*arguments: Any) -> Any:
        asked.append(arguments)
        return real(*arguments) if settings is None else settings

    with mock.patch.object(kind, "default", default):
        yield asked


if __name__ == "__main__":
    sys.exit(main())
