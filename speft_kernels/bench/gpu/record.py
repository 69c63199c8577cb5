"""The record of a run, made of its journal: `gpu.json`, and `gpu.md` to read.

Both are small enough to be committed under `benchmarks/results/`; a GPU backend counts as verified
only by such a record. Nothing here imports torch.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...files import replaced
from .journal import NAME, fingerprint, read
from .sanitize import NO_TOOL
from .stages import STAGES

JSON, TABLE = "gpu.json", "gpu.md"
NOT_YET = "not yet run on a GPU"
DRY = "a dry run on a CPU: no figure means anything"

# What the list of a side holds, in `sides` of a case; the last where its call waits for the device.
COLUMNS = (
    *("ours", "ms", "light_ms", "bytes", "operations", "host_us", "peak_mb", "trained"),
    *("saved_bytes", "input_bytes", "ms_until_wait"),
)
# Said of a side whose call waits for the device, and which is judged by its time until then.
UNTIL_WAIT = ", until the host waits"
_FAILURES_KEPT = 40  # with their messages; of the others only the number


def empty() -> dict[str, Any]:
    """The record before any run."""
    return {"status": NOT_YET, "stages": {}, "cases": []}


def build(out: Path, device: str, sources: Callable[[str], str] = fingerprint) -> dict[str, Any]:
    """Make a record of what the journal in `out` holds of the present sources on `device`."""
    current = {stage: sources(stage) for stage in STAGES}
    entries = [
        entry
        for entry in read(out / NAME)
        if entry["device"] == device and entry["sources"] == current[entry["stage"]]
    ]
    stages: dict[str, Any] = {}
    for entry in entries:
        if entry["kind"] == "stage":
            said = ("status", "seconds", "detail")
            kept = {name: entry[name] for name in said if entry.get(name)}
            stages[entry["stage"]] = {**kept, "sources": entry["sources"]}
        elif entry["kind"] != "machine":
            stages.setdefault(entry["stage"], {"status": "not ended", "sources": entry["sources"]})
    status = DRY if device == "cpu" else _verdict(stages)
    own = ("kind", "stage", "sources", "device")
    facts = {
        kind: {name: value for name, value in entry.items() if name not in own}
        for kind in ("machine", "light")
        for entry in entries
        if entry["kind"] == kind
    }
    return {
        "status": status if entries else NOT_YET,
        "stages": {stage: stages[stage] for stage in STAGES if stage in stages},
        **facts,
        "tests": _tests(entries),
        **_watched(entries),
        "tuned": _tuned(entries),
        "columns": list(COLUMNS),
        "cases": [_case(entry) for entry in _last_of_each(entries)],
    }


def _verdict(stages: Mapping[str, Mapping[str, Any]]) -> str:
    """Which stages are not complete, and how they ended: the others are none the worse for it."""
    others = {stage: stages.get(stage, {}).get("status", "not run") for stage in STAGES}
    lacking = [f"{stage} ({how})" for stage, how in others.items() if how != "complete"]
    return f"complete but for {', '.join(lacking)}" if lacking else "complete"


def _last_of_each(entries: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    cases = [entry for entry in entries if entry["kind"] == "case"]
    return list({json.dumps(entry["spec"]): entry for entry in cases}.values())


def _case(entry: Mapping[str, Any]) -> dict[str, Any]:
    if "error" in entry:
        spec = entry["spec"]
        name = f"{spec['projection']}, {spec['tokens']} tokens, {spec['mask']} {spec['density']}"
        name += f", {spec['backend']}" if spec["backend"] else ""
        return {"operation": spec["operation"], "case": name, "error": entry["error"]}
    names: tuple[str, ...]
    names = ("operation", "case", "rounds", "calls", "tokens", "sides", "ratios", "left_out")
    if entry["stage"] == "matrix":  # hundreds of cases without a goal: the times tell the ratios
        names = ("operation", "case", "rounds", "calls", "sides", "left_out")
    return {name: entry[name] for name in names if entry[name]}


def _tests(entries: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The last outcome of each test; failures with their messages; the reasons of those skipped;
    and how exact each operation was, at worst.
    """
    last = {entry["id"]: entry for entry in entries if entry["kind"] == "test"}
    if not last:
        return {}
    outcomes = Counter(entry["outcome"] for entry in last.values())
    failed = {
        name: entry.get("message", "")
        for name, entry in last.items()
        if entry["outcome"] == "failed"
    }
    skipped = Counter(e.get("message", "") for e in last.values() if e["outcome"] == "skipped")
    worst: dict[str, float] = {}
    for entry in last.values():
        for what, ratio in entry.get("errors", []):
            worst[what] = max(ratio, worst.get(what, 0.0))
    return {
        **outcomes,
        "failures": dict(list(failed.items())[:_FAILURES_KEPT]),
        "skips": dict(skipped),
        "error_over_twice_torchs": worst,
    }


