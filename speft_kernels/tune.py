"""Measuring the constants of the plan's cost model on this machine (`costs.py`), and on a GPU where
`sparse_delta_matmul` changes its way.

Each cost is the slope between two patterns that differ in one kind of work alone, on the backend
whose plans weigh all kinds, on a GPU Triton's. A time is the least of alternating calls, as other
processes only add to it, with a pass over other memory before each, because in a training step
nothing finds its operands in the nearest cache. A slope that noise has turned around says nothing:
the default holds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import _triton, ops
from .costs import CROSSOVER_TOKENS, DEFAULTS, Costs
from .errors import BackendError
from .ops.ways import triton_ways
from .pattern import SparsePattern
from .plan import SparsityPlan
from .testing import realistic_pattern

ROUNDS = 15
LEAD = 2e-3  # seconds for which the device is kept busy until the host has issued a product
FLUSH_BYTES = 64 << 20


@dataclass(frozen=True)
class _Scale:
    """What a device is measured at: it must be busy well past what starting a call takes."""

    tokens: int
    lines: int  # columns of the weight for one of the cases below
    dtype: torch.dtype
    backend: str | None  # whose plans weigh all costs; None: that which serves the device


_SCALES = {
    "cpu": _Scale(2048, 1, torch.float32, None),
    # Strips of a panel are computed by 64 at a time. Torch's own operators weigh two costs alone.
    "cuda": _Scale(8192, 8, torch.bfloat16, "triton"),
}

# What makes a plan gather all entries, and what makes it put all into tiles or into columns.
_GATHER = Costs(panel=1, read=1, tile=1, gather=1e-12, pack=1e-12, call=1)
_TILES = Costs(panel=1, read=1, tile=1e-15, gather=1, pack=1e-12, call=1)
_COLUMNS = Costs(panel=1e-15, read=1e-15, tile=1, gather=1, pack=1e-12, call=1e-15)


def calibrate(device: torch.device | str = "cpu", rounds: int = ROUNDS) -> Costs:
    """Measure the costs on `device` with the threads that torch uses now; some seconds.

    Raises:
        BackendError: no backend serves the device; on a GPU, Triton is missing.
    """
    device = torch.device(device)
    if device.type == "cuda" and (reason := _triton.missing()) is not None:
        raise BackendError(
            f"on a GPU only Triton's kernels have costs that are measured, and they cannot run: "
            f"{reason}"
        )
    scale = _SCALES.get(device.type, _SCALES["cpu"])
    tokens, wide = scale.tokens, scale.lines

    def case(rows: int, cols: int, costs: Costs) -> Callable[[], Tensor]:
        return _case(_grid(rows, cols), costs, device, scale)

    cases = {
        "few entries": case(512, 8, _GATHER),
        "many entries": case(512, 64, _GATHER),
        "few rows": case(256, 16, _GATHER),
        "many rows": case(1024, 4, _GATHER),
        "few tiles": case(512, 16, _TILES),
        "many tiles": case(512, 64, _TILES),
        "thin panel": case(1024, 8 * wide, _COLUMNS),
        "wide panel": case(1024, 64 * wide, _COLUMNS),
        "short panel": case(256, 8 * wide, _COLUMNS),
    }
    seconds = _alternate(cases, device, rounds)

    def slope(more: str, less: str, units: int) -> float:
        return (seconds[more] - seconds[less]) / (units * tokens)

    panel = slope("wide panel", "thin panel", 1024 * 56 * wide)
    read = slope("thin panel", "short panel", 768) - 8 * wide * panel
    found = {
        "panel": panel,
        "read": read,
        "tile": slope("many tiles", "few tiles", 512 * 48),
        "gather": slope("many entries", "few entries", 512 * 56),
        "pack": slope("many rows", "few rows", 768),
        "call": seconds["short panel"] - 256 * tokens * (read + 8 * wide * panel),
    }
    default = DEFAULTS.get(device.type, DEFAULTS["cpu"])
    kept: dict[str, Any] = {name: value for name, value in found.items() if value > 0}
    if device.type == "cuda":
        kept["fused_tokens"] = crossover(ways_at(device, rounds))
    return replace(default, **kept)


def crossover(seconds: Mapping[int, Mapping[str, float]]) -> int:
    """The most tokens up to which reading W once is the faster way at every number measured; half
    of the fewest where it is at none, because there W is all that is read.

    Args:
        seconds: tokens -> way -> seconds.
    """
    fused = min(seconds) // 2
    for tokens, ways in sorted(seconds.items()):
        if ways["W read once"] > ways["W + D written"]:
            break
        fused = tokens
    return fused


def ways_at(device: torch.device, rounds: int) -> dict[int, dict[str, float]]:
    """Tokens -> way -> seconds of Triton's `sparse_delta_matmul`, 4096 x 4096 in bf16, 0.5 %: of
    the device alone, because launching takes the host longer than either product takes the device.
    """
    from .bench.gpu.device import Device

    clock = Device(str(device))
    pattern = realistic_pattern((4096, 4096), 0.005).to(device)
    weight = clock.randn(*pattern.shape)
    values = clock.randn(pattern.nnz, dtype=torch.float32)
    seconds = {}
    for tokens in CROSSOVER_TOKENS:
        ways = triton_ways(clock.randn(tokens, pattern.shape[1]), weight, values, pattern)
        for way in ways.values():
            way()  # compiles
        spent: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, way in ways.items():
                read = clock.timed(way, LEAD)
                clock.synchronize()
                spent[name].append(read().device)
        seconds[tokens] = {name: statistics.median(some) for name, some in spent.items()}
    return seconds


def _grid(rows: int, cols: int) -> SparsePattern:
    """All entries of the first `cols` columns of a `rows` x 1024 weight."""
    mask = torch.zeros(rows, 1024, dtype=torch.bool)
    mask[:, :cols] = True
    return SparsePattern.from_mask(mask)


def _case(
    pattern: SparsePattern, costs: Costs, device: torch.device, scale: _Scale
) -> Callable[[], Tensor]:
    plan = SparsityPlan.build(pattern, device, scale.tokens, costs=costs)

    def operand(size: int) -> Tensor:
        return torch.randn(scale.tokens, size, device=device).to(scale.dtype)

    dy, kept = operand(pattern.shape[0]), ops.keep_columns(operand(pattern.shape[1]), plan)
    out = torch.empty(pattern.nnz, device=device)
    return lambda: ops.sampled_grad(
        dy, kept, plan.pattern, plan=plan, packed=True, out=out, backend=scale.backend
    )


def _alternate(
    cases: dict[str, Callable[[], Tensor]], device: torch.device, rounds: int
) -> dict[str, float]:
    other = torch.zeros(FLUSH_BYTES // 4, device=device)
    spent: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            other.sum()
            _wait(device)
            start = time.perf_counter()
            case()
            _wait(device)
            spent[name].append(time.perf_counter() - start)
    return {name: min(some) for name, some in spent.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