def _watched(entries: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """How many operations passed on small tensors, alone and under each of the sanitizer's tools,
    and what was said of the others.
    """
    last = {(e["tool"], e["operation"]): e for e in entries if e["kind"] == "sanitizer"}
    found: dict[str, Any] = {}
    for (tool, operation), entry in last.items():
        of_tool = found.setdefault(tool, {})
        of_tool[entry["outcome"]] = of_tool.get(entry["outcome"], 0) + 1
        if entry["outcome"] != "passed":
            of_tool.setdefault("messages", {})[operation] = entry["message"]
    return {"small": found.pop(NO_TOOL, {}), "sanitizer": found}


def _tuned(entries: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each problem the default settings, the best of those tried, and how many were tried."""
    problems: dict[str, dict[str, Mapping[str, Any]]] = {}
    for entry in entries:
        if entry["kind"] == "tuned":
            problems.setdefault(entry["problem"], {})[entry["settings"]] = entry
    found = []
    for problem, tried in problems.items():
        right = [entry for entry in tried.values() if "ms" in entry]
        facts: dict[str, Any] = {"problem": problem, "tried": len(tried)}
        facts["failed"] = len(tried) - len(right)
        if right:
            best = min(right, key=lambda entry: entry["ms"] / entry["default_ms"])
            facts |= {name: best[name] for name in ("default", "default_ms", "ms", "settings")}
        found.append(facts)
    return found


class Goal(NamedTuple):
    """A ratio, and the largest wanted.

    Attributes:
        what: "ours / peer", and whether our time is the one until the host waits.
        quartiles: of the rounds' ratios, where it is one of times.
        ms: our side's time; None where the ratio is one of memory.
    """

    operation: str
    case: str
    what: str
    ratio: float
    at_most: float
    quartiles: Sequence[float]
    ms: float | None

    @property
    def met(self) -> bool:
        return self.ratio <= self.at_most


def goals(record: Mapping[str, Any]) -> list[Goal]:
    """Each goal in the record."""
    return [
        Goal(case["operation"], case["case"], f"{ours}{waits} / {peer}", ratio, at_most, rest, ms)
        for case in record["cases"]
        for ours, peer, ratio, at_most, *rest in case.get("ratios", ())
        for ms, waits in [_judged(case["sides"].get(ours))]
        if at_most is not None
    ]


def _judged(values: Sequence[Any] | None) -> tuple[float | None, str]:
    """The time of a side that its ratios are of, and what is to be said of it; None of no side's,
    as of memory.
    """
    if values is None:
        return None, ""
    side = _named(values)
    until = side.get("ms_until_wait")
    return (side["ms"], "") if until is None else (until, UNTIL_WAIT)


def write(out: Path, record: Mapping[str, Any]) -> None:
    """Write the record and the table into a folder, one line for each case."""
    head = {name: value for name, value in record.items() if name != "cases"}
    lines = [
        json.dumps(case, ensure_ascii=False, separators=(",", ":")) for case in record["cases"]
    ]
    text = json.dumps(head, indent=1, ensure_ascii=False).removesuffix("\n}")
    body = ",\n".join(lines)
    _replace(out / JSON, f'{text},\n "cases": [\n{body}\n ]\n}}\n')
    _replace(out / TABLE, table(record))


def _replace(path: Path, text: str) -> None:
    with replaced(path) as temporary:
        temporary.write_text(text, "utf-8")


def table(record: Mapping[str, Any]) -> str:
    """The record in Markdown."""
    parts = [f"# The kernels on a GPU: {record['status']}\n"]
    if record["status"] == NOT_YET:
        parts.append(
            "`scripts/gpu_check.sh`, on a machine with a GPU, builds, tests and measures, and\n"
            f"writes the `{JSON}` and `{TABLE}` that take the place of these. Until then no GPU\n"
            "backend counts as verified, and no figure for a GPU is a measured one.\n"
        )
        return "\n".join(parts)
    parts += [_machine(record), _stages(record), _goals(record), _steps(record), _ours(record)]
    operations = dict.fromkeys(case["operation"] for case in record["cases"])
    parts += [_operation(record, operation) for operation in operations if operation != "step"]
    parts += [_settings(record), _not_measured(record)]
    return "\n".join(part for part in parts if part)


def _machine(record: Mapping[str, Any]) -> str:
    lines = [f"- {name}: {value}" for name, value in record.get("machine", {}).items() if value]
    if light := record.get("light"):
        copied, multiplied = light["bytes_per_second"], light["operations_per_second"]
        lines.append(f"- a large copy, read and written: {copied / 1e12:.2f} TB/s")
        lines.append(f"- a bf16 product of 8192 x 8192 x 8192: {multiplied / 1e12:.0f} TFLOP/s")
        if "least_us" in light:
            lines.append(f"- a kernel that does nothing, as it is timed: {light['least_us']} us")
    return "\n".join(lines) + "\n"


def _stages(record: Mapping[str, Any]) -> str:
    rows = [
        (stage, facts["status"], str(facts.get("seconds", "")), facts["sources"])
        for stage, facts in record["stages"].items()
    ]
    parts = [_markdown(("stage", "status", "seconds", "sources"), rows)]
    parts += [
        f"{stage}: {' / '.join(facts['detail'].splitlines())}\n"
        for stage, facts in record["stages"].items()
        if facts.get("detail")
    ]
    if tests := record.get("tests"):
        counts = ", ".join(
            f"{tests[name]} {name}" for name in ("passed", "failed", "skipped") if name in tests
        )
        parts.append(f"Tests: {counts}.\n")
        parts += [f"- failed: `{name}`: {why}" for name, why in tests["failures"].items()]
        parts += [f"- skipped, {count}: {why}" for why, count in tests["skips"].items()]
        if worst := tests["error_over_twice_torchs"]:
            errors = [(what, f"{ratio:.3g}") for what, ratio in sorted(worst.items())]
            head = ("operation, backend, dtype", "largest error / (2 x torch's + one rounding)")
            parts += ["", _markdown(head, errors)]
    watched = {f"compute-sanitizer {tool}": o for tool, o in record.get("sanitizer", {}).items()}
    if small := record.get("small"):
        watched = {"Operations alone on small tensors": small, **watched}
    for what, outcomes in watched.items():
        said = [f"{n} {outcome}" for outcome, n in outcomes.items() if outcome != "messages"]
        parts.append(f"{what}: {', '.join(said)}.\n")
        parts += [
            f"- {name}: {' / '.join(why.splitlines())}"
            for name, why in outcomes.get("messages", {}).items()
        ]
    return "\n".join(parts) + "\n"


def _goals(record: Mapping[str, Any]) -> str:
    found = goals(record)
    if not found:
        return ""
    rows = [
        (
            *(goal.operation, goal.case, goal.what),
            "" if goal.ms is None else f"{goal.ms:.4g}",
            f"{goal.ratio:.3f}",
            " to ".join(f"{quartile:.3f}" for quartile in goal.quartiles),
            f"{goal.at_most:g}",
            "yes" if goal.met else "NO",
        )
        for goal in found
    ]
    head = ("operation", "case", "ours / peer", "ms", "ratio", "quartiles", "goal", "met")
    title = f"## Goals: {sum(goal.met for goal in found)} of {len(found)} met"
    return "\n\n".join([title, *_least(record), _markdown(head, rows)])


def _least(record: Mapping[str, Any]) -> list[str]:
    """What a time has on top of the kernel's own, where that was measured."""
    least = record.get("light", {}).get("least_us")
    return [] if least is None else [f"Of each time {least} us are those of starting a kernel."]


def _steps(record: Mapping[str, Any]) -> str:
    rows = []
    for case in record["cases"]:
        if case["operation"] != "step" or "sides" not in case:
            continue
        for name, values in case["sides"].items():
            side = _named(values)
            rows.append(
                (
                    case["case"],
                    name,
                    f"{side['ms']:.2f}",
                    f"{case['tokens'] / side['ms'] * 1e3:,.0f}",
                    f"{side['peak_mb'] / 1e3:.1f}",
                    f"{side['trained']:,}",
                    _share(side),
                )
            )
    if not rows:
        return ""
    head = ("step", "side", "ms", "tokens/s", "peak GB", "trained", "of light")
    return f"## Training steps\n\n{_markdown(head, rows)}"


def _ours(record: Mapping[str, Any]) -> str:
    """Of each case the time of each of our backends: which of them is to serve it."""
    found: list[tuple[str, str, dict[str, float]]] = []
    for case in record["cases"]:
        times: dict[str, float] = {}
        for name, values in case.get("sides", {}).items():
            side = _named(values)
            backend = backend_of(name)
            if side["ours"]:
                times[backend] = min(side["ms"], times.get(backend, side["ms"]))
        if len(times) > 1:
            found.append((case["operation"], case["case"], times))
    names = sorted({name for *_, times in found for name in times})
    rows = [
        (
            *(operation, case),
            *(f"{times[name]:.4g}" if name in times else "" for name in names),
            min(times, key=lambda name: times[name]),
        )
        for operation, case, times in found
    ]
    if not rows:
        return ""
    head = _markdown(("operation", "case", *names, "fastest"), rows)
    return f"## Our backends, ms\n\n{head}"


def backend_of(side: str) -> str:
    """The backend in the name of a side of ours; of a peer's name something that is none."""
    return side.removeprefix("SPEFT ").split(",")[0]


def _operation(record: Mapping[str, Any], operation: str) -> str:
    """Of each side: ms, and its share of the speed of light where that was counted."""
    cases = [c for c in record["cases"] if c["operation"] == operation and "sides" in c]
    names = list(dict.fromkeys(name for case in cases for name in case["sides"]))
    rows = []
    for case in cases:
        cells = []
        for name in names:
            values = case["sides"].get(name)
            cells.append(_time(_named(values)) if values else "")
        rows.append((case["case"], *cells))
    if not rows:
        return ""
    title = f"## {operation}, ms (share of the speed of light)"
    return f"{title}\n\n{_markdown(('case', *names), rows)}"


def _settings(record: Mapping[str, Any]) -> str:
    rows = [
        (
            *(one["problem"], f"{one['tried']}, {one['failed']} failed"),
            *(one["default"], f"{one['default_ms']:.4g}", one["settings"], f"{one['ms']:.4g}"),
            f"{one['ms'] / one['default_ms']:.3f}",
        )
        for one in record.get("tuned", ())
        if "ms" in one
    ]
    if not rows:
        return ""
    head = ("problem", "tried", "default", "ms", "best of the tried", "ms", "ratio")
    return f"## Settings beside the default ones\n\n{_markdown(head, rows)}"


def _not_measured(record: Mapping[str, Any]) -> str:
    failed = [
        f"- {case['operation']}, {case['case']}: {case['error']}"
        for case in record["cases"]
        if "error" in case
    ]
    reasons = Counter(
        (case["operation"], side, why)
        for case in record["cases"]
        for side, why in case.get("left_out", {}).items()
    )
    failed += [
        f"- {operation}, {side}, in {count} cases: {why}"
        for (operation, side, why), count in reasons.items()
    ]
    return "## Not measured\n\n" + "\n".join(failed) + "\n" if failed else ""


def _named(values: Sequence[Any]) -> dict[str, Any]:
    return dict(zip(COLUMNS, values, strict=False))


def _time(side: Mapping[str, Any]) -> str:
    share = _share(side)
    until = side.get("ms_until_wait")
    waited = f", {until:.4g}{UNTIL_WAIT.removeprefix(',')}" if until is not None else ""
    return f"{side['ms']:.4g}" + (f" ({share})" if share else "") + waited


def _share(side: Mapping[str, Any]) -> str:
    return f"{side['light_ms'] / side['ms']:.0%}" if side["light_ms"] else ""


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(c) for c in line) + " |" for line in lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def summary(record: Mapping[str, Any]) -> str:
    """A short table for the end of the output: stages, tests, goals, steps."""
    lines = [f"record: {record['status']}"]
    for stage, facts in record["stages"].items():
        lines.append(f"  {stage:8} {facts['status']:12} {facts.get('seconds', '')} s")
    if tests := record.get("tests"):
        lines.append(
            f"  tests: {tests.get('passed', 0)} passed, {tests.get('failed', 0)} failed, "
            f"{tests.get('skipped', 0)} skipped"
        )
        lines += [f"    failed: {name}" for name in list(tests["failures"])[:10]]
    errors = sum("error" in case for case in record["cases"])
    lines.append(f"  cases: {len(record['cases']) - errors} measured, {errors} failed")
    lines += [f"  {sentence}" for sentence in _least(record)]
    for goal in goals(record):
        verdict, of = "met" if goal.met else "MISSED", f"{goal.operation}, {goal.case}: {goal.what}"
        lines.append(f"  {verdict:6} {goal.ratio:8.3f} goal {goal.at_most:5g}  {of}")
    return "\n".join(lines)
